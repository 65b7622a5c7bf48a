"""The main example: a model of 1.1 M parameters on the source code of Python's standard library.

2 CPU cores, about 3 minutes, to 3.26 nats per token, 1.43 bits per byte, on files it has not seen. bench/NOTES.md
explains its options. They are those of the architecture Qwen3, which other tools run.
"""

dataset = "stdlib"  # prepared if it is missing: 2048 byte-pair tokens, 3 bytes each on average
block_size = 256
batch_size = 4

n_layer = 4
n_head = 4
n_embd = 128
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"
qk_norm = True

optimizer = "muon"
learning_rate = 3e-3
muon_learning_rate = 0.03
muon_momentum = 0.9
weight_decay = 0.1
max_iters = 2400
warmup_iters = 20
schedule = "linear"

eval_interval = 1200
checkpoint_interval = 600
