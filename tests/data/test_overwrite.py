"""--overwrite: only files of the old dataset go, and one of the two datasets is there whole, whatever happens."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from data_helpers import command, left_over

from nib.common.exits import InputError
from nib.data.dataset import Dataset
from nib.data.prepare import prepare
from nib.data.settings import PrepareSettings
from nib.data.shards import dataset_files, staging_directory


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(
    out: Path, text: str, overwrite: bool = True, shard_tokens: int = 10, source: Path = Path("text.txt")
) -> dict[str, Any]:
    source.write_text(text)
    settings = PrepareSettings(
        tokenizer="byte", val_fraction=0.0, workers=1, shard_tokens=shard_tokens, overwrite=overwrite
    )
    return prepare([str(source)], out, settings)


def content(out: Path) -> dict[str, bytes]:
    """All that is in a directory, hidden files and what is below as well."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


OLD, NEW = "the old text, of many shards " * 5, "the new one " * 5


def add_files(out: Path) -> dict[str, bytes]:
    """What a user may keep beside a dataset."""
    make(out / "inner", "another dataset", overwrite=False)
    for name in ("input.txt", "train.bin", "train-00000.txt", "train-1.bin", ".hidden", "notes/meta.json"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(f"the user's own {name}")
    return {name: data for name, data in content(out).items() if name not in dataset_files(out)}


@pytest.mark.parametrize("target", ["directory", "link", "working directory"])
def test_only_files_of_the_dataset_are_replaced(work: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = work / "place"
    make(place, OLD, overwrite=False)
    theirs = add_files(place)
    Dataset(place)  # leaves stamps beside the shards
    out = {"directory": place, "link": work / "link", "working directory": Path()}[target]
    if target == "link":
        out.symlink_to(place)
    if target == "working directory":
        monkeypatch.chdir(place)
    theirs["input.txt"] = NEW.encode()
    meta = make(out, NEW, source=out / "input.txt")
    found = content(place)
    assert {name: found.pop(name) for name in theirs} == theirs
    assert set(found) == {"meta.json", "nib_tokenizer.json", *meta["sha256"]}, "something of the old one is left"
    assert Dataset(place).train.read(0, 100).tolist()[:-1] == list(NEW.encode())


class Killed(BaseException):
    pass


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever changes a directory fails from its `number`-th time on: a dead process does nothing any more."""
    left = number

    def counting(change: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return change(*arguments, **options)

        return counted

    for owner, names in ((Path, ("rename", "unlink", "mkdir", "rmdir")), (shutil, ("rmtree",)), (os, ("fsync",))):
        for name in names:
            monkeypatch.setattr(owner, name, counting(getattr(owner, name)))


def test_a_kill_at_any_moment_leaves_one_whole_dataset_or_a_line_that_says_how_to_finish(work: Path) -> None:
    out = work / "out"
    for name, text, shard_tokens in (("old", OLD, 50), ("new", NEW, 20)):
        make(work / name, text, shard_tokens=shard_tokens)
    old, new = content(work / "old"), content(work / "new")
    (work / "old" / "mine.txt").write_text("years of work")

    def replace() -> None:
        with staging_directory(out, overwrite=True) as staging:
            shutil.copytree(work / "new", staging, dirs_exist_ok=True)

    moments, unfinished, done = 0, 0, False
    while not done:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(work / "old", out)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(moments, patch)
            try:
                replace()
                done = True
            except Killed:
                moments += 1
        try:
            Dataset(out)  # leaves stamps
            found = {name: data for name, data in content(out).items() if name in dataset_files(out)}
            assert found in ([new] if done else [old, new])
        except InputError as error:
            assert "was interrupted. Run the same prepare_data.py command again" in str(error)
            unfinished += 1
            with pytest.raises(InputError, match=r"exists\. Give --overwrite"):
                make(out, "x", overwrite=False)  # finishes it all the same
            assert content(out) == new | {"mine.txt": b"years of work"}
        replace()
        assert content(out) == new | {"mine.txt": b"years of work"} and left_over(out) == sorted([*new, "mine.txt"])
    assert moments > 12 and unfinished > 4


def test_a_failure_leaves_the_old_dataset(work: Path) -> None:
    make(work / "out", OLD, overwrite=False)
    before = content(work / "out")
    (work / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not UTF-8"):
        prepare(["bad.txt"], work / "out", PrepareSettings(tokenizer="byte", workers=1, overwrite=True))
    assert content(work / "out") == before


def test_a_file_with_the_name_of_a_shard_that_meta_json_does_not_list_is_not_replaced(work: Path) -> None:
    make(work / "out", NEW, overwrite=False)
    (work / "out" / "train-00077.bin").write_text("who knows")
    before = content(work / "out")
    with pytest.raises(InputError, match=r"train-00077.bin is not part of the dataset there. Move it"):
        make(work / "out", OLD)
    assert content(work / "out") == before


@pytest.mark.parametrize("place", [".out.staging", "out/.nib-staging", "out/.nib-replacement"])
@pytest.mark.parametrize("name", ["thesis.txt", "train.tokens", "sub/meta.json", "meta.json"])
def test_a_hidden_directory_of_the_user_is_not_emptied(work: Path, place: str, name: str) -> None:
    if place.startswith("out/"):
        make(work / "out", OLD)
    (work / place / name).parent.mkdir(parents=True)
    (work / place / name).write_text("years of work")
    before = content(work)
    if place == "out/.nib-replacement":  # not where nib works
        make(work / "out", NEW)
    else:
        with pytest.raises(InputError, match=rf"{place}, nib's temporary directory, holds files"):
            make(work / "out", NEW, source=work / "text.txt")
        assert {**content(work), "text.txt": b""} == {**before, "text.txt": b""}
    assert (work / place / name).read_text() == "years of work"


def test_a_link_where_nib_would_work_is_not_followed(work: Path) -> None:
    (work / "mine/nib-unfinished").mkdir(parents=True)
    (work / "mine/nib-unfinished/thesis.txt").write_text("years of work")
    (work / ".out.staging").symlink_to("mine")
    with pytest.raises(InputError, match="holds files that nib did not write"):
        make(work / "out", NEW)
    assert (work / "mine/nib-unfinished/thesis.txt").exists()


def test_a_meta_json_of_a_stranger_has_nothing_else_removed(work: Path) -> None:
    out = work / "out"
    meta = make(out, OLD, overwrite=False)
    for name in ("keep.txt", "out/keep.txt"):
        (work / name).write_text("keep")
    more = dict.fromkeys(["../keep.txt", "keep.txt", str(work / "keep.txt"), "../out/keep.txt", "."], "0" * 64)
    (out / "meta.json").write_text(json.dumps(meta | {"sha256": meta["sha256"] | more}))
    make(out, NEW)
    assert (work / "keep.txt").read_text() == (out / "keep.txt").read_text() == "keep"


def test_a_link_to_nothing_is_not_written_through(work: Path) -> None:
    (work / "out").symlink_to(work / "nothing")
    with pytest.raises(InputError, match="is not prepared data"):
        make(work / "out", NEW)
    assert left_over(work) == ["out", "text.txt"]


def test_an_existing_directory_is_prepared_by_one_run_at_a_time(work: Path) -> None:
    make(work / "out", OLD, overwrite=False)
    descriptor = os.open(work / "out", os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is preparing"):
            make(work / "out", NEW)
    finally:
        os.close(descriptor)
    make(work / "out", NEW)


def test_a_mount_point_is_written_in_place(work: Path) -> None:
    (work / "text.txt").write_text(NEW)
    (work / "disk").mkdir()
    probe = ["unshare", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*probe, "mount -t tmpfs none disk"]).returncode:
        pytest.skip("no right to mount")
    script = 'mount -t tmpfs none disk && "$@" && echo mine > disk/mine.txt && "$@" && ls -A disk'
    prepare_disk = command("text.txt", "--out=disk", "--tokenizer=byte", "--workers=1", "--overwrite")
    done = subprocess.run([*probe, script, "sh", *prepare_disk], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["meta.json", "mine.txt", "nib_tokenizer.json", "train-00000.bin", "val-00000.bin"]
    assert sorted(done.stdout.split()[-5:]) == names


def test_overwrite_is_advised_only_where_it_is_taken(tmp_path: Path) -> None:
    make(Path("made"), OLD)
    Path("mine").mkdir()
    Path("mine/file").write_text("mine")
    Path("file").write_text("mine")
    for out, advised in (("made", True), ("mine", False), ("file", False)):
        with pytest.raises(InputError, match=f"{out} exists") as refused:
            make(Path(out), NEW, overwrite=False)
        assert ("--overwrite" in str(refused.value)) == advised
