"""Calculate the time and memory of a training step on 1 to 1,024 GPUs, with DDP and with FSDP.

    python bench/scale_model.py [--measure]

This is a model, not a measurement: nib has not run on a GPU. It counts the FLOPs of a step at an assumed utilisation,
the bytes that nib's DDP and FSDP2 exchange over NCCL's ring or tree, and how much of that overlaps with the backward
pass. It is compared with published runs of other programs, and with --measure with two gloo processes on this machine.
Prints tables and one JSON line last.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from common import GPT2, finish, parser_for
from scaling import Group

from model import GPT, GPTConfig
from nib.training.cost import flops_per_token, num_parameters

GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
# The sources of the published runs.
LLM_C = "github.com/karpathy/llm.c, scripts/run_gpt2_{}.sh"
TITAN = "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3, torch.compile"


@dataclass
class Hardware:
    """GB/s in one direction, as NCCL reaches them (its bus bandwidth): about 80 % of the data sheets' figures."""

    name: str
    peak: float  # dense bfloat16, FLOP/s
    gigabytes: float
    inside: float  # GB/s from a GPU to the others in its machine
    between: float  # GB/s from a machine to the others, over all its network cards
    latency: float = 5e-6  # of one hop, in seconds
    machine: int = 8  # GPUs


H100 = Hardware("H100 SXM, 8 x 400 Gb/s", 989e12, 80, 360, 320)
A100 = Hardware("A100 SXM, 8 x 200 Gb/s", 312e12, 80, 230, 160)
RTX4090 = Hardware("RTX 4090, PCIe 4, 25 Gb/s", 165e12, 24, 20, 2.5)


@dataclass
class Shape:
    """What the estimate of a step needs to know about a model; `shape_of` makes it from nib's."""

    name: str
    parameters: float
    flops: float  # to train on a token
    layers: int
    width: int
    vocabulary: int


def shape_of(name: str, **changes: Any) -> Shape:
    with torch.device("meta"):
        model = GPT(GPTConfig(**(GPT2 | changes)))
    config = model.config
    flops = flops_per_token(model)
    return Shape(name, num_parameters(model), flops, config.n_layer, config.n_embd, config.vocab_size)


def exchange(size: float, gpus: int, on: Hardware, kind: str) -> float:
    """Seconds to sum (all-reduce), gather or scatter `size` bytes over the GPUs, by the better of ring and tree."""
    if gpus == 1:
        return 0.0
    speed = 1e9 * (on.inside if gpus <= on.machine else min(on.inside, on.between))
    passes = 2 if kind == "sum" else 1
    ring = passes * ((gpus - 1) / gpus * size / speed + (gpus - 1) * on.latency)
    tree = passes * (size / speed + 2 * math.log2(gpus) * on.latency)
    return min(ring, tree) if kind == "sum" else ring  # NCCL gathers and scatters only over rings


def step_seconds(
    shape: Shape, on: Hardware, gpus: int, tokens: int, micro: int, mfu: float, parallel: str, overlap: bool = True
) -> tuple[float, float]:
    """Seconds of a step of `tokens` over all GPUs, in micro-batches of `micro` tokens, and of exposed exchange in it.

    DDP all-reduces float32 gradients in the last backward pass, in buckets; the last bucket does not overlap. FSDP2
    gathers each block's 16-bit weights before each forward and backward pass, while the block before is computed. It
    reduce-scatters float32 gradients in the last backward pass. A backward pass is two thirds of the arithmetic.
    """
    parts = max(1, round(tokens / gpus / micro))
    compute = tokens / gpus * shape.flops / (on.peak * mfu)
    backward = compute / parts * 2 / 3
    block = (shape.parameters - shape.vocabulary * shape.width) / shape.layers
    if parallel == "ddp":
        size = 4 * shape.parameters
        shown = exchange(size, gpus, on, "sum")
        if overlap:  # the embedding's gradient comes last
            last = exchange(4 * max(25e6 / 4, shape.vocabulary * shape.width), gpus, on, "sum")
            shown = min(shown, last + max(0.0, shown - last - backward))
    else:
        gather, scatter = (exchange(each * block, gpus, on, "gather") for each in (2, 4))
        root = exchange(2 * shape.vocabulary * shape.width, gpus, on, "gather")
        a_block = compute / parts / shape.layers
        forward = shape.layers * max(0.0, gather - a_block / 3)
        back = shape.layers * max(0.0, gather - a_block * 2 / 3)
        last = shape.layers * max(0.0, gather + scatter - a_block * 2 / 3)
        shown = parts * (root + gather + forward) + (parts - 1) * back + last + 2 * root + scatter
    agreements = 4 * gpus * 30e-6  # two small all-reduces over gloo's ring, on the host, which is a step ahead
    return max(compute + shown, agreements), shown


