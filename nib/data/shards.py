"""The token files of a data directory: written to a temporary directory, split, cut into shards, renamed into place."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from nib.common import files
from nib.common.exits import InputError
from nib.common.files import file_sha256, fsync, fsync_files, new_directory, read_object, workplace
from nib.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer

FORMAT = "nib-data-1"
META_FILE, MAX_META_BYTES = "meta.json", 1 << 26
# The names that files of a dataset can have.
OWN_NAME = re.compile(rf"(train|val)-\d{{5,}}\.(bin|mask|rows)|{re.escape(META_FILE)}|{re.escape(TOKENIZER_FILE)}")
# While a dataset is being replaced: the directory with the complete new dataset, and the old meta.json in it.
REPLACEMENT, REPLACED = ".nib-staging/nib-replacement", "replaced.json"
COPY_BYTES = 1 << 22
# Bits in the uint32 of a chat's token until the shards are cut: the token is learned, it begins a conversation.
LEARNED, FIRST = 1 << 31, 1 << 30
SPLITS = ("train", "val")


def staging_path(out: Path) -> Path:
    """The directory for preparing the content of `out`: in `out` if that exists, since it may be a mount or a link."""
    return out / ".nib-staging" if out.is_dir() else files.staging_path(out)


@contextlib.contextmanager
def staging_directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden directory whose content becomes that of `out` if the body succeeds, and is removed if it fails.

    A new `out` appears by one rename. In an existing `out` only the files of the old dataset are replaced. Files that
    a killed run left are removed, or its replacement is finished. Raises InputError if another run is preparing `out`,
    if `out` exists and `overwrite` is False, and if overwriting could destroy a file that nib did not write.
    """
    if not out.is_dir():
        check_output(out, overwrite)
        with new_directory(out) as new:
            yield new
        return
    staging = staging_path(out)
    with workplace(out, staging, out, (Path(REPLACEMENT).name,)) as new:
        _finish_replacement(out)
        check_output(out, overwrite)  # under the lock, since another run may just have finished
        yield new
        fsync_files(new)
        new.rename(out / REPLACEMENT)
        fsync(staging)
        fsync(out)
        _finish_replacement(out)


