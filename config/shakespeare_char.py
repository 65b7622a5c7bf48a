"""nanoGPT's CPU example with the same settings: tiny Shakespeare, one token per character, 0.80 M parameters.

2 CPU cores, about 70 seconds, to a loss of 1.90 on the whole validation split, the same as nanoGPT. nanoGPT's GPU
example (loss 1.47 by its README) is the same text with --n_layer=6 --n_head=6 --n_embd=384 --block_size=256
--batch_size=64 --dropout=0.2 --max_iters=5000.
"""

dataset = "shakespeare_char"
block_size = 64
batch_size = 12

n_layer = 4
n_head = 4
n_embd = 128
norm = "layernorm"
init = "gpt2"
position = "learned"
mlp = "gelu"
qk_norm = False

optimizer = "adamw"
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
weight_decay = 0.1
max_iters = 2000
warmup_iters = 100
schedule = "cosine"

eval_interval = 500
checkpoint_interval = 500
