"""The byte-level BPE of a Hugging Face tokenizer.json, run by the package tokenizers; every encoding is checked."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from nib.common.exits import InputError
from nib.tokenizer.tokenizer import _PROBE, MAX_VOCAB, Tokenizer, bytes_of_letters

# The names of special tokens in tokenizer_config.json and chat templates.
NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))


class HuggingFaceTokenizer(Tokenizer):
    """A byte-level BPE from a tokenizer.json, with the same ids as in transformers.

    `content` is the object in tokenizer.json, `config` the kept part of tokenizer_config.json. Texts are encoded
    without NFC normalisation and without a space put before them, since decoding could undo neither. Prompts have
    both, as in transformers. Raises InputError for another kind of tokenizer, and for one that loses text.
    """

    kind = "huggingface"

    def __init__(self, name: str, content: dict[str, Any], config: dict[str, Any], end_of_text: int | None) -> None:
        import tokenizers

        self.content, self.config = content, config
        kinds = [part.get("type") for part in _parts(content.get("decoder"), "decoders")]
        model: Any = content.get("model")
        kind = model.get("type", "BPE") if isinstance(model, dict) else None
        if kind != "BPE" or kinds != ["ByteLevel"]:
            found = f"{kind} decoded by {', '.join(map(str, kinds)) or 'nothing'}"
            raise InputError(f"tokenizer {name} is {found[:80]}, not a byte-level BPE. Give a model that has one")
        # Dropout is random. A prefix or suffix stands for no bytes of the text, and can crash the library.
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(key):
                raise InputError(f"tokenizer {name} has {key}, which nib does not support. Give a model without it")
        with library_errors(name):
            self.tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
            self.tokenizer.no_truncation()
            self.tokenizer.no_padding()
            token_bytes = self._token_bytes()
            # The components that differ between texts and prompts, loaded without the vocabulary, which would be slow.
            exact = {"normalizer": _without_nfc(content.get("normalizer")), "post_processor": None, "added_tokens": []}
            exact["pre_tokenizer"] = _without_prefix(content.get("pre_tokenizer"))
            exact["model"] = {"type": "BPE", "vocab": {}, "merges": []}
            for_text = tokenizers.Tokenizer.from_str(json.dumps(content | exact))
            self.parts = {
                prompt: (made.normalizer, made.pre_tokenizer) for prompt, made in enumerate((for_text, self.tokenizer))
            }
        if end_of_text is not None and not 0 <= end_of_text < len(token_bytes):
            raise InputError(
                f"tokenizer {name}: its end of text, {end_of_text}, is not one of its ids. Give a complete directory"
            )
        if end_of_text is not None:
            token_bytes[end_of_text] = b""
        super().__init__(name, token_bytes, end_of_text)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id for id, token in added.items() if token.special}
        self.special = "|".join(map(re.escape, self.special_tokens))
        # A tokenizer that lacks some bytes is tested on a text without them. The end-of-text token, which
        # tokenizer.json may not mark as special, is left out too.
        known, end = set(token_bytes), self.tokenizer.id_to_token(end_of_text) if end_of_text is not None else None
        probe = _PROBE.replace(end, "") if end else _PROBE
        probe = "".join(c for c in probe if all(bytes([byte]) in known for byte in c.encode()))
        if not probe:
            raise InputError(f"tokenizer {name} has no tokens of bytes. Give a complete tokenizer.json")
        self._encode_piece(probe)

    @property
    def chat_template(self) -> str:
        """The template; the one called "default" if the model has several."""
        found = self.config.get("chat_template") or ""
        if isinstance(found, list):
            found = {entry.get("name"): entry.get("template") for entry in found}.get("default", "")
        return str(found)

    @chat_template.setter
    def chat_template(self, template: str) -> None:
        self.config["chat_template"] = template

    def named_tokens(self) -> dict[str, str]:
        return {key: str(token) for key, token in self.config.items() if key in NAMED_TOKENS}

    def encode_chat(self, text: str, continued: bool = False) -> tuple[list[int], np.ndarray]:
        """As transformers does with add_special_tokens=False."""
        with library_errors(self.name):
            self.tokenizer.encode_special_tokens = False
            self.tokenizer.normalizer, self.tokenizer.pre_tokenizer = self.parts[True][0], self.parts[not continued][1]
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        # trim_offsets may have removed the spaces before a word from its offsets.
        places[1:, 0] = np.minimum(places[1:, 0], np.maximum.accumulate(places[:-1, 1]))
        return list(encoding.ids), places

    def _token_bytes(self) -> list[bytes]:
        added = self.tokenizer.get_added_tokens_decoder()
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocab.values(), default=-1) + 1
        if not 0 < size <= MAX_VOCAB:
            raise InputError(f"the tokenizer has ids up to {size - 1}. Give one of at most {MAX_VOCAB}")
        byte_of, token_bytes = bytes_of_letters(), [b""] * size
        for token, id in vocab.items():
            if id not in added:
                # A token with a letter outside the byte-level alphabet is literal text, as in the library's decoder.
                known = all(map(byte_of.__contains__, token))
                token_bytes[id] = bytes(map(byte_of.__getitem__, token)) if known else token.encode("utf-8")
            elif not added[id].special:
                token_bytes[id] = token.encode("utf-8")
        return token_bytes

    def _ids(self, text: str, prompt: bool) -> list[int]:
        with library_errors(self.name):
            self.tokenizer.encode_special_tokens = not prompt  # True: special tokens in the text are ordinary text
            self.tokenizer.normalizer, self.tokenizer.pre_tokenizer = self.parts[prompt]
            return list(self.tokenizer.encode(text, add_special_tokens=prompt).ids)

    def _encode_piece(self, text: str) -> np.ndarray:
        """The ids of a text. They are decoded and compared with it, so that no loss goes unnoticed (5 % of time)."""
        data = text.encode("utf-8")
        ids = self._ids(text, prompt=False)
        decoded = b"".join(map(self.token_bytes.__getitem__, ids))
        if decoded != data:
            given = decoded.decode("utf-8", errors="replace")
            pairs = enumerate(zip(text, given, strict=False))
            same = next((place for place, (a, b) in pairs if a != b), min(len(text), len(given)))
            lost, instead = text[same : same + 20], given[same : same + 20]
            raise InputError(
                f"tokenizer {self.name} loses text: {lost!r} becomes {instead!r}. Use another, such as "
                "--tokenizer=bpe:8192, or leave such text out"
            )
        return np.array(ids, dtype=np.uint32)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids that transformers gives: special tokens in the text get their ids, and one may be put before it."""
        for part in re.split(self.special, text) if self.special else [text]:
            self.encode(part)  # raises InputError for a text that is lost
        return self._ids(text, prompt=True)

    def token_name(self, id: int) -> str:
        return str(self.tokenizer.id_to_token(id))

    def _content(self) -> dict[str, Any]:
        return {"tokenizer": self.content, "config": self.config}


