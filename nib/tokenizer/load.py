"""Open a tokenizer by its name, or from a file or directory."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nib.common.exits import InputError
from nib.common.files import plain_file
from nib.common.hub import TOKENIZER_FILES, download, is_hub_name
from nib.common.wording import way_out
from nib.tokenizer.tokenizer import (
    FORMAT,
    MAX_FILE_BYTES,
    MAX_VOCAB,
    TOKENIZER_FILE,
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
)  # fmt: skip


def make_tokenizer(name: str) -> Tokenizer:
    """A tokenizer that needs no training: `byte`, an encoding of tiktoken, a file or directory, or a hub name.

    Raises InputError if there is no such tokenizer, or if tiktoken cannot download it.
    """
    if name == "byte":
        return ByteTokenizer()
    import tiktoken

    known = tiktoken.list_encoding_names()
    if name not in known:
        if name and Path(name).exists():
            return load_tokenizer(Path(name))
        if is_hub_name(name):
            return load_tokenizer(download(name, TOKENIZER_FILES))
        raise InputError(f"no tokenizer {name!r}. There are byte, char, bpe:N, a tokenizer file and {', '.join(known)}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # what requests raises is an OSError
        raise InputError(
            f"tiktoken cannot download {name} ({type(error).__name__}). Use --tokenizer bpe:8192, which needs no "
            "network, or point TIKTOKEN_CACHE_DIR to a copy of its files"
        ) from None
    return BpeTokenizer(name, encoding._pat_str, encoding._mergeable_ranks, encoding._special_tokens)


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `nib_tokenizer.json`, by its own path or from a directory that holds one (data, checkpoint or run).

    A Hugging Face directory gives its tokenizer. No code in a file is run.
    Raises InputError for a file that is missing, truncated, or not what `save` writes.
    """
    path = Path(path)
    if path.is_dir():
        in_checkpoints = sorted(path.glob(f"checkpoints/*/{TOKENIZER_FILE}"))
        found = in_checkpoints[-1] if in_checkpoints else path / TOKENIZER_FILE
        if not found.exists():
            from nib.tokenizer.huggingface import TOKENIZER_JSON, read_tokenizer

            if (path / TOKENIZER_JSON).is_file() or (path / "vocab.json").is_file():
                return read_tokenizer(path)
        path = found
    try:
        data = plain_file(path, MAX_FILE_BYTES).read_bytes()
    except OSError as error:
        how = way_out(error, f"Give a {TOKENIZER_FILE}")
        raise InputError(f"cannot read tokenizer {path}: {error.strerror}. {how}") from None
    try:
        return _from_content(json.loads(data))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(f"{path} is not a tokenizer file: {reason[:200]}. Make the tokenizer again") from None


def _from_content(content: Any) -> Tokenizer:
    _check(isinstance(content, dict) and content.get("format") == FORMAT, f"its format is not {FORMAT}")
    kind, name, end_of_text = content["kind"], content["name"], content["end_of_text"]
    _check(isinstance(name, str) and 0 < len(name) < 100 and name.isprintable(), "its name is not a short text")
    tokenizer: Tokenizer
    if kind == "byte":
        tokenizer = ByteTokenizer()
    elif kind == "char":
        characters = content["characters"]
        _check(isinstance(characters, str) and len(characters) > 0, "its characters are not a text")
        _check(not re.search("[\ud800-\udfff]", characters), "its characters hold a lone surrogate")
        _check(all(a < b for a, b in itertools.pairwise(characters)), "its characters are not in order")
        tokenizer = CharTokenizer(characters)
    elif kind == "bpe":
        pattern, tokens, special = content["pattern"], content["tokens"], content["special_tokens"]
        _check(isinstance(pattern, str) and 0 < len(pattern) < 10_000, "its pattern is not a short text")
        _check(isinstance(tokens, list) and 256 <= len(tokens) <= MAX_VOCAB, "its tokens are not a list of that size")
        _check(isinstance(special, dict), "its special tokens are not a table")
        _check(
            all(type(id) is int and 0 <= id < len(tokens) for id in special.values()), "a special token has a wrong id"
        )
        _check(len(set(special.values())) == len(special), "two special tokens share one id")
        _check(tokens[-1] is not None or len(tokens) - 1 in special.values(), "its last id stands for nothing")
        tokenizer = BpeTokenizer(name, pattern, dict(_ranks(tokens)), special)
    elif kind == "huggingface":
        from nib.tokenizer.byte_level import HuggingFaceTokenizer

        _check(isinstance(content["tokenizer"], dict) and isinstance(content["config"], dict), "it has no tokenizer")
        _check(end_of_text is None or type(end_of_text) is int, "its end_of_text is not an id")
        tokenizer = HuggingFaceTokenizer(name, content["tokenizer"], content["config"], end_of_text)
    else:
        raise ValueError(f"its kind is {kind!r}, not byte, char, bpe or huggingface")
    added, template = content.get("added_tokens", []), content.get("chat_template", "")
    _check(
        isinstance(added, list) and all(isinstance(token, str) and token for token in added),
        "its added_tokens are not a list of names",
    )
    _check(isinstance(template, str), "its chat_template is not a text")
    tokenizer.add_special_tokens(added)
    if template:
        tokenizer.chat_template = template
    _check(tokenizer.end_of_text == end_of_text, "its end_of_text does not fit")
    stops = content.get("stop_ids", [])
    whole = isinstance(stops, list) and all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in stops)
    _check(whole, "its stop_ids are not a list of ids")
    tokenizer.stop_ids = frozenset(stops)
    return tokenizer


def _ranks(tokens: list[Any]) -> Iterator[tuple[bytes, int]]:
    seen = set()
    for rank, encoded in enumerate(tokens):
        if encoded is None:
            continue
        try:
            token = base64.b64decode(encoded, validate=True)
        except (binascii.Error, TypeError):
            raise ValueError(f"token {rank} is not base64") from None
        _check(len(token) > 0 and token not in seen, f"token {rank} is empty or a duplicate")
        seen.add(token)
        yield token, rank


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
