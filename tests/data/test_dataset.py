"""Opening a data directory: what is noticed, what is remembered, and that any meta.json is sound or refused."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import nib.data.dataset
from nib.common.exits import InputError, RunError
from nib.data.dataset import Dataset
from nib.data.sequences import ValidationWindows
from nib.tokenizer.tokenizer import ByteTokenizer, CharTokenizer

torch.set_num_threads(1)
quick = settings(max_examples=100, deadline=None, database=None, derandomize=True)


# ---- opening a directory -------------------------------------------------------------------------------------------


def write_dataset(
    directory: Path, train: NDArray[Any], val: NDArray[Any], *, dtype: str = "uint16", shard_tokens: int = 1000
) -> dict[str, Any]:
    """A data directory with the byte tokenizer, as prepare_data.py writes it; returns its meta.json."""
    directory.mkdir(parents=True, exist_ok=True)
    ByteTokenizer().save(directory)
    sha256 = {}
    for split, tokens in (("train", train), ("val", val)):
        for index in range(-(-len(tokens) // shard_tokens)):
            data = tokens[index * shard_tokens : (index + 1) * shard_tokens].astype(f"<{dtype[0]}{int(dtype[4:]) // 8}")
            (directory / f"{split}-{index:05d}.bin").write_bytes(data.tobytes())
            sha256[f"{split}-{index:05d}.bin"] = hashlib.sha256(data.tobytes()).hexdigest()
    counts = {"train": len(train), "val": len(val)}
    meta = {
        "format": "nib-data-1", "source": ["texts"], "tokenizer": "byte", "vocab_size": 257, "dtype": dtype,
        "tokens": counts, "bytes": counts, "documents": {"train": 1, "val": 1}, "shard_tokens": shard_tokens,
        "sha256": sha256, "val_fraction": 0.1, "seed": 1337,
    }  # fmt: skip
    write_meta(directory, meta)
    return meta


def write_meta(directory: Path, meta: Any) -> None:
    (directory / "meta.json").write_text(json.dumps(meta))


TRAIN, VAL = np.arange(2500) % 257, np.arange(300) % 200


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "data", TRAIN, VAL)
    return tmp_path / "data"


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_sound_directory_opens(dtype: str, tmp_path: Path) -> None:
    write_dataset(tmp_path, TRAIN, VAL, dtype=dtype)
    dataset = Dataset(tmp_path)
    assert dataset.vocab_size == 257 and dataset.tokenizer.name == "byte"
    assert dataset.train.read(0, 9999).tolist() == TRAIN.tolist()
    assert dataset.val.read(0, 9999).tolist() == VAL.tolist()


def test_a_split_may_be_empty(tmp_path: Path) -> None:
    write_dataset(tmp_path, TRAIN, VAL[:0])
    assert Dataset(tmp_path).val.tokens == 0 and ValidationWindows(Dataset(tmp_path).val, 8, 0).size == 0


def test_prepared_data_opens(corpus: Path) -> None:
    dataset = Dataset(corpus / "data" / "words")
    tokens = dataset.train.read(0, dataset.train.tokens)
    assert dataset.tokenizer.decode(tokens[:6].tolist()) == "line 0"
    assert dataset.meta["bytes"]["train"] == (tokens < 256).sum()


def rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
    """Change a file's content and take care that its times say so, also on a clock that ticks slowly."""
    content = bytearray(path.read_bytes())
    change(content)
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before + 10**9, before + 10**9))


