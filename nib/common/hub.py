"""Models named as on the Hugging Face hub, downloaded once by the optional package huggingface_hub."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from nib.common.exits import InputError

TOKENIZER_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "*.jinja",
]  # fmt: skip
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors", "model.safetensors.index.json"]


def is_hub_name(target: str) -> bool:
    """Whether a name, which is not a local path, can be a model on the hub: gpt2 and its sizes, or OWNER/NAME."""
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?", target):
        return True
    owner, slash, name = target.partition("/")
    plain = re.fullmatch(r"[\w-][\w.-]*", owner) and re.fullmatch(r"[\w.-]*[\w-]", name)
    return bool(slash and plain and owner not in ("out", "data", "config") and not Path(owner).exists())


def download(name: str, files: list[str]) -> Path:
    """The directory with these files of a model, downloaded or from the cache. Raises InputError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"{name} is not here, and the hub needs a package. Run: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of the hub, of three network libraries, or of the disk
        reason = textwrap.shorten(str(error), 150, placeholder="...")
        raise InputError(
            f"{name} is not here, and the hub gives none: {reason}. Check the name and the network"
        ) from None
