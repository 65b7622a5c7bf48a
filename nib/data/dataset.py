"""A directory of prepared data: its shards, checked, memory-mapped and read as one sequence of tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import resource
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nib.common.exits import InputError, RunError
from nib.common.files import read_object
from nib.common.wording import counted, typed, way_out
from nib.data.shards import FORMAT, MAX_META_BYTES, META_FILE, REPLACEMENT
from nib.tokenizer.load import load_tokenizer
from nib.tokenizer.tokenizer import Tokenizer

HOW = "Prepare it again with: python prepare_data.py ... --overwrite"
KINDS = ("text", "chat", "preference")
# The most shards that a process keeps mapped, each of which is an open file. Opening a shard takes 40 us, reading a
# window of an open one 4 us.
OPEN_SHARDS = 128


class Dataset:
    """A directory made by prepare_data.py: two splits of tokens, the tokenizer and the content of meta.json.

    Opening checks every shard against meta.json: its size always, its sha256 unless that was done before for the
    same file. Raises InputError for anything that does not match.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.name, self.shares = directory, directory.name, [Fraction(1)]
        self.meta = read_meta(directory)
        self.tokenizer: Tokenizer = load_tokenizer(directory)
        self.vocab_size = int(self.meta["vocab_size"])
        self.kind = str(self.meta.get("kind", "text"))
        self.chat = self.kind != "text"  # conversations with a loss mask; a preference pair is two conversations
        if self.tokenizer.vocab_size != self.vocab_size:
            size = self.tokenizer.vocab_size
            sizes = f"the tokenizer has {counted(size, 'id')}, meta.json says {self.vocab_size}"
            raise InputError(f"{directory}: {sizes}. {HOW}")
        self.train = self.open_split("train")
        self.val = self.open_split("val")

    @property
    def parts(self) -> list[Dataset]:
        """This dataset alone, for code that takes a Mixture too."""
        return [self]

    def open_split(self, split: str) -> TokenStream:
        tokens, size = self.meta["tokens"][split], self.meta["shard_tokens"]
        dtypes = {".bin": np.dtype(self.meta["dtype"]).newbyteorder("<")}
        dtypes |= {".mask": np.dtype("u1"), ".rows": np.dtype("<u4")} if self.chat else {}
        shards: dict[str, list[Shard]] = {suffix: [] for suffix in dtypes}
        rows: list[NDArray[Any]] = [np.zeros(1, dtype=np.int64)]
        for index in range(math.ceil(tokens / size)):
            path = self.directory / f"{split}-{index:05d}.bin"
            count = min(size, tokens - index * size)
            try:
                for suffix, dtype in dtypes.items():
                    path = path.with_suffix(suffix)
                    shard, expected = Shard(path), count * dtype.itemsize
                    if shard.size != expected and suffix != ".rows":
                        raise InputError(f"{path} has {counted(shard.size, 'byte')} instead of {expected}. {HOW}")
                    shards[suffix].append(shard)
                self.check_content(path.with_suffix(".bin"), dtypes)
                if self.chat:
                    rows.append(np.fromfile(path, dtypes[".rows"]))
            except OSError as error:
                how = HOW if isinstance(error, FileNotFoundError) else "Make it readable"
                raise InputError(f"cannot read {path}: {error.strerror}. {way_out(error, how)}") from None
        stream = TokenStream(MappedShards(shards[".bin"], dtypes[".bin"]), size)
        if self.chat:
            stream.mask = TokenStream(MappedShards(shards[".mask"], dtypes[".mask"]), size)
            lengths = np.concatenate(rows)
            stream.starts = np.cumsum(lengths, dtype=np.int64)
            if stream.starts[-1] != tokens or (lengths[1:] == 0).any():
                raise InputError(f"{self.directory}: the rows of {split} do not fit its {tokens} tokens. {HOW}")
        return stream

    def check_content(self, shard: Path, dtypes: dict[str, np.dtype]) -> None:
        """Check the sha256 and the largest value of a shard's files once: a stamp file records what was checked.

        The stamp includes the files' ctime, which no program can set, so a stamp that was copied along with a file
        is not valid.
        """
        limits, lines = {".bin": self.vocab_size, ".mask": 2, ".rows": 2**32}, []
        for suffix, dtype in dtypes.items():
            path = shard.with_suffix(suffix)
            stat, expected = path.stat(), self.meta["sha256"].get(path.name)
            times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
            lines.append(f"{expected} {dtype} {limits[suffix]} {stat.st_size} {times}")
        stamp, seen = shard.with_suffix(".checked"), "\n".join(lines)
        try:
            if stamp.read_bytes() == seen.encode():
                return
        except OSError:
            pass
        for suffix, dtype in dtypes.items():
            self.check_file(shard.with_suffix(suffix), dtype, limits[suffix])
        try:
            stamp.write_text(seen)
        except OSError:
            return  # a read-only data directory is checked at every start

    def check_file(self, path: Path, dtype: np.dtype, limit: int) -> None:
        digest, largest = hashlib.sha256(), 0
        content = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.zeros(0, dtype)
        for begin in range(0, len(content), 1 << 22):
            piece = content[begin : begin + (1 << 22)]
            digest.update(piece.tobytes())
            largest = max(largest, int(piece.max()))
        if digest.hexdigest() != self.meta["sha256"].get(path.name):
            raise InputError(f"{path} does not have the content that meta.json records (sha256 differs). {HOW}")
        if largest >= limit:
            what, those = ("token id", "vocabulary") if path.suffix == ".bin" else ("a", "numbers")
            raise InputError(f"{path} holds {what} {largest}, beyond the {those} of {limit}. {HOW}")

    def fingerprint(self) -> str:
        """A hash that identifies the corpus: of the checksums of its shards, its token counts and vocabulary size."""
        text = json.dumps([self.meta["sha256"], self.meta["tokens"], self.vocab_size], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_meta(directory: Path) -> dict[str, Any]:
    """The content of meta.json, with its types checked. Raises InputError."""
    path = directory / META_FILE
    try:
        meta = read_object(path, MAX_META_BYTES)
        splits = [meta[key][split] for key in ("tokens", "bytes", "documents") for split in ("train", "val")]
        counts = [*splits, meta["vocab_size"], meta["shard_tokens"]]
        sound = all(type(count) is int and 0 <= count < 2**48 for count in counts) and meta["shard_tokens"] > 0
        sound = sound and meta["dtype"] in ("uint16", "uint32") and isinstance(meta["sha256"], dict)
        sound = sound and meta["format"] == FORMAT and meta["tokenizer"].isprintable()
        sound = sound and meta.get("kind", "text") in KINDS
    except FileNotFoundError:
        if (directory / REPLACEMENT).exists():
            how = "Run the same prepare_data.py command again to finish it"
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
    """One file of a shard, with its identity when the dataset was opened."""

    def __init__(self, path: Path) -> None:
        status = path.stat()
        self.path, self.size = path, status.st_size
        self.identity = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def most_mapped() -> int:
    """OPEN_SHARDS, or half of the files that this process may open, if that is less."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if limit < 0 else min(OPEN_SHARDS, limit // 2)


@functools.lru_cache(most_mapped())
def map_shard(shard: Shard, dtype: np.dtype) -> NDArray[Any]:
    """Memory-map the shard. Of all datasets of this process, the most recently used shards stay mapped.

    Raises RunError for a shard that was replaced since the dataset was opened: the data would mix two corpora.
    """
    try:
        mapped = np.memmap(shard.path, dtype=dtype, mode="r")
        if Shard(shard.path).identity == shard.identity:
            return mapped
        reason, how = "it was replaced meanwhile", "Run the same command again"
    except (OSError, ValueError) as error:
        how = way_out(error, "Run the same command again")
        reason = str(getattr(error, "strerror", None) or error)
    raise RunError(f"cannot read {shard.path}: {reason}. {how}")


class MappedShards(Sequence[NDArray[Any]]):
    """Shards that are mapped when they are read."""

    def __init__(self, shards: list[Shard], dtype: np.dtype) -> None:
        self.shards, self.dtype = shards, dtype

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: Any) -> Any:
        return map_shard(self.shards[index], self.dtype)


class TokenStream:
    """The tokens of one split, in shards of `size` tokens each (the last may be shorter), read as one sequence."""

    mask: TokenStream | None = None  # for conversations: 1 for each token that is learned
    starts: NDArray[np.int64] | None = None  # where each conversation begins, and where the last one ends

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
