"""A directory of prepared data: its shards, checked, memory-mapped and read as one sequence of tokens."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import operator
import resource
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
IDENTITY = operator.attrgetter("st_dev", "st_ino", "st_size", "st_mtime_ns")  # of a file that is still the same


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
        kinds = {".bin": (np.dtype(self.meta["dtype"]).newbyteorder("<"), self.vocab_size)}
        if self.chat:
            kinds |= {".mask": (np.dtype("u1"), 2), ".rows": (np.dtype("<u4"), 2**32)}
        shards: dict[str, list[Shard]] = {suffix: [] for suffix in kinds}
        rows: list[NDArray[Any]] = [np.zeros(1, dtype=np.int64)]
        for index in range(math.ceil(tokens / size)):
            path = self.directory / f"{split}-{index:05d}.bin"
            count = min(size, tokens - index * size)
            try:
                for suffix, (dtype, limit) in kinds.items():
                    shard, expected = Shard(path.with_suffix(suffix), dtype, limit), count * dtype.itemsize
                    if shard.status.st_size != expected and suffix != ".rows":
                        has = counted(shard.status.st_size, "byte")
                        raise InputError(f"{shard.path} has {has} instead of {expected}. {HOW}")
                    shards[suffix].append(shard)
                self.check_content([files[index] for files in shards.values()])
                if self.chat:
                    rows.append(np.fromfile(shards[".rows"][index].path, "<u4"))
            except OSError as error:
                how = HOW if isinstance(error, FileNotFoundError) else "Make it readable"
                at = error.filename or path
                raise InputError(f"cannot read {at}: {error.strerror}. {way_out(error, how)}") from None
        stream = TokenStream(shards[".bin"], size)
        if self.chat:
            stream.mask = TokenStream(shards[".mask"], size)
            lengths = np.concatenate(rows)
            stream.starts = np.cumsum(lengths, dtype=np.int64)
            if stream.starts[-1] != tokens or (lengths[1:] == 0).any():
                raise InputError(f"{self.directory}: the rows of {split} do not fit its {tokens} tokens. {HOW}")
        return stream

    def check_content(self, shards: list[Shard]) -> None:
        """Check the sha256 and the largest value of a shard's files once: a stamp file records what was checked.

        The stamp includes the files' ctime, which no program can set, so a stamp that was copied along with a file
        is not valid.
        """
        lines = []
        for shard in shards:
            status, expected = shard.status, self.meta["sha256"].get(shard.path.name)
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            lines.append(f"{expected} {shard.dtype} {shard.limit} {status.st_size} {times}")
        stamp, seen = shards[0].path.with_suffix(".checked"), "\n".join(lines)
        try:
            if stamp.read_bytes() == seen.encode():
                return
        except OSError:
            pass
        for shard in shards:
            self.check_file(shard)
        try:
            stamp.write_text(seen)
        except OSError:
            return  # a read-only data directory is checked at every start

    def check_file(self, shard: Shard) -> None:
        path, digest, largest = shard.path, hashlib.sha256(), 0
        content = np.memmap(path, dtype=shard.dtype, mode="r") if shard.status.st_size else np.zeros(0, shard.dtype)
        for begin in range(0, len(content), 1 << 22):
            piece = content[begin : begin + (1 << 22)]
            digest.update(piece.tobytes())
            largest = max(largest, int(piece.max()))
        if digest.hexdigest() != self.meta["sha256"].get(path.name):
            raise InputError(f"{path} does not have the content that meta.json records (sha256 differs). {HOW}")
        if largest >= shard.limit:
            what, those = ("token id", "vocabulary") if path.suffix == ".bin" else ("a", "numbers")
            raise InputError(f"{path} holds {what} {largest}, beyond the {those} of {shard.limit}. {HOW}")

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
    """One file of a shard, which is mapped when it is read: values below `limit`."""

    def __init__(self, path: Path, dtype: np.dtype, limit: int) -> None:
        self.path, self.dtype, self.limit = path, dtype, limit
        self.status = path.stat()  # when the dataset was opened

    def __len__(self) -> int:
        return self.status.st_size // self.dtype.itemsize

    def __getitem__(self, places: slice) -> NDArray[Any]:
        return map_shard(self)[places]


def most_mapped() -> int:
    """OPEN_SHARDS, or half of the files that this process may open, if that is less."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OPEN_SHARDS if limit < 0 else min(OPEN_SHARDS, limit // 2)


@functools.lru_cache(most_mapped())
def map_shard(shard: Shard) -> NDArray[Any]:
    """Memory-map the shard. Of all datasets of this process, the most recently used shards stay mapped.

    Raises RunError for a shard that was replaced since the dataset was opened: the data would mix two corpora.
    """
    try:
        mapped = np.memmap(shard.path, dtype=shard.dtype, mode="r")
        if IDENTITY(shard.path.stat()) == IDENTITY(shard.status):
            return mapped
        reason, how = "it was replaced meanwhile", "Run the same command again"
    except (OSError, ValueError) as error:
        how = way_out(error, "Run the same command again")
        reason = str(getattr(error, "strerror", None) or error)
    raise RunError(f"cannot read {shard.path}: {reason}. {how}")


class TokenStream:
    """The tokens of one split, in shards of `size` tokens each (the last may be shorter), read as one sequence."""

    mask: TokenStream | None = None  # for conversations: 1 for each token that is learned
    starts: NDArray[np.int64] | None = None  # where each conversation begins, and where the last one ends

    def __init__(self, shards: list[Shard] | list[NDArray[Any]], size: int) -> None:
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
