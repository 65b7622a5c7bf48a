"""The part of bench/gpu.py that measures decoding, relative to the memory bandwidth: a token reads all weights."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from common import GPT2
from decode import Numbers, prompt_of
from gpu_training import MODERN, TINY, case, clock
from torch import nn

from model import GPT, GPTConfig
from nib.common.device import pick_device
from nib.generation.cuda_graph import CompiledRows
from nib.generation.engine import Rows, stream_text
from nib.generation.request import Sample, SamplingSettings


class BiasApart(nn.Linear):
    """A linear layer that adds its bias separately: only then does the compiler fuse it into one kernel for one row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.mT + self.bias


def bias_apart(model: GPT) -> None:
    for module in model.modules():
        if type(module) is nn.Linear and module.bias is not None:
            module.__class__ = BiasApart


def decoding(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens per second at 124 M, one stream and many, plain and compiled, also as a share of the memory bandwidth."""
    device = pick_device(options.device)
    cuda, tokens = device.type == "cuda", 256 if options.device == "cuda" else 4
    less = {} if cuda else TINY | dict(vocab_size=50257)
    if not cuda:
        CompiledRows.compiling = dict(backend="aot_eager")
    memory = torch.ones(2**30 if cuda else 2**20, device=device)
    speed = memory.nbytes / clock(memory.sum, device)
    del memory
    yield dict(read_gigabytes_per_second=speed / 1e9)

    def model_of(shape: dict[str, Any]) -> GPT:
        torch.manual_seed(0)
        with device:
            model = GPT(GPTConfig(**(shape | less))).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return model

    def written(model: GPT, streams: int, make_rows: type[Rows]) -> dict[str, Any]:
        rates = []
        for _ in range(3):  # the first compiles
            settings = SamplingSettings(max_new_tokens=tokens)
            samples = [Sample("", row, 0, prompt_of(32), Numbers(), settings) for row in range(streams)]
            for _ in stream_text(model, samples, settings, make_rows):
                pass
            rates.append(samples[0].tokens_per_second or 0.0)
        size = sum(p.nbytes for name, p in model.named_parameters() if name != "wpe.weight")
        share = statistics.median(rates[1:]) / streams * size / speed
        return dict(tokens_per_second=statistics.median(rates[1:]), streams=streams, share_of_bandwidth=share)

    gpt2, modern = model_of(GPT2), model_of(MODERN | dict(vocab_size=50257))
    apart = model_of(GPT2)
    bias_apart(apart)
    plan: list[tuple[str, GPT, int, type[Rows]]] = [
        ("gpt2, plain", gpt2, 1, Rows), ("gpt2, compiled", gpt2, 1, CompiledRows),
        ("modern, plain", modern, 1, Rows), ("modern, compiled", modern, 1, CompiledRows),
        ("gpt2, compiled, bias apart", apart, 1, CompiledRows),
        ("gpt2, plain", gpt2, 8, Rows), ("gpt2, plain", gpt2, 64, Rows),
        ("gpt2, compiled", gpt2, 8, CompiledRows), ("gpt2, compiled", gpt2, 64, CompiledRows),
    ]  # fmt: skip
    for name, model, streams, make_rows in plan[: 4 if options.quick and cuda else None]:
        yield from case(name, functools.partial(written, model, streams, make_rows), 15 if make_rows is Rows else 25)
    yield from case("transformers' generate", lambda: transformers_rate(device, less, tokens), 10)


def transformers_rate(device: torch.device, less: dict[str, Any], tokens: int) -> dict[str, Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2 | less
    config = GPT2Config(n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"], bos_token_id=0)
    model = GPT2LMHeadModel(config).to(device, torch.bfloat16).eval()
    prompt = torch.tensor([prompt_of(32)], device=device)

    def write(count: int) -> float:
        options: dict[str, Any] = dict(min_new_tokens=count, max_new_tokens=count, do_sample=True, pad_token_id=0)
        return clock(lambda: model.generate(prompt, **options), device, 2)

    return dict(tokens_per_second=(tokens - 1) / max(1e-9, write(tokens) - write(1)), streams=1)
