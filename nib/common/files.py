"""Files and directories that appear complete or not at all, survive a power cut, and are read with a size limit."""

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

from nib.common.exits import InputError
from nib.common.signals import stop_signals_raise

UNFINISHED = "nib-unfinished"  # a name that only nib uses: whatever is in such a directory may be removed


def plain_file(path: Path, most: int = 1 << 62) -> Path:
    """Return `path`. Raises OSError unless it is a regular file of at most `most` bytes: a pipe may never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if found.st_size > most:
        raise OSError(errno.EFBIG, f"it is over {most >> 20} MB")
    return path


def read_object(path: Path, most: int) -> dict[str, Any]:
    """The object in a JSON file of at most `most` bytes. Raises OSError as `plain_file` does, ValueError otherwise."""
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
    """Wait until a file, or a directory's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Make a file hold `data`, in one step and on the disk."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(data)
    fsync(aside)
    aside.replace(path)


def fsync_files(directory: Path) -> None:
    """Wait until a directory's files and their names are on the disk."""
    for path in (*directory.iterdir(), directory):
        fsync(path)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Lock a directory. Yields False if another process holds the lock, or has just renamed or removed the directory.

    The lock ends with the process, so a killed run leaves none behind.
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


def staging_path(place: Path) -> Path:
    """The directory in which a new `place` is prepared, in its subdirectory UNFINISHED."""
    return place.with_name(f".{place.name}.staging")


@contextlib.contextmanager
def workplace(place: Path, staging: Path, lock: Path, known: tuple[str, ...] = ()) -> Iterator[Path]:
    """An empty directory in `staging` to prepare the content of `place` in. It is removed unless the body renames it.

    A lock on the directory `lock` admits one process at a time; what a killed one left is removed. Raises InputError
    if another process holds the lock, or if `staging` holds anything but this directory and the names in `known`.
    """
    staging.mkdir(parents=True, exist_ok=True)
    new = staging / UNFINISHED
    with stop_signals_raise(), locked(lock) as mine:
        if not mine:
            raise InputError(f"another run is preparing {place} right now. Wait for it, or give another name")
        if staging.is_symlink() or not {UNFINISHED, *known}.issuperset(os.listdir(staging)):
            what = "nib's temporary directory, holds files that nib did not write"
            raise InputError(f"{staging}, {what}. Move it, or give another name")
        try:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)
            with contextlib.suppress(OSError):
                staging.rmdir()


@contextlib.contextmanager
def new_directory(place: Path, replace: bool = False) -> Iterator[Path]:
    """A hidden directory that is renamed to `place` when the body succeeds, and removed when it fails.

    Before that its files are flushed to disk. Raises InputError as `workplace` does, and if `place` exists by then and
    `replace` is False.
    """
    with workplace(place, staging_path(place), staging_path(place)) as new:
        yield new
        for path in new.iterdir():
            if path.is_file():  # safetensors makes files that only their owner can read
                path.chmod(new.stat().st_mode & 0o666)
        fsync_files(new)
        if replace:
            shutil.rmtree(place, ignore_errors=True)
        elif place.exists():
            raise InputError(f"{place} was made by another program meanwhile. Move it away, and run again")
        new.rename(place)
        fsync(place.parent)
