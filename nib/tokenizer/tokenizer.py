"""Text to token ids and back, without loss: tiktoken encodings, BPE trained on a corpus, characters, bytes.

Every tokenizer is saved as one complete JSON file: loading it needs no network and no pickle, and runs no code.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nib.common.exits import InputError
from nib.tokenizer.chunking import PIECE_BYTES, read_pieces

TOKENIZER_FILE = "nib_tokenizer.json"
FORMAT = "nib-tokenizer-1"
END_OF_TEXT = "<|endoftext|>"
MAX_FILE_BYTES = 64 << 20  # o200k, the largest public encoding, takes 4 MB
MAX_VOCAB = 1 << 22

# Words with one leading space or sign, groups of up to three digits, punctuation with the line ends after it, white
# space without the space of the next word: the split pattern of cl100k (GPT-4) and Llama 3.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORD_CHARACTERS = 1000  # in BPE training, shorter words are never cut, longer ones at multiples of it
_LONG_WORD = re.compile(rf"\w{{{WORD_CHARACTERS}}}|[\W_]{{{WORD_CHARACTERS}}}")
# Encoded and decoded once when a tokenizer is made: one that loses text is refused.
_PROBE = "The end's near: don't\tpanic, 12345 x_y = 'é中文🙂e\u0301'\r\n\n  \x00 <|endoftext|> \u3000ＡＢ...\n   "


class Tokenizer:
    """Token ids of a text. `decode(encode(text)) == text` for every text without lone surrogates.

    `token_bytes[id]` are the bytes that an id stands for; empty for end-of-text, other special tokens and unused ids.
    `stop_ids` end a generated text like end-of-text does; Hugging Face models may have several.
    `special_tokens` maps names to the ids that no text is encoded to; `chat_template` is jinja, or empty.
    """

    kind = ""
    stop_ids: frozenset[int] = frozenset()
    chat_template = ""

    def __init__(self, name: str, token_bytes: list[bytes], end_of_text: int | None) -> None:
        self.name = name
        self.token_bytes = token_bytes
        self.end_of_text = end_of_text
        self.special_tokens: dict[str, int] = {} if end_of_text is None else {END_OF_TEXT: end_of_text}

    def add_special_tokens(self, names: Iterable[str]) -> None:
        """Give each name that is not a special token yet the next id after the vocabulary."""
        for name in names:
            if name not in self.special_tokens:
                self.special_tokens[name] = self.vocab_size
                self.token_bytes.append(b"")

    def named_tokens(self) -> dict[str, str]:
        """The special tokens that chat templates use by name, such as eos_token."""
        return {} if self.end_of_text is None else dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; special tokens in it are ordinary text. Raises InputError for text that has no ids."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, as a uint32 array, which is faster."""
        try:
            if len(text) <= PIECE_BYTES:
                return self._encode_piece(text)
            stream = io.BytesIO(text.encode("utf-8"))
            return np.concatenate([self._encode_piece(piece.decode("utf-8")) for piece, _ in read_pieces(stream)])
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            raise InputError(f"the text holds U+{code:04X}, a lone surrogate. Give valid Unicode text") from None

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text to be continued. A Hugging Face tokenizer gives special tokens in it their ids."""
        return self.encode(text)

    def encode_chat(self, text: str, continued: bool = False) -> tuple[list[int], np.ndarray]:
        """The ids of a rendered chat, with special tokens as their ids, and each id's span of characters, (T, 2).

        `continued`: the text continues another one, so no space is put before it.
        """
        ids: list[int] = []
        places = [np.zeros((0, 2), dtype=np.int64)]
        at = 0
        specials = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        for part in re.split(f"({specials})", text) if specials else [text]:
            if part in self.special_tokens:
                ids.append(self.special_tokens[part])
                places.append(np.array([[at, at + len(part)]]))
            elif part:
                found = self.encode(part)
                code = code_points(part)
                of_byte = np.repeat(np.arange(len(code)), 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000))
                ends = np.cumsum([len(self.token_bytes[id]) for id in found])
                places.append(at + np.stack([of_byte[np.r_[0, ends[:-1]]], of_byte[ends - 1] + 1], axis=1))
                ids += found
            at += len(part)
        return ids, np.concatenate(places)

    def _encode_piece(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`; special tokens have none. Raises InputError for an id outside the vocabulary."""
        ids = list(ids)
        for outside in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= outside < self.vocab_size:
                size = self.vocab_size
                raise InputError(f"token id {outside} is not in the vocabulary of {self.name}, 0 to {size - 1}")
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, with U+FFFD where the bytes are not valid UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def byte_lengths(self) -> np.ndarray:
        """The number of bytes of each id, int64 (V,), to turn a loss per token into bits per byte."""
        return np.array([len(piece) for piece in self.token_bytes], dtype=np.int64)

    def check_ids(self, ids: Iterable[int], known: int, what: str, put: Iterable[int | None] = ()) -> None:
        """Raise InputError if `what` has ids that a model with embeddings for 0 to known - 1 lacks.

        Ids in `put` do not come from the text: nib or the tokenizer has put them before or after it.
        """
        largest = max(ids, default=-1)
        if largest >= known:
            token = f"the token {self.token_name(largest)!r}, id {largest}"
            has, how = f"{what} has {token}", "Leave it out, or add"
            if largest in put:
                has, how = f"{token}, is put before or after {what}", "Add"
            raise InputError(
                f"{has}, but the model has only the ids 0 to {known - 1}. {how} embeddings with transformers' "
                "resize_token_embeddings"
            )

    def token_name(self, id: int) -> str:
        """The token as text, for messages."""
        return next((name for name, special in self.special_tokens.items() if special == id), "") or self.decode([id])

    def token_text(self, id: int) -> str:
        """The text of a token, or the name of a special one. Bytes of an incomplete character become U+FFFD."""
        if id >= self.vocab_size:  # a model's vocabulary may be padded to a round number
            return f"<{id}>"
        return self.decode([id]) or (END_OF_TEXT if id == self.end_of_text else self.token_name(id)) or f"<{id}>"

    def save(self, directory: Path) -> Path:
        """Write `nib_tokenizer.json` into `directory` and return its path."""
        content: dict[str, Any] = {
            "format": FORMAT, "kind": self.kind, "name": self.name, "end_of_text": self.end_of_text,
        }  # fmt: skip
        if self.stop_ids:
            content["stop_ids"] = sorted(self.stop_ids)
        if self.chat_template:
            content["chat_template"] = self.chat_template
        path = Path(directory) / TOKENIZER_FILE
        path.write_text(json.dumps(content | self._content()) + "\n", encoding="utf-8")
        return path

    def _content(self) -> dict[str, Any]:
        added = [token for token in self.special_tokens if token != END_OF_TEXT]
        return {"added_tokens": added} if added else {}  # their ids are the last ones, in this order


