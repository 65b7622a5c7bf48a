"""Models by their name on the Hugging Face hub, downloaded once by the optional package huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from nib.common.exits import InputError

TOKENIZER_FILES = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt",
    "*.jinja",
]  # fmt: skip
MODEL_FILES = [*TOKENIZER_FILES, "*.safetensors", "model.safetensors.index.json"]


def is_hub_name(target: str) -> bool:
    """Whether a name that is no path here is one of the hub's: gpt2 and its sizes, or OWNER/NAME."""
    if re.fullmatch(r"gpt2(-medium|-large|-xl)?", target):
        return True
    owner, slash, name = target.partition("/")
    plain = re.fullmatch(r"[\w-][\w.-]*", owner) and re.fullmatch(r"[\w.-]*[\w-]", name)
    return bool(slash and plain and owner not in ("out", "data", "config") and not Path(owner).exists())


def download(name: str, files: list[str]) -> Path:
    """The directory of these files of a model, from the hub or from what was downloaded before. Raises InputError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"{name} is not here, and the hub needs a package. Run: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:  # the hub's, those of three network libraries, and the disk's
        reason = " ".join(str(error).split())[:150]
        raise InputError(
            f"{name} is not here, and the hub gives none: {reason}. Check the name and the network"
        ) from None
