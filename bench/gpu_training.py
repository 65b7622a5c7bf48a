"""The part of bench/gpu.py that measures training: whole steps, their parts, and changes that may be faster.

Results are yielded as they are found, the most important first. The environment variable PART_ENDS says when the part
is stopped; no measurement starts that could not finish by then.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from common import GPT2, make_run, micro_batches, nanogpt_step
from torch import nn

from nib.common.device import peak_flops, pick_device
from nib.training import run as run_module
from nib.training.report import Reporter
from nib.training.run import Run
from nib.training.settings import TrainSettings
from nib.training.step import optimizer_step

MODERN = dict(
    vocab_size=50304, block_size=1024, n_layer=12, n_head=6, n_embd=768, bias=False, norm="rmsnorm", position="rope",
    mlp="swiglu", qk_norm=True, init="modern",
)  # fmt: skip
GPT2_350M = GPT2 | dict(n_layer=24, n_head=16, n_embd=1024)
TINY = dict(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=500)  # for a CPU
# Kinds of kernels by name; the first match counts, and the rest is "other".
KINDS = {
    "attention": r"flash|fmha|sdpa|cudnn.*(attn|attention)|attention|softmax_flash",
    "matmuls": r"gemm|nvjet|cutlass|xmma|cublas|::mm|addmm|bmm|wgmma|matmul",
    "optimizer": r"adam|multi_tensor|foreach|lerp",
    "pointwise, norms and loss": r"triton|softmax|elementwise|layer_norm|rms_norm|reduce|cross_entropy|gather|scatter",
    "copies": r"memcpy|memset|copy",
}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(action: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    """Seconds of the fastest of some rounds, after a warm-up."""
    action()
    wait(device)
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        action()
        wait(device)
        found.append(time.perf_counter() - began)
    return min(found)


def time_left() -> float:
    return float(os.environ.get("PART_ENDS", "inf")) - time.time()


class Said(Reporter):
    """Keeps the messages of a run, such as that the compiler failed."""

    def __init__(self) -> None:
        super().__init__(Path(), active=False)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)
        print(text, file=sys.stderr, flush=True)


def endless_run(device: torch.device, shape: dict[str, Any], optimizer: str, batch: int, micro: int = 0) -> Run:
    settings = TrainSettings(
        batch_size=batch, micro_batch_size=micro, block_size=shape["block_size"], device=device.type,
        optimizer=optimizer, learning_rate=6e-4, max_iters=10**6, eval_interval=0, log_interval=10**6,
        checkpoint_interval=0,
    )  # fmt: skip
    run = make_run(settings, shape, Said())
    run.training = SimpleNamespace(tokens=lambda sequences: len(sequences) * settings.block_size)  # type: ignore[assignment]
    run.steps = settings.max_iters
    return run


def steps_of(run: Run) -> Callable[[], None]:
    """A function that takes one step as train.py's loop does, always on the same batch."""
    settings, cuda = run.settings, run.cluster.device.type == "cuda"
    batch = micro_batches(
        run.model.config.vocab_size, settings.batch_size, settings.block_size, run.micro_batch_size, pin=cuda
    )

    def step() -> None:
        run.begin_step()
        run.set_learning_rate()
        run.count_step(*optimizer_step(run, batch))

    return step


def rate_of(step: Callable[[], None], device: torch.device, seconds: float) -> tuple[float, float]:
    """Seconds per step, averaged over `seconds`, and the host's seconds to launch one step on an idle device."""
    step()
    wait(device)
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    wait(device)
    one = time.perf_counter() - began
    count = max(2, round(seconds / one))
    began = time.perf_counter()
    for _ in range(count):
        step()
    wait(device)
    return (time.perf_counter() - began) / count, host


def measure(run: Run, seconds: float) -> dict[str, Any]:
    device = run.cluster.device
    taken, host = rate_of(steps_of(run), device, seconds)
    rate = run.settings.batch_size * run.settings.block_size / taken
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    wrong = [line for line in run.report.lines if line.startswith("warning")]  # type: ignore[attr-defined]
    return dict(
        tokens_per_second=rate, mfu=rate * run.flops / peak_flops(device, run.precision.dtype), ms_a_step=1e3 * taken,
        micro_batch=run.micro_batch_size, gigabytes=memory, host_ms=1e3 * host, warnings="; ".join(wrong),
    )  # fmt: skip


def profile(run: Run) -> Iterator[dict[str, Any]]:
    """The time of a step by kind of kernel, with their number, and how often the host waits for the device."""
    from torch.profiler import ProfilerActivity

    device, step = run.cluster.device, steps_of(run)
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as found:
        began = time.perf_counter()
        step()
        wait(device)
        taken = time.perf_counter() - began
    spent: dict[str, list[float]] = {}
    waits = 0
    for event in found.key_averages():
        if re.search(r"Synchronize|aten::item|_local_scalar_dense", event.key):
            waits += event.count
        seconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        is_kernel = str(event.device_type).endswith("CUDA") and not getattr(event, "is_user_annotation", False)
        if seconds and (is_kernel or not cuda):
            kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key, re.I)), "other")
            sums = spent.setdefault(kind, [0.0, 0])
            sums[0], sums[1] = sums[0] + seconds, sums[1] + event.count
    for kind, (seconds, count) in sorted(spent.items(), key=lambda item: -item[1][0]):
        yield dict(kernels=kind, ms=1e3 * seconds, count=int(count))
    busy = sum(seconds for seconds, _ in spent.values())
    yield dict(profiled_step_ms=1e3 * taken, idle_ms=1e3 * (taken - busy), waits_and_reads=waits)


