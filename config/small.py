"""The main job: a small model of Python's own standard library."""

dataset = "stdlib"
block_size = 256
batch_size = 16

n_layer = 4
n_head = 4
n_embd = 128
