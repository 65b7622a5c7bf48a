"""What the scripts share, in packages that import one way; see their docstrings. Imports no script and no model.py."""
