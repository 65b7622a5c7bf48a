"""Training windows from token shards, in an order that is a pure function of (seed, step)."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import resource
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nib.common.exits import InputError, RunError
from nib.common.files import read_object
from nib.common.wording import counted, typed, way_out
from nib.data.shards import FORMAT, MAX_META_BYTES, META_FILE, REPLACEMENT
from nib.tokenizer.load import load_tokenizer
from nib.tokenizer.tokenizer import Tokenizer

HOW = "Prepare it again with: python prepare_data.py ... --overwrite"
# Of a split, at a time, and not above a quarter of the files that the process may hold open: each map is one of them.
# Opening one takes 40 us, reading a window of an open one 4 us.
OPEN_SHARDS = 128


class Dataset:
    """A directory made by prepare_data.py: two splits of tokens, the tokenizer and what meta.json says.

    Opening checks every shard against meta.json: its size always, its sha256 unless that was done before for the
    same file. Raises InputError for anything that does not fit.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.meta = read_meta(directory)
        self.tokenizer: Tokenizer = load_tokenizer(directory)
        self.vocab_size = int(self.meta["vocab_size"])
        if self.tokenizer.vocab_size != self.vocab_size:
            size = self.tokenizer.vocab_size
            sizes = f"the tokenizer has {counted(size, 'id')}, meta.json says {self.vocab_size}"
            raise InputError(f"{directory}: {sizes}. {HOW}")
        self.train = self.open_split("train")
        self.val = self.open_split("val")

    def open_split(self, split: str) -> TokenStream:
        tokens, size = self.meta["tokens"][split], self.meta["shard_tokens"]
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        shards: list[Shard] = []
        for index in range(math.ceil(tokens / size)):
            path = self.directory / f"{split}-{index:05d}.bin"
            expected = min(size, tokens - index * size) * dtype.itemsize
            try:
                shard = Shard(path)
                if shard.size != expected:
                    raise InputError(f"{path} has {counted(shard.size, 'byte')} instead of {expected}. {HOW}")
                self.check_content(path, np.memmap(path, dtype=dtype, mode="r"))
            except OSError as error:
                how = HOW if isinstance(error, FileNotFoundError) else "Make it readable"
                raise InputError(f"cannot read {path}: {error.strerror}. {way_out(error, how)}") from None
            shards.append(shard)
        return TokenStream(MappedShards(shards, dtype), size)

    def check_content(self, path: Path, shard: NDArray[Any]) -> None:
        """Compare the shard's sha256, and its largest id, once: a stamp beside it remembers what was seen.

        The time of the last change is in it, which cannot be set: a stamp that was copied with its file counts
        nothing.
        """
        stat, expected = path.stat(), self.meta["sha256"].get(path.name)
        stamp = path.with_suffix(".checked")
        seen = f"{expected} {shard.dtype} {self.vocab_size} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
        try:
            if stamp.read_bytes() == seen.encode():
                return
        except OSError:
            pass
        digest, largest = hashlib.sha256(), 0
        for begin in range(0, len(shard), 1 << 22):
            piece = shard[begin : begin + (1 << 22)]
            digest.update(piece.tobytes())
            largest = max(largest, int(piece.max()))
        if digest.hexdigest() != expected:
            raise InputError(f"{path} does not have the content that meta.json records (sha256 differs). {HOW}")
        if largest >= self.vocab_size:
            raise InputError(f"{path} holds token id {largest}, beyond the vocabulary of {self.vocab_size}. {HOW}")
        try:
            stamp.write_text(seen)
        except OSError:
            return  # a read-only data directory is checked every time

    def fingerprint(self) -> str:
        """Identifies the corpus: a hash over the checksums of its shards and its vocabulary."""
        text = json.dumps([self.meta["sha256"], self.meta["tokens"], self.vocab_size], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_meta(directory: Path) -> dict[str, Any]:
    """meta.json with its types checked. Raises InputError."""
    path = directory / META_FILE
    try:
        meta = read_object(path, MAX_META_BYTES)
        splits = [meta[key][split] for key in ("tokens", "bytes", "documents") for split in ("train", "val")]
        counts = [*splits, meta["vocab_size"], meta["shard_tokens"]]
        sound = all(type(count) is int and 0 <= count < 2**48 for count in counts) and meta["shard_tokens"] > 0
        sound = sound and meta["dtype"] in ("uint16", "uint32") and isinstance(meta["sha256"], dict)
        sound = sound and meta["format"] == FORMAT and meta["tokenizer"].isprintable()
    except FileNotFoundError:
        if (directory / REPLACEMENT).exists():
            how = "Give the same prepare_data.py command again to finish it"
            raise InputError(f"the replacement of {directory} was interrupted. {how}") from None
        raise InputError(
            f"no prepared data in {directory}. Make it with: python prepare_data.py SOURCE --out {typed(directory)}"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. {way_out(error, HOW)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise InputError(f"{path} is not what prepare_data.py writes. {HOW}")
    return meta


class Shard:
    """One file of tokens, as it was when it was opened."""

    def __init__(self, path: Path) -> None:
        status = path.stat()
        self.path, self.size = path, status.st_size
        self.identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class MappedShards(Sequence[NDArray[Any]]):
    """Shards that are mapped into memory when they are read; the last used stay so.

    Raises RunError for one that was replaced since it was opened: the data would be of two corpora.
    """

    def __init__(self, shards: list[Shard], dtype: np.dtype) -> None:
        self.shards, self.dtype = shards, dtype
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.map = functools.lru_cache(OPEN_SHARDS if limit < 0 else min(OPEN_SHARDS, limit // 4))(self._map)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: Any) -> Any:
        return self.map(index)

    def _map(self, index: int) -> NDArray[Any]:
        shard = self.shards[index]
        try:
            mapped = np.memmap(shard.path, dtype=self.dtype, mode="r")
            if Shard(shard.path).identity == shard.identity:
                return mapped
            reason, how = "it was replaced meanwhile", "Give the same command again"
        except (OSError, ValueError) as error:
            how = way_out(error, "Give the same command again")
            reason = str(getattr(error, "strerror", None) or error)
        raise RunError(f"cannot read {shard.path}: {reason}. {how}")


class TokenStream:
    """The tokens of one split, in shards of `size` tokens each (the last may be shorter), read as one sequence."""

    def __init__(self, shards: Sequence[NDArray[Any]], size: int) -> None:
        self.shards, self.size = shards, size
        self.tokens = (len(shards) - 1) * size + len(shards[-1]) if shards else 0

    def read(self, begin: int, end: int) -> NDArray[np.int64]:
        """Tokens begin to end (exclusive, cut at the end of the stream) as int64."""
        end = min(end, self.tokens)
        parts = []
        while begin < end:
            shard, offset = divmod(begin, self.size)
            part = self.shards[shard][offset : offset + end - begin]
            parts.append(part.astype(np.int64))
            begin += len(part)
        return np.concatenate(parts) if len(parts) != 1 else parts[0]


class WindowOrder:
    """Which window of the stream is the i-th training sequence, for every i, without keeping any state.

    A window is block_size inputs and the targets one further on. Sequence i belongs to epoch i // windows; an
    epoch visits every window once, in a permutation seeded by (seed, epoch), and cuts the stream at an offset of
    its own, so that other tokens meet at the borders. Raises InputError when the split is shorter than a window.
    """

    def __init__(self, tokens: int, block_size: int, seed: int) -> None:
        if tokens < block_size + 1:
            raise InputError(
                f"the training split has {counted(tokens, 'token')}, fewer than one window of block_size + 1 = "
                f"{block_size + 1}. Lower block_size or prepare more text"
            )
        self.block_size, self.seed = block_size, seed
        # One block is kept free for the offset to move in, so that every epoch has the same number of windows, and
        # the offset moves up to the end, so that every token has its turn.
        self.windows = max(1, (tokens - block_size) // block_size)
        self.offsets = tokens - self.windows * block_size

    def begin(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """First token of each of these sequences."""
        begins = np.empty_like(sequences)
        for epoch in np.unique(sequences // self.windows):
            chosen = sequences // self.windows == epoch
            key = int.from_bytes(hashlib.sha256(f"epoch {self.seed} {epoch}".encode()).digest()[:8], "little")
            window = permute(sequences[chosen] % self.windows, self.windows, key)
            begins[chosen] = key % self.offsets + window * self.block_size
        return begins


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """The images of `index` under a permutation of range(size) chosen by `key`.

    A Feistel network on the next even number of bits, applied again where the image is not below `size` (cycle
    walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). It needs no memory for the order.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.array([hash_round(key, turn) for turn in range(6)], dtype=np.uint64)
    x = index.astype(np.uint64)
    todo = np.ones(len(x), dtype=bool)
    while todo.any():
        left, right = x[todo] >> np.uint64(half), x[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        x[todo] = (left << np.uint64(half)) | right
        todo[todo] = x[todo] >= size
    return x.astype(np.int64)


def hash_round(key: int, turn: int) -> int:
    return int.from_bytes(hashlib.sha256(f"round {key} {turn}".encode()).digest()[:8], "little")


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64: every bit of x moves every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def training_batch(stream: TokenStream, order: WindowOrder, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Sequences first to first + count of the run: inputs and targets, each (count, block_size) int64.

    Both are contiguous: for views with other strides a compiled model would be compiled once more.
    """
    begins = order.begin(np.arange(first, first + count, dtype=np.int64))
    windows = np.stack([stream.read(int(begin), int(begin) + order.block_size + 1) for begin in begins])
    return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())


class BatchesAhead:
    """The batch of any step, by `load(step)`; that of the next one is loaded while this one is trained on.

    On a GPU's way it is pinned there too. An error of `load` comes when its step does.
    """

    def __init__(self, load: Callable[[int], tuple[Tensor, Tensor]], device: torch.device) -> None:
        self.load, self.device = load, device
        self.thread = ThreadPoolExecutor(1, "batches")
        self.waiting: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def take(self, step: int) -> tuple[Tensor, Tensor]:
        batch = (self.waiting.pop(step, None) or self.thread.submit(self.prepare, step)).result()
        self.waiting = {step + 1: self.thread.submit(self.prepare, step + 1)}
        return batch

    def prepare(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.load(step)
        if self.device.type != "cuda":
            return inputs, targets
        torch.cuda.set_device(self.device)  # a thread begins on the first one, and pinning would open that
        return inputs.pin_memory(), targets.pin_memory()


def validation_windows(stream: TokenStream, block_size: int, limit: int) -> int:
    """How many windows cover the targets of the split, or its first `limit` tokens (0: all)."""
    tokens = min(stream.tokens, limit + 1) if limit else stream.tokens
    return math.ceil((tokens - 1) / block_size) if tokens > 1 else 0


def validation_batch(
    stream: TokenStream, block_size: int, first: int, count: int, windows: int
) -> tuple[Tensor, Tensor]:
    """Windows first to first + count, side by side in the split; targets past window number `windows` are -1."""
    inputs = torch.zeros(count * block_size, dtype=torch.int64)
    targets = torch.full((count * block_size,), -1)
    end = min(first + count, windows)
    if first < end:
        tokens = torch.from_numpy(stream.read(first * block_size, end * block_size + 1))
        inputs[: len(tokens) - 1], targets[: len(tokens) - 1] = tokens[:-1], tokens[1:]
    return inputs.view(count, block_size), targets.view(count, block_size)
