"""The recommended config at GPT-2's size: RoPE, RMSNorm, QK-norm, SwiGLU, trained with Muon on FineWeb-Edu.

One or more GPUs: torchrun --standalone --nproc_per_node=8 train.py config/modern_124m.py
10 billion tokens. No complete run with nib yet, so its loss is not known. Its options are those of Qwen3,
an architecture that transformers, vLLM and llama.cpp run.
"""

dataset = "fineweb-edu"
block_size = 1024
batch_size = 512  # 524,288 tokens a step

n_layer = 12
n_head = 6  # heads of 128 channels
n_embd = 768
norm = "rmsnorm"
position = "rope"
mlp = "swiglu"
qk_norm = True

optimizer = "muon"
learning_rate = 3e-3
muon_learning_rate = 0.02
weight_decay = 0.1
max_tokens = 10_000_000_000
max_iters = 0
warmup_iters = 250
schedule = "wsd"
decay_fraction = 0.3948  # the last 7,530 of 19,074 steps

eval_interval = 250
eval_tokens = 1_000_000
checkpoint_interval = 1000
