"""A dataclass with an option of every kind, read from the command line or refused, for the tests of options."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from nib.common.exits import InputError
from nib.common.options import Parsed, option, parse

quick = settings(max_examples=100, deadline=None, database=None, derandomize=True)


@dataclasses.dataclass
class Options:
    n_layer: int = option(6, "blocks", at_least=1)
    learning_rate: float = option(1e-3, "peak", above=0, group="more")
    seed: int = option(7, "of all draws", at_least=0, below=2**31, group="more")
    dropout: float = option(0.0, "share", at_least=0, at_most=1, group="more")
    bias: bool = option(True, "biases", group="more")
    eval_only: bool = option(False, "no training", group="more")
    compile: str = option("auto", "torch.compile", choices=("auto", "true", "false"), group="more")
    norm: str = option("rmsnorm", "which", choices=("layernorm", "rmsnorm"), group="more")
    out_dir: str = option("", "where", group="more")
    stop: list[str] = option([], "texts", group="more")


def read(*argv: str, config_file: bool = False, max_arguments: int | None = None) -> Parsed[Options]:
    return parse(
        Options, list(argv), usage="python x.py", about="About.", config_file=config_file, max_arguments=max_arguments
    )


def refused(*argv: str, **how: Any) -> str:
    with pytest.raises(InputError) as found:
        read(*argv, **how)
    message = str(found.value)
    assert "\n" not in message and message.strip()
    assert len(message) < 400
    return message


NAMES = st.sampled_from([field.name for field in dataclasses.fields(Options)])


def sound(found: Options) -> None:
    """The settings have the types and keep the limits that their fields state."""
    assert type(found.n_layer) is int and found.n_layer >= 1
    assert type(found.learning_rate) is float and 0 < found.learning_rate < math.inf
    assert type(found.seed) is int and 0 <= found.seed < 2**31
    assert type(found.dropout) is float and 0 <= found.dropout <= 1
    assert type(found.bias) is type(found.eval_only) is bool
    assert found.compile in ("auto", "true", "false") and found.norm in ("layernorm", "rmsnorm")
    assert type(found.out_dir) is str and all(type(text) is str for text in found.stop)
