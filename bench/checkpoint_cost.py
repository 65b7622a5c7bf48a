"""The cost of a checkpoint: how long saving blocks training, compared with copying the same state.

    python bench/checkpoint_cost.py

A GPT-2-shaped model of 124 M parameters with AdamW's state is saved by nib's own code. The time that the call blocks is
compared with a plain copy of the same tensors, in alternation. Prints a table and one JSON line last.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import GPT2, finish, parser_for

from model import GPT, GPTConfig
from nib.tokenizer.load import make_tokenizer
from nib.training.optimizer import make_optimizers
from nib.training.saving import Saver
from nib.training.state import optimizer_tensors, parameter_names, snapshot

TARGET = 1.5  # times the seconds of the copy


def main() -> None:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    model = GPT(GPTConfig(**GPT2 | {"n_layer": arguments.layers}))
    optimizers = make_optimizers(
        model, kind="adamw", learning_rate=1e-4, muon_learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95)
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers[0].step()
    model.zero_grad()
    tensors = {**model.state_dict(), **optimizer_tensors(optimizers, parameter_names(model))}
    size = sum(tensor.nbytes for tensor in tensors.values())
    copies, blocks, writes = [], [], []
    with tempfile.TemporaryDirectory() as name:
        saver = Saver(Path(name), keep=1, tokenizer=make_tokenizer("byte"))
        for step in range(arguments.rounds):
            began = time.perf_counter()
            copy = {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
            copies.append(time.perf_counter() - began)
            del copy
            began = time.perf_counter()
            weights, state = snapshot(model, optimizers)
            saver.save(weights, state, {"step": step, "model_config": {}}, best=False)
            blocks.append(time.perf_counter() - began)
            began = time.perf_counter()
            saver.finish()
            writes.append(time.perf_counter() - began)
            del weights, state
    copied, blocked, written = map(statistics.median, (copies, blocks, writes))
    ratio = blocked / copied
    print(f"state {size / 1e9:.2f} GB, medians of {arguments.rounds} rounds")
    print(f"copy of the state      {copied:6.2f} s")
    print(f"saving blocks for      {blocked:6.2f} s   ratio {ratio:.2f}")
    print(f"writing, in background {written:6.2f} s   (sha256 and fsync included)")
    result = dict(bytes=size, copy=copied, blocked=blocked, written=written, ratio=ratio)
    finish(result, ratio <= TARGET, arguments.check)


if __name__ == "__main__":
    main()