def put_id(directory: Path, token: int) -> None:
    """An id in the second shard, with its sha256 rewritten to match."""
    path = directory / "train-00001.bin"
    rewrite(path, lambda content: content.__setitem__(slice(40, 42), token.to_bytes(2, "little")))
    meta = json.loads((directory / "meta.json").read_text())
    meta["sha256"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    write_meta(directory, meta)


def change_meta(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        write_meta(directory, {**json.loads((directory / "meta.json").read_text()), **changes})

    return change


def shard_is_a_directory(directory: Path) -> None:
    """Of the very size that the shard has to have."""
    path = directory / "val-00000.bin"
    path.unlink()
    path.mkdir()
    counts = {"train": 2500, "val": path.stat().st_size // 2}
    change_meta(tokens=counts, shard_tokens=max(2500, counts["val"]))(directory)
    whole = np.arange(2500, dtype="<u2") % 257
    (directory / "train-00000.bin").write_bytes(whole.tobytes())
    sums = {"train-00000.bin": hashlib.sha256(whole.tobytes()).hexdigest()}
    change_meta(sha256=sums)(directory)


def shard(name: str, change: Callable[[bytearray], object]) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory / name, change)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte flipped": (
        shard("train-00001.bin", lambda content: content.__setitem__(7, content[7] ^ 1)),
        r"train-00001.bin does not have the content that meta.json records",
    ),
    "a byte of val flipped": (shard("val-00000.bin", lambda c: c.__setitem__(-1, c[-1] ^ 128)), r"val-00000.bin does"),
    "two bytes lost": (
        shard("train-00002.bin", lambda content: content.__delitem__(slice(0, 2))),
        r"train-00002.bin has 998 bytes instead of 1000",
    ),
    "an odd size": (shard("train-00000.bin", lambda content: content.append(0)), r"has 2001 bytes instead of 2000"),
    "emptied": (shard("val-00000.bin", lambda content: content.clear()), r"val-00000.bin has 0 bytes instead of 600"),
    "shard missing": (lambda directory: (directory / "train-00001.bin").unlink(), r"cannot read .*train-00001.bin: No"),
    "a directory for a shard": (shard_is_a_directory, r"cannot read .*val-00000.bin"),
    "id beyond the vocabulary": (
        lambda directory: put_id(directory, 257),
        r"train-00001.bin holds token id 257, beyond the vocabulary of 257",
    ),
    "largest id of the dtype": (lambda directory: put_id(directory, 65535), r"holds token id 65535"),
    "wrong dtype": (change_meta(dtype="uint32"), r"train-00000.bin has 2000 bytes instead of 4000"),
    "wrong dtype, and counts that fit": (
        change_meta(dtype="uint32", tokens={"train": 1250, "val": 150}, shard_tokens=500),
        r"train-00000.bin holds token id \d+, beyond the vocabulary",
    ),
    "unknown dtype": (change_meta(dtype="int64"), r"meta.json is not what prepare_data.py writes"),
    "smaller vocabulary": (change_meta(vocab_size=200), r"the tokenizer has 257 ids, meta.json says 200"),
    "another tokenizer": (
        lambda directory: CharTokenizer("abc").save(directory),
        r"the tokenizer has 3 ids, meta.json says 257",
    ),
    "no tokenizer": (lambda directory: (directory / "nib_tokenizer.json").unlink(), r"cannot read tokenizer"),
    "no sums": (change_meta(sha256={}), r"train-00000.bin does not have the content"),
    "more tokens than there are": (change_meta(tokens={"train": 2501, "val": 300}), r"has 1000 bytes instead of 1002"),
    "a count beyond all disks": (change_meta(tokens={"train": 10**400, "val": 300}), r"meta.json is not what"),
    "a count that is true": (change_meta(vocab_size=True), r"meta.json is not what"),
    "shards of no tokens": (change_meta(shard_tokens=0), r"meta.json is not what"),
    "another format": (change_meta(format="nib-data-2"), r"meta.json is not what"),
    "no name of the tokenizer": (change_meta(tokenizer=None), r"meta.json is not what"),
    "no meta.json": (lambda directory: (directory / "meta.json").unlink(), r"no prepared data in .*data. Make it"),
    "meta.json cut": (shard("meta.json", lambda content: content.__delitem__(slice(50, None))), r"meta.json is not"),
    "meta.json nested deeply": (lambda directory: (directory / "meta.json").write_text("[" * 10**6), r"meta.json is n"),
}  # fmt: skip


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_noticed_on_opening(name: str, opened_before: bool, data: Path) -> None:
    """Whether or not an earlier opening has left its stamps."""
    if opened_before:
        Dataset(data)
    damage, pattern = DAMAGES[name]
    damage(data)
    with pytest.raises(InputError, match=pattern) as found:
        Dataset(data)
    assert "\n" not in str(found.value)


