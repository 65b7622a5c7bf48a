"""The time that a run spends outside training steps: start-up, logging, progress, checkpoints.

    python bench/overhead.py [--config config/small.py] [--steps 200]

Trains with the config for some steps and four checkpoints, and measures in the process the time outside
`optimizer_step` and validation. A first, short run prepares the corpus. Prints a table and one JSON line last.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import ROOT, finish, parser_for

START_SECONDS, SHARE = 5.0, 0.02


def run(config: str, steps: int, out_dir: str) -> dict[str, float]:
    """Train in this process and time its parts. Returns the seconds of each part."""
    import train
    from nib.training import objective, run, saving, step

    spent = dict.fromkeys(("step", "validation", "batch", "checkpoint", "metrics", "progress"), 0.0)
    ends: list[float] = []

    def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **options)
            spent[part] += time.perf_counter() - began
            if part == "step":
                ends.append(time.perf_counter())
            return result

        return inner

    step.optimizer_step = clocked("step", step.optimizer_step)
    run.Run.load_batch = clocked("batch", run.Run.load_batch)  # type: ignore[method-assign]
    objective.validate = clocked("validation", objective.validate)
    saving.save = clocked("checkpoint", saving.save)
    run.Reporter.metrics = clocked("metrics", run.Reporter.metrics)  # type: ignore[method-assign]
    run.Reporter.progress = clocked("progress", run.Reporter.progress)  # type: ignore[method-assign]
    arguments = [config, f"--max_iters={steps}", f"--checkpoint_interval={max(1, steps // 4)}", f"--out_dir={out_dir}"]
    settings = train.read_settings([*arguments, "--eval_tokens=20000", "--device=cpu"])
    train.train(settings)
    first = spent["step"] / steps  # one step more, since the clock starts at the end of the first
    return {**spent, "loop": time.perf_counter() - ends[0] + first}


def seconds_to_first_step(config: str, out_dir: Path) -> float:
    """Seconds from the start of the process to the first line of metrics.jsonl, written after one step."""
    options = ["--log_interval=1", "--eval_interval=0", "--checkpoint_interval=0", f"--out_dir={out_dir}"]
    command = [sys.executable, str(ROOT / "train.py"), config, *options, "--device=cpu"]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (out_dir / "metrics.jsonl").exists():
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.kill()
    return seconds


def main() -> None:
    parser = parser_for(__doc__, rounds=5)
    parser.add_argument("--config", default=str(ROOT / "config/small.py"))
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        seconds_to_first_step(arguments.config, Path(name) / "warm")
        starts = sorted(seconds_to_first_step(arguments.config, Path(name) / f"{i}") for i in range(arguments.rounds))
        spent = run(arguments.config, arguments.steps, f"{name}/run")
    loop = spent["loop"] - spent["validation"]
    other = loop - spent["step"]
    print(f"start to first step: {starts[len(starts) // 2]:.2f} s (median of {len(starts)})")
    for part in ("step", "batch", "checkpoint", "metrics", "progress"):
        print(f"{part:12}{spent[part]:9.3f} s{100 * spent[part] / loop:8.2f} %")
    share = other / loop
    print(f"all but steps and validation passes: {100 * share:.2f} % of {loop:.1f} s")
    start = starts[len(starts) // 2]
    met = share < SHARE and start < START_SECONDS
    finish(dict(share=share, start_seconds=start, **spent), met, arguments.check)


if __name__ == "__main__":
    main()
