"""A parameter that somebody adds to model.py needs no second place, and no format that lacks it takes it silently."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from model_helpers import random_model
from safetensors.torch import load_file
from test_export import save_run
from test_load import hf_bytes

from model import GPTConfig
from nib.common.exits import InputError
from nib.formats.export import export
from nib.formats.load import open_source

TINY = (
    "--dataset=words --n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --warmup_iters=1 "
    "--eval_interval=0 --schedule=constant --learning_rate=1e-2 --device=cpu"
).split()
# A learned gain of what attention adds to the residual stream, in each block.
CHANGES = {
    "        self.mlp = MLP(config)\n": "        self.gain = nn.Parameter(torch.ones(config.n_embd))\n",
    "        x = x + self.attention(self.attention_norm(x), *attention_inputs)\n": "        x = x * self.gain\n",
}


@pytest.fixture
def repository(tmp_path: Path, corpus: Path) -> Path:
    """A copy of nib in which model.py has one parameter more, and nothing else is changed."""
    (tmp_path / "data").symlink_to(corpus / "data")
    shutil.copytree(ROOT / "nib", tmp_path / "nib", ignore=shutil.ignore_patterns("__pycache__"))
    for script in ("train.py", "sample.py", "evaluate.py", "export.py"):
        shutil.copy(ROOT / script, tmp_path)
    source = (ROOT / "model.py").read_text()
    for after, line in CHANGES.items():
        assert source.count(after) == 1
        source = source.replace(after, after + line)
    (tmp_path / "model.py").write_text(source)
    return tmp_path


def test_a_new_parameter_is_trained_kept_and_sampled_and_not_exported(repository: Path) -> None:
    def call(*command: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, *command], cwd=repository, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == status, done.stderr
        assert status == 0 or done.stderr.count("\n") == 1
        return done.stdout + done.stderr

    def weights(run: str) -> dict[str, torch.Tensor]:
        return load_file(repository / f"out/{run}/checkpoints/step-00000004/model.safetensors")

    call("train.py", *TINY, "--max_iters=4", "--out_dir=out/whole")
    call("train.py", *TINY, "--max_iters=2", "--out_dir=out/run")
    assert "resume: step 2" in call("train.py", *TINY, "--max_iters=4", "--out_dir=out/run")
    whole, resumed = weights("whole"), weights("run")
    assert (whole["blocks.1.gain"] != 1).any()
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)

    for options in ([], ["--quantize=int8"]):
        call("sample.py", "run", "--max-new-tokens=4", "--device=cpu", *options)
    call("evaluate.py", "run", "--max-tokens=20", "--device=cpu")
    call("train.py", *TINY, "--max_iters=1", "--init_from=run", "--out_dir=out/tuned")

    lacks = "error: this model.py has the parameter blocks.0.gain, which Qwen3ForCausalLM lacks. "
    assert call("export.py", "run", "exported", status=2).startswith(lacks)
    assert not (repository / "exported").exists()
    hf_bytes(repository / "hf", "Qwen3", head_dim=8)
    assert lacks in call("sample.py", "hf", status=2)


@dataclass
class OwnConfig(GPTConfig):
    gate: str = "none"


def test_an_option_of_ones_own_is_exported_only_at_its_default(tmp_path: Path) -> None:
    source = open_source(str(save_run(tmp_path / "run", random_model(vocab_size=257))))
    config = OwnConfig(**source.model_config, gate="all")
    with pytest.raises(InputError, match=r"no architecture of transformers has gate=all\. Export a model with none"):
        export(source, config, source.weights(), tmp_path / "out")
    config.gate = "none"
    assert export(source, config, source.weights(), tmp_path / "out") == "GPT2LMHeadModel"
