"""One process of several, or one that only looks so: what it waits for, how long, and what it says."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from conftest import Call

import nib.data.open
import nib.training.distributed
import train
from nib.common.exits import InputError, RunError
from nib.common.files import UNFINISHED
from nib.data.dataset import Dataset
from nib.data.open import open_dataset
from nib.data.prepare import BUILTIN_DATASETS, prepare
from nib.data.settings import PrepareSettings
from nib.data.shards import staging_path
from nib.training.distributed import own_place, start_cluster

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which the text of a built-in corpus called tiny is there and its data are not."""
    monkeypatch.chdir(tmp_path)
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "t.txt").write_text("some text " * 50)
    monkeypatch.setitem(BUILTIN_DATASETS, "tiny", {"source": "t.txt", "tokenizer": "byte"})
    return tmp_path


def set_place(monkeypatch: pytest.MonkeyPatch, **place: object) -> None:
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))


def open_as_here() -> Dataset:
    """As train.py opens it: as the process that the environment says this one is."""
    return open_dataset("tiny", first=own_place().rank == 0)


@pytest.mark.parametrize("place", [{}, {"WORLD_SIZE": 1}, {"WORLD_SIZE": 1, "LOCAL_RANK": 3}])
def test_a_rank_that_was_left_in_the_environment_of_the_only_process_means_nothing(
    place: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_place(monkeypatch, RANK=2, **place)
    assert own_place() == (0, 1, 0)
    assert open_as_here().train.tokens > 0


def test_such_a_process_says_its_errors_and_writes_its_run(
    corpus: Path, work: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    set_place(monkeypatch, RANK=1, LOCAL_RANK=1)
    small = ["--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=8", "--batch_size=1", "--max_iters=1"]
    options = [f"--dataset={corpus / 'data/words'}", "--eval_tokens=8", "--device=cpu", *small]
    assert train.train(train.read_settings(options)) == 0 and (work / "out/run/checkpoints/latest").exists()
    refused = call(lambda: train.train(train.read_settings(["--n_layer=0"])), cwd=work)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")


@pytest.mark.parametrize(
    "place, said",
    [
        ({"RANK": 1}, "with MASTER_ADDR and MASTER_PORT missing"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": 1}, "with RANK missing"),
        ({"RANK": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}, "with RANK 2"),
        ({"RANK": -1, "MASTER_ADDR": "localhost", "MASTER_PORT": 1}, "with RANK -1"),
    ],
)
def test_a_place_that_cannot_be_is_refused(
    place: dict[str, object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_place(monkeypatch, WORLD_SIZE=2, **place)
    with pytest.raises(InputError, match=f"WORLD_SIZE is 2, {said}. Start with torchrun, or unset"):
        train.train(train.read_settings(["--dataset=tiny"]))
    assert not Path("data").exists()


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is the second of two, and has little patience."""
    set_place(monkeypatch, RANK=1, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=1)
    monkeypatch.setattr(nib.data.open, "ABSENT_SECONDS", 0.3)
    monkeypatch.setattr(nib.data.open, "SILENT_SECONDS", 0.8)


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("left", ["nothing", "a directory that nobody writes to"])
def test_a_first_process_that_is_not_at_work_is_not_waited_for(left: str, capsys: pytest.CaptureFixture[str]) -> None:
    if left != "nothing":
        staging_path(Path("data/tiny")).mkdir(parents=True)
    with pytest.raises(
        RunError, match=r"process 0 is not preparing data/tiny\. See its message.*prepare_data\.py tiny"
    ):
        open_as_here()
    assert capsys.readouterr().err == "waiting for process 0 to prepare data/tiny\n"


@pytest.mark.usefixtures("second")
def test_a_first_process_that_is_at_work_is_waited_for() -> None:
    def work() -> None:
        staging = staging_path(Path("data/tiny")) / UNFINISHED
        staging.mkdir(parents=True)
        for number in range(12):  # longer than either patience
            (staging / "train.tokens").write_bytes(bytes(number))
            time.sleep(0.1)
        prepare(["t.txt"], Path("data/tiny"), PrepareSettings(tokenizer="byte", workers=1))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert open_as_here().train.tokens > 0
    finally:
        thread.join()


@pytest.mark.usefixtures("second")
def test_a_process_that_waits_to_connect_says_for_what(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(nib.training.distributed, "SILENCE", 0.1)
    monkeypatch.setattr(nib.training.distributed, "PATIENCE", timedelta(seconds=1))
    with pytest.raises(RuntimeError):
        start_cluster("cpu")
    assert capsys.readouterr().err == "waiting for the other processes at localhost:1 for up to 0:00:01\n"
