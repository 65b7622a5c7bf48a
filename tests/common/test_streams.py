"""Standard streams in every state that a user's shell, terminal or daemon gives them to the scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT

from nib.training.report import Reporter

STATES = {
    "closed": "closed, as by >&-",
    "full": "a full device",
    "ascii": "not UTF-8",
    "left": "a pipe without the other end",
    "line": "a pipe whose other end goes after the first line",
}
TINY = [
    "--dataset=words", "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=2",
    "--warmup_iters=1", "--device=cpu", "--max_iters=2", "--sample_interval=1",
]  # fmt: skip
SAMPLE = ["run", "--max-new-tokens=4"]
COMMANDS: dict[str, list[str]] = {
    "train": ["train.py", *TINY, "--out_dir=OUT"],
    "prepare": ["prepare_data.py", "texts/naïve 猫.txt", "--tokenizer=byte", "--workers=1", "--out=OUT é"],
    "export": ["export.py", "run", "OUT é"],
    "look": ["look.py", "run", "--prompt=é", "--max-new-tokens=2", "--output=OUT é"],
    "sample": ["sample.py", *SAMPLE, "--prompt=FILE:long.txt"],
    "sample --json": ["sample.py", *SAMPLE, "--prompt=é", "--prompt=FILE:long.txt", "--json"],
    "evaluate": ["evaluate.py", "run", "--data=texts/naïve 猫.txt"],
    "evaluate --json": ["evaluate.py", "run", "--data=texts/naïve 猫.txt", "--json"],
    "help": ["train.py", "--help"],
}
TELLS = ("train", "prepare", "export", "look")  # for these, standard output is no result
SHORT = ("evaluate", "evaluate --json", "help")  # may be in the pipe before its other end is closed


class Result(NamedTuple):
    status: int
    told: str  # on standard output
    errors: str


Run = Callable[..., Result]


@pytest.fixture(scope="module")
def place(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a dataset, texts and a trained run."""
    place = tmp_path_factory.mktemp("streams")
    (place / "data").symlink_to(corpus / "data")
    (place / "texts").mkdir()
    (place / "texts/naïve 猫.txt").write_text("a short text about 猫\n" * 20, encoding="utf-8")
    (place / "long.txt").write_text("line é\n" * 30_000, encoding="utf-8")  # more than a pipe holds
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Iterator[Run]:
    """Runs a script in `place` with its standard streams in the states that are given; see forks.py."""
    command = [sys.executable, str(ROOT / "tests/forks.py")]
    with subprocess.Popen(command, cwd=place, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        asked, answers = process.stdin, process.stdout
        assert asked and answers

        def run(script: str, *arguments: str, states: dict[int, str]) -> Result:
            print(json.dumps([script, arguments, states]), file=asked, flush=True)
            return Result(*json.loads(answers.readline()))

        assert run("train.py", *TINY, "--out_dir=out/run", states={}).status == 0
        yield run
        asked.close()


def steady(text: str) -> str:
    """What does not change from one run to the next: no times, no speeds, no name that is different in each."""
    return re.sub(r"[\d.]+ (s|MB/s)\b|\"tokens_per_second\": [\d.]+|made/\w+|^[\d -]+ [\d:]+ ", "", text, flags=re.M)


def made(out: Path) -> Any:
    """What is there of the work of a script: the files, and the lines of its log."""
    log = out / "log.txt"
    told = steady(log.read_text(encoding="utf-8")) if log.exists() else ""
    files = [out] if out.is_file() else out.rglob("*")
    return sorted(path.relative_to(out).as_posix() for path in files), told


def test_every_script_with_each_standard_stream_in_every_state(run: Run, place: Path) -> None:
    states: list[dict[int, str]] = [{}, {0: "closed", 1: "closed", 2: "closed"}, {1: "left", 2: "full"}]
    states += [{0: "closed"}, {0: "full"}, *({number: state} for number in (1, 2) for state in STATES)]
    usual: dict[str, Any] = {}
    wrong = []
    for name, (script, *arguments) in COMMANDS.items():
        for index, state in enumerate(states):
            out = f"made/{name}{index}"
            status, told, errors = run(script, *(word.replace("OUT", out) for word in arguments), states=state)
            work = made(next(place.glob(f"{out}*"), place / out)) if name in TELLS else None
            if not state:
                usual[name] = steady(told), work
                assert status == 0 and told and (work is None or work[0]), (name, status, errors)
            lost = state.get(1, "ascii") != "ascii" and name not in TELLS
            if status != lost and not (state == {1: "line"} and name in SHORT):
                wrong.append((name, state, f"status {status}", errors))
            last = errors.splitlines()[-1:]
            silent = not status or state[1] in ("left", "line")  # `| head` is no mistake
            complains = last and last[0].startswith("error: cannot write to standard output: ")
            if "Traceback" in errors or "ignored" in errors or not (2 in state or silent or complains):
                wrong.append((name, state, "on standard error", errors))
            if work != usual[name][1]:
                wrong.append((name, state, "not made as usual", work))
            if 1 not in state and steady(told) != usual[name][0]:
                wrong.append((name, state, "on standard output", told))
    assert not wrong


def test_a_pipe_that_does_not_wait_gets_everything(run: Run) -> None:
    """Programs such as ssh and node leave O_NONBLOCK set on what they share with others."""
    (script, *arguments), told = COMMANDS["sample"], []
    for states in ({}, {1: "busy"}):
        told.append(run(script, *arguments, states=states))
    assert told[0].status == 0 and told[0] == told[1]


def test_names_that_are_not_utf8_are_told_and_name_no_run(run: Run, place: Path) -> None:
    name = os.fsdecode(b"r\xff.py")
    (place / name).write_text("max_iters = 2\n")
    assert run("train.py", name, *TINY, states={}).status == 0
    assert run("sample.py", "out/r", "--max-new-tokens=2", states={}).status == 0
    assert run("prepare_data.py", name, "--tokenizer=byte", "--workers=1", "--out=made/r", states={}).status == 0
    refused = run("export.py", "run", os.fsdecode(b"made/\xff"), states={})
    assert refused.status == 2 and refused.errors == "error: made/\\udcff is not UTF-8. Give another directory\n"
    Reporter(place, active=True).append("log.txt", f"Go on with: train.py {name}")
    assert (place / "log.txt").read_text() == "Go on with: train.py r\\udcff.py"


INPUTS: dict[str, tuple[list[str], dict[str, str]]] = {  # what is said of a standard input; nothing: it is taken
    "--prompt -": (["sample.py", *SAMPLE, "--prompt=-"], {
        "closed": "", "line": "", "full": "cannot read the prompt from standard input: Bad file descriptor",
        "ascii": "the prompt in standard input is not UTF-8",
    }),
    "--interactive": (["sample.py", *SAMPLE, "--interactive"], {
        "closed": "", "line": "", "full": "cannot read standard input: Bad", "ascii": "standard input is not UTF-8",
    }),
    "byte": (["prepare_data.py", "-", "--tokenizer=byte", "--workers=1", "--out=OUT"], {
        "closed": "there is no text in -", "line": "", "full": "cannot read standard input: Bad",
        "ascii": "byte 0xff at offset 0 is not UTF-8",
    }),
    "bpe": (["prepare_data.py", "-", "--tokenizer=bpe:300", "--workers=1", "--out=OUT"], {
        "closed": "there is no text in -", "full": "cannot read standard input: Bad file descriptor",
    }),
}  # fmt: skip


def test_a_standard_input_that_cannot_be_read_is_empty_or_one_line(run: Run) -> None:
    for name, (command, states) in INPUTS.items():
        for state, said in states.items():
            found = run(*(word.replace("OUT", f"made/{name}-{state}") for word in command), states={0: state})
            assert found.status == (2 if said else 0), (name, state, found)
            assert found.errors.count("error: ") == bool(said) and "Traceback" not in found.errors, (name, state, found)
            if said:
                assert said in found.errors.splitlines()[-1], (name, state, found)
