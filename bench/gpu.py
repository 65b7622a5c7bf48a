"""Check nib on a GPU in nine minutes, or three with --quick: the card's limits, invariants, training, decoding.

    python bench/gpu.py [--quick] [--nanogpt CLONE] [--output DIR] [--device cuda] [--part training]...

Each part runs in its own process with a deadline, so that a part that fails, hangs or runs out of memory does not stop
the others. Every result is appended to DIR/results-gpu.jsonl at once, and DIR/RESULTS-GPU.md is rewritten after each
part (DIR: bench/ on CUDA). Prints the same tables and one JSON line last. With --device cpu --quick everything runs on
tiny shapes, to test the script without a GPU; the numbers then mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import ROOT, finish, parser_for
from gpu_decoding import decoding
from gpu_training import clock, training

from nib.common.device import device_name, peak_flops, pick_device

# Time limits in seconds, in full and with --quick, doubled on a CPU. What a part does not use, later parts may.
PARTS = {"machine": (25, 15), "tests": (130, 50), "small": (75, 30), "training": (210, 60), "decoding": (100, 25)}
# Tokens/s of GPT-2's 124 M on an H100 or H200, context 1024, bfloat16.
TARGET = 500_000


def machine(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The card and its limits: memory bandwidth, matmul speed, and the cost of a kernel launch."""
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    about: dict[str, Any] = dict(device=device_name(device), torch=torch.__version__, python=sys.version.split()[0])
    if cuda:
        asked = "--query-gpu=driver_version,power.limit,clocks.max.sm,clocks.max.mem"
        found = subprocess.run(["nvidia-smi", asked, "--format=csv,noheader"], capture_output=True, text=True)
        made = torch.cuda.get_device_properties(device)
        about |= dict(driver=found.stdout.strip() or found.stderr.strip(), cuda=torch.version.cuda)
        about |= dict(gigabytes=made.total_memory / 2**30, multiprocessors=made.multi_processor_count)
        about |= dict(capability=f"{made.major}.{made.minor}", peak_tflops=peak_flops(device, torch.bfloat16) / 1e12)
    yield about
    size = 2**30 if cuda else 2**22
    memory, other = torch.ones(size, device=device), torch.empty(size, device=device)
    # In GB/s of bytes read plus bytes written.
    yield dict(read=memory.nbytes / clock(memory.sum, device) / 1e9)
    yield dict(copy=2 * memory.nbytes / clock(functools.partial(other.copy_, memory), device) / 1e9)
    del memory, other
    scale = 1 if cuda else 16
    shapes = {
        "square": (8192, 8192, 8192), "qkv": (65536, 768, 2304), "up": (65536, 768, 3072), "down": (65536, 3072, 768),
        "head": (7040, 768, 50304), "head's gradient": (50304, 7040, 768),
    }  # fmt: skip
    for name, (m, k, n) in shapes.items():
        m, k, n = m // scale // (1 if cuda else 4), k // scale, n // scale
        a, b = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        seconds = clock(lambda a=a, b=b: a @ b, device)
        yield dict(matmul=name, shape=f"{m} x {k} x {n}", tflops=2 * m * k * n / seconds / 1e12, ms=1e3 * seconds)
    tiny = torch.zeros(1, device=device)
    yield dict(microseconds_a_kernel=1e4 * clock(lambda: [tiny.add_(1) for _ in range(100)], device))


