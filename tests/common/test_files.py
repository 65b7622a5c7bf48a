"""What is written is whole or not there, and what is read has an end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from nib.common.exits import InputError
from nib.common.files import new_directory, plain_file, read_object


def test_a_directory_appears_whole_and_its_leftovers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.staging/nib-unfinished/deep").mkdir(parents=True)  # as a killed process leaves it
    with new_directory(tmp_path / "out") as aside:
        assert list(aside.iterdir()) == []
        (aside / "a").write_text("1")
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out/a").read_text() == "1"


def test_a_directory_that_is_there_is_replaced_only_where_that_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("")
    with pytest.raises(InputError, match="was made by another program"), new_directory(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["old"]
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out", replace=True) as aside:
        (aside / "new").write_text("")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["old"]
    with new_directory(tmp_path / "out", replace=True) as aside:
        (aside / "new").write_text("")
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["new"]


WRITER = """
import sys, time
from pathlib import Path
from nib.common.exits import InputError
from nib.common.files import new_directory
with new_directory(Path("out")) as aside:
    (aside / "a").write_text("1")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_and_none_after_a_signal(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        with pytest.raises(InputError, match="another run is preparing"), new_directory(tmp_path / "out"):
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_a_file_without_end_or_measure_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(101))
    for name in ("pipe", "large", "none"):
        with pytest.raises(OSError, match=r"not a regular file|over 0 MB|No such file"):
            plain_file(tmp_path / name, 100)
    for text in ("[" * 10**5, "[1]", '{"a": ', "", "\udcff"):
        (tmp_path / "file").write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError):
            read_object(tmp_path / "file", 1 << 20)
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(tmp_path / "file", 100) == {"a": 1}
