"""The examples of README.md, "Change the model": each diff, applied to a copy, trains, resumes and samples.

And a copy from which an option is removed, and whose activation is another.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_load import hf_bytes

TRAIN = (
    "train --dataset=words --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=4 --warmup_iters=1 "
    "--schedule=constant --eval_interval=0 --device=cpu"
).split()
WHOLE = [*TRAIN, "--out_dir=out/whole", "--max_iters=4"]
PARTS = [[*TRAIN, "--out_dir=out/parts", f"--max_iters={steps}"] for steps in (2, 4)]
SAMPLE = "sample out/whole --prompt=line --max-new-tokens=20 --device=cpu".split()
# One process for all commands, so that torch is imported once. Each answer ends with a line of its own.
PROGRAM = """
import importlib, json, sys
from nib.common.exits import InputError
for script, *arguments in json.loads(sys.argv[1]):
    sys.argv = [script + ".py", *arguments]
    try:
        importlib.import_module(script).main()
    except InputError as error:
        print("error:", error)
    print("----", flush=True)
"""


def diffs() -> list[str]:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Change the model\n")[1].split("\n## ")[0]
    return [block.split("```")[0] for block in section.split("```diff\n")[1:]]


def apply(diff: str, path: Path) -> None:
    """Apply the diff to the file; each hunk begins with a line @@ and fits in exactly one place."""
    source = path.read_text(encoding="utf-8")
    for hunk in diff.split(" @@\n")[1:]:
        lines = [line or " " for line in hunk.splitlines() if not line.startswith("@@ ")]
        before, after = ("".join(f"{line[1:]}\n" for line in lines if line[0] in kept) for kept in (" -", " +"))
        assert source.count(before) == 1, f"not in one place of {path.name}:\n{before}"
        source = source.replace(before, after)
    path.write_text(source, encoding="utf-8")


@pytest.fixture
def copy(corpus: Path, tmp_path: Path) -> Path:
    for name in ("model.py", "train.py", "sample.py", "evaluate.py", "export.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "nib", tmp_path / "nib", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").symlink_to(corpus / "data")
    return tmp_path


def run(copy: Path, *commands: list[str]) -> list[str]:
    """What each of these commands of the copy's scripts prints."""
    program = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = subprocess.run(program, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    return done.stdout.split("----\n")[:-1]


def weights(copy: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(copy / f"out/{run}/checkpoints/step-00000004/model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_new_option_is_one_line_and_the_place_where_it_acts(copy: Path) -> None:
    run(copy, WHOLE)
    (copy / "out/whole").rename(copy / "out/before")
    diff = diffs()[0]
    apply(diff, copy / "model.py")
    name, comment = diff.split("+    ")[1].split(":")[0], diff.split("# ")[1].split("\n")[0]
    on = f"--{name}"
    _, _, resumed, text, uncached, before, refused = run(
        copy, [*WHOLE, on], [*PARTS[0], on], [*PARTS[1], on], SAMPLE, [*SAMPLE, "--no-cache"],
        ["sample", "out/before", "--max-new-tokens=5", "--device=cpu"], PARTS[1],
    )  # fmt: skip
    assert "resume: step 2" in resumed and same(weights(copy, "parts"), weights(copy, "whole"))
    assert list(weights(copy, "before")) == list(weights(copy, "whole"))
    assert not same(weights(copy, "before"), weights(copy, "whole")), "the option acts"
    assert json.loads((copy / "out/whole/config.json").read_text())["model_config"][name] is True
    assert "line" in text and text == uncached
    assert "error" not in before, "a checkpoint from before opens"
    assert f"error: {name} is False but the run in out/parts was made with True" in refused
    helped = subprocess.run([sys.executable, "train.py", "--help"], cwd=copy, capture_output=True, text=True).stdout
    assert on in helped and comment in " ".join(helped.split())
    shutil.copy(ROOT / "model.py", copy)
    for refused in run(copy, PARTS[1], [*PARTS[1], "--eval_only"]):
        assert (
            "out/parts" in refused
            and f"does not fit this model.py: got an unexpected keyword argument '{name}'" in refused
        )


def test_a_new_parameter_is_only_the_place_where_it_acts(copy: Path) -> None:
    apply(diffs()[1], copy / "model.py")
    hf_bytes(copy / "hf", "Qwen3", head_dim=8)
    tuned = [*TRAIN, "--max_iters=1", "--init_from=out/whole", "--out_dir=out/tuned"]
    _, _, resumed, text, uncached, int8, score, fine_tuned, exported, theirs = run(
        copy, WHOLE, *PARTS, SAMPLE, [*SAMPLE, "--no-cache"], [*SAMPLE, "--quantize=int8"],
        ["evaluate", "out/whole", "--max-tokens=20", "--device=cpu"], tuned,
        ["export", "out/whole", "exported"], ["sample", "hf"],
    )  # fmt: skip
    assert "resume: step 2" in resumed and same(weights(copy, "parts"), weights(copy, "whole"))
    scales = [weights(copy, "whole")[f"blocks.{layer}.scale"] for layer in range(2)]
    assert all(scale.shape == (32,) and not torch.equal(scale, torch.ones(32)) for scale in scales), "it is trained"
    assert "line" in text and text == uncached and "line" in int8
    assert "bits_per_byte" in score and "done: step 1" in fine_tuned
    lacks = "error: this model.py has the parameter blocks.0.scale, which Qwen3ForCausalLM lacks. "
    assert lacks in exported and lacks in theirs
    assert not (copy / "exported").exists(), "no format that lacks it takes it silently"


def test_an_option_may_be_removed_and_another_activation_is_noticed_at_export(copy: Path) -> None:
    source = (copy / "model.py").read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if not line.startswith("    window: int")]
    changed = "\n".join(lines).replace("mlp_hidden window dropout", "mlp_hidden dropout")
    (copy / "model.py").write_text(changed.replace("self.config.window", "0"), encoding="utf-8")
    printed = run(copy, WHOLE, SAMPLE, ["export", "out/whole", "one"])
    assert "one as Qwen3ForCausalLM" in printed[2] and "warning" not in printed[2]
    assert json.loads((copy / "one/config.json").read_text())["use_sliding_window"] is False
    (copy / "model.py").write_text(source.replace("F.silu(gate)", "F.gelu(gate)"), encoding="utf-8")
    (printed,) = run(copy, ["export", "out/whole", "two"])
    assert "warning: model.py computes something else than other programs will" in printed
    assert "two as Qwen3ForCausalLM" in printed
