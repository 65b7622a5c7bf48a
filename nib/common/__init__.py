"""Basics that all other packages use: options, exits, standard streams, files, signals, devices, the model hub.

Imports nothing else of nib. Start with options.py (one dataclass makes parser, checks and --help) and exits.py.
"""
