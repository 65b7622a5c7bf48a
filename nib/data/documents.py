"""Where text comes from: files, directories, standard input, URLs and public corpora, read as documents.

A document is one text file, one line of JSONL, one element of a JSON array or one row of Parquet. All is streamed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import re
import select
import shutil
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from nib.common.exits import InputError
from nib.common.wording import counted, printable, way_out
from nib.data.download import download, url_path
from nib.data.paths import walk
from nib.data.questions import write_questions
from nib.data.rows import CHAT_COLUMNS, MESSAGES, row_text
from nib.data.settings import ROWS
from nib.tokenizer.chunking import read_pieces

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some programs put it first in a JSONL file; also inside concatenated files
# By the extension of the name; anything else is text.
FORMATS = {".jsonl": "jsonl", ".jsonlines": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
PACKED = set(".7z .br .lz4 .lzma .rar .tar .tbz .tbz2 .tgz .txz .tzst .z .zip .zst .zstd".split())  # not read
SEPARATOR = re.compile(r"[ \t\r\n,]*")  # between the rows of a .json file
HEAD_BYTES = 1 << 16  # of the first line of a .json file, which shows whether it is JSONL
ROW_BYTES = 1 << 28  # the longest row of a .json file; in a broken file the end of a row is not found
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
HUB = {  # built-in name: repository and its configuration
    "openwebtext": ("Skylion007/openwebtext", None),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}
BUILTIN_SOURCES = ("stdlib", "questions", "shakespeare", *HUB)
# Tests, installed packages, and directories that some machines lack.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Source:
    """One file or stream of documents."""

    name: str  # for messages
    format: str  # text, jsonl, json, parquet or hub
    path: Path | None = None  # None: standard input, or the hub
    size: int | None = None  # of its text in bytes, if known
    skip_invalid: bool = False  # leave out what is not UTF-8, whatever --invalid says


@dataclass(frozen=True)
class Part:
    """A document or a piece of one. `is_json`: an unparsed row of JSON. `fault`: why it has no text, or ""."""

    where: str
    data: bytes
    offset: int = 0  # of `data` in its file, in bytes
    first: bool = True
    last: bool = True
    is_json: bool = False
    skip_invalid: bool = False
    fault: str = ""


def find_sources(names: list[str], format: str, glob: str, directory: Path, spool: bool) -> list[Source]:
    """The files and streams that the source arguments name, in a fixed order.

    URLs are downloaded to `directory`, and with `spool` (sources are read twice) pipes are copied there.
    Raises InputError for a source that does not exist or has no matching file.
    """
    found: list[Source] = []
    for index, name in enumerate(names):
        copy = directory / str(index)
        if name == "stdlib":
            found += _standard_library()
        elif name == "questions":
            write_questions(copy)
            found.append(Source(name, "jsonl", copy, copy.stat().st_size))
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
    """Standard input or a named pipe, copied to the file `copy` unless that is None."""
    format = _format_of(Path(name), format)
    if format == "parquet":
        raise InputError("Parquet cannot be read from a pipe. Give the name of a file")
    if copy is None:
        return Source(name, format, None if name == "-" else Path(name))
    copy = copy.with_suffix(_compression(Path(name)))
    with io.BufferedReader(StandardInput()) if name == "-" else open(name, "rb") as stream, open(copy, "wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    return Source(name, format, copy, _text_size(copy))


def _standard_library() -> list[Source]:
    root = Path(sysconfig.get_path("stdlib"))
    files = walk(root, "*.py", NOT_STDLIB, follow=False)
    if not files:
        raise InputError(f"this Python has no source of its standard library in {root}. Give a directory of text")
    return [Source(f"stdlib: {path.relative_to(root)}", "text", path, path.stat().st_size, True) for path in files]


def _downloaded(name: str, format: str, path: Path) -> Source:
    if name == "shakespeare":
        download(SHAKESPEARE_URL, path, SHAKESPEARE_BYTES)
        return Source(name, "text", path, SHAKESPEARE_BYTES)
    shown = url_path(name)
    format, path = _format_of(shown, format), path.with_suffix(_compression(shown))
    download(name, path)
    return Source(name, format, path, _text_size(path))


def _on_disk(path: Path, format: str, glob: str) -> list[Source]:
    try:
        if path.is_dir():
            files = walk(path, glob or "*")
            tables = [file for file in files if file.suffix.lower() == ".parquet"]
            if tables and not glob and format == "auto":  # other files beside Parquet are not part of the corpus
                files = tables
            if not files:
                raise InputError(f"no file in {path} matches {glob or '*'}. Give another directory or --glob")
            readable = [file for file in files if _content_of(file, format)]
            if len(files) <= 2 * len(readable) < 2 * len(files):  # if most were packed, the corpus would be in them
                packed = sorted(set(files) - set(readable))
                shown = ", ".join(map(printable, packed[:3])) + ", ..." * (len(packed) > 3)
                how = "Unpack what belongs to the corpus"
                print(f"skipped {counted(len(packed), 'packed file')}: {shown}. {how}", file=sys.stderr)
                files = readable
        elif path.exists():
            files = [path]
        else:
            raise InputError(f"no source {path}. Give a file, a directory, -, a URL or {', '.join(BUILTIN_SOURCES)}")
        for file in files:
            file.open("rb").close()  # fail now, not after hours of work
        return [Source(str(file), _format_of(file, format), file, _text_size(file)) for file in files]
    except OSError as error:
        how = way_out(error, "Leave it out or repair it")
        raise InputError(f"cannot read {error.filename or path}: {error.strerror}. {how}") from None


def _compression(path: Path) -> str:
    """The extension of a compressed file that can be read, or ""."""
    return path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""


def _text_size(path: Path) -> int | None:
    return None if _compression(path) else path.stat().st_size


def _content_of(path: Path, format: str) -> str:
    """The format of a file of that name; "" for archives and compressions that are not read."""
    *_, inner, last = "", "", *(suffix.lower() for suffix in path.suffixes)
    ending = inner if last in COMPRESSED else last
    found = FORMATS.get(ending, "text" if format == "auto" else "jsonl") if format in ("auto", *ROWS) else format
    return "" if ending in PACKED or (found == "parquet" and last in COMPRESSED) else found


def _format_of(path: Path, format: str) -> str:
    """The format of a file of that name. Raises InputError for archives and compressions that are not read."""
    if found := _content_of(path, format):
        return found
    raise InputError(
        f"{path} is packed, and of packed files only text and JSON in {', '.join(COMPRESSED)} are read. Unpack it, "
        "pipe what is in it to prepare_data.py -, or leave it out (of a directory by --glob)"
    )


def read_parts(sources: list[Source], field: str, kind: str = "") -> Iterator[Part]:
    """The documents of all sources, in order. `field` is the Parquet column that holds the text.

    With a `kind` (chat, preference), rows of Parquet become rows of JSON.
    Raises InputError for what cannot be read. Whether text is valid UTF-8 and a line valid JSON is checked later.
    """
    for source in sources:
        try:
            if source.format == "hub":
                yield from _hub_rows(source)
            elif source.format == "parquet":
                yield from _parquet_rows(source, field, kind)
            elif source.path is None:
                yield from _stream(source, io.BufferedReader(StandardInput(), 2**20))
            else:
                with COMPRESSED.get(_compression(source.path), open)(source.path, "rb") as stream:
                    yield from _stream(source, stream)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            error = error if isinstance(error, OSError) else OSError(f"it is compressed, and damaged: {error}")
            how = way_out(error, "Leave it out or repair it")
            raise InputError(f"cannot read {source.name}: {error.strerror or error}. {how}") from None


class StandardInput(io.RawIOBase):
    """Standard input, read with short waits: a signal just before a long wait would be handled only after it."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        number = sys.stdin.fileno()
        try:
            while not select.select([number], [], [], 0.2)[0]:
                pass
            return os.readv(number, [buffer])
        except OSError as error:
            raise InputError(f"cannot read standard input: {error.strerror}. Give the name of a file") from None


