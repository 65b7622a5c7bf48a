"""Compare the memory that `train.py --dry-run` predicts with what training takes: three sizes, float32, CPU.

    python bench/account.py [--size small --size 10m --size 124m]

Each size trains a few steps in its own process. The growth of its resident memory, from before the model is made to the
high-water mark, is compared with the predicted peak. Prints a table and one JSON line last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import GPT2, finish, parser_for, resident, sides

# The options of GPTConfig and of TrainSettings
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": (
        dict(vocab_size=2048, block_size=256, n_layer=4, n_head=4, n_embd=128),
        dict(batch_size=4, optimizer="muon"),
    ),
    "10m": (
        GPT2 | dict(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384),
        dict(batch_size=8, optimizer="adamw"),
    ),
    "124m": (GPT2 | dict(block_size=512), dict(batch_size=1, optimizer="adamw")),
}
TARGET = 0.15  # largest relative error of the prediction


def arguments_of(size: str) -> tuple[Any, ...]:
    from model import GPT, GPTConfig
    from nib.training.distributed import Cluster
    from nib.training.settings import TrainSettings

    shape, options = SIZES[size]
    options = dict(block_size=shape["block_size"]) | options
    settings, cluster = TrainSettings(**options), Cluster(0, 1, torch.device("cpu"))
    micro = settings.micro_batch_size or settings.batch_size
    return lambda: GPT(GPTConfig(**shape)), settings, cluster, micro


def measured(size: str) -> Callable[[], int]:
    from nib.cpu.process import tune_for_training
    from nib.training import account

    tune_for_training(torch.device("cpu"))
    account.TRIAL_SECONDS = 0.0
    SIZES["first"] = (SIZES["small"][0] | dict(block_size=16), SIZES[size][1])
    account.timed_steps(*arguments_of("first"))  # loads the libraries that a first step loads

    def turn() -> int:
        before = resident("VmRSS")
        account.timed_steps(*arguments_of(size))
        return resident("VmHWM") - before

    return turn


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--size", action="append", choices=SIZES, help="may be given several times; default: all")
    arguments = parser.parse_args()
    from nib.training.account import memory_of_step

    found, off = {}, 0.0
    print(f"{'size':8}{'predicted, MB':>14}{'measured':>12}{'ratio':>8}", flush=True)
    for size in arguments.size or list(SIZES):
        said = memory_of_step(*arguments_of(size))["peak"]
        with sides(side=(measured, size)) as turns:
            took = turns["side"]()
        found[size], off = {"account": said, "measured": took}, max(off, abs(said / took - 1))
        print(f"{size:8}{said / 1e6:14,.1f}{took / 1e6:12,.1f}{said / took:8.3f}", flush=True)
    finish(dict(peak=found, off=off), off <= TARGET, arguments.check)


if __name__ == "__main__":
    main()