def _finish_replacement(out: Path) -> None:
    """Move a complete new dataset from its directory in `out` into place, removing the old one.

    If a run is killed in here, the next call finishes the work: each step may be repeated. `out` has a meta.json only
    while one of the two datasets is complete in it.
    """
    new = out / REPLACEMENT
    if (new / META_FILE).exists():
        if (out / META_FILE).exists():
            (out / META_FILE).rename(new / REPLACED)
        for name in dataset_files(new, REPLACED):
            if name.endswith(".bin"):
                with contextlib.suppress(OSError):
                    (out / name).with_suffix(".checked").unlink()  # the stamp of nib.data.dataset
            if name not in dataset_files(new):  # a file of the new dataset may already be in place
                (out / name).unlink(missing_ok=True)
        for path in new.iterdir():
            if path.name not in (META_FILE, REPLACED):
                path.rename(out / path.name)
        fsync(out)
        (new / META_FILE).rename(out / META_FILE)
        fsync(out)
    shutil.rmtree(new, ignore_errors=True)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise InputError if `out` may not be written."""
    if not out.exists() and not out.is_symlink():
        return
    own = dataset_files(out)
    names = {path.name for path in out.iterdir()} - {staging_path(out).name} if out.is_dir() else {out.name}
    if not overwrite:
        how = "Give another --out" if names and not own else "Give --overwrite to replace it, or another --out"
        raise InputError(f"{out} exists. {how}")
    if names and not own:
        raise InputError(f"{out} is not prepared data, so --overwrite does not replace it. Give another --out")
    for name in sorted(filter(OWN_NAME.fullmatch, names)):
        if name not in own or not (out / name).is_file():
            raise InputError(f"{out / name} is not part of the dataset there. Move it away, or give another --out")


def dataset_files(directory: Path, meta_file: str = META_FILE) -> set[str]:
    """The names of the files that nib wrote into a directory of prepared data; empty if it holds no such data."""
    try:
        meta = read_object(directory / meta_file, MAX_META_BYTES)
        names = [*meta["sha256"], META_FILE, TOKENIZER_FILE] if meta["format"] == FORMAT else []
        return set(filter(OWN_NAME.fullmatch, names))
    except (OSError, ValueError, TypeError, KeyError):
        return set()


@dataclass
class _Document:
    """The document being written, with its start, so that it can be removed again."""

    split: str
    start: int  # in tokens of its split
    content_hash: int
    tokens: int = 0
    bytes: int = 0
    replaced: int = 0


@dataclass
class SplitWriter:
    """Appends documents to one token file for each split, then completes the val split and cuts the shards.

    A document goes to val if its content hash, as a fraction of 2^64, is below `val_fraction`.
    """

    directory: Path
    dtype: np.dtype
    val_fraction: float
    rows: bool = False  # conversations, which have a loss mask
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    documents: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    learned: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))  # tokens, of chats
    replaced: int = 0

    def __post_init__(self) -> None:
        self.files: dict[str, BinaryIO] = {split: open(self._path(split), "w+b") for split in SPLITS}  # noqa: SIM115
        self.stored = np.dtype("<u4") if self.rows else self.dtype  # with the bits LEARNED and FIRST
        self.document: _Document | None = None
        self.lowest: _Document | None = None  # the document in train with the lowest hash

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def _path(self, split: str) -> Path:
        return self.directory / f"{split}.tokens"

    def begin(self, content_hash: int) -> None:
        """Start a document."""
        split = "val" if content_hash < self.val_fraction * 2**64 else "train"
        self.document = _Document(split, self.tokens[split], content_hash)

    def append(self, tokens: np.ndarray, bytes: int, replaced: int) -> None:
        """Add a piece to the document that was begun."""
        assert self.document is not None
        self.files[self.document.split].write(tokens.tobytes())
        self.document.tokens += len(tokens)
        self.document.bytes += bytes
        self.document.replaced += replaced

    def end(self) -> None:
        """Count the document, unless it is empty."""
        document, self.document = self.document, None
        if document is None or document.tokens == 0:
            return
        self.tokens[document.split] += document.tokens
        self.bytes[document.split] += document.bytes
        self.documents[document.split] += 1
        self.replaced += document.replaced
        if document.split == "train" and (self.lowest is None or document.content_hash < self.lowest.content_hash):
            self.lowest = document

    def take_back(self) -> None:
        """Undo the document that was begun."""
        if self.document is not None:
            file = self.files[self.document.split]
            file.seek(self.document.start * self.stored.itemsize)
            file.truncate()
            self.document = None

    def settle(self, tokenizer: Tokenizer) -> None:
        """Fill an empty val split with the document of the lowest hash, or with the last part of a single document."""
        if self.val_fraction == 0:
            return
        if sum(self.documents.values()) == 1:
            self._cut_single(tokenizer)
        elif self.documents["val"] == 0 and self.lowest is not None:
            self._move_to_val(self.lowest.start, self.lowest.tokens, self.lowest.bytes)
            self.documents = {"train": self.documents["train"] - 1, "val": 1}

    def _cut_single(self, tokenizer: Tokenizer) -> None:
        if self.documents["val"]:  # the hash put it there
            self.files = {"train": self.files["val"], "val": self.files["train"]}
            self.tokens, self.bytes, self.documents = (
                {"train": counts["val"], "val": 0} for counts in (self.tokens, self.bytes, self.documents)
            )
        if self.rows:
            return  # a conversation is not cut
        total = self.tokens["train"]
        start = int(total * (1 - self.val_fraction))
        while start < total and _inside_character(tokenizer, self._read("train", start, 1)):
            start += 1
        lengths = tokenizer.byte_lengths()
        val_bytes = 0
        for position in range(start, total, COPY_BYTES):
            val_bytes += int(lengths[self._read("train", position, min(COPY_BYTES, total - position))].sum())
        self._move_to_val(start, total - start, val_bytes)
        self.documents["val"] = 1 if start < total else 0

    def _read(self, split: str, start: int, count: int) -> np.ndarray:
        file = self.files[split]
        file.seek(start * self.stored.itemsize)
        return np.frombuffer(file.read(count * self.stored.itemsize), dtype=self.stored)

    def _move_to_val(self, start: int, count: int, bytes: int) -> None:
        """Move `count` tokens of train, which stand for `bytes` bytes, to the empty val, and close the gap."""
        train, size = self.files["train"], self.stored.itemsize
        self.files["val"].seek(0)
        for data in _chunks(train, start * size, count * size):
            self.files["val"].write(data)
        to = start * size
        for data in _chunks(train, to + count * size, (self.tokens["train"] - start - count) * size):
            train.seek(to)
            to += train.write(data)
        train.truncate(to)
        self.tokens = {"train": self.tokens["train"] - count, "val": count}
        self.bytes = {"train": self.bytes["train"] - bytes, "val": bytes}

    def write_shards(self, shard_tokens: int) -> dict[str, str]:
        """Cut the token files into shards and return the sha256 of each; every shard but a split's last is full.

        Shards are cut from the end of the file, so that the disk never holds more than one shard twice.
        """
        sha256 = {}
        size = self.stored.itemsize
        for split, file in self.files.items():
            end = self.tokens[split] * size
            row_end = self.tokens[split]
            for index in reversed(range(-(-self.tokens[split] // shard_tokens))):
                shard = self.directory / f"{split}-{index:05d}.bin"
                start = index * shard_tokens * size
                if index == 0 and not self.rows:
                    file.flush()
                    os.rename(file.name, shard)
                else:
                    row_end = self._write_shard(split, shard, index * shard_tokens, end // size, row_end)
                    file.truncate(start)
                    end = start
                for path in (shard, shard.with_suffix(".mask"), shard.with_suffix(".rows"))[: 3 if self.rows else 1]:
                    sha256[path.name] = file_sha256(path)
            file.close()
            Path(file.name).unlink(missing_ok=True)
        return dict(sorted(sha256.items()))

    def _write_shard(self, split: str, shard: Path, start: int, end: int, row_end: int) -> int:
        """Write tokens `start` to `end`; for chats also the loss mask and the length of each conversation.

        A conversation may continue in the next shard; its length is stored with the shard in which it begins.
        `row_end` is the end of the last conversation that begins here. Returns the start of the first one.
        """
        size = self.stored.itemsize
        chunks = _chunks(self.files[split], start * size, (end - start) * size)
        if not self.rows:
            with open(shard, "wb") as file:
                file.writelines(chunks)
            return row_end
        starts, at = [np.zeros(0, dtype=np.int64)], start
        with open(shard, "wb") as file, open(shard.with_suffix(".mask"), "wb") as masks:
            for data in chunks:
                tokens = np.frombuffer(data, dtype=self.stored)
                mask = tokens >= LEARNED
                starts.append(at + np.flatnonzero(tokens & FIRST))
                file.write((tokens & (FIRST - 1)).astype(self.dtype).tobytes())
                masks.write(mask.astype(np.uint8).tobytes())
                self.learned[split] += int(mask.sum())
                at += len(tokens)
        begin = np.concatenate(starts)
        np.diff(begin, append=row_end).astype("<u4").tofile(shard.with_suffix(".rows"))
        return int(begin[0]) if len(begin) else row_end


def _inside_character(tokenizer: Tokenizer, token: np.ndarray) -> bool:
    """Whether the token begins with a continuation byte of UTF-8."""
    return tokenizer.decode_bytes(token.tolist())[:1] in [bytes([value]) for value in range(0x80, 0xC0)]


def _chunks(file: BinaryIO, start: int, count: int) -> Iterator[bytes]:
    """The `count` bytes from `start`, a few MB at a time; the file may be written between two chunks."""
    for position in range(start, start + count, COPY_BYTES):
        file.seek(position)
        yield file.read(min(COPY_BYTES, start + count - position))