def _stream(source: Source, stream: BinaryIO) -> Iterator[Part]:
    offset = 0
    if source.format == "text":
        for piece, last in read_pieces(stream):
            yield Part(source.name, piece, offset, offset == 0, last, skip_invalid=source.skip_invalid)
            offset += len(piece)
        return
    lines: Iterable[bytes] = stream
    if source.format == "json":
        head = [stream.readline(HEAD_BYTES)]
        while head[-1] and not (line := head[-1].removeprefix(BYTE_ORDER_MARK).strip()):
            head.append(stream.readline(HEAD_BYTES))
        whole = head[-1].endswith(b"\n") or 0 < len(head[-1]) < HEAD_BYTES
        if not (whole and line.startswith(b"{") and line.endswith(b"}")):
            yield from _json_rows(source.name, stream, b"".join(head))
            return
        lines = itertools.chain(head, stream)  # a single object, or JSONL in a file called .json
    for number, line in enumerate(lines, start=1):
        mark = len(BYTE_ORDER_MARK) if line.startswith(BYTE_ORDER_MARK) else 0
        if line[mark:].strip():
            yield Part(f"{source.name}, line {number}", line[mark:], offset + mark, is_json=True)
        offset += len(line)


def _json_rows(name: str, stream: BinaryIO, head: bytes) -> Iterator[Part]:
    """The elements of an array, or objects one after the other, from a file that begins with the bytes `head`.

    Memory holds little more than the current row. After an error in the JSON the next row cannot be found: the rest
    becomes one part, which is later found to be invalid.
    """
    decoder = json.JSONDecoder(strict=False)
    text = head.removeprefix(BYTE_ORDER_MARK).decode("latin-1")  # one character per byte, so that positions are equal
    offset, at = len(head) - len(text), SEPARATOR.match(text).end()  # type: ignore[union-attr]
    array = text.startswith("[", at)
    at += array
    number = 1
    while True:
        at = SEPARATOR.match(text, at).end()  # type: ignore[union-attr]
        if array and text.startswith("]", at):
            array, at = False, at + 1
            continue
        where = f"{name}, row {number}"
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            more = stream.read(max(1 << 16, len(text) - at))
            if more and len(text) - at < ROW_BYTES:
                offset, text, at = offset + at, text[at:] + more.decode("latin-1"), 0
                continue
            if array or at < len(text):
                yield Part(f"{where} and what follows", text[at:].encode("latin-1"), offset + at, is_json=True)
            return
        yield Part(where, text[at:end].encode("latin-1"), offset + at, is_json=True)
        number, at = number + 1, end


