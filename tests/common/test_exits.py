"""How a script ends: nothing that a file or a name holds is a command to the terminal."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from conftest import Call
from model_helpers import random_model
from test_export import save_run

import evaluate
import export
import prepare_data
import sample
from nib.common.exits import InputError, RunError

TITLE = "\x1b]0;title\x07\x9b31m\u202e"


def harmless(text: str) -> None:
    assert text.startswith("error: ") and text.endswith("\n")
    assert text[:-1].isprintable() and "\\x1b]0;title\\x07" in text


@pytest.mark.parametrize(
    "error",
    [
        InputError(f"no {TITLE}\n. Mend it"),
        RunError(f"no {TITLE}\n. Mend it"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), TITLE),
        OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), TITLE),
    ],
)
def test_an_error_is_one_line_without_control_characters(error: Exception, call: Call, tmp_path: Path) -> None:
    def fail() -> int:
        raise error

    harmless(call(fail, cwd=tmp_path).stderr)


def test_names_are_shown_without_control_characters(call: Call, tmp_path: Path) -> None:
    save_run(tmp_path / "out/a", random_model(vocab_size=257))
    for main, arguments in (
        (sample.main, [TITLE]),
        (sample.main, ["a", f"--prompt=FILE:{TITLE}"]),
        (evaluate.main, ["a", f"--data={TITLE}"]),
        (export.main, [TITLE, "to"]),
        (prepare_data.main, [TITLE]),
    ):
        harmless(call(main, *arguments, cwd=tmp_path).stderr)
