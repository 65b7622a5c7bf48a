"""Plot the metrics.jsonl of one or several runs: `python -m nib.plot RUN... --output curves.png`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nib.common.exits import InputError, run_script
from nib.common.options import option, parse

USAGE = "python -m nib.plot RUN... [--option=value]..."
ABOUT = "Draws the curves of runs on shared axes. A RUN is a run directory, or its name under out/."
# The palette of Okabe and Ito, which colour-blind people can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
CURVES = {  # key of metrics.jsonl: title
    "loss": "Loss, nats per token",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
}
AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training"}
SMOOTHED = ("loss", "grad_norm")
VALIDATION: dict[str, Any] = dict(
    linestyle=(0, (4, 2)), marker="o", markersize=4.5, markeredgecolor="white", markeredgewidth=0.8
)


@dataclass
class Settings:
    output: str = option("curves.png", "the file to write: .png, .svg or .pdf")
    x: str = option("step", "the horizontal axis", choices=tuple(AXES))
    curve: list[str] = option([], f"a curve to draw: {', '.join(CURVES)}; may be given several times; default: all")


def main() -> None:
    parsed = parse(Settings, sys.argv[1:], usage=USAGE, about=ABOUT)
    settings, output = parsed.settings, Path(parsed.settings.output)
    if not parsed.arguments:
        raise InputError("no RUN. Give a run directory such as out/small")
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--output {output} is not a .png, .svg or .pdf. Write --output=curves.png")
    if unknown := [name for name in settings.curve if name not in CURVES]:
        raise InputError(f"--curve {unknown[0]} is not one of {', '.join(CURVES)}. Choose one")
    runs = {name: read_metrics(name) for name in parsed.arguments}
    draw(runs, settings.curve or list(CURVES), settings.x, output)
    print(f"{output}: {', '.join(Path(name).name for name in runs)}")


def read_metrics(name: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. Raises InputError if there are none."""
    paths = [directory / "metrics.jsonl" for directory in (Path(name), Path("out") / name)]
    path = next((path for path in paths if path.exists()), paths[not Path(name).is_dir()])
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Give a run directory such as out/small") from None
    lines = []
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue  # truncated when the run was killed
        if isinstance(found, dict) and isinstance(found.get("step"), int):
            lines.append(found)
    if not lines:
        raise InputError(f"{path} holds no metrics yet. Wait for the first line")
    return lines


def points(lines: list[dict[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The pairs (x, y) of the lines that have both as numbers; a loss that was not finite is null."""
    both = [(line.get(x), line.get(y)) for line in lines]
    kept = [pair for pair in both if all(isinstance(value, int | float) for value in pair)]
    return [float(a) for a, _ in kept], [float(b) for _, b in kept]  # type: ignore[arg-type]


def smooth(values: list[float], share: float = 0.04) -> list[float]:
    """An exponential moving average over about this share of the curve, corrected for the bias at its start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    average = weight = 0.0
    out = []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + 1 - keep
        out.append(average / weight)
    return out


def draw(runs: dict[str, list[dict[str, Any]]], curves: list[str], x: str, output: Path) -> None:
    """Write the plot. Raises InputError if matplotlib is missing or the file cannot be written."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("drawing needs matplotlib. Run: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    style: Any = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999",
             "axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555", "svg.hashsalt": "nib",
             "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left"}  # fmt: skip
    with plt.rc_context(style):
        rows, columns = (len(curves) + 1) // 2, min(2, len(curves))
        size = (10, 3.1 * rows + 0.5) if columns == 2 else (7.5, 4)
        figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
        panels = list(grid.flat)
        for unused in panels[len(curves) :]:
            unused.axis("off")
        for curve, axes in zip(curves, panels, strict=False):
            for number, (name, lines) in enumerate(runs.items()):
                draw_curve(axes, lines, curve, x, COLOURS[number % len(COLOURS)], Path(name).name)
            finish_axes(axes, curve, x)
        handles, labels = panels[0].get_legend_handles_labels()
        if "loss" in curves and any("val_loss" in line for lines in runs.values() for line in lines):
            handles.append(Line2D([], [], color="#777777", linewidth=1, **VALIDATION))
            labels.append("validation")
        figure.legend(handles, labels, loc="outside upper center", ncols=min(6, len(handles)), frameon=False)
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output, dpi=160, metadata={"Date": None} if output.suffix == ".svg" else None)
        except OSError as error:
            raise InputError(f"cannot write {output}: {error.strerror}. Give another --output") from None
        finally:
            plt.close(figure)


def draw_curve(axes: Any, lines: list[dict[str, Any]], curve: str, x: str, colour: str, name: str) -> None:
    """Draw one run in one panel: noisy curves as a thin line under their average, validation as markers."""
    from matplotlib.patheffects import withStroke

    along, values = points(lines, x, curve)
    noisy = curve in SMOOTHED and len(values) > 50
    if noisy:
        axes.plot(along, values, color=colour, alpha=0.25, linewidth=0.7)
    axes.plot(along, smooth(values) if noisy else values, color=colour, linewidth=1.6, label=name)
    along, values = points(lines, x, "val_loss") if curve == "loss" else ([], [])
    if values:
        axes.plot(along, values, color=colour, linewidth=1, **VALIDATION)
        axes.annotate(
            f"{values[-1]:.3f}", (along[-1], values[-1]), xytext=(3, 7), textcoords="offset points", ha="right",
            color=colour, fontsize=9, fontweight="bold", path_effects=[withStroke(linewidth=3, foreground="white")],
        )  # fmt: skip


def finish_axes(axes: Any, curve: str, x: str) -> None:
    """Set title, labels and number formats."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    axes.set_title(CURVES[curve], color="#222222", pad=8)
    axes.set_xlabel(AXES[x])
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(EngFormatter(sep="") if x == "tokens" else StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if curve == "tokens_per_second":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if curve == "grad_norm":
        axes.set_yscale("log", nonpositive="clip")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    run_script(main)
