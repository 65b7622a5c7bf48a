"""The run directory: what cannot be written in it is one line that says what is lost and what to do."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from test_train import in_corpus, train

from nib.common.exits import RunError
from nib.tokenizer.tokenizer import ByteTokenizer
from nib.training import state
from nib.training.state import Saver

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "log.txt"])
def test_a_file_of_the_run_that_cannot_be_written_is_one_line(name: str) -> None:
    Path("out/run", name).mkdir(parents=True)
    with pytest.raises(RunError, match=rf"cannot write to out/run/{name}: Is a directory. Make it a file") as found:
        train("--max_iters=1")
    del found  # its traceback holds the lock of the run


def test_a_checkpoint_that_cannot_be_written_says_what_there_is_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(state, "write_checkpoint", refuse)
    saver = Saver(tmp_path, 2, ByteTokenizer())
    (tmp_path / "checkpoints").mkdir()
    for latest, said in (("", "there is no checkpoint before it"), ("step-00000004", "before it, step-00000004, is")):
        (tmp_path / "checkpoints/latest").write_text(latest)
        saver.save({}, {}, {}, False)
        with pytest.raises(RunError, match=said):
            saver.finish()
