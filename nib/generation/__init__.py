"""Generate and score text: requests, the batched engine with its KV cache, sampling filters, CUDA graphs, scoring.

Start with engine.py; sampling.py turns logits into the next token.
"""
