"""The ground that everything stands on: options, exit statuses, standard streams, signals, devices, the model hub.

Imports nothing else of nib. Start with options.py (one dataclass makes parser, checks and --help) and exits.py.
"""
