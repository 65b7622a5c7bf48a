"""Open datasets by name; a built-in corpus is prepared if it is missing."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from nib.common.exits import InputError, RunError
from nib.data.dataset import Dataset
from nib.data.mixture import Mixture, read_names
from nib.data.paths import find_dataset
from nib.data.prepare import BUILTIN_DATASETS, prepare_builtin
from nib.data.shards import staging_path

# How long the other processes wait for a built-in corpus if the first process has made no files yet, and if its files
# do not change. On a network file system a new name may take a minute to appear.
ABSENT_SECONDS, SILENT_SECONDS = 120.0, 600.0


def open_mixture(text: str, first: bool = True) -> Dataset | Mixture:
    """The dataset that the setting `dataset` names, or the mixture of several. Raises InputError."""
    shares = read_names(text)
    parts = {name: open_dataset(name, first) for name in shares}
    return Mixture(parts, list(shares.values())) if len(parts) > 1 else next(iter(parts.values()))


def open_dataset(name: str, first: bool = True) -> Dataset:
    """The prepared directory NAME, or data/NAME. Raises InputError.

    A built-in corpus that is missing is prepared by the `first` process, for which the others wait.
    """
    directory = find_dataset(name)
    if not directory.exists() and name in BUILTIN_DATASETS:
        if first:
            prepare_builtin(name)
        else:
            wait_for_dataset(directory)
    if not directory.exists():
        have = sorted(path.parent.name for path in Path("data").glob("*/meta.json"))
        prepared = f" Prepared: {', '.join(have)}." if have else ""
        raise InputError(
            f"there is no dataset {name!r} under data/.{prepared} Built in: {', '.join(BUILTIN_DATASETS)}. "
            f"Make it with: python prepare_data.py SOURCE --out {shlex.quote(f'data/{Path(name).name}')}"
        )
    return Dataset(directory)


def wait_for_dataset(directory: Path) -> None:
    """Return when the first process has prepared `directory`.

    Raises RunError if its files do not change for too long: it failed, never started, or has another file system.
    """
    print(f"waiting for process 0 to prepare {directory}", file=sys.stderr)
    seen, since = None, time.monotonic()
    while True:
        work = [staging_path(directory), *staging_path(directory).glob("**/*")]
        now = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in work if path.exists()]
        if directory.exists():  # checked after `work`, since renaming removes the files there
            return
        if now != seen:
            seen, since = now, time.monotonic()
        if time.monotonic() - since > (SILENT_SECONDS if now else ABSENT_SECONDS):
            raise RunError(
                f"process 0 is not preparing {directory}. See its message, or unset RANK if this is the only process, "
                f"or prepare it first: python prepare_data.py {directory.name}"
            )
        time.sleep(0.2)