def _parquet_rows(source: Source, field: str, kind: str) -> Iterator[Part]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"reading {source.name} needs pyarrow. Run: pip install pyarrow") from None
    try:
        # With a buffer size it reads small blocks; without, it would hold a row group, which can be gigabytes.
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=1 << 20, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if kind:
                known = [name for name in columns if name in (field, *CHAT_COLUMNS)]
                if not known:
                    raise InputError(f"{source.name} has no column of {kind}s. Give --field={'|'.join(columns)}")
                batches = file.iter_batches(batch_size=256, columns=known)
                for number, values in enumerate((row for batch in batches for row in _rows_of(batch)), start=1):
                    where = f"{source.name}, row {number}"
                    try:
                        line = json.dumps(
                            _without_nulls(values if isinstance(values, dict) else values.to_pylist()[0]),
                            default=_as_text,
                        )
                        yield Part(where, line.encode(), is_json=True)
                    except (ValueError, OverflowError) as error:  # text that is not UTF-8, a time beyond datetime
                        yield Part(where, b"", fault=f"a value cannot be read: {str(error)[:80]}")
                return
            if field == "text" and field not in columns and MESSAGES in columns:
                field = MESSAGES
            if field not in columns:
                raise InputError(f"{source.name} has no column {field!r}. Give --field={'|'.join(columns)}")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for cell in batch.column(0):
                    row += 1
                    try:
                        value = cell.as_py()
                    except UnicodeDecodeError as error:  # a text column's bytes are checked later
                        if not isinstance(getattr(cell, "value", cell), pyarrow.BinaryScalar):
                            fault = f"column {field!r} holds {cell.type} with text that is not UTF-8"
                            yield Part(f"{source.name}, row {row}", b"", fault=fault)
                            continue
                        value = error.object
                    except (ValueError, OverflowError):  # a time beyond Python's datetime
                        value = cell
                    yield _row(value, f"column {field!r}", f"{source.name}, row {row}")
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"{source.name} is not a valid Parquet file: {str(error)[:120]}. Give a valid file") from None


def _rows_of(batch: Any) -> list[Any]:
    """The rows of a batch of Parquet as dictionaries; if one of them cannot be read, as batches of one row."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError):
        return [batch.slice(place, 1) for place in range(batch.num_rows)]


def _as_text(value: Any) -> str:
    """A value of Parquet that JSON lacks, such as a date. Raises UnicodeDecodeError for bytes that are not UTF-8."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _without_nulls(value: Any) -> Any:
    """`value` without nulls: a row of Parquet has null for each key that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _hub_rows(source: Source) -> Iterator[Part]:
    repository, configuration = HUB[source.name]
    try:
        import datasets
    except ImportError:
        raise InputError(f"{source.name} needs the package datasets. Run: pip install datasets") from None
    try:
        rows = datasets.load_dataset(repository, configuration, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _row(row["text"], "column 'text'", f"{source.name}, row {number}")
    except (OSError, ValueError, RuntimeError) as error:  # no network, or the hub's own errors
        raise InputError(f"cannot stream {repository}: {str(error)[:150]}. Check the network and try again") from None


def _row(value: Any, column: str, where: str) -> Part:
    if isinstance(value, bytes):
        return Part(where, value)
    text, fault = row_text(value, column)
    return Part(where, text.encode("utf-8", "surrogatepass"), fault=fault)
