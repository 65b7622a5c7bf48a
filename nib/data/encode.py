"""Documents to token ids: checks the texts, ends each document, and divides the work among processes."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nib.common.exits import InputError
from nib.data.chat import Chat
from nib.data.documents import Part
from nib.data.rows import MESSAGES, learned_sides, row_text
from nib.data.settings import PrepareSettings
from nib.data.shards import FIRST, LEARNED
from nib.data.template import TemplateFault
from nib.tokenizer.chunking import PIECE_BYTES, cut
from nib.tokenizer.load import load_tokenizer
from nib.tokenizer.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
BATCH_PARTS = 4096
CORRECT_ROW = "Correct it, give another --field, --format or --glob, or leave such rows out with --invalid=skip"


class Encoded(NamedTuple):
    """The result of one `Part`: how many of the batch's tokens are its own, or why it is left out."""

    tokens: int
    bytes: int  # of the encoded text
    replaced: int  # invalid places that became U+FFFD
    content_hash: int  # 64 bits, of the document's first piece; 0 for later pieces
    invalid: str  # why the document is left out, or ""


def token_dtype(tokenizer: Tokenizer) -> str:
    """The type of the tokens in a dataset's files."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


class Encoder:
    """Encodes batches of parts; each document ends with the end-of-text id if the tokenizer has one.

    For chats and preferences the bits LEARNED and FIRST are set in the tokens.
    """

    def __init__(self, directory: Path, settings: PrepareSettings) -> None:
        """`directory` holds the tokenizer."""
        self.settings = settings
        self.tokenizer = load_tokenizer(directory)
        self.dtype = token_dtype(self.tokenizer)
        self.key = str(settings.seed).encode()
        self.lengths = self.tokenizer.byte_lengths() if settings.kind else np.zeros(0)

    def __call__(self, parts: list[Part]) -> tuple[list[Encoded], np.ndarray]:
        """One `Encoded` a part, and the tokens of all parts together. Raises InputError."""
        results, arrays = [], []
        settings, end = self.settings, self.tokenizer.end_of_text
        end_array = np.array([] if end is None or settings.kind else [end], dtype=self.dtype)
        for part in parts:
            text, replaced, invalid = part_text(part, settings.field, settings.invalid, settings.kind)
            data = text.encode("utf-8")
            content_hash = self.content_hash(data) if part.first else 0
            if settings.kind:
                tokens, invalid = self.row(part, text, invalid)
                size = int(self.lengths[tokens & ~np.uint32(LEARNED | FIRST)].sum())
            else:
                tokens, size = self.text(part, text), len(data)
            arrays.append(tokens)
            count = len(tokens)
            # An empty document gives no tokens, not even end-of-text.
            if part.last and not invalid and (count or not part.first):
                arrays.append(end_array)
                count += len(end_array)
            results.append(Encoded(count, size, replaced, content_hash, invalid))
        return results, np.concatenate(arrays)

    def text(self, part: Part, text: str) -> np.ndarray:
        try:
            return self.tokenizer.encode_array(text).astype(self.dtype)
        except InputError as error:
            raise InputError(f"{part.where}: {error}") from None

    def row(self, part: Part, text: str, invalid: str) -> tuple[np.ndarray, str]:
        """The tokens of a conversation or preference, and why it is left out, or ""."""
        if invalid:
            return np.zeros(0, dtype=np.uint32), invalid
        try:
            return np.concatenate([self.side(**side) for side in json.loads(text)]), ""
        except (InputError, RecursionError) as error:
            reason = f"{part.where}: {'it is nested too deeply' if isinstance(error, RecursionError) else error}"
            if isinstance(error, TemplateFault):
                raise InputError(reason) from None
            how = "Correct it, give another --chat-template, or leave such rows out with --invalid=skip"
            return np.zeros(0, dtype=np.uint32), left_out(reason, how, self.settings.invalid)

    def side(self, prompt: str = "", text: str = "", **conversation: Any) -> np.ndarray:
        """The tokens, with LEARNED and FIRST, of a conversation, or of a prompt and the text learned after it."""
        if conversation:
            ids, mask = self.chat.encode_conversation(**conversation, train_on=self.settings.train_on)
        else:
            before, after = self.tokenizer.encode(prompt), self.tokenizer.encode(text)
            after += [] if self.tokenizer.end_of_text is None else [self.tokenizer.end_of_text]
            ids = np.array(before + after, dtype=np.uint32)
            mask = np.arange(len(ids)) >= len(before)
        ids |= mask * np.uint32(LEARNED)
        ids[0] |= FIRST
        return ids

    @functools.cached_property
    def chat(self) -> Chat:
        return Chat(self.tokenizer)

    def content_hash(self, data: bytes) -> int:
        """64 bits from the seed and the first piece of a document: the same for equal documents of any source."""
        first = data if len(data) < PIECE_BYTES else data[: cut(data[:PIECE_BYTES])]
        return int.from_bytes(hashlib.blake2b(first, digest_size=8, key=self.key).digest(), "big")


def part_text(part: Part, field: str, invalid: str, kind: str = "") -> tuple[str, int, str]:
    """The text of a part, the number of invalid places replaced by U+FFFD, and why its document is left out, or "".

    With a `kind` (chat, preference) the text is the JSON of the row's `learned_sides`.

    `invalid` says what to do about invalid UTF-8: error, replace or skip. A row that is not an object with a text in
    `field` is an error, or left out with skip. Raises InputError.
    """
    if part.skip_invalid:
        invalid = "skip"
    data = part.data
    if part.fault:
        return "", 0, left_out(f"{part.where}: {part.fault}", CORRECT_ROW, invalid)
    try:
        text, replaced = data.decode("utf-8"), 0
    except UnicodeDecodeError as error:
        where = part.where.partition(", line ")[0] if part.is_json else part.where
        reason = f"{where}: byte 0x{data[error.start]:02x} at offset {part.offset + error.start} is not UTF-8"
        if invalid != "replace":
            how = "Convert it with iconv, or use --invalid=replace or --invalid=skip"
            return "", 0, left_out(reason, how, invalid)
        text = data.decode("utf-8", errors="replace")
        replaced = text.count("\ufffd") - data.count("\ufffd".encode())
    if not part.is_json:
        return text, replaced, ""
    text, fault = _json_text(text, field, kind)
    if fault:
        return "", 0, left_out(f"{part.where}: {fault}", CORRECT_ROW, invalid)
    if halves := re.findall("[\ud800-\udfff]", text):  # "\ud83d" alone is valid JSON and no valid Unicode
        reason = f"{part.where}: U+{ord(halves[0]):04X} is a lone surrogate"
        if invalid != "replace":
            return "", 0, left_out(reason, "Use --invalid=replace or --invalid=skip", invalid)
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text, replaced + len(halves), ""


def left_out(reason: str, how: str, invalid: str) -> str:
    """`reason`, why a document is left out. Raises InputError with `how` to mend it unless `invalid` is skip."""
    if invalid == "skip":
        return reason
    raise InputError(f"{reason}. {how}")


def _json_text(line: str, field: str, kind: str) -> tuple[str, str]:
    """The text in a row of JSON, and what is wrong with it, or ""."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        return "", f"not valid JSON: {error}"
    if not isinstance(document, dict):
        return "", f"{type(document).__name__}, not an object"
    if kind:
        found, fault = learned_sides(document, field, kind)
        return json.dumps(found, ensure_ascii=False), fault
    if field == "text" and field not in document and MESSAGES in document:
        field = MESSAGES
    if field not in document:
        return "", f"no field {field!r} among {', '.join(list(document)[:10]) or 'none'}"
    return row_text(document[field], f"field {field!r}")


def batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    """Group parts into batches of about `BATCH_BYTES`, so that many small files cost no more than a large one."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part.data)
        if size >= BATCH_BYTES or len(batch) >= BATCH_PARTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
