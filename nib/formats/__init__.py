"""Where weights come from and go to: nib's checkpoints, Hugging Face directories, GGUF, nanoGPT.

Start with load.py, which opens any of them, and checkpoint.py; architectures.py maps names to Hugging Face's.
"""
