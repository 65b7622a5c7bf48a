"""Data directories of conversations, as prepare_data.py --format chat writes them, made by a few lines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from nib.tokenizer.tokenizer import ByteTokenizer

Conversation = tuple[list[int], list[int]]  # ids, and for each whether it is learned


def conversation(question: str, answer: str) -> Conversation:
    """A turn that is read and a turn that is learned, with the id that ends it."""
    read, learned = list(question.encode()), [*answer.encode(), 256]
    return read + learned, [0] * len(read) + [1] * len(learned)


def sums(count: int, first: int = 0) -> list[Conversation]:
    """Conversations of different lengths that have something to learn in them."""
    numbers = range(first, first + count)
    return [conversation(f"{n}+{n * n % 997}=", f"{n + n * n % 997}" + "!" * (n * 7 % 13)) for n in numbers]


def write_chats(
    directory: Path, train: list[Conversation], val: list[Conversation], shard_tokens: int = 1000
) -> dict[str, object]:
    """Returns meta.json. A conversation may go on in the next shard; its length is with the shard it begins in."""
    directory.mkdir(parents=True, exist_ok=True)
    ByteTokenizer().save(directory)
    sha256, tokens = {}, {}
    for split, conversations in (("train", train), ("val", val)):
        ids = np.array([each for text, _ in conversations for each in text], dtype="<u2")
        mask = np.array([each for _, learned in conversations for each in learned], dtype=np.uint8)
        lengths = np.array([len(text) for text, _ in conversations], dtype="<u4")
        begins = np.cumsum(lengths) - lengths
        tokens[split] = len(ids)
        for index in range(-(-len(ids) // shard_tokens)):
            here = slice(index * shard_tokens, (index + 1) * shard_tokens)
            parts = {"bin": ids[here], "mask": mask[here], "rows": lengths[begins // shard_tokens == index]}
            for suffix, part in parts.items():
                path = directory / f"{split}-{index:05d}.{suffix}"
                path.write_bytes(part.tobytes())
                sha256[path.name] = hashlib.sha256(part.tobytes()).hexdigest()
    meta = {
        "format": "nib-data-1", "kind": "chat", "source": ["chats.jsonl"], "tokenizer": "byte", "vocab_size": 257,
        "dtype": "uint16", "tokens": tokens, "bytes": tokens,
        "documents": {"train": len(train), "val": len(val)}, "shard_tokens": shard_tokens, "sha256": sha256,
    }  # fmt: skip
    (directory / "meta.json").write_text(json.dumps(meta))
    return meta
