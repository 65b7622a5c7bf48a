"""How a training step scales with the number of processes, the context length and the width.

    python bench/scaling.py [--rounds 3]

First two processes of one thread each, connected as by torchrun, relative to one process of one thread with the same
global batch; the target of 1.8 times as fast includes the exchange of gradients. Then the time and GFLOP/s of a step
by context and by width, on one thread; a cost that grows faster than the FLOPs would lower the GFLOP/s.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from typing import Any

import torch
from common import GPT2, ROOT, alternate, finish, make_run, micro_batches, parser_for

TARGET = 1.8
CONTEXTS, WIDTHS = (64, 256, 1024, 2048, 4096, 8192), (64, 128, 256, 512, 768)


def make_step(layers: int, width: int, context: int, batch: int) -> tuple[Any, Any]:
    """A function that takes one optimizer step on this process's share of `batch` sequences, and the model."""
    from nib.training.settings import TrainSettings
    from nib.training.step import optimizer_step

    settings = TrainSettings(batch_size=batch, block_size=context, device="cpu", dtype="float32", optimizer="adamw")
    torch.manual_seed(1)
    shape = dict(n_layer=layers, n_head=width // 64, n_embd=width, block_size=context, vocab_size=512)
    run = make_run(settings, GPT2 | shape)
    parts = micro_batches(512, batch // run.cluster.world, context, run.micro_batch_size)
    return lambda: optimizer_step(run, parts), run.model


def process(steps: int, *shape: int) -> None:
    """One of the processes: for each line of standard input, takes `steps` steps and prints the seconds of one."""
    step, _ = make_step(*shape)
    step()
    for _ in sys.stdin:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        print((time.perf_counter() - began) / steps, flush=True)
    os._exit(0)


class Group:
    """`world` processes of one thread each that find each other as by torchrun; each runs a script with `numbers`."""

    def __init__(self, world: int, numbers: list[int], script: str = __file__) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        common = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, script, "--process", *map(str, numbers)]
        self.processes = [
            subprocess.Popen(
                command, env={**common, "RANK": str(rank), "WORLD_SIZE": str(world)}, cwd=ROOT,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(world)
        ]  # fmt: skip

    def turn(self) -> float:
        for each in self.processes:
            print("turn", file=each.stdin, flush=True)
        return max(float(each.stdout.readline()) for each in self.processes if each.stdout)

    def end(self) -> None:
        for each in self.processes:
            each.communicate()


def growth(values: tuple[int, ...], by: str, rounds: int) -> list[tuple[int, float, float]]:
    """Seconds and GFLOP/s of a step of 2 layers, by context length (width 128) or by width (context 256)."""
    from nib.training.cost import flops_per_token

    rows = []
    print(f"\n{by:>10}{'ms a step':>12}{'GFLOP/s':>10}")
    for value in values:
        width, context = (128, value) if by == "context" else (value, 256)
        batch = max(1, 2048 // context)
        step, model = make_step(2, width, context, batch)
        seconds = alternate({"step": lambda step=step: timed(step)}, rounds)["step"]
        rows.append((value, seconds, batch * context * flops_per_token(model, context) / seconds / 1e9))
        print(f"{value:10}{1000 * seconds:12.1f}{rows[-1][2]:10.1f}", flush=True)
    return rows


def timed(step: Any) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def main() -> None:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--process", type=int, nargs=5, help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.process:
        process(*arguments.process)
    numbers = [2, 6, 384, 256, 16]  # steps, layers, width, context, sequences over all processes: 10 M parameters
    groups = {"one": Group(1, numbers), "two": Group(2, numbers)}
    found = alternate({name: group.turn for name, group in groups.items()}, arguments.rounds)
    for group in groups.values():
        group.end()
    ratio = found["one"] / found["two"]
    print(f"one process {found['one']:.3f} s a step, two {found['two']:.3f} s: {ratio:.2f} times as fast")
    torch.set_num_threads(1)
    tables = {by: growth(values, by, arguments.rounds) for by, values in (("context", CONTEXTS), ("width", WIDTHS))}
    finish(dict(ratio=ratio, seconds=found, **tables), ratio >= TARGET, arguments.check)


if __name__ == "__main__":
    main()
