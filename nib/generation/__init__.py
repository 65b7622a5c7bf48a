"""Text from a model: requests, the batched engine with its cache, sampling filters, CUDA graphs, scoring.

Start with engine.py; sampling.py turns logits into the next token.
"""
