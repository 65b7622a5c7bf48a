"""What a name means beside a directory of the same name, and commands that can be typed as they are printed."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import Call
from model_helpers import random_model
from test_changed_model import in_corpus, train
from test_export import save_run

import evaluate as evaluate_script
import prepare_data as prepare_script
import sample as sample_script
from nib import plot
from nib.common.exits import InputError
from nib.common.wording import typed
from nib.data.open import open_dataset
from nib.formats.load import open_source

__all__ = ["in_corpus"]

NAMES = ["with space", "it's", "-dash", "new\nline"]


def test_a_directory_of_something_else_does_not_hide_a_dataset(call: Call, tmp_path: Path) -> None:
    for name in ("words", "poems"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("a text\n" * 99)
    (tmp_path / "words/meta.json").write_text('{"title": "my words"}')
    assert open_dataset("words").directory == Path("data/words")
    save_run(tmp_path / "out/a", random_model(vocab_size=257), settings={"dataset": "words"})
    done = call(evaluate_script.main, "a", "--max-tokens=9", cwd=tmp_path)
    shutil.rmtree("words")
    Path("words").write_text("a file")
    again = call(evaluate_script.main, "a", "--max-tokens=9", cwd=tmp_path)
    assert done.returncode == again.returncode == 0 and done.stdout == again.stdout, done.stderr + again.stderr
    with pytest.raises(InputError, match=r"no dataset 'poems'.*python prepare_data\.py SOURCE --out data/poems"):
        open_dataset("poems")
    shutil.copytree("data/words", "near")
    assert open_dataset("near").directory == open_dataset("./near").directory == Path("near")


def test_a_directory_of_something_else_does_not_hide_a_run(tmp_path: Path) -> None:
    model = random_model(vocab_size=257)
    for name in ("a", "b"):
        run = save_run(tmp_path / "out" / name, model)
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    (tmp_path / "a/config.json").write_text('{"model_type": "of my own"}')
    (tmp_path / "b").write_text("a file")
    for name in ("a", "b"):
        assert open_source(name).directory == Path(f"out/{name}/checkpoints/step-00000003")
        assert plot.read_metrics(name)[0]["loss"] == 2.0
    shutil.copytree("out/a", "near")
    assert open_source("near").directory.parent.parent == Path("near")
    with pytest.raises(InputError, match="no run or checkpoint b/c"):
        open_source("b/c")


@pytest.mark.parametrize("name", NAMES)
def test_printed_commands_can_be_typed(
    name: str, call: Call, capsys: pytest.CaptureFixture[str], corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whatever a dataset and a run are called, and also beside their texts."""
    Path("data").unlink()
    shutil.copytree(corpus / "texts", name)
    for number, out in enumerate(("", f"{name}/deep", f"data/in/{name}")):
        sources = [*([f"--out={out}"] if out else []), "--", name]
        done = call(prepare_script.main, "--tokenizer=byte", "--workers=1", *sources, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        words = shlex.split(done.stdout.partition("train on it: ")[2])
        assert words[:2] == ["python", "train.py"] and len(words) == 3
        out_dir = f"{number}/{name}" if out else f"{name}-run"
        monkeypatch.setattr(sys, "argv", words[1:])
        assert train(*words[2:], f"--out_dir={out_dir}") == 0
        words = shlex.split(capsys.readouterr().out.partition("sample from it: ")[2])
        assert words[:2] == ["python", "sample.py"] and len(words) == 3
        assert sample_script.main([*words[2:], "--max-new-tokens=1"]) == 0
        assert f"{out_dir}/checkpoints/step-00000002 on" in capsys.readouterr().err


def test_a_name_that_two_datasets_have_is_printed_as_a_path(call: Call, corpus: Path, tmp_path: Path) -> None:
    Path("data").unlink()
    for out in ("words", "data/words"):
        arguments = [str(corpus / "texts"), "--tokenizer=byte", "--workers=1", "--out=" + out]
        done = call(prepare_script.main, *arguments, cwd=tmp_path)
        assert done.stdout.endswith(f"train on it: python train.py --dataset={out}\n")


def test_a_path_is_never_taken_for_an_option() -> None:
    assert [typed(name) for name in ("out/a", "-a", "a b", Path("--x"))] == ["out/a", "./-a", "'a b'", "./--x"]
