"""The time in which nib reaches the loss of nanoGPT's CPU example, and the loss it reaches in nanoGPT's whole time.

    python bench/time_to_loss.py --nanogpt PATH_TO_CLONE --text input.txt [--text other.txt] [--plot out.svg]

For each text and round: nanoGPT's own train.py (4 layers, width 128, context 64, 2000 steps of 12 sequences), then
config/char_fast.py twice: with a tenth of the seconds that nanoGPT trained, in which nib also starts, and with all of
them, start-up excluded. The start-up of both is measured by a run of one step; there is almost no validation on either
side. nib has another seed in each round, and trains in bfloat16 if the CPU has instructions for it. Losses are of the
whole validation split in the same windows. Prints a table and one JSON line last; with --check, exits with status 1 if
a tenth of the time does not reach nanoGPT's loss.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from pathlib import Path

from common import finish, parser_for, timed
from nanogpt_job import NANOGPT, full_loss, nanogpt_model, prepare

from nib.cpu.bfloat16 import has_bfloat16

SHARE = 10
DTYPE = ["--dtype=bfloat16"] if has_bfloat16() else []  # of nib's training


def train_nib(data: Path, out: Path, budget: list[str]) -> tuple[float, list[tuple[float, float]]]:
    """Seconds of the process, and (seconds of training, loss) along the way."""
    options = [f"--dataset={data}", f"--out_dir={out}", "--eval_tokens=64", "--device=cpu", *DTYPE, *budget]
    seconds, _ = timed(["train.py", "config/char_fast.py", *options])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return seconds, [(line["seconds"], line["loss"]) for line in lines]


def nib_loss(data: Path, out: Path, seed: str) -> float:
    options = [seed, f"--dataset={data}", f"--out_dir={out}", "--eval_only", "--max_seconds=1", "--device=cpu", *DTYPE]
    _, text = timed(["train.py", "config/char_fast.py", *options])
    return float(re.findall(r"validation loss ([\d.]+)", text)[-1])


def plot(curves: list[tuple[str, list[tuple[float, float]], float]], path: Path) -> None:
    """Training loss against wall time, averaged over 20 records; a dot is the loss on the whole validation split."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for (name, points, loss), colour in zip(curves, ("tab:gray", "tab:orange", "tab:blue"), strict=True):
        losses = [sum(x for _, x in points[max(0, i - 19) : i + 1]) / min(20, i + 1) for i in range(len(points))]
        axes.plot([second for second, _ in points], losses, color=colour, label=name, linewidth=1.2)
        axes.plot(points[-1][0], loss, "o", color=colour)
        axes.annotate(f"{loss:.3f}", (points[-1][0], loss), xytext=(0, 8), textcoords="offset points", color=colour)
    axes.set(xlabel="seconds of training", ylabel="loss (nats a character)", ylim=(1.2, 2.8), xlim=(0, None))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    parser = parser_for(__doc__, nanogpt=True, rounds=1)
    parser.add_argument("--text", type=Path, action="append", required=True, help="a text file; may be given again")
    parser.add_argument("--plot", type=Path, help="draw the first text's curves into this file")
    arguments = parser.parse_args()
    clone = arguments.nanogpt.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, text in enumerate(arguments.text * arguments.rounds):
            directory = Path(name) / str(number)
            data = directory / "data"
            directory.mkdir()
            dataset = prepare(text.resolve(), data, clone)
            command = ["train.py", *NANOGPT, f"--out_dir={directory / 'nanogpt'}", "--log_interval=10"]
            whole, log = timed(command, clone)
            theirs = whole - timed([*command, "--max_iters=1"], clone)[0]
            peer = nanogpt_model(clone, directory / "nanogpt")
            loss = full_loss(lambda inputs, peer=peer: peer(inputs, inputs)[0], dataset, 64)
            startup, _ = train_nib(data, directory / "start", ["--max_iters=1", "--max_seconds=0"])
            row = [text.name, theirs, loss]
            points = [(float(at) / 2000 * theirs, float(x)) for at, x in re.findall(r"iter (\d+): loss ([\d.]+)", log)]
            drawn = [("nanoGPT", points, loss)]
            for share in (SHARE, 1):
                out = directory / f"nib-{share}"
                budget = theirs / share - (startup if share > 1 else 0)
                seed = f"--seed={1337 + number // len(arguments.text)}"
                seconds, points = train_nib(data, out, [f"--max_seconds={budget:.2f}", seed])
                row += [seconds - (startup if share == 1 else 0), nib_loss(data, out, seed)]
                label = f"nib, 1/{share} of the time" if share > 1 else "nib, the same time"
                drawn.append((label, points, row[-1]))
            if arguments.plot and not number:
                plot(drawn, arguments.plot)
            rows.append(row)
            print("{}: nanoGPT {:.1f} s, {:.4f};  nib {:.1f} s, {:.4f};  nib {:.1f} s, {:.4f}".format(*row), flush=True)
    ratio = statistics.median(row[1] / row[3] for row in rows)
    finish({"rows": rows, "ratio": ratio}, all(row[4] <= row[2] for row in rows), arguments.check)


if __name__ == "__main__":
    main()