def gigabytes(shape: Shape, gpus: int, micro: int, parallel: str, accumulates: bool) -> float:
    """GB on one GPU: float32 weights, gradients and AdamW's state; activations; the loss's chunks."""
    held = 16.0 * shape.parameters / (1 if parallel == "ddp" else gpus)
    if accumulates:  # DDP's buckets beside the gradients; FSDP's gradients whole until they are exchanged
        held += 4.0 * shape.parameters
    if parallel == "fsdp":  # two blocks and the head in 16 bits, the head's gradient in float32
        block = (shape.parameters - shape.vocabulary * shape.width) / shape.layers
        held += 4 * block + 6 * shape.vocabulary * shape.width
    activations = 40.0 * micro * shape.width * shape.layers  # about 17 numbers, most of them of 16 bits
    rows = math.sqrt(micro * shape.width)
    loss = rows * shape.vocabulary * 4 + micro / rows * shape.vocabulary * shape.width * 2
    return (held + activations + loss) / 1e9


def published() -> list[dict[str, Any]]:
    """Published runs against the two assumptions: the MFU of a GPU, and what the exchange costs."""
    rows = []
    for name, on, changes, tokens, seconds in (
        ("124M", A100, {}, 524_288, 0.300),
        ("350M", A100, dict(n_layer=24, n_head=16, n_embd=1024), 524_288, 0.820),
        ("1558M", H100, dict(n_layer=48, n_head=25, n_embd=1600), 1_048_576, 2.80),
    ):
        shape = shape_of(name, **changes)
        mfu = tokens * shape.flops / seconds / 8 / on.peak
        source = LLM_C.format(name)
        rows.append(dict(run=f"GPT-2 {name}, 8 x {on.name[:4]}", published=f"MFU {mfu:.2f}", source=source))
    # Llama 3.1 8B, 2 x 8192 tokens per GPU; the MFU includes partial activation recomputation.
    titan = Shape("Llama 3.1 8B", 8.03e9, 6 * 7.5e9 + 12 * 32 * 4096 * 8192, 32, 4096, 128_256)
    mfu = 6667 * titan.flops / H100.peak
    few, many = (step_seconds(titan, H100, n, 16384 * n, 16384, mfu, "fsdp")[0] for n in (8, 128))
    rows.append(
        dict(
            run="Llama 3.1 8B by FSDP, tokens/s of a GPU, 128 to 8", published=f"{6514 / 6667:.3f}",
            model=f"{few / many:.3f}", source=TITAN,
        )
    )  # fmt: skip
    return rows


# ---- two processes on this machine -----------------------------------------------------------------------------------


def sum_over_two(size: int) -> None:
    """One of two gloo processes: prints the seconds of an all-reduce of `size` float32 numbers."""
    dist.init_process_group("gloo")
    numbers, found = torch.ones(size), []
    for _ in range(5):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(numbers)
        found.append(time.perf_counter() - began)
    print(min(found), flush=True)
    os._exit(0)


