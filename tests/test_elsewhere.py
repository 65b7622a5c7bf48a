"""The runs in surroundings that people have: wandb, a notebook, Slurm."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_script
from test_train import TINY, losses, metrics, tensors, train

from nib.common.exits import InputError
from nib.training.report import Reporter
from nib.training.slurm import adopt_slurm, first_host

STEPS = [*TINY, "--max_iters=6", "--schedule=constant"]


@pytest.fixture(autouse=True)
def in_corpus(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(corpus / "data")


# ---- wandb ---------------------------------------------------------------------------------------------------------


def without_login(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "HOME": os.getcwd(), "WANDB_SILENT": "true", **more}


def records(directory: Path) -> list[Any]:
    """What wandb keeps of an offline run: a log of LevelDB's format, blocks of 32 KB with records in fragments."""
    from wandb.proto import wandb_internal_pb2

    (path,) = directory.glob("*.wandb")
    data, place, whole, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # full, or the last fragment
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(whole)
            whole = b""
    return found


def history(directory: Path) -> list[dict[str, Any]]:
    rows = []
    for record in records(directory):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_without_a_login_wandb_is_offline_and_a_resumed_run_goes_on_under_its_id(tmp_path: Path) -> None:
    for steps in ("4", "6"):
        options = ["--wandb_log", "--sample_interval=2", "--eval_interval=2", f"--max_iters={steps}"]
        done = run_script("train.py", *STEPS, *options, cwd=tmp_path, env=without_login())
        assert done.returncode == 0, done.stderr
        assert (
            "wandb: no login, so the run is kept offline. Later: wandb sync out/run/wandb/offline-run-*" in done.stdout
        )
    first, second = sorted(Path("out/run/wandb").glob("offline-run-*"))
    own = Path("out/run/wandb_id.txt").read_text()
    assert first.name.endswith(own) and second.name.endswith(own), "one id, one run"
    rows = history(first) + history(second)
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in logged] == pytest.approx(losses("out/run"))
    assert all(row["by_tokens/loss"] == row["loss"] and row["tokens"] == 256 * row["step"] for row in logged)
    assert "by_tokens/val_loss" in logged[1] and logged[1]["val_bits_per_byte"] > 0
    assert [row["samples/nrows"] for row in rows if "samples/nrows" in row] == [1, 2, 1]
    config = next(record.run.config for record in records(first) if record.WhichOneof("record_type") == "run")
    kept = {item.key: json.loads(item.value_json) for item in config.update}
    assert kept["n_layer"] == 2 and kept["model_config"]["norm"] == "rmsnorm" and kept["parameters"] > 1000


def test_an_id_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb_id.txt").symlink_to(tmp_path / "missing" / "id")
    Reporter(tmp_path, active=True).start_wandb("project", "name", {})
    assert "warning: wandb did not start, so nothing is logged there" in "".join(capsys.readouterr())


def test_wandb_offline_gets_the_same_numbers(tmp_path: Path) -> None:
    options = ["--wandb_log", "--eval_interval=2", "--max_iters=4"]
    done = run_script("train.py", *STEPS, *options, cwd=tmp_path, env=without_login(WANDB_MODE="offline"))
    assert done.returncode == 0 and "wandb" not in done.stdout, done.stderr
    (directory,) = Path("out/run/wandb").glob("offline-run-*")
    logged = [{name: row[name] for name in row if name[0] != "_" and "/" not in name} for row in history(directory)]
    assert logged == metrics("out/run") and len(logged) == 4


