"""What the name of a dataset means, and how a path is typed in the commands that nib prints."""

from __future__ import annotations

import shlex
from pathlib import Path


def find_dataset(name: str) -> Path:
    """The prepared directory NAME or data/NAME; where there is none, the place that a message should name.

    A directory without a meta.json does not hide data/NAME: mostly it holds the texts that were prepared.
    """
    path, below = Path(name), Path("data") / name
    for directory in (path, below):
        if (directory / "meta.json").exists():
            return directory
    return path if path.is_dir() and "/" in name else below


def typed(path: Path | str) -> str:
    """`path` as an argument in a shell, which no script takes for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
