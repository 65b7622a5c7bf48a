"""nanoGPT's datasets: train.bin, val.bin and perhaps meta.pkl, read without running any code from it."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nib.common.exits import InputError
from nib.common.files import plain_file
from nib.common.wording import counted
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer, Tokenizer

if TYPE_CHECKING:
    from nib.data.shards import SplitWriter

META_FILE = "meta.pkl"
MAX_META_BYTES = 16 << 20
COPY_TOKENS = 1 << 22


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries; refuses a pickle that names a class or function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_meta(path: Path) -> CharTokenizer:
    """The character tokenizer in a meta.pkl. Raises InputError."""
    try:
        letters = _PlainUnpickler(io.BytesIO(plain_file(path, MAX_META_BYTES).read_bytes())).load()["itos"]
        characters = [letters[id] for id in range(len(letters))]
        if not all(isinstance(each, str) and len(each) == 1 for each in characters):
            raise ValueError("its tokens are not characters")
        if not characters or sorted(set(characters)) != characters:
            raise ValueError("its characters are not in order")
        return CharTokenizer("".join(characters))
    except Exception as error:  # a broken pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} holds no table of characters: {reason[:100]}. Prepare the text itself") from None


def is_dataset(sources: list[str]) -> bool:
    """Whether the only source is a directory of nanoGPT's token files."""
    return len(sources) == 1 and all((Path(sources[0]) / f"{split}.bin").is_file() for split in ("train", "val"))


def dataset_tokenizer(directory: Path, name: str) -> Tokenizer:
    """The tokenizer in meta.pkl if there is one, else the one called `name`."""
    return read_meta(directory / META_FILE) if (directory / META_FILE).exists() else make_tokenizer(name)


def copy_tokens(directory: Path, tokenizer: Tokenizer, writer: SplitWriter) -> None:
    """Append both splits to `writer`, checking every id. Raises InputError."""
    lengths, end = tokenizer.byte_lengths(), tokenizer.end_of_text
    for name, split in writer.splits.items():
        path = directory / f"{name}.bin"
        if path.stat().st_size % 2:
            raise InputError(f"{path} has an odd number of bytes, not tokens of 2. Give nanoGPT's own files")
        with path.open("rb") as file:
            while data := file.read(2 * COPY_TOKENS):
                tokens = np.frombuffer(data, dtype="<u2")
                if tokens.max() >= tokenizer.vocab_size:
                    size = tokenizer.vocab_size
                    ids = f"id {tokens.max()}, {tokenizer.name} only {counted(size, 'id')}"
                    raise InputError(f"{path} has {ids}. Give the --tokenizer it was made with")
                split.file.write(tokens.astype(writer.dtype).tobytes())
                split.tokens += len(tokens)
                split.bytes += int(lengths[tokens].sum())
                split.documents += int((tokens == end).sum()) if end is not None else 0
        split.documents = split.documents or min(1, split.tokens)
