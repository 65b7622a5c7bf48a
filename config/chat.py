"""An assistant from scratch: sums, words to reverse, lists to sort, facts and names to look up, over several turns.

    make chat

2 CPU cores, about 5 minutes. It learns only the assistant's turns, in conversations that nib/data/questions.py
generates. bench/chat.py counts the correct answers to held-out questions; sample.py chat --chat talks to the model.
"""

dataset = "questions"  # generated and prepared if it is missing: bytes, and special tokens for the turns
block_size = 256
batch_size = 8  # conversations, of 5 questions on average

n_layer = 4
n_head = 4
n_embd = 128
mlp_hidden = 256
norm = "rmsnorm"
position = "rope"
rope_base = 100.0  # wavelengths of up to some hundred characters
mlp = "swiglu"
qk_norm = True
tie_weights = False

optimizer = "muon"
learning_rate = 3e-3
muon_learning_rate = 0.03
muon_momentum = 0.9
weight_decay = 0.1
max_iters = 2500
warmup_iters = 10
schedule = "linear"

eval_interval = 0
checkpoint_interval = 0
