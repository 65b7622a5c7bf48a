"""The token files of a data directory: written to a temporary directory, split, cut into shards, renamed into place."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
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
        ours = dataset_files(new)
        for name in dataset_files(new, REPLACED):
            if name.endswith(".bin"):
                with contextlib.suppress(OSError):
                    (out / name).with_suffix(".checked").unlink()  # the stamp of nib.data.dataset
            if name not in ours:  # a file of the new dataset may already be in place
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


class Split:
    """The token file of a split while it is written, and the counts of what is in it."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "w+b")  # noqa: SIM115
        self.tokens = self.bytes = self.documents = 0
        self.learned = 0  # tokens, of chats


@dataclass
class _Document:
    """The document being written, with its start, so that it can be removed again."""

    split: Split
    start: int  # in tokens of its split
    content_hash: int
    tokens: int = 0
    bytes: int = 0
    replaced: int = 0


class SplitWriter:
    """Appends documents to one token file for each split, then completes the val split and cuts the shards.

    A document goes to val if its content hash, as a fraction of 2^64, is below `val_fraction`.
    """

    def __init__(self, directory: Path, dtype: np.dtype, val_fraction: float, rows: bool) -> None:
        """`rows`: conversations, which have a loss mask."""
        self.directory, self.dtype, self.val_fraction, self.rows = directory, dtype, val_fraction, rows
        self.stored = np.dtype("<u4") if rows else dtype  # with the bits LEARNED and FIRST
        self.train, self.val = (Split(directory / f"{name}.tokens") for name in ("train", "val"))
        self.replaced = 0
        self.document: _Document | None = None
        self.lowest: _Document | None = None  # the document in train with the lowest hash

    @property
    def splits(self) -> dict[str, Split]:
        return {"train": self.train, "val": self.val}

    def count(self, noun: str) -> dict[str, int]:
        """The number of tokens, bytes, documents or learned tokens in each split."""
        return {name: getattr(split, noun) for name, split in self.splits.items()}

    def close(self) -> None:
        self.train.file.close()
        self.val.file.close()

    def begin(self, content_hash: int) -> None:
        """Start a document."""
        split = self.val if content_hash < self.val_fraction * 2**64 else self.train
        self.document = _Document(split, split.tokens, content_hash)

    def append(self, tokens: np.ndarray, bytes: int, replaced: int) -> None:
        """Add a piece to the document that was begun."""
        assert self.document is not None
        self.document.split.file.write(tokens.tobytes())
        self.document.tokens += len(tokens)
        self.document.bytes += bytes
        self.document.replaced += replaced

    def end(self) -> None:
        """Count the document, unless it is empty."""
        document, self.document = self.document, None
        if document is None or document.tokens == 0:
            return
        document.split.tokens += document.tokens
        document.split.bytes += document.bytes
        document.split.documents += 1
        self.replaced += document.replaced
        in_train = document.split is self.train
        if in_train and (self.lowest is None or document.content_hash < self.lowest.content_hash):
            self.lowest = document

    def take_back(self) -> None:
        """Undo the document that was begun."""
        assert self.document is not None
        self.document.split.file.seek(self.document.start * self.stored.itemsize)
        self.document.split.file.truncate()
        self.document = None

    def settle(self, tokenizer: Tokenizer) -> None:
        """Fill an empty val split with the document of the lowest hash, or with the last part of a single document."""
        if self.val_fraction == 0:
            return
        if self.train.documents + self.val.documents == 1:
            self._cut_single(tokenizer)
        elif self.val.documents == 0 and self.lowest is not None:
            self._move_to_val(self.lowest.start, self.lowest.tokens, self.lowest.bytes)
            self.train.documents -= 1

    def _cut_single(self, tokenizer: Tokenizer) -> None:
        if self.val.documents:  # the hash put it there
            self.train, self.val = self.val, self.train
        if self.rows:
            return  # a conversation is not cut
        total = self.train.tokens
        start = int(total * (1 - self.val_fraction))
        while start < total and _inside_character(tokenizer, self._read(start, 1)):
            start += 1
        lengths = tokenizer.byte_lengths()
        val_bytes = 0
        for position in range(start, total, COPY_BYTES):
            val_bytes += int(lengths[self._read(position, min(COPY_BYTES, total - position))].sum())
        if start < total:
            self._move_to_val(start, total - start, val_bytes)

    def _read(self, start: int, count: int) -> np.ndarray:
        """Tokens of train."""
        self.train.file.seek(start * self.stored.itemsize)
        return np.frombuffer(self.train.file.read(count * self.stored.itemsize), dtype=self.stored)

    def _move_to_val(self, start: int, count: int, bytes: int) -> None:
        """Make `count` tokens of train, which stand for `bytes` bytes, the only document of val, and close the gap."""
        train, val, size = self.train, self.val, self.stored.itemsize
        val.file.seek(0)
        for data in _chunks(train.file, start * size, count * size):
            val.file.write(data)
        to = start * size
        for data in _chunks(train.file, to + count * size, (train.tokens - start - count) * size):
            train.file.seek(to)
            to += train.file.write(data)
        train.file.truncate(to)
        train.tokens, train.bytes = train.tokens - count, train.bytes - bytes
        val.tokens, val.bytes, val.documents = count, bytes, 1

    def write_shards(self, shard_tokens: int) -> dict[str, str]:
        """Cut the token files into shards and return the sha256 of each; every shard but a split's last is full.

        Shards are cut from the end of the file, so that the disk never holds more than one shard twice.
        """
        sha256 = {}
        for name, split in self.splits.items():
            end = row_end = split.tokens
            for index in reversed(range(-(-split.tokens // shard_tokens))):
                shard, start = self.directory / f"{name}-{index:05d}.bin", index * shard_tokens
                if start == 0 and not self.rows:
                    split.file.flush()
                    os.rename(split.file.name, shard)
                else:
                    row_end = self._write_shard(split, shard, start, end, row_end)
                    split.file.truncate(start * self.stored.itemsize)
                    end = start
                for suffix in (".bin", ".mask", ".rows") if self.rows else (".bin",):
                    path = shard.with_suffix(suffix)
                    sha256[path.name] = file_sha256(path)
            split.file.close()
            Path(split.file.name).unlink(missing_ok=True)
        return dict(sorted(sha256.items()))

    def _write_shard(self, split: Split, shard: Path, start: int, end: int, row_end: int) -> int:
        """Write tokens `start` to `end`; for chats also the loss mask and the length of each conversation.

        A conversation may continue in the next shard; its length is stored with the shard in which it begins.
        `row_end` is the end of the last conversation that begins here. Returns the start of the first one.
        """
        size = self.stored.itemsize
        chunks = _chunks(split.file, start * size, (end - start) * size)
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
                split.learned += int(mask.sum())
                at += len(tokens)
        begin = np.concatenate(starts)
        np.diff(begin, append=row_end).astype("<u4").tofile(shard.with_suffix(".rows"))
        return int(begin[0]) if len(begin) else row_end


def _inside_character(tokenizer: Tokenizer, token: np.ndarray) -> bool:
    """Whether the token begins with a continuation byte of UTF-8."""
    return b"\x80" <= tokenizer.decode_bytes(token.tolist())[:1] < b"\xc0"


def _chunks(file: BinaryIO, start: int, count: int) -> Iterator[bytes]:
    """The `count` bytes from `start`, a few MB at a time; the file may be written between two chunks."""
    for position in range(start, start + count, COPY_BYTES):
        file.seek(position)
        yield file.read(min(COPY_BYTES, start + count - position))
