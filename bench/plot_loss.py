"""Draw the loss of one or several runs over their training time, from their metrics.jsonl.

python bench/plot_loss.py out/small --output docs/small.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="an .svg or .png file")
    arguments = parser.parse_args()
    plt.rcParams.update({"font.size": 10, "svg.hashsalt": "nib", "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for number, run in enumerate(arguments.runs):
        lines, colour = read(run), f"C{number}"
        losses = [(line["seconds"], line["loss"]) for line in lines if line.get("loss") is not None]
        evaluations = [(line["seconds"], line["val_loss"]) for line in lines if "val_loss" in line]
        axes.plot(*zip(*losses, strict=True), color=colour, alpha=0.35, linewidth=1, label=f"{run.name}: training")
        axes.plot(
            *zip(*evaluations, strict=True), color=colour, marker="o", markersize=4, label=f"{run.name}: validation"
        )
        seconds, loss = evaluations[-1]
        axes.annotate(f"{loss:.2f}", (seconds, loss), xytext=(0, -14), textcoords="offset points", ha="center")
    axes.set(xlabel="seconds of training", ylabel="loss, nats per token")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output, metadata={"Date": None} if arguments.output.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
