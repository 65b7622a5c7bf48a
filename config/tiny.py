"""A character-level model of 0.1 M parameters on Python's standard library, for quick experiments.

2 CPU cores, about 10 seconds including preparing the text, to 2.74 bits per byte on the first 20,000 validation tokens.
It has only learned which characters follow which.
"""

dataset = "stdlib_char"
block_size = 64
batch_size = 16

n_layer = 2
n_head = 2
n_embd = 64

learning_rate = 3e-3
max_iters = 200
warmup_iters = 10
schedule = "linear"

eval_interval = 100
eval_tokens = 20_000
checkpoint_interval = 100
