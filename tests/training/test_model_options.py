"""A field of GPTConfig is a setting: on the command line, in help, in config files, in checks and on resuming."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import model
from nib.training.model_options import MODEL_FILE, load_config, model_settings
from nib.training.settings import TrainSettings

TINY = (
    "--dataset=words --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=2 --warmup_iters=1 "
    "--eval_interval=0 --device=cpu --out_dir=out/run"
).split()


def edited(directory: Path, old: str, new: str) -> Path:
    source = MODEL_FILE.read_text(encoding="utf-8")
    assert source.count(old) == 1
    path = directory / "model.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    return path


def test_settings_are_the_fields_of_gpt_config() -> None:
    settings = {field.name: field for field in dataclasses.fields(TrainSettings)}
    for field in dataclasses.fields(model.GPTConfig):
        if field.name != "vocab_size":
            assert settings[field.name].default == field.default
            assert settings[field.name].metadata["help"], f"{field.name} has no comment"


def test_reading_the_options_imports_no_torch() -> None:
    code = "import sys, nib.training.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_model_file_that_needs_torch_above_gpt_config(tmp_path: Path) -> None:
    heading = "@dataclass\nclass GPTConfig:"
    path = edited(tmp_path, heading, "LARGEST = torch.finfo(torch.float16).max\n\n\n" + heading)
    config, comments = load_config(path)
    assert config().n_layer == 6 and comments["n_layer"] == "blocks"


def test_a_gpt_config_with_a_text_and_a_comment_that_are_not_indented(tmp_path: Path) -> None:
    first = "    n_layer: int = 6"
    path = edited(tmp_path, first, f'# blocks\n    """A text\nof two lines."""\n{first}')
    config, comments = load_config(path)
    assert config().n_layer == 6 and comments == load_config()[1]


@pytest.mark.parametrize("line", ["sizes: tuple[int, ...] = (1, 2)", "maybe: int | None = None"])
def test_a_field_that_cannot_be_written_as_an_option(tmp_path: Path, line: str) -> None:
    path = edited(tmp_path, "    n_layer: int = 6", f"    {line}\n    n_layer: int = 6")
    with pytest.raises(TypeError, match=f"GPTConfig.{line.split(':')[0]} needs a default, and a type of int"):
        model_settings(*load_config(path))


@pytest.fixture
def repository(tmp_path: Path, corpus: Path) -> Path:
    """A copy of the scripts whose GPTConfig has one line more."""
    (tmp_path / "data").symlink_to(corpus / "data")
    shutil.copytree(ROOT / "nib", tmp_path / "nib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path / "train.py")
    option = '    gate: Literal["none", "all"] = "none"  # my gate\n'
    edited(tmp_path, "    n_layer: int = 6", option + "    n_layer: int = 6")
    return tmp_path


def train(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "train.py", *arguments]
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120, env=environment)


def test_a_new_field_is_an_option_everywhere(repository: Path) -> None:
    assert "--gate=none|all my gate [none]" in " ".join(train(repository, "--help").stdout.split())
    assert "--gate must be one of none, all, not 'al'. Did you mean all?" in train(repository, "--gate=al").stderr
    (repository / "mine.py").write_text("gate = 'all'\n")
    done = train(repository, "mine.py", *TINY)
    assert done.returncode == 0, done.stderr
    assert '"gate": "all"' in (repository / "out/run/config.json").read_text()
    changed = train(repository, *TINY)
    assert changed.returncode == 2
    assert "gate is 'none' but the run in out/run was made with 'all'" in changed.stderr
    (state,) = (repository / "out/run/checkpoints").glob("step-*/state.json")
    assert '"gate": "all"' in state.read_text()


def test_a_run_from_before_the_option_goes_on_only_with_its_default(repository: Path) -> None:
    changed = (repository / "model.py").read_text()
    shutil.copy(MODEL_FILE, repository / "model.py")
    assert train(repository, *TINY).returncode == 0
    (repository / "model.py").write_text(changed)
    refused = train(repository, *TINY, "--gate=all", "--max_iters=3")
    assert refused.returncode == 2 and "was made with 'none'" in refused.stderr
    assert train(repository, *TINY, "--max_iters=3").returncode == 0


@pytest.mark.parametrize("name", ["parallel", "seed", "steps"])
def test_an_option_with_the_name_of_a_training_setting_is_refused(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "nib", tmp_path / "nib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    changed = source.replace("    n_layer: int", f"    {name}: int = 2  # mine\n    n_layer: int", 1)
    (tmp_path / "model.py").write_text(changed, encoding="utf-8")
    done = subprocess.run([sys.executable, "train.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and f"GPTConfig.{name} has the name of a setting of training" in done.stderr
