"""Where text comes from: files, directories, standard input, URLs and public corpora, read as documents.

A document is one text file, one line of JSONL or one row of Parquet. Everything is read as a stream.
"""

from __future__ import annotations

import fnmatch
import io
import os
import select
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from nib.download import download
from nib.errors import InputError
from nib.pieces import read_pieces

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some programs begin a JSONL file with it; files may have been joined
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}  # anything else is text
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
HUB = {  # built-in name: repository, its configuration, and the column that holds the text
    "openwebtext": ("Skylion007/openwebtext", None, "text"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", "text"),
}
MESSAGES = "messages"  # the column of a chat, where there is none called text
BUILTIN_SOURCES = ("stdlib", "shakespeare", *HUB)
# Tests, installed packages, and what is there on one machine and not on the next.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """One file or stream of documents."""

    name: str  # as messages and meta.json show it
    format: str  # text, jsonl, parquet or hub
    path: Path | None = None  # None is standard input, or the hub
    size: int | None = None  # in bytes, where known
    skip_invalid: bool = False  # leave out what is not UTF-8, whatever the option says


@dataclass(frozen=True)
class Part:
    """A document, or a piece of one that is long. `is_json`: a line of JSONL, not parsed yet."""

    where: str
    data: bytes
    offset: int = 0  # of `data` in its file, in bytes
    first: bool = True
    last: bool = True
    is_json: bool = False
    skip_invalid: bool = False


def find_sources(names: list[str], format: str, glob: str, directory: Path, spool: bool) -> list[Source]:
    """The files and streams behind the source arguments, in a fixed order.

    What has to be fetched goes to `directory`: a URL always, a pipe when it is to be read twice (`spool`).
    Raises InputError for a source that is not there or has no matching file.
    """
    found: list[Source] = []
    for index, name in enumerate(names):
        copy = directory / str(index)
        if name == "stdlib":
            found += _standard_library()
        elif name in HUB:
            found.append(Source(name, "hub"))
        elif name == "shakespeare" or name.startswith(("http://", "https://")):
            found.append(_downloaded(name, format, copy))
        elif name == "-" or Path(name).is_fifo():
            found.append(_pipe(name, format, copy if spool else None))
        else:
            found += _on_disk(Path(name), format, glob)
    return found


def _pipe(name: str, format: str, copy: Path | None) -> Source:
    """Standard input or a named pipe, copied to disk when it is to be read twice."""
    format = _format_of(Path(name), format)
    if format == "parquet":
        raise InputError("Parquet cannot be read from a pipe. Give the name of a file")
    if copy is None:
        return Source(name, format, None if name == "-" else Path(name))
    with open(0 if name == "-" else name, "rb", closefd=name != "-") as stream, open(copy, "wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    return Source(name, format, copy, copy.stat().st_size)


def _standard_library() -> list[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    files = _walk(root, "*.py", NOT_STDLIB)
    if not files:
        raise InputError(f"this Python has no source of its standard library in {root}. Give a directory of text")
    return [Source(f"stdlib: {path.relative_to(root)}", "text", path, path.stat().st_size, True) for path in files]


def _downloaded(name: str, format: str, path: Path) -> Source:
    if name == "shakespeare":
        size = download(SHAKESPEARE_URL, path, SHAKESPEARE_BYTES)
        return Source(name, "text", path, size)
    size = download(name, path)
    return Source(name, _format_of(Path(urlsplit(name).path), format), path, size)


def _on_disk(path: Path, format: str, glob: str) -> list[Source]:
    try:
        if path.is_dir():
            files = _walk(path, glob or "*", set())
            tables = [file for file in files if file.suffix.lower() == ".parquet"]
            if tables and not glob and format == "auto":  # the notes beside them are no part of the corpus
                files = tables
            if not files:
                raise InputError(f"no file in {path} matches {glob or '*'}. Give another directory or --glob")
        elif path.exists():
            files = [path]
        else:
            raise InputError(f"no source {path}. Give a file, a directory, -, a URL or {', '.join(BUILTIN_SOURCES)}")
        for file in files:
            file.open("rb").close()  # before hours of work, not after
        return [Source(str(file), _format_of(file, format), file, file.stat().st_size) for file in files]
    except OSError as error:
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}. Leave it out or mend it") from None


def _format_of(path: Path, format: str) -> str:
    return FORMATS.get(path.suffix.lower(), "text") if format == "auto" else format


def _walk(root: Path, glob: str, leave_out: set[str]) -> list[Path]:
    """The files below `root` that match, sorted by their path; nothing hidden."""

    def fail(error: OSError) -> None:
        raise error

    files = []
    for directory, names, file_names in os.walk(root, onerror=fail):
        names[:] = [name for name in names if not name.startswith(".") and name not in leave_out]
        for name in file_names:
            path = Path(directory) / name
            shown = path.relative_to(root).as_posix() if "/" in glob else name
            if not name.startswith(".") and fnmatch.fnmatchcase(shown, glob) and path.is_file():
                files.append(path)
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def read_parts(sources: list[Source], field: str) -> Iterator[Part]:
    """The documents of all sources, in order. `field` is the Parquet or hub column that holds the text.

    Raises InputError for what cannot be read. Whether text is valid UTF-8 and a line valid JSON is found later.
    """
    for source in sources:
        try:
            if source.format == "hub":
                yield from _hub_rows(source)
            elif source.format == "parquet":
                yield from _parquet_rows(source, field)
            elif source.path is None:
                yield from _stream(source, io.BufferedReader(StandardInput(), 2**20))
            else:
                with open(source.path, "rb") as stream:
                    yield from _stream(source, stream)
        except OSError as error:
            raise InputError(f"cannot read {source.name}: {error.strerror or error}. Leave it out or mend it") from None


class StandardInput(io.RawIOBase):
    """Standard input, waited for a moment at a time: a signal that comes just before a longer wait would go unseen."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        number = sys.stdin.fileno()
        while not select.select([number], [], [], 0.2)[0]:
            pass
        return os.readv(number, [buffer])


def _stream(source: Source, stream: BinaryIO) -> Iterator[Part]:
    offset = 0
    if source.format == "text":
        for piece, last in read_pieces(stream):
            yield Part(source.name, piece, offset, offset == 0, last, skip_invalid=source.skip_invalid)
            offset += len(piece)
        return
    for number, line in enumerate(stream, start=1):
        mark = len(BYTE_ORDER_MARK) if line.startswith(BYTE_ORDER_MARK) else 0
        if line[mark:].strip():
            yield Part(f"{source.name}, line {number}", line[mark:], offset + mark, is_json=True)
        offset += len(line)


def _parquet_rows(source: Source, field: str) -> Iterator[Part]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {source.name} needs pyarrow. Run: pip install pyarrow") from None
    try:
        # Read in small blocks: without a buffer size a whole row group, which can be gigabytes, is held.
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if field == "text" and field not in columns and MESSAGES in columns:
                field = MESSAGES
            if field not in columns:
                raise InputError(f"{source.name} has no column {field!r}. Give --field={'|'.join(columns)}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield _row(value, field, f"{source.name}, row {row}")
    except pyarrow.ArrowException as error:
        raise InputError(f"{source.name} is no valid Parquet file: {str(error)[:120]}. Give a whole file") from None


def _hub_rows(source: Source) -> Iterator[Part]:
    repository, configuration, field = HUB[source.name]
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source.name} is streamed by datasets. Run: pip install datasets") from None
    try:
        rows = datasets.load_dataset(repository, configuration, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _row(row[field], field, f"{source.name}, row {number}")
    except (OSError, ValueError, RuntimeError) as error:  # no network, or the hub's own errors
        raise InputError(f"cannot stream {repository}: {str(error)[:150]}. Check the network and try again") from None


def chat_text(messages: list[Any]) -> str | None:
    """Chat messages as plain text, a paragraph a message: `role: content`. None when they are none."""
    paragraphs = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which pictures and sounds are left out
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join(text for text in texts if isinstance(text, str))
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        paragraphs.append(f"{role}: {content}\n")
    return "\n".join(paragraphs)


def _row(value: Any, field: str, where: str) -> Part:
    text = chat_text(value) if isinstance(value, list) else value
    if not isinstance(text, str):
        raise InputError(f"{where}: column {field!r} holds {type(value).__name__}, not text. Give another --field")
    return Part(where, text.encode("utf-8", "surrogatepass"))