def test_wandb_that_is_not_installed_or_fails_stops_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "broken")
    for source, said in (
        ("raise ImportError", "wandb is not installed, so nothing is logged there. pip install wandb"),
        (
            "def login(prompt): raise OSError('no network')",
            "wandb did not start, so nothing is logged there: no network",
        ),
        (
            "class Run:\n def define_metric(self, *_, **__): pass\n def log(self, *_, **__): raise OSError('gone')\n"
            "def login(prompt): return True\ndef init(**_): return Run()",
            "wandb failed, so nothing more is logged there: gone",
        ),
    ):
        (tmp_path / "broken/wandb.py").write_text(source)
        monkeypatch.delitem(sys.modules, "wandb", raising=False)
        importlib.invalidate_caches()
        assert train(*STEPS, "--wandb_log", f"--out_dir=out/{len(source)}") == 0
        assert capsys.readouterr().out.count(f"warning: {said}") == 1
        assert len(losses(f"out/{len(source)}")) == 6
    monkeypatch.delitem(sys.modules, "wandb")


# ---- a notebook ----------------------------------------------------------------------------------------------------


def test_the_notebook_cell_of_the_docs_runs_twice(tmp_path: Path) -> None:
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    cell = page.split("## In a notebook")[1].split("```python\n")[1].split("```")[0]
    assert "config/tiny.py" in cell and "out/tiny" in cell
    Path("tiny.py").write_text("".join(f"{option[2:].replace('=', ' = ', 1)}\n" for option in STEPS).replace(
        "= words", "= 'words'").replace("= cpu", "= 'cpu'").replace("= constant", "= 'constant'"))  # fmt: skip
    cell = cell.replace("config/tiny.py", "tiny.py")
    program = (
        "from code import InteractiveInterpreter\nimport sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nshell = InteractiveInterpreter()\ncell = {cell!r}\n"
        "for turn in range(2):\n    assert not shell.runsource(cell, symbol='exec')\nprint('after both')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert "after both" in done.stdout and done.stdout.count("done: step") == 2, done.stdout


# ---- Slurm ---------------------------------------------------------------------------------------------------------


def slurm(rank: int, **changes: str) -> dict[str, str]:
    """What srun tells a task."""
    step = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train", "SLURM_STEP_NODELIST": "localhost"}
    return step | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), **changes}


def test_two_processes_of_srun_train_as_one_does(tmp_path: Path) -> None:
    port = 20000 + os.getpid() % 10000
    command = [sys.executable, str(ROOT / "train.py"), *STEPS]
    tasks = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         env={**os.environ, **slurm(rank), "MASTER_PORT": str(port)})
        for rank in range(2)
    ]  # fmt: skip
    said = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 processes" in said[0] and said[1] == ""
    alone = run_script("train.py", *STEPS, "--out_dir=out/alone", cwd=tmp_path)
    assert alone.returncode == 0
    assert losses("out/run") == pytest.approx(losses("out/alone"), abs=1e-5)
    for name, tensor in tensors("out/run").items():
        assert (tensor - tensors("out/alone")[name]).abs().max() < 1e-3, name


def test_what_srun_says_is_taken_and_what_it_does_not_say_is_left() -> None:
    environment = slurm(1, SLURM_STEP_NODELIST="gpu[003-005,9],login1", SLURM_LOCALID="0")
    adopt_slurm(environment)
    expected = dict(RANK="1", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="gpu003", MASTER_PORT="29571")
    assert {name: environment[name] for name in expected} == expected
    for untouched in (
        {}, {"RANK": "0", **slurm(1)}, slurm(0, SLURM_NTASKS="1"), slurm(0, SLURM_JOB_NAME="bash"),
        {key: value for key, value in slurm(0).items() if key != "SLURM_STEP_ID"},  # a batch script by itself
    ):  # fmt: skip
        before = dict(untouched)
        adopt_slurm(untouched)
        assert untouched == before
    with pytest.raises(InputError, match="lacks a number"):
        adopt_slurm(slurm(0, SLURM_PROCID="x"))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[01-04,07],x", "n01"), ("a-b[7]", "a-b7"), ("a[1,3]", "a1"), ("r[2-3]c", "r2c"),
     ("node-1.cluster,b", "node-1.cluster")],
)  # fmt: skip
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
    for wrong in ("", "[", "a[", "a b"):
        with pytest.raises(InputError, match="Set MASTER_ADDR"):
            first_host(wrong)
