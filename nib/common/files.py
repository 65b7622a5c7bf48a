"""Files and directories that are whole or not there, that survive a power cut, and that are read within bounds."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nib.common.signals import stop_signals_raise


def plain_file(path: Path, most: int = 1 << 62) -> Path:
    """`path` as it is. Raises OSError unless it is a file of at most `most` bytes: a pipe or a device may not end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file")
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it is over {most >> 20} MB")
    return path


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes. Raises OSError as `plain_file` does, ValueError for others."""
    try:
        content = json.loads(plain_file(path, most).read_bytes())
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with plain_file(path).open("rb") as file:
        while data := file.read(1 << 22):
            digest.update(data)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Lock a directory for this process; False when another holds it, or renamed it just now.

    The lock goes with the process, so a killed run leaves none behind.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(descriptor), os.stat(directory))
        except OSError:
            mine = False
        yield mine
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_directory(place: Path, replace: bool = False) -> Iterator[Path]:
    """A hidden directory beside `place` that takes its name when the body ends well, and vanishes when it does not.

    Its files are on the disk by then. What a killed process left in it is removed. Raises FileExistsError when another
    process is writing `place`, and when there is something of that name, unless that is to be replaced.
    """
    aside = place.with_name(f".{place.name}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    with stop_signals_raise(), locked(aside) as mine:
        if not mine:
            raise FileExistsError(errno.EEXIST, "another process is writing it")
        try:
            for left in aside.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield aside
            for path in (*aside.iterdir(), aside):
                fsync(path)
            if replace:
                shutil.rmtree(place, ignore_errors=True)
            elif place.exists():
                raise FileExistsError(errno.EEXIST, "something else made it meanwhile")
            aside.rename(place)
            fsync(place.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