def _parts(node: Any, inside: str) -> list[dict[str, Any]]:
    """The components in a sequence of tokenizer.json, or the component itself if it is not a sequence."""
    if not isinstance(node, dict):
        return []
    inner = node.get(inside)
    return [part for part in inner if isinstance(part, dict)] if isinstance(inner, list) else [node]


@contextlib.contextmanager
def library_errors(name: str) -> Iterator[None]:
    """Turn errors of the package tokenizers into InputErrors: Exceptions, and panics, which are only BaseExceptions."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"tokenizer {name}: {reason}. Give a complete tokenizer.json") from None


def _without_nfc(normalizer: Any) -> Any:
    """The normaliser, or None if it is only NFC. Other normalisers stay, since their tokens depend on them."""
    kinds = {part.get("type") for part in _parts(normalizer, "normalizers")}
    return None if kinds == {"NFC"} else normalizer


def _without_prefix(pre_tokenizer: Any) -> Any:
    """The pre-tokenizer, changed so that it puts no space before a text."""
    inner = pre_tokenizer.get("pretokenizers") if isinstance(pre_tokenizer, dict) else None
    if isinstance(inner, list):
        return pre_tokenizer | {"pretokenizers": [_without_prefix(part) for part in inner]}
    is_level = isinstance(pre_tokenizer, dict) and pre_tokenizer.get("type") == "ByteLevel"
    return pre_tokenizer | {"add_prefix_space": False} if is_level else pre_tokenizer
