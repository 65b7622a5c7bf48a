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

from nib.common.exits import InputError
from nib.common.signals import stop_signals_raise

UNFINISHED = "nib-unfinished"  # a name that only nib gives, since all that is there may be removed


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
    """Lock a directory for this process; False when another holds it, or renamed or removed it just now.

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


def staging_path(place: Path) -> Path:
    """Where a new `place` is prepared, in the directory UNFINISHED."""
    return place.with_name(f".{place.name}.staging")


@contextlib.contextmanager
def workplace(place: Path, staging: Path, lock: Path, known: tuple[str, ...] = ()) -> Iterator[Path]:
    """An empty directory below `staging` to prepare the content of `place` in, which is removed if it is not renamed.

    One process at a time has it, by a lock on the directory `lock`; what a killed one left in it is removed. Raises
    InputError when another is at work there, and when `staging` holds anything but it and what is `known`.
    """
    staging.mkdir(parents=True, exist_ok=True)
    new = staging / UNFINISHED
    with stop_signals_raise(), locked(lock) as mine:
        if not mine:
            raise InputError(f"another run is preparing {place} right now. Wait for it, or give another name")
        if staging.is_symlink() or not {UNFINISHED, *known}.issuperset(os.listdir(staging)):
            what = "where nib would work, holds what nib did not write"
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
    """A hidden directory that takes the name `place` when the body ends well, and vanishes when it does not.

    Its files are on the disk by then. Raises InputError as `workplace` does, and when something else has the name by
    then, unless that is to be replaced.
    """
    with workplace(place, staging_path(place), staging_path(place)) as new:
        yield new
        fsync_files(new)
        if replace:
            shutil.rmtree(place, ignore_errors=True)
        elif place.exists():
            raise InputError(f"{place} was made by something else meanwhile. Move it away, and run again")
        new.rename(place)
        fsync(place.parent)
