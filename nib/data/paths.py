"""Find a dataset by name, and the text files in a directory."""

from __future__ import annotations

import fnmatch
import os
import sys
from collections.abc import Set
from pathlib import Path

from nib.common.wording import printable
from nib.data.shards import META_FILE, dataset_files


def find_dataset(name: str) -> Path:
    """The prepared directory NAME or data/NAME; if there is none, the path for error messages.

    A directory NAME without prepared data does not hide data/NAME: it usually holds the source texts.
    """
    path, below = Path(name), Path("data") / name
    for directory in (path, below):
        if dataset_files(directory):
            return directory
    for directory in (path, below):  # damaged, perhaps
        if (directory / META_FILE).exists():
            return directory
    return path if path.is_dir() and "/" in name else below


def walk(root: Path, glob: str, leave_out: Set[str] = frozenset(), follow: bool = True) -> list[Path]:
    """The files below `root` that match, sorted by path, without those of a prepared dataset and hidden ones.

    A glob with a part that begins with a dot matches hidden files too.

    Links to files are followed, with `follow` also links to directories. A file that is reached twice is read once,
    and a link to a directory that contains it is not followed.
    """

    def fail(error: OSError) -> None:
        raise error

    def identity(path: str | Path) -> tuple[int, int]:
        status = os.stat(path)
        return status.st_dev, status.st_ino

    hidden = any(part.startswith(".") for part in glob.split("/"))
    files, links, seen = [], [root], set()
    while links:
        links.sort(reverse=True)
        top = links.pop()
        for directory, names, file_names in os.walk(top, onerror=fail):
            here = Path(directory)
            if identity(here) in seen:
                names.clear()
                continue
            seen.add(identity(here))
            names[:] = [name for name in names if (hidden or not name.startswith(".")) and name not in leave_out]
            for link in (here / name for name in names if follow and (here / name).is_symlink()):
                if not Path(os.path.realpath(here)).is_relative_to(os.path.realpath(link)):
                    links.append(link)
            own = dataset_files(here)
            own |= {Path(name).with_suffix(".checked").name for name in own}  # the stamps of nib.data.dataset
            for name in file_names:
                path = here / name
                parts = path.relative_to(root).parts if "/" in glob else (name,)
                if (name.startswith(".") and not hidden) or name in own or not _matches(parts, glob):
                    continue
                if path.is_file():
                    files.append(path)
                else:
                    print(f"skipped {printable(path)}: it is not a readable file", file=sys.stderr)
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    linked = {path for path in files if path.is_symlink()}
    known = {identity(path) for path in files if path not in linked} if linked else set()
    once = []
    for path in files:
        if path in linked:
            if identity(path) in known:
                continue
            known.add(identity(path))
        once.append(path)
    return once


def _matches(parts: tuple[str, ...], glob: str) -> bool:
    """Whether a path matches `glob`: its name, or its whole path if `glob` has a slash; `**` is any directories."""
    if "/" not in glob:
        return fnmatch.fnmatchcase(parts[-1], glob)

    def match(parts: tuple[str, ...], patterns: list[str]) -> bool:
        if not patterns or not parts:
            return not parts and all(pattern == "**" for pattern in patterns)
        if patterns[0] == "**":
            return match(parts, patterns[1:]) or match(parts[1:], patterns)
        return fnmatch.fnmatchcase(parts[0], patterns[0]) and match(parts[1:], patterns[1:])

    return match(parts, [pattern for pattern in glob.split("/") if pattern not in ("", ".")])
