"""Text to token ids and back without loss: bytes, characters, BPE run by tiktoken, Hugging Face tokenizers.

Start with tokenizer.py. load.py opens one by name or file; huggingface.py reads and writes tokenizer.json.
"""
