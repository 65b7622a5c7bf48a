"""Fast sampling and training on CPUs: C kernels compiled on first use, 8-bit weights, oneDNN matmul.

Start with linear.py (float32) and int8.py, then fused_blocks.py, which runs all blocks of a model in one C call.
"""
