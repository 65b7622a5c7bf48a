"""GPT-2 (124 M parameters), trained from scratch on OpenWebText with nanoGPT's settings.

8 A100 GPUs of 40 GB: torchrun --standalone --nproc_per_node=8 train.py config/gpt2_124m.py
nanoGPT's README reports about 4 days to a validation loss of about 2.85 there. No complete run with nib yet.
"""

dataset = "openwebtext"
block_size = 1024
batch_size = 480  # 491,520 tokens a step

n_layer = 12
n_head = 12
n_embd = 768
norm = "layernorm"
init = "gpt2"
position = "learned"
mlp = "gelu"
qk_norm = False

optimizer = "adamw"
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
max_iters = 600_000
warmup_iters = 2000
schedule = "cosine"

eval_interval = 1000
eval_tokens = 1_000_000
checkpoint_interval = 1000
