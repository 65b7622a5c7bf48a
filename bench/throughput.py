"""Training tokens per second of nib and of nanoGPT on the same GPT-2-shaped model and batch.

    python bench/throughput.py --nanogpt PATH_TO_CLONE [--size tiny --size small --size 124m]
    python bench/throughput.py --nanogpt PATH_TO_CLONE --dtype=bfloat16 [--size 27m --size 87m --size 124m-4]

Eager, AdamW, gradient clipping. nib runs train.py's `optimizer_step`; nanoGPT runs the body of its loop, always in
float32. With --dtype=bfloat16, nib in float32 is measured too. They alternate, each in its own process. Prints a table
and one JSON line last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import GPT2, alternate, finish, make_run, micro_batches, nanogpt_step, parser_for, sides

# layers, heads, width, context, vocabulary, sequences, steps per measurement. tiny: nanoGPT's README example for a CPU.
# small: its character-level example for a GPU, in smaller batches. 124m: GPT-2 with nanoGPT's padded vocabulary.
# The others are for bfloat16.
SIZES = {
    "tiny": (4, 4, 128, 64, 65, 12, 20),
    "small": (6, 6, 384, 256, 65, 8, 2),
    "124m": (12, 12, 768, 1024, 50304, 1, 1),
    "27m": (8, 8, 512, 512, 2048, 8, 1),
    "87m": (12, 12, 768, 1024, 2048, 4, 1),
    "124m-4": (12, 12, 768, 1024, 50304, 4, 1),
}
TARGETS = {"float32": 1.5, "bfloat16": 3.5}


def shape_of(size: str) -> dict[str, Any]:
    layers, heads, width, context, vocab, _, _ = SIZES[size]
    own = dict(n_layer=layers, n_head=heads, n_embd=width, block_size=context, vocab_size=vocab)
    return GPT2 | own | dict(mlp="gelu")


def nib_step(size: str, dtype: str) -> Callable[[], None]:
    from nib.training.settings import TrainSettings
    from nib.training.step import optimizer_step

    *_, context, vocab, sequences, _ = SIZES[size]
    settings = TrainSettings(
        batch_size=sequences, block_size=context, device="cpu", optimizer="adamw", learning_rate=6e-4, dtype=dtype
    )
    run = make_run(settings, shape_of(size))
    batch = micro_batches(vocab, sequences, context, run.micro_batch_size)

    def step() -> None:
        optimizer_step(run, batch)
        run.progress.step += 1

    return step


def timed(make: Callable[..., Callable[[], None]], size: str, *arguments: Any) -> Callable[[], float]:
    """A function that returns the seconds of a step, averaged over so many as SIZES says."""
    step, steps = make(*arguments), SIZES[size][-1]

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        return (time.perf_counter() - began) / steps

    return turn


def main() -> None:
    parser = parser_for(__doc__, nanogpt=True, rounds=5)
    parser.add_argument("--size", action="append", choices=SIZES, help="may be given several times; default: all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of nib's matmuls")
    arguments = parser.parse_args()
    ratios, rates, to_float32 = {}, {}, {}
    sizes = ["tiny", "small", "124m"] if arguments.dtype == "float32" else ["27m", "87m", "124m-4"]
    print(f"{'size':8}{'nib tokens/s':>16}{'nanoGPT':>12}{'ratio':>8}")
    for size in arguments.size or sizes:
        tokens, sequences = SIZES[size][3] * SIZES[size][5], SIZES[size][5]
        theirs = (nanogpt_step, arguments.nanogpt.resolve(), shape_of(size), sequences, sequences)
        made: dict[str, tuple[Any, ...]] = {"nib": (nib_step, size, arguments.dtype), "nanogpt": theirs}
        if arguments.dtype != "float32":
            made["float32"] = (nib_step, size, "float32")
        with sides(**{name: (timed, make, size, *rest) for name, (make, *rest) in made.items()}) as turns:
            found = alternate(turns, arguments.rounds)
        rates[size] = {name: tokens / taken for name, taken in found.items()}
        ratios[size] = found["nanogpt"] / found["nib"]
        print(f"{size:8}{rates[size]['nib']:16,.0f}{rates[size]['nanogpt']:12,.0f}{ratios[size]:8.2f}", flush=True)
        if "float32" in found:
            to_float32[size] = found["float32"] / found["nib"]
            print(f"{'':36}{to_float32[size]:8.2f}   x nib's float32", flush=True)
    result = dict(ratios=ratios, to_float32=to_float32, tokens_per_second=rates)
    finish(result, min(ratios.values()) >= TARGETS[arguments.dtype], arguments.check)


if __name__ == "__main__":
    main()
