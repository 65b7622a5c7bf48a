"""Shared by the bench scripts: nanoGPT's model file, alternating measurements in separate processes, the JSON line."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

# GPT-2 of 124 M parameters, for model.GPTConfig.
GPT2 = dict(
    vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True, norm="layernorm",
    position="learned", mlp="gelu_tanh", qk_norm=False, init="gpt2",
)  # fmt: skip


def parser_for(text: str, peer: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that most scripts have."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if peer:
        parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each program; medians are reported")
    parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed")
    return parser


def load_nanogpt(clone: Path) -> ModuleType:
    """nanoGPT's model.py as the module nanogpt_model, since nib has a model.py too."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def serve(pipe: Any, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    turn = make(*arguments)
    while pipe.recv() == "turn":
        pipe.send(turn())


@contextmanager
def sides(**makers: tuple[Any, ...]) -> Iterator[dict[str, Callable[[], Any]]]:
    """Start a process for each program to compare; yields, by name, functions that run one measurement there.

    Each is given as a function and its arguments. Called in its process, the function returns the one that measures.
    So the settings of one (allocator, threads) do not affect the others.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, (make, *arguments) in makers.items():
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(theirs, make, tuple(arguments)), daemon=True))
        processes[-1].start()
        theirs.close()

    def turn_of(pipe: Any) -> Any:
        pipe.send("turn")
        return pipe.recv()

    try:
        yield {name: lambda pipe=pipe: turn_of(pipe) for name, pipe in pipes.items()}
    finally:
        for pipe in pipes.values():
            pipe.send("end")
        for process in processes:
            process.join()


def alternate(turns: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """The median of each program's results over `rounds` rounds, in each of which every program runs once."""
    figures: dict[str, list[float]] = {name: [] for name in turns}
    for turn in turns.values():
        turn()  # warm up
    for _ in range(rounds):
        for name, turn in turns.items():
            figures[name].append(turn())
    return {name: statistics.median(found) for name, found in figures.items()}


def finish(result: dict[str, Any], met: bool, check: bool) -> None:
    """Print the JSON line; with `check`, exit with status 1 if the target was missed."""
    machine = dict(cpus=os.cpu_count(), threads=torch.get_num_threads(), machine=platform.machine())
    print(json.dumps({**result, "met": met, **machine, "torch": torch.__version__}))
    sys.exit(1 if check and not met else 0)
