"""Text to token ids and back without loss: bytes, characters, BPE by tiktoken, tokenizers of Hugging Face.

Start with tokenizer.py; load.py finds one by its name or file, huggingface.py reads and writes tokenizer.json.
"""
