"""The code that the scripts share, in packages without circular imports. Imports neither the scripts nor model.py."""