def measured() -> dict[str, float]:
    """The seconds of a step of two gloo processes, and the estimate: half the batch on one, plus an all-reduce."""
    layers, width = 6, 384
    half, two = Group(1, [1, layers, width, 256, 4]), Group(2, [1, layers, width, 256, 8])
    found = [(half.turn(), two.turn()) for _ in range(4)][1:]
    for group in (half, two):
        group.end()
    compute, both = (min(each) for each in zip(*found, strict=True))
    size = num_parameters(GPT(GPTConfig(**(GPT2 | dict(n_layer=layers, n_head=6, n_embd=width, block_size=256,
                                                       vocab_size=512)))))  # fmt: skip
    summed = max(float(each.communicate()[0]) for each in Group(2, [size], __file__).processes)
    # The matmuls keep the cores busy, so the all-reduce does not overlap with them.
    return dict(one_half=compute, sum=summed, model=compute + summed, two=both)


def main() -> None:
    parser = parser_for(__doc__, check=False)
    parser.add_argument("--measure", action="store_true", help="also measure two gloo processes on this machine")
    parser.add_argument("--mfu", type=float, default=0.42, help="assumed model FLOPs utilisation of one GPU")
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        sum_over_two(options.process)
    result: dict[str, Any] = {"published": published(), "tables": {}}
    for row in result["published"]:
        print(f"{row['run']:52} published {row['published']:10} model {row.get('model', '-'):8} {row['source']}")
    shapes = {
        "GPT-2 124M": (shape_of("124M"), 65536, 524_288),
        "GPT-2 1558M": (shape_of("1558M", n_layer=48, n_head=25, n_embd=1600), 16384, 1_048_576),
        "7B": (shape_of("7B", n_layer=32, n_head=32, n_embd=4096, block_size=4096), 8192, 4_194_304),
    }
    for on in (H100, A100, RTX4090):
        for name, (shape, micro, tokens) in shapes.items():
            print(f"\n{name} on {on.name}, {tokens:,} tokens per step; efficiency relative to one GPU, and GB per GPU")
            print(f"{'GPUs':>6}{'DDP':>8}{'GB':>8}{'FSDP':>8}{'GB':>8}   DDP without overlap")
            for gpus in GPUS:
                part = min(micro if on.gigabytes > 30 else micro // 8, tokens // gpus)
                cells, several = [], tokens // gpus > part
                for parallel, overlap in (("ddp", True), ("fsdp", True), ("ddp", False)):
                    seconds, _ = step_seconds(shape, on, gpus, tokens, part, options.mfu, parallel, overlap)
                    ideal = tokens / gpus * shape.flops / (on.peak * options.mfu)
                    cells.append((ideal / seconds, gigabytes(shape, gpus, part, parallel, several)))
                ddp, fsdp, plain = cells
                fits = ["" if cell[1] <= on.gigabytes else "!" for cell in cells]
                print(
                    f"{gpus:6}{ddp[0]:8.2f}{ddp[1]:7.1f}{fits[0] or ' '}{fsdp[0]:8.2f}{fsdp[1]:7.1f}{fits[1] or ' '}"
                    f"{plain[0]:8.2f}"
                )
                result["tables"][f"{name}, {on.name}, {gpus}"] = dict(ddp=ddp, fsdp=fsdp, without_overlap=plain[0])
    print("\n!: does not fit. The largest model for DDP, at 20 bytes per parameter in 90 % of the memory:")
    for on in (H100, A100, RTX4090):
        print(f"  {on.name}: {0.9 * on.gigabytes / 20:.1f} billion parameters")
    if options.measure:
        result["measured"] = found = measured()
        print(f"\ntwo gloo processes here: {found['two']:.3f} s a step; the model says {found['model']:.3f} s", end=" ")
        print(f"({found['one_half']:.3f} s of half the batch on one, {found['sum']:.3f} s of a sum)")
    finish(result)


if __name__ == "__main__":
    main()