class ByteTokenizer(Tokenizer):
    """The 256 bytes and end-of-text: 257 ids, for any corpus, without training."""

    kind = "byte"

    def __init__(self) -> None:
        super().__init__("byte", [bytes([value]) for value in range(256)] + [b""], end_of_text=256)

    def _encode_piece(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)


class CharTokenizer(Tokenizer):
    """One id for each different character of the corpus, in code-point order; no end-of-text."""

    kind = "char"

    def __init__(self, characters: str) -> None:
        super().__init__("char", [character.encode("utf-8") for character in characters], end_of_text=None)
        self.characters = characters
        self.ids = np.full(0x110000, -1, dtype=np.int32)
        self.ids[code_points(characters)] = np.arange(len(characters))

    def _encode_piece(self, text: str) -> np.ndarray:
        ids = self.ids[code_points(text)]
        unknown = np.flatnonzero(ids < 0)
        if len(unknown):
            character = text[unknown[0]]
            raise InputError(
                f"the character {character!r} (U+{ord(character):04X}) is not among the {len(self.characters)} of this "
                "char tokenizer. Leave it out, or prepare the data with --tokenizer=byte or bpe:N"
            )
        return ids.astype(np.uint32)

    def _content(self) -> dict[str, Any]:
        return {"characters": self.characters, **super()._content()}


