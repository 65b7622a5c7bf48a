"""Shared by the bench scripts: options, runs without a dataset, nanoGPT, alternating measurements, the JSON line.

Importing it puts the checkout on the path, and does not import torch: some scripts choose the number of threads first.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from nib.training.report import Reporter
    from nib.training.run import Run
    from nib.training.settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# GPT-2 of 124 M parameters, for model.GPTConfig.
GPT2 = dict(
    vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768, bias=True, norm="layernorm",
    position="learned", mlp="gelu_tanh", qk_norm=False, init="gpt2",
)  # fmt: skip


def parser_for(text: str | None, nanogpt: bool = False, rounds: int = 0, check: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that many scripts have; `rounds` is the default of --rounds, 0: no such option."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if nanogpt:
        parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of karpathy/nanoGPT")
    if rounds:
        how = "measurements of each program; medians are reported"
        parser.add_argument("--rounds", type=int, default=rounds, help=how)
    if check:
        parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed")
    return parser


def timed(command: list[str], cwd: str | Path = ROOT) -> tuple[float, str]:
    """Run a script in Python. Returns the seconds of the whole process, and its output; exits if it failed."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return time.perf_counter() - began, done.stdout


def resident(kind: str) -> int:
    """The resident bytes of this process, now (VmRSS) or at their peak (VmHWM)."""
    (found,) = re.findall(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found)


def make_run(settings: TrainSettings, shape: dict[str, Any], report: Reporter | None = None) -> Run:
    """A run of language modelling without a dataset, for `optimizer_step`; processes are connected as by torchrun."""
    from model import GPT, GPTConfig
    from nib.cpu.process import tune_for_training
    from nib.training.distributed import start_cluster
    from nib.training.objective import LanguageModelling
    from nib.training.report import Reporter
    from nib.training.run import Run

    cluster = start_cluster(settings.device)
    tune_for_training(cluster.device)
    no_dataset: Any = None
    run = Run(settings, no_dataset, cluster)
    run.report, run.objective = report or Reporter(Path(), active=False), LanguageModelling(settings, None)
    with cluster.device:
        model = GPT(GPTConfig(**shape))
    run.take(model)
    return run


def micro_batches(
    vocabulary: int, sequences: int, context: int, size: int, pin: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """A batch of random tokens, always the same ones: inputs and targets of each micro-batch of `size` sequences."""
    import torch

    tokens = torch.randint(vocabulary, (sequences, context + 1), generator=torch.Generator().manual_seed(1))
    batch = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in tokens.split(size)]
    return [(inputs.pin_memory(), targets.pin_memory()) for inputs, targets in batch] if pin else batch


def load_nanogpt(clone: Path) -> ModuleType:
    """nanoGPT's model.py as the module nanogpt_model, since nib has a model.py too."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", clone / "model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def nanogpt_step(
    clone: Path, shape: dict[str, Any], sequences: int, micro: int, device: str = "cpu"
) -> Callable[[], None]:
    """A function that takes one step as nanoGPT's loop does; on CUDA compiled and in bfloat16."""
    import torch

    module, cuda = load_nanogpt(clone), device == "cuda"
    names = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    config = module.GPTConfig(**{name: shape[name] for name in names}, dropout=0.0, bias=True)
    model = module.GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    ready = torch.compile(model) if cuda else model
    context = torch.autocast(device, dtype=torch.bfloat16) if cuda else contextlib.nullcontext()
    batch = micro_batches(config.vocab_size, sequences, config.block_size, micro, pin=cuda)

    def step() -> None:
        for inputs, targets in batch:
            with context:
                _, loss = ready(inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True))
                loss = loss / len(batch)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def serve(pipe: Any, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    turn = make(*arguments)
    while pipe.recv() == "turn":
        pipe.send(turn())


@contextlib.contextmanager
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


def finish(result: dict[str, Any], met: bool = True, check: bool = False) -> None:
    """Print the JSON line; with `check`, exit with status 1 if the target was missed."""
    import torch

    machine = dict(cpus=os.cpu_count(), threads=torch.get_num_threads(), machine=platform.machine())
    print(json.dumps({**result, "met": met, **machine, "torch": torch.__version__}))
    sys.exit(1 if check and not met else 0)