def tests(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The test suite's core invariants on the device; with --quick on a GPU, only those that need no torch.compile."""
    chosen = ["tests/test_gpu.py", "-m", "gpu", "--device", options.device, "-vv", "-rfE", "--tb=line"]
    chosen += ["-k", "not compiled and not true"] if options.quick and options.device == "cuda" else []
    for line in lines_of([sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider"]):
        if found := re.match(r"tests/test_gpu.py::(.*) (PASSED|FAILED|ERROR)\b", line):
            yield dict(test=found[1], outcome=found[2].lower())
        elif found := re.match(r"(FAILED|ERROR) tests/test_gpu.py::(.*)", line):
            yield dict(why=found[2])
        elif re.search(r"\d+ (passed|failed|error)", line):
            yield dict(tests=line.strip(" ="))


def small(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The README's main example, config/small.py, from its data to its loss; on a CPU only a few steps."""
    with tempfile.TemporaryDirectory() as place:
        less = [] if options.device == "cuda" else ["--max_iters=5", "--eval_tokens=5000"]
        if (ROOT / "data/stdlib").is_dir():
            (Path(place) / "data").symlink_to(ROOT / "data")
        command = [sys.executable, str(ROOT / "train.py"), str(ROOT / "config/small.py"), f"--device={options.device}"]
        began = time.perf_counter()
        for line in lines_of([*command, *less], cwd=place):
            if re.match(r"step \d+: validation|done|warning|error", line):
                yield dict(seconds=time.perf_counter() - began, said=line)
        lines = [json.loads(line) for line in (Path(place) / "out/small/metrics.jsonl").read_text().splitlines()]
        yield {key: lines[-1][key] for key in ("step", "val_loss", "val_bits_per_byte", "tokens_per_second", "seconds")}


def lines_of(command: list[str], cwd: str | Path = ROOT) -> Iterator[str]:
    """The lines of a process's output as they come, also copied to standard error."""
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", file=sys.stderr, flush=True)
            yield line.rstrip("\n")
    if process.returncode:
        yield f"error: {shlex.join(command[:3])} ended with status {process.returncode}"


FUNCTIONS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "machine": machine, "tests": tests, "small": small, "training": training, "decoding": decoding,
}  # fmt: skip
MARK = "result: "


def run_part(name: str, options: list[str], seconds: float, write: Callable[[dict[str, Any]], None]) -> None:
    """Run one part in its own process; `write` gets each of its results, and an error if it failed or was stopped."""
    command = [sys.executable, "-u", __file__, *options, "--run", name]
    environment = {**os.environ, "PART_ENDS": str(time.time() + seconds)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    late = threading.Timer(seconds, lambda: os.killpg(process.pid, 9))
    late.start()
    for line in process.stdout or ():
        if line.startswith(MARK):
            write(dict(part=name, **json.loads(line.removeprefix(MARK))))
        else:
            print(line, end="", file=sys.stderr, flush=True)
    status = process.wait()
    if not late.is_alive():
        write(dict(part=name, error=f"stopped after {seconds:.0f} seconds"))
    elif status:
        write(dict(part=name, error=f"ended with status {status}, see above"))
    late.cancel()


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "/")


def tables(results: list[dict[str, Any]], headline: str) -> str:
    """All results as Markdown: consecutive rows with the same columns form a table."""
    parts, columns = [headline], None
    for number, result in enumerate(results):
        row = {key.replace("_", " "): shown(value) for key, value in result.items() if key != "part"}
        if not number or result["part"] != results[number - 1]["part"]:
            parts.append(f"\n## {result['part'].capitalize()}")
            columns = None
        if list(row) != columns:
            columns = list(row)
            parts += ["", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        parts.append(f"| {' | '.join(row.values())} |")
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--quick", action="store_true", help="only the most important measurements: three minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT, to measure it too")
    parser.add_argument("--output", type=Path, help="directory for the results; default: bench/ or out/gpu/")
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be given several times")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no CUDA GPU. Run it on a machine with one, or give --device cpu", file=sys.stderr)
        sys.exit(2)
    if options.run:
        for found in FUNCTIONS[options.run](options):
            print(f"\n{MARK}{json.dumps(found)}", flush=True)
        return
    place = options.output or (ROOT / "bench" if options.device == "cuda" else ROOT / "out/gpu")
    place.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    command = f"python bench/gpu.py {shlex.join(sys.argv[1:])}".strip()
    headline = f"# nib on a GPU\n\n{time.strftime('%Y-%m-%d')}, commit {commit.strip()}: `{command}`"
    if options.device == "cpu":
        headline += "\n\nOn a CPU, at tiny sizes, to test the script: these numbers mean nothing."
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # the machine may be busy, and nothing is measured
    results: list[dict[str, Any]] = []
    with (place / "results-gpu.jsonl").open("w") as file:

        def write(result: dict[str, Any]) -> None:
            results.append(result)
            file.write(json.dumps(result) + "\n")
            file.flush()

        began, allowed = time.time(), 0.0
        for name, (full, quick) in PARTS.items():
            if options.part and name not in options.part:
                continue
            allowed += (quick if options.quick else full) * (1 if options.device == "cuda" else 2)
            run_part(name, sys.argv[1:], began + allowed - time.time(), write)
            (place / "RESULTS-GPU.md").write_text(tables(results, headline))
    print(tables(results, headline))
    print(f"{time.time() - began:.0f} seconds; written to {place / 'RESULTS-GPU.md'}")
    rates = [r["tokens_per_second"] for r in results if r.get("case") == "gpt2_124m"]
    bad = [r for r in results if "error" in r or r.get("outcome") in ("failed", "error")]
    finish(dict(results=results, failed=len(bad)), not bad and max(rates, default=0.0) >= TARGET, options.check)


if __name__ == "__main__":
    main()