class BpeTokenizer(Tokenizer):
    """Byte-pair encoding run by tiktoken: a public encoding such as gpt2, or one trained on a corpus.

    `ranks` maps the bytes of a token to its id, which is also its merge priority; all 256 single bytes are in it.
    Raises InputError if ids clash, a byte is missing, or the pattern is not a regular expression or loses text.
    """

    kind = "bpe"

    def __init__(self, name: str, pattern: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
        import tiktoken

        size = max([*ranks.values(), *special_tokens.values()], default=-1) + 1
        token_bytes = [b""] * size
        for token, rank in ranks.items():
            token_bytes[rank] = token
        super().__init__(name, token_bytes, special_tokens.get(END_OF_TEXT))
        if sum(map(bool, token_bytes)) != len(ranks) or any(token_bytes[id] for id in special_tokens.values()):
            raise InputError(f"tokenizer {name}: two tokens share one id. Make the tokenizer again")
        if any(bytes([value]) not in ranks for value in range(256)):
            raise InputError(f"tokenizer {name}: not all 256 single bytes have an id. Make the tokenizer again")
        self.pattern, self.ranks, self.special_tokens = pattern, ranks, dict(special_tokens)
        # tiktoken searches the text for special tokens even if none is allowed, so it gets only one, a rare one.
        try:
            self.encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: size}
            )
        except ValueError as error:
            raise InputError(f"tokenizer {name}: {error}. Make the tokenizer again") from None
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise InputError(f"tokenizer {name}: its split pattern loses text. Make the tokenizer again")

    def _encode_piece(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            # A panic of the regular expression engine. Pieces of PIECE_BYTES cause none with any known pattern.
            # The panic's class cannot be imported and is not a subclass of Exception.
            if type(error).__name__ != "PanicException":
                raise
            if len(text) == 1:
                raise InputError(f"tokenizer {self.name}: its split pattern fails on {text!r}") from None
        middle = len(text) // 2
        return np.concatenate([self._encode_piece(text[:middle]), self._encode_piece(text[middle:])])

    def _content(self) -> dict[str, Any]:
        tokens = [base64.b64encode(token).decode() if token else None for token in self.token_bytes]
        return {"pattern": self.pattern, "tokens": tokens, "special_tokens": self.special_tokens}


def code_points(text: str) -> np.ndarray:
    """The code points of `text`. Raises UnicodeEncodeError for a lone surrogate."""
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Train byte-level BPE on `texts`, with at most `vocab_size` ids of which the last is end-of-text.

    Stops early if every word of a small corpus is already one token. The same texts give the same tokenizer.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=sorted(alphabet), show_progress=False)
    trained.train_from_iterator(_short_words(texts), trainer)
    # Ids are in the order of the merges, so they are also tiktoken's ranks.
    byte_of = bytes_of_letters()
    ranks = {bytes(byte_of[letter] for letter in token): id for token, id in trained.get_vocab().items()}
    return BpeTokenizer(f"bpe:{len(ranks) + 1}", SPLIT_PATTERN, ranks, {END_OF_TEXT: len(ranks)})


def _short_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut inside very long words: the time of training grows with the square of a word's length."""
    for text in texts:
        start = 0
        for place in range(0, len(text), WORD_CHARACTERS):
            if _LONG_WORD.match(text, place):
                yield text[start:place]
                start = place
        yield text[start:]


def bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of the byte-level alphabet stands for.

    Printable bytes stand for themselves; the others are, in order, U+0100, U+0101 and so on.
    """
    from tokenizers import pre_tokenizers

    itself = {letter: ord(letter) for letter in pre_tokenizers.ByteLevel.alphabet() if ord(letter) < 256}
    others = sorted(set(range(256)) - set(itself.values()))
    return itself | {chr(256 + index): value for index, value in enumerate(others)}


def train_char(texts: Iterable[str]) -> CharTokenizer:
    """The tokenizer of the characters that occur in `texts`. Raises InputError if there are none."""
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        seen[code_points(text)] = True
    if not seen.any():
        raise InputError("there is no text to take characters from. Give a source that has some")
    return CharTokenizer("".join(map(chr, np.flatnonzero(seen))))