def test_content_is_checked_once_and_again_when_the_file_changes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    plain = hashlib.sha256
    monkeypatch.setattr(nib.data.dataset.hashlib, "sha256", lambda *content: hashed.append(1) or plain(*content))

    def checks() -> int:
        hashed.clear()
        Dataset(data)
        return len(hashed)

    assert checks() == 4, "three shards of train and one of val"
    assert checks() == 0
    assert sorted(path.stem for path in data.glob("*.checked")) == sorted(path.stem for path in data.glob("*.bin"))
    rewrite(data / "train-00001.bin", lambda content: None)
    assert checks() == 1 and checks() == 0
    (data / "val-00000.checked").unlink()
    assert checks() == 1 and checks() == 0
    (data / "val-00000.checked").write_bytes(b"\xff\xfe no text")
    assert checks() == 1 and checks() == 0
    copied = data.with_name("copied")
    shutil.copytree(data, copied)  # keeps the times of a file, but not that of its last change
    hashed.clear()
    Dataset(copied)
    assert len(hashed) == 4, "a stamp that came with the file says nothing about it"


def test_a_stamp_that_cannot_be_written_is_no_error(data: Path) -> None:
    (data / "val-00000.checked").mkdir()
    assert Dataset(data).val.tokens == Dataset(data).val.tokens == 300


def test_fingerprint_tells_corpora_apart(tmp_path: Path) -> None:
    prints = []
    for number, (train, val) in enumerate([(TRAIN, VAL), (TRAIN, VAL), (TRAIN[:-1], VAL), (TRAIN, VAL + 1)]):
        write_dataset(tmp_path / str(number), train, val)
        prints.append(Dataset(tmp_path / str(number)).fingerprint())
    assert prints[0] == prints[1] and len(set(prints)) == 3


# ---- many shards ---------------------------------------------------------------------------------------------------


def open_files() -> int:
    count = 0
    for number in range(1000):
        with contextlib.suppress(OSError):
            os.fstat(number)
            count += 1
    return count


