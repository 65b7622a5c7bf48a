"""Tiny models with large random weights, for the tests of model.py."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from model import GPT, GPTConfig

torch.set_num_threads(1)
# The options of GPT-2, and its sizes.
GPT2 = dict(
    bias=True, norm="layernorm", position="learned", mlp="gelu_tanh", qk_norm=False, init="gpt2"
)  # fmt: skip
GPT2_124M = GPT2 | dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
KINDS = get_type_hints(GPTConfig)
POSITIONS, MLPS = get_args(KINDS["position"]), get_args(KINDS["mlp"])


def tiny(**changes: Any) -> GPTConfig:
    settings: dict[str, Any] = GPT2 | dict(vocab_size=40, block_size=24, n_layer=2, n_head=4, n_embd=32)
    return GPTConfig(**{**settings, **changes})


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights so large that no part of the network can be left out, or two of its parts swapped, unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        is_gain = parameter.ndim == 1 and name.endswith("weight")
        parameter.copy_(1 + 0.3 * drawn if is_gain else 0.3 * drawn)


def random_model(**changes: Any) -> GPT:
    model = GPT(tiny(**changes))
    randomise(model)
    return model.eval()


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 40) -> Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# The options of Llama.
LLAMA = dict(norm="rmsnorm", position="rope", mlp="swiglu", bias=False, tie_weights=False)
