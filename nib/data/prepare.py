"""Text to a data directory: shards of token ids, the tokenizer, and a `meta.json` that describes them."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nib.common.exits import InputError, RunError
from nib.common.wording import counted, printable, way_out
from nib.data.chat import fit_tokenizer, read_template, said, shown
from nib.data.documents import Part, Source, find_sources, read_parts
from nib.data.download import url_path
from nib.data.encode import Encoder, batches, part_text, token_dtype
from nib.data.nanogpt import copy_tokens, dataset_tokenizer, is_dataset
from nib.data.settings import PrepareSettings
from nib.data.shards import FORMAT, META_FILE, SplitWriter, staging_directory
from nib.data.workers import Worker, map_in_order
from nib.tokenizer.load import load_tokenizer, make_tokenizer
from nib.tokenizer.tokenizer import Tokenizer, train_bpe, train_char

# Datasets that are made by name: the source, and how it is prepared.
BUILTIN_DATASETS: dict[str, dict[str, Any]] = {
    "stdlib": {"source": "stdlib", "tokenizer": "bpe:2048", "val_fraction": 0.05},
    "stdlib_char": {"source": "stdlib", "tokenizer": "char", "val_fraction": 0.05},
    "questions": {"source": "questions", "tokenizer": "byte", "val_fraction": 0.02, "format": "chat"},
    "shakespeare": {"source": "shakespeare", "tokenizer": "gpt2", "val_fraction": 0.1},
    "shakespeare_char": {"source": "shakespeare", "tokenizer": "char", "val_fraction": 0.1},
    "openwebtext": {"source": "openwebtext", "tokenizer": "gpt2"},
    "fineweb-edu": {"source": "fineweb-edu", "tokenizer": "gpt2"},
}
# Text for training a BPE. On 160 MB of source code, a sample of 100 MB instead of 60 saves 0.1 % of the tokens
# (vocabulary 8192) and takes twice the time and 70 MB more memory.
BPE_SAMPLE_BYTES = 50_000_000
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def prepare_builtin(name: str) -> dict[str, Any]:
    """Prepare the built-in dataset `name` in data/`name`, and return the content of its meta.json."""
    options = dict(BUILTIN_DATASETS[name])
    return prepare([options.pop("source")], Path("data", name), PrepareSettings(**options))


def prepare(sources: list[str], out: Path, settings: PrepareSettings) -> dict[str, Any]:
    """Tokenize `sources` into the directory `out` and return the content of its `meta.json`.

    The settings have to name a tokenizer: auto is for the command line. The same sources and settings give the same
    bytes for any number of workers. A directory of nanoGPT's token files keeps its split. `out` appears complete or not
    at all. Raises InputError for a bad source, text or setting, RunError if the disk is full or the network fails.
    """
    began = time.monotonic()
    template = read_template(Path(settings.chat_template)) if settings.chat_template else ""
    tokenizer, kind = settings.tokenizer, settings.kind
    check_tokenizer_name(tokenizer)
    try:
        with staging_directory(out, settings.overwrite) as staging:
            spool = tokenizer == "char" or tokenizer.startswith("bpe:")
            fetched = staging / "fetched"
            fetched.mkdir()
            ready = is_dataset(sources) and not kind
            if ready:
                fitted = dataset_tokenizer(Path(sources[0]), tokenizer)
            else:
                found = find_sources(sources, settings.format, settings.glob, fetched, spool)
                if kind and (texts := [source.name for source in found if source.format in ("text", "hub")]):
                    raise InputError(f"{texts[0]} holds texts, not rows of {kind}s. Leave out --format={kind}")
                fitted = _fit_tokenizer(settings, found, staging)
            # Pairs of plain texts need no template and none of its special tokens.
            if kind == "chat" or (kind and (template or fitted.chat_template)):
                fit_tokenizer(fitted, template)
            fitted.save(staging)
            dtype = token_dtype(fitted)
            writer = SplitWriter(staging, np.dtype(dtype).newbyteorder("<"), settings.val_fraction, bool(kind))
            try:
                if ready:
                    copy_tokens(Path(sources[0]), fitted, writer)
                else:
                    _encode(settings, found, fitted, writer)
                    writer.settle(fitted)
                if writer.train.tokens == 0:
                    wrong = f"there is no text in {' '.join(sources)[:200]}. Give a source that has some"
                    if writer.val.tokens:
                        fraction = f"--val-fraction={settings.val_fraction}"
                        wrong = f"{fraction} leaves nothing to train on. Lower it or give more text"
                    raise InputError(wrong)
                sha256 = writer.write_shards(settings.shard_tokens)
            finally:
                writer.close()
            meta = {
                "format": FORMAT,
                "source": sources,
                "tokenizer": fitted.name,
                "vocab_size": fitted.vocab_size,
                "dtype": dtype,
                "tokens": writer.count("tokens"),
                "bytes": writer.count("bytes"),
                "documents": writer.count("documents"),
                "shard_tokens": settings.shard_tokens,
                "sha256": sha256,
                "val_fraction": settings.val_fraction,
                "seed": settings.seed,
            }
            if kind:
                meta |= {"kind": kind, "learned": writer.count("learned")}
            (staging / META_FILE).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(fetched)
    except OSError as error:
        if error.errno in DISK_ERRORS:
            raise RunError(f"cannot write {out}: {error.strerror}. Make room and run again") from None
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise RunError(f"{error.strerror}. {way_out(error, '')}, or lower --workers") from None
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError | FileNotFoundError):
            raise InputError(f"cannot write {out}: {error.strerror}. Give another --out") from None
        raise
    _print_summary(out, meta, writer.replaced, time.monotonic() - began)
    return meta


def check_tokenizer_name(name: str) -> None:
    """Raise InputError for bpe:N with a bad N; other names are looked up when they are needed."""
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:").replace("_", "")
        if not size.isdecimal() or not 257 <= int(size) <= 1_000_000:
            raise InputError(f"--tokenizer={name}: N is 257 (bytes and end-of-text) to 1000000. Write bpe:8192")


def _fit_tokenizer(settings: PrepareSettings, sources: list[Source], directory: Path) -> Tokenizer:
    """The tokenizer that the settings name; `char` and `bpe:N` are trained on the corpus."""
    name = settings.tokenizer
    if name == "char":
        _say("collecting the characters of the corpus")
        return train_char(_texts(read_parts(sources, settings.field, settings.kind), settings))
    if not name.startswith("bpe:"):
        return make_tokenizer(name)
    size = int(name.removeprefix("bpe:"))
    _say(f"training {name} on the corpus")
    # In its own process: training does not return its memory to the system, and would delay Ctrl-C.
    with contextlib.closing(Worker(functools.partial, _train_bpe)) as worker:
        tokenizer = load_tokenizer(worker(settings, sources, size, directory))
    if tokenizer.vocab_size < size:
        _say(f"the corpus has words for only {tokenizer.vocab_size} tokens, so the tokenizer is {tokenizer.name}")
    return tokenizer


def _train_bpe(settings: PrepareSettings, sources: list[Source], size: int, directory: Path) -> Path:
    """Train a tokenizer on the sources and save it."""
    parts = _sample(read_parts(sources, settings.field, settings.kind), sources)
    return train_bpe(_texts(parts, settings), size).save(directory)


def _texts(parts: Iterable[Part], settings: PrepareSettings) -> Iterator[str]:
    for part in parts:
        text = part_text(part, settings.field, settings.invalid, settings.kind)[0]
        yield from (words for side in json.loads(text) for words in said(side)) if settings.kind and text else [text]


def _sample(parts: Iterable[Part], sources: list[Source]) -> Iterator[Part]:
    """Parts spread evenly over the corpus, about `BPE_SAMPLE_BYTES`; the first ones if its size is unknown."""
    sizes = [source.size for source in sources]
    known = sum(size for size in sizes if size is not None) if None not in sizes else 0
    stride = max(1.0, known / BPE_SAMPLE_BYTES)
    taken = seen = 0
    for part in parts:
        seen += len(part.data)
        if taken * stride < seen:
            taken += len(part.data)
            yield part
        if taken >= BPE_SAMPLE_BYTES:
            return


def _encode(settings: PrepareSettings, sources: list[Source], tokenizer: Tokenizer, writer: SplitWriter) -> None:
    """Encode all documents into `writer`, in order, and print the first rows."""
    left_out, show = 0, settings.show
    # In a container a process may have fewer cores than the machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = batches(read_parts(sources, settings.field, settings.kind))
    make = functools.partial(Encoder, writer.directory)
    encoded = map_in_order(make, settings, parts, settings.workers or cores)
    with contextlib.closing(encoded), contextlib.closing(_Progress(sources)) as progress:
        for batch, (results, tokens) in encoded:
            position = 0
            for part, result in zip(batch, results, strict=True):
                if part.first:
                    writer.begin(result.content_hash)
                if writer.document is not None and result.invalid:
                    left_out += 1
                    if left_out <= 10:
                        _say(f"left out: {printable(result.invalid)}")
                    writer.take_back()
                elif writer.document is not None:
                    written = tokens[position : position + result.tokens]
                    writer.append(written, result.bytes, result.replaced)
                    if show > 0:
                        show -= 1
                        _say(f"{printable(part.where)}:\n{shown(tokenizer, written)}")
                position += result.tokens
                if part.last:
                    writer.end()
            progress.update(sum(len(part.data) for part in batch), len(tokens))
    if left_out:
        _say(f"left out {counted(left_out, 'document')} without valid text")


class _Progress:
    """A tqdm bar on a terminal; otherwise a line every LINE_SECONDS: MB, tokens, MB/s."""

    LINE_SECONDS = 10.0

    def __init__(self, sources: list[Source]) -> None:
        from tqdm import tqdm

        compressed = any(source.size is None or source.format in ("parquet", "hub") for source in sources)
        self.total = None if compressed else sum(source.size or 0 for source in sources)
        self.tokens = self.bytes = 0
        self.began = self.said = time.monotonic()
        self.bar = tqdm(total=self.total, unit="B", unit_scale=True, desc="tokens", disable=not sys.stderr.isatty())

    def close(self) -> None:
        self.bar.close()

    def update(self, bytes: int, tokens: int) -> None:
        self.bytes += bytes
        self.tokens += tokens
        self.bar.set_postfix_str(f"{self.tokens / 1e6:.1f} M tokens", refresh=False)
        self.bar.update(bytes)
        now = time.monotonic()
        if self.bar.disable and now - self.said > self.LINE_SECONDS:
            self.said = now
            of = f" of {self.total / 1e6:.0f}" if self.total else ""
            speed = self.bytes / 1e6 / (now - self.began)
            _say(f"{self.bytes / 1e6:.0f}{of} MB, {self.tokens / 1e6:.1f} M tokens, {speed:.1f} MB/s")


def _print_summary(out: Path, meta: dict[str, Any], replaced: int, seconds: float) -> None:
    total_bytes, total_tokens = sum(meta["bytes"].values()), sum(meta["tokens"].values())
    if learned := meta.get("learned"):
        _say("learned " + " and ".join(f"{counted(f'{learned[split]:,}', 'token')} of {split}" for split in learned))
    if replaced:
        _say(f"replaced {counted(replaced, 'place')} of invalid UTF-8 by U+FFFD")
    for split in ("train", "val"):
        counts = ((meta[f"{noun}s"][split], noun) for noun in ("document", "token", "byte"))
        _say(f"{split:5} " + " ".join(f"{counted(f'{count:,}', noun):>21}" for count, noun in counts))
    _say(
        f"{out}: {meta['tokenizer']}, vocabulary {meta['vocab_size']}, "
        f"{total_bytes / total_tokens:.2f} bytes a token; {seconds:.1f} s, {total_bytes / 1e6 / seconds:.1f} MB/s"
    )


def _say(line: str) -> None:
    print(line, flush=True)


def dataset_name(sources: list[str]) -> str:
    """The default name of the data directory. Raises InputError if the sources suggest none."""
    if len(sources) != 1:
        raise InputError("there is no default name for several sources. Give --out=data/NAME")
    source = sources[0]
    if source in BUILTIN_DATASETS:
        return source
    is_url = source.startswith(("http://", "https://"))
    path = url_path(source) if is_url else Path(os.path.abspath(source))
    name = "stdin" if source == "-" else re.sub(r"[^\w.-]", "_", path.name if path.is_dir() else path.stem)
    if not name:
        raise InputError(f"{source} has no name. Give --out=data/NAME")
    return name
