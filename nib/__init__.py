"""What nib's scripts share. Nothing here imports the scripts or model.py."""