def nanogpt_rate(
    device: torch.device, clone: Path, shape: dict[str, Any], batch: int, micro: int, seconds: float
) -> Any:
    """The speed of nanoGPT's own loop, compiled, in bfloat16, with nib's micro-batch."""
    vocab = -(-shape["vocab_size"] // 64) * 64  # its own padding
    step = nanogpt_step(clone, shape | dict(vocab_size=vocab), batch, micro, device.type)
    taken, _ = rate_of(step, device, seconds)
    return dict(tokens_per_second=batch * shape["block_size"] / taken, ms_a_step=1e3 * taken, micro_batch=micro)


@contextlib.contextmanager
def placed(change: Callable[[Any], object]) -> Iterator[None]:
    """Within this context `change` is applied to each model once it is on its device."""
    real = run_module.place

    def place(*arguments: Any) -> nn.Module:
        model = real(*arguments)
        change(model)
        return model

    with mock.patch.object(run_module, "place", place):
        yield


def flash(precision: Any, masked: bool) -> Any:
    """Replaces Precision.training, which selects cuDNN's attention."""
    return precision.autocast()


def switches(vocab: int) -> dict[str, Any]:
    """Changes that may be faster on a GPU, as contexts for making and measuring a run. The first changes nothing."""

    def rows(count: int) -> Any:
        return placed(lambda model: setattr(model, "max_logits", count * vocab))

    def residual(model: Any) -> None:
        model.wte.register_forward_hook(lambda _, inputs, x: x.to(torch.bfloat16))

    def whole(model: Any) -> None:
        model.max_logits, model.vocab_multiple = 2**60, 1

    mode = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs")
    return {
        "as it is": contextlib.nullcontext(),
        "flash instead of cuDNN's attention": mock.patch("nib.common.device.Precision.training", flash),
        "the residual stream in bfloat16": placed(residual),
        "logits of 5,632 rows at a time": rows(5632),
        "logits of 11,264 rows at a time": rows(11264),
        "logits of 3,072 rows at a time": rows(3072),
        "the compiler's own cross-entropy of all logits": placed(whole),
        "max-autotune without CUDA graphs": mock.patch("torch.compile", mode),
    }


def freed() -> None:
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def case(name: str, make: Callable[[], dict[str, Any]], least: float) -> Iterator[dict[str, Any]]:
    """The result of one case or its error; skipped if fewer than `least` seconds are left."""
    if time_left() < (least if torch.cuda.is_available() else least / 20):
        yield dict(skipped=name, reason=f"only {time_left():.0f} s left")
        return
    began = time.perf_counter()
    try:
        found = make()
    except Exception as error:  # the next case may do better
        yield dict(case=name, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    else:
        yield dict(case=name, **found, whole_seconds=time.perf_counter() - began)
    freed()


def training(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens/s at 124 M and 350 M and of nanoGPT, the parts of a step, the switches, and a sweep of micro-batches."""
    device = pick_device(options.device)
    cuda, seconds = device.type == "cuda", (1.5 if options.quick else 4.0) if options.device == "cuda" else 0.2
    less, batch = ({}, 480) if cuda else (TINY, 4)
    kept: list[dict[str, Any]] = []

    def train(shape: dict[str, Any], optimizer: str, batch: int, micro: int = 0, profiled: bool = False) -> Any:
        run = endless_run(device, shape | less, optimizer, batch, micro)
        found = measure(run, seconds)
        kept[:] = profile(run) if profiled else []
        return found

    for name, shape, optimizer in (("gpt2_124m", GPT2, "adamw"), ("modern_124m", MODERN, "muon")):
        yield from case(name, functools.partial(train, shape, optimizer, batch, profiled=True), 30)
        yield from list(kept)
        if options.nanogpt and shape is GPT2:
            clone = options.nanogpt.resolve()
            micro = 60 if cuda else 2
            peer = functools.partial(nanogpt_rate, device, clone, GPT2 | less, batch, micro, seconds)
            yield from case("nanoGPT", peer, 25)
    if options.quick and cuda:
        return
    # Four layers compile in a third of the time of twelve, and contain everything that a switch changes.
    four, batch = GPT2 | dict(n_layer=4), 128 if cuda else 4
    for name, switch in switches(50257 if cuda else TINY["vocab_size"]).items():

        def switched(switch: Any = switch) -> Any:
            with switch:
                return train(four, "adamw", batch, batch // 2)

        yield from case(f"4 layers, {name}", switched, 25)
    yield from case("gpt2_350m", lambda: train(GPT2_350M, "adamw", 128 if cuda else 4), 45)
    for micro in (128, 32, 16) if cuda else (4, 1):
        yield from case(f"4 layers, micro-batch {micro}", lambda micro=micro: train(four, "adamw", batch, micro), 20)