def keep_mapped(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    mapper = nib.data.dataset.map_shard.__wrapped__
    monkeypatch.setattr(nib.data.dataset, "map_shard", functools.lru_cache(most)(mapper))


@pytest.mark.parametrize("limit, most", [(1024, 128), (24, 12), (2, 1), (1, 0), (-1, 128)])
def test_datasets_may_have_more_shards_than_a_process_may_open(
    limit: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nib.data.dataset.resource, "getrlimit", lambda _: (limit, limit))
    keep_mapped(monkeypatch, nib.data.dataset.most_mapped())
    before, datasets = open_files(), []
    for name in "abc":
        (tmp_path / name).mkdir()
        write_dataset(tmp_path / name, TRAIN[:600], VAL[:20], shard_tokens=4)
        datasets.append(Dataset(tmp_path / name))
        assert datasets[-1].train.read(0, 9999).tolist() == TRAIN[:600].tolist()
    assert open_files() - before <= most
    assert datasets[0].train.read(3, 9).tolist() == TRAIN[3:9].tolist()


def test_a_shard_that_is_replaced_while_it_is_in_use_ends_the_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_mapped(monkeypatch, 1)
    dataset = Dataset(data)
    shard = data / "train-00001.bin"
    content = shard.read_bytes()
    for damage in (shard.unlink, lambda: shard.write_bytes(content[::-1]), lambda: shard.write_bytes(b"")):
        damage()
        with pytest.raises(RunError, match=r"cannot read .*train-00001\.bin: .*Run the same command again"):
            dataset.train.read(0, 2500)


FULL = """
import os, resource, sys
from pathlib import Path
from nib.common.exits import run_script
from nib.data.dataset import Dataset

def main():
    kind, path = sys.argv[1], Path(sys.argv[2])
    dataset = Dataset(path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        pass
    try:
        {"meta": lambda: Dataset(path), "opening": lambda: dataset.open_split("val"),
         "training": lambda: dataset.train.read(0, 9999)}[kind]()
    finally:
        list(map(os.close, held))  # Python may need one at its end

run_script(main)
"""


@pytest.mark.parametrize(("kind", "status"), [("meta", 2), ("opening", 2), ("training", 1)])
def test_the_limit_of_open_files_is_named_where_it_is_the_cause(kind: str, status: int, tmp_path: Path) -> None:
    write_dataset(tmp_path, TRAIN[:600], VAL[:20], shard_tokens=4)
    command = [sys.executable, "-c", FULL, kind, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Too many open files. Raise the limit of open files (ulimit -n)" in done.stderr, done.stderr
    assert (done.returncode, done.stderr.count("\n")) == (status, 1)


# ---- any meta.json at all ------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.integers(-(10**400), 10**400),
        st.sampled_from([0, 1, 257, 500, 1000, 1250, 2500, 2**31, 2**63, "uint16", "uint32", "../x", "train", 10**18]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["train", "val", "train-00000.bin", "x"]), inner, max_size=3),
    ),
    max_leaves=5,
)  # fmt: skip
KEYS = ["format", "tokenizer", "vocab_size", "dtype", "tokens", "bytes", "documents", "shard_tokens", "sha256", "seed"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all examples: each of them replaces only its meta.json."""
    directory = tmp_path_factory.mktemp("shared") / "data"
    meta = write_dataset(directory, TRAIN, VAL)
    (directory / "sound.json").write_text(json.dumps(meta))
    return directory


def opens_soundly_or_not_at_all(directory: Path) -> None:
    try:
        dataset = Dataset(directory)
    except InputError as error:
        assert len(str(error)) < 1000
        return
    for stream in (dataset.train, dataset.val):
        if stream.tokens:
            found = stream.read(0, stream.tokens)
            assert len(found) == stream.tokens and found.max() < dataset.vocab_size
    assert isinstance(dataset.meta["tokenizer"], str) and dataset.fingerprint()


@quick
@given(st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["", "train", "val"]), JSON), max_size=3), st.data())
def test_any_meta_is_sound_or_refused(shared: Path, changes: list[tuple[str, str, Any]], data: st.DataObject) -> None:
    meta = json.loads((shared / "sound.json").read_text())
    for key, split, value in changes:
        if split and isinstance(meta.get(key), dict):
            meta[key][split] = value
        elif value == 0 and data.draw(st.booleans()):
            meta.pop(key, None)
        else:
            meta[key] = value
    try:
        write_meta(shared, meta)
    except UnicodeEncodeError:
        return
    opens_soundly_or_not_at_all(shared)


@quick
@given(JSON)
def test_any_json_for_a_meta_is_refused(shared: Path, content: Any) -> None:
    write_meta(shared, content)
    with pytest.raises(InputError):
        Dataset(shared)


@quick
@given(st.integers(0, 900), st.integers(0, 40), st.binary(max_size=8))
def test_a_damaged_meta_is_sound_or_refused(shared: Path, at: int, lost: int, found: bytes) -> None:
    sound = (shared / "sound.json").read_bytes()
    at %= len(sound)
    (shared / "meta.json").write_bytes(sound[:at] + found + sound[at + lost :])
    opens_soundly_or_not_at_all(shared)
