"""A character-level model that reaches a good loss in seconds: nanoGPT's CPU example in a tenth of its time.

    python prepare_data.py input.txt --out data/mytext --tokenizer char --val-fraction 0.1
    python train.py config/char_fast.py --dataset=mytext --max_seconds=60

--dataset takes any character-level dataset, --max_seconds any budget: the learning rate falls to zero over that time.
On a CPU with instructions for bfloat16, --dtype=bfloat16 runs a third more steps in the same time.
0.29 M parameters, context 64. bench/NOTES.md says what was tried.
"""

dataset = "stdlib_char"
block_size = 64
batch_size = 24

n_layer = 3
n_head = 4
n_embd = 96
mlp_hidden = 192
norm = "rmsnorm"
position = "rope"
rope_base = 100.0  # wavelengths for a context of 64, not of thousands
mlp = "swiglu"
qk_norm = True
tie_weights = False

optimizer = "muon"
learning_rate = 0.015
muon_learning_rate = 0.025
muon_momentum = 0.9
weight_decay = 0.1
max_iters = 0
max_seconds = 60
warmup_iters = 5
schedule = "linear"

eval_interval = 0
checkpoint_interval = 0
