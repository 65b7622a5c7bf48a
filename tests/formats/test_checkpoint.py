"""Checkpoint directories whose bytes were changed, by accident or on purpose."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nib.common.exits import InputError
from nib.formats.checkpoint import (
    FILES,
    KEEP_FILE,
    MODEL_FILE,
    SUMS_FILE,
    Checkpoint,
    name_checkpoint,
    open_checkpoint,
    remove_old,
    write_checkpoint,
)
from nib.tokenizer.load import make_tokenizer
from nib.training.optimizer import AdamW
from nib.training.saving import Saver
from nib.training.state import load_optimizer_tensors, optimizer_tensors

WEIGHTS = {"wte.weight": torch.arange(12.0).view(3, 4), "norm.weight": torch.ones(4)}
STATE = {"step": 7, "model_config": {"n_layer": 1}, "settings": {}}
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    optimizer = {f"{name}:exp_avg": value for name, value in WEIGHTS.items()}
    return write_checkpoint(root, WEIGHTS, optimizer, STATE, make_tokenizer("byte"))


def read_all(directory: Path) -> None:
    found = Checkpoint(directory, optimizer=True)
    found.weights(), found.optimizer(), found.tokenizer()


def test_what_was_written_is_read(checkpoint: Path) -> None:
    found = Checkpoint(checkpoint, optimizer=True)
    assert found.state["step"] == 7
    assert all(torch.equal(found.weights()[name], value) for name, value in WEIGHTS.items())
    assert open_checkpoint(checkpoint.parent / "latest").directory == checkpoint


@QUICK
@given(data=st.data())
def test_any_changed_byte_is_noticed(checkpoint: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from([*FILES, SUMS_FILE]))
    path = checkpoint / file
    content = path.read_bytes()
    changed = bytearray(content)
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3, unique=True)):
        changed[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        if file == SUMS_FILE:
            try:  # white space and the like may change without another meaning
                meant = json.loads(changed) == json.loads(content)
            except ValueError:
                meant = False
            if meant:
                return
        with pytest.raises(InputError):
            read_all(checkpoint)
    finally:
        path.write_bytes(content)


@QUICK
@given(data=st.data())
def test_files_forged_with_their_checksums_end_in_an_error_or_load(checkpoint: Path, data: st.DataObject) -> None:
    """A stranger can make checksums that agree. Whatever the bytes are: no traceback."""
    file = data.draw(st.sampled_from(FILES))
    path, sums = checkpoint / file, checkpoint / SUMS_FILE
    content, kept = path.read_bytes(), sums.read_bytes()
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, min(len(content), begin + 40)))
    path.write_bytes(content[:begin] + data.draw(st.binary(max_size=40)) + content[end:])
    sums.write_text(json.dumps({name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in FILES}))
    try:
        read_all(checkpoint)
    except InputError as error:
        assert "\n" not in " ".join(str(error).split())
    finally:
        path.write_bytes(content)
        sums.write_bytes(kept)


@pytest.mark.parametrize("part", ["model_config", "adapter"])
def test_a_part_of_the_state_that_is_no_object_is_refused(part: str, tmp_path: Path) -> None:
    written = write_checkpoint(tmp_path, WEIGHTS, {}, STATE | {part: 5}, make_tokenizer("byte"))
    with pytest.raises(InputError, match="was not written by this version of nib"):
        Checkpoint(written)


def test_a_header_that_claims_gigabytes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    forged = tmp_path / "forged"
    shutil.copytree(checkpoint, forged)
    (forged / MODEL_FILE).write_bytes((2**40).to_bytes(8, "little") + b"{}" * 50)
    sums = {name: hashlib.sha256((forged / name).read_bytes()).hexdigest() for name in FILES}
    (forged / SUMS_FILE).write_text(json.dumps(sums))
    with pytest.raises(InputError, match="cannot read"):
        Checkpoint(forged).weights()


def test_old_checkpoints_go_and_the_best_and_the_base_of_an_adapter_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, WEIGHTS, {}, {**STATE, "step": step}, make_tokenizer("byte"))
        if step == 2:
            (tmp_path / "best").write_text("step-00000002\n")
        if step == 1:
            (tmp_path / "step-00000001" / KEEP_FILE).touch()
        remove_old(tmp_path, 2, f"step-{step:08d}")
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == [1, 2, 3, 4]
    write_checkpoint(tmp_path, WEIGHTS, {}, {**STATE, "step": 5}, make_tokenizer("byte"))
    remove_old(tmp_path, 2, "step-00000005")
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == [1, 2, 4, 5]


def test_all_files_have_the_mode_that_the_umask_gives(checkpoint: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in checkpoint.iterdir()} == {checkpoint.stat().st_mode & 0o666}


def test_a_checkpoint_of_someone_else_is_not_called_damaged(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint, tmp_path / "checkpoints/step-00000007")

    def refused(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("nib.formats.checkpoint.file_sha256", refused)  # root may read everything
    with pytest.raises(InputError, match=r"cannot read .*model\.safetensors: Permission denied\. Let its owner"):
        open_checkpoint(tmp_path)


def test_a_link_to_latest_is_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    name_checkpoint(checkpoint.parent, "latest", checkpoint.name)
    (tmp_path / "link").symlink_to(checkpoint.parent / "latest")
    found = open_checkpoint(tmp_path / "link")
    assert found and found.directory.resolve() == checkpoint.resolve()


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    for step in (9, 3, 6):  # gone back from a damaged step 9
        write_checkpoint(tmp_path, WEIGHTS, {}, {**STATE, "step": step}, make_tokenizer("byte"))
    remove_old(tmp_path, 1, "step-00000006")
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000006", "step-00000009"]


@pytest.mark.parametrize("file", [*FILES, SUMS_FILE])
def test_a_pipe_in_place_of_a_file_is_refused(file: str, checkpoint: Path, tmp_path: Path) -> None:
    """Reading it would never end."""
    shutil.copytree(checkpoint, tmp_path / "forged")
    (tmp_path / "forged" / file).unlink()
    os.mkfifo(tmp_path / "forged" / file)
    with pytest.raises(InputError, match="it is not a regular file"):
        read_all(tmp_path / "forged")


@pytest.mark.parametrize("kind", ["step", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_optimizer_state_that_lacks_a_tensor_is_refused(name: str, kind: str) -> None:
    model = torch.nn.Linear(2, 2)
    optimizers: list[torch.optim.Optimizer] = [AdamW([{"params": [*model.parameters()]}])]
    names = {model.weight: "weight", model.bias: "bias"}
    tensors = optimizer_tensors(optimizers, names)
    load_optimizer_tensors(optimizers, names, tensors)
    del tensors[f"{name}:{kind}"]
    with pytest.raises(InputError, match=f"no optimizer state of {name} .{kind}"):
        load_optimizer_tensors(optimizers, names, tensors)


def test_a_write_that_fails_in_any_way_is_told(tmp_path: Path) -> None:
    """Not only by the disk: a bug in the thread must not pass for a checkpoint that was written."""
    saver = Saver(tmp_path, keep=1, tokenizer=make_tokenizer("byte"))
    saver.save(WEIGHTS, {}, {**STATE, "settings": object()}, best=False)
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.finish()
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, WEIGHTS, {}, {**STATE, "step": 1}, make_tokenizer("byte"))

    def full(tensors: object, path: Path) -> None:
        save_file({"x": torch.zeros(9)}, path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nib.formats.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, WEIGHTS, {}, {**STATE, "step": 2}, make_tokenizer("byte"))
    assert (tmp_path / "latest").read_text().strip() == "step-00000001"
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []
    read_all(tmp_path / "step-00000001")
