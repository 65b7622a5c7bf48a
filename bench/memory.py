"""Peak resident memory of training GPT-2 (124 M), 4 x 1024 tokens per step, on a CPU: nib and nanoGPT.

    python bench/memory.py --nanogpt PATH_TO_CLONE [--size 124m]

Each trains a few steps in its own process, which then reads its peak (VmHWM), including imports. nanoGPT runs as it is,
and with gradient accumulation over single sequences. Prints a table and one JSON line last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import finish, nanogpt_step, parser_for, resident, sides
from throughput import SIZES, nib_step, shape_of

TARGET, SEQUENCES, STEPS = 0.4, 4, 2  # the target is for bfloat16


def make(maker: Callable[..., Callable[[], None]], size: str, *arguments: Any) -> Callable[[], tuple[float, int]]:
    SIZES[size] = (*SIZES[size][:5], SEQUENCES, 1)
    step = maker(*arguments)

    def turn() -> tuple[float, int]:
        """Seconds of the last step, and the peak resident bytes."""
        for _ in range(STEPS):
            began = time.perf_counter()
            step()
        return time.perf_counter() - began, resident("VmHWM")

    return turn


def main() -> None:
    parser = parser_for(__doc__, nanogpt=True)
    parser.add_argument("--size", choices=SIZES, default="124m")
    arguments = parser.parse_args()
    size, found = arguments.size, {}
    theirs = (arguments.nanogpt.resolve(), shape_of(size), SEQUENCES)
    rows: dict[str, tuple[Any, ...]] = {
        "nib": (nib_step, size, "float32"),
        "nib, bfloat16": (nib_step, size, "bfloat16"),
        "nanogpt": (nanogpt_step, *theirs, SEQUENCES),
        "nanogpt, accumulating": (nanogpt_step, *theirs, 1),
    }
    print(f"{'':24}{'peak, MB':>10}{'seconds a step':>18}", flush=True)
    for name, (maker, *rest) in rows.items():
        with sides(side=(make, maker, size, *rest)) as turns:
            seconds, found[name] = turns["side"]()
        print(f"{name:24}{found[name] / 1e6:10,.0f}{seconds:18.2f}", flush=True)
    ratios = {name: found[name] / found["nanogpt"] for name in ("nib", "nib, bfloat16")}
    print(*(f"{name}: {ratio:.2f} of nanoGPT's" for name, ratio in ratios.items()), sep="\n")
    finish(dict(ratios=ratios, peak=found), ratios["nib, bfloat16"] <= TARGET, arguments.check)


if __name__ == "__main__":
    main()
