"""python -m nib.plot: a picture of every kind from what a run leaves, cut lines and missing numbers included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from nib.plot import points, read_metrics, smooth


def write_run(directory: Path, steps: int) -> Path:
    directory.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "tokens": step * 100, "loss": 5 / step**0.3, "lr": 1e-3 * step, "grad_norm": 1 / step}
        line |= {"tokens_per_second": 1e4, "seconds": step / 2}
        lines.append(line | ({"val_loss": 4.0} if step % 40 == 0 else {}))
    lines[1]["loss"] = lines[1]["grad_norm"] = None  # a skipped step
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text + "[1]\n" + text[:30])
    return directory


def plot(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(cwd)}
    command = [sys.executable, "-m", "nib.plot", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment)


@pytest.mark.parametrize(("x", "file"), [("step", "a.png"), ("tokens", "new/a.svg"), ("seconds", "a.pdf")])
def test_runs_are_drawn_on_shared_axes(x: str, file: str, tmp_path: Path) -> None:
    write_run(tmp_path / "out/one", 100)
    write_run(tmp_path / "elsewhere/two", 3)
    done = plot("one", "elsewhere/two", f"--x={x}", f"--output={file}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = (tmp_path / file).read_bytes()
    assert data.startswith({"png": b"\x89PNG", "pdf": b"%PDF"}.get(file[-3:], b"")) and len(data) > 10_000
    if file.endswith(".svg"):
        text = data.decode()
        assert "<svg" in text and all(f"<!-- {said} -->" in text for said in ("one", "two", "Learning rate"))
        again = plot("one", "elsewhere/two", f"--x={x}", "--output=b.svg", cwd=tmp_path)
        assert again.returncode == 0 and (tmp_path / "b.svg").read_bytes() == data, "the same run, the same picture"


def test_a_number_that_is_missing_is_left_out(tmp_path: Path) -> None:
    lines = read_metrics(str(write_run(tmp_path / "one", 60)))
    assert len(lines) == 60 and len(points(lines, "step", "loss")[0]) == 59
    assert points(lines, "tokens", "val_loss") == ([4000.0], [4.0])


def test_smoothing_keeps_a_constant_and_the_beginning() -> None:
    assert smooth([3.0] * 200) == pytest.approx([3.0] * 200)
    assert smooth([8.0] + [2.0] * 300)[0] == 8.0 and smooth([8.0] + [2.0] * 300)[-1] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "no RUN. Give a run directory"),
        ("nothing", "cannot read out/nothing/metrics.jsonl: No such file"),
        ("empty", "holds no metrics yet"),
        ("one --output=a.txt", "--output a.txt is not a .png, .svg or .pdf"),
        ("one --curve=los", "--curve los is not one of loss, lr"),
        ("one --x=epoch", "--x must be one of step, tokens, seconds"),
        ("one --output=file/a.png", "cannot write file/a.png"),
    ],
)
def test_a_mistake_is_one_line(command: str, message: str, tmp_path: Path) -> None:
    write_run(tmp_path / "out/one", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    done = plot(*command.split(), cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr
