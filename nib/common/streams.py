"""Standard streams that are closed, full, not UTF-8, or whose reader has exited.

Progress messages must not end a script: a stream that cannot be written is replaced by the null device. The result
of a script goes through `write_result`, which raises OutputLost if it cannot be written.
"""

from __future__ import annotations

import io
import os
import select
import sys
from typing import Any

_lost: dict[int, OSError] = {}  # why a descriptor cannot be written


class OutputLost(OSError):
    """The result cannot be written to standard output."""


class _Output(io.FileIO):
    """Standard output or standard error; never raises OSError."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another program made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            _lost[self.fileno()] = error
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def guard_streams() -> None:
    """Make the standard streams usable in any state, before another file can be opened under their descriptors.

    A closed stream becomes the null device. Characters that an encoding lacks are written as escapes. Streams that
    a notebook or a test has replaced are left alone.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError as error:
            _lost[number] = error
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            raw = io.BufferedWriter(_Output(number, "w", closefd=False))
            encoding = stream.encoding if stream else "utf-8"
            setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True))


def write_result(text: str, end: str = "\n") -> None:
    """Print the script's result. Raises OutputLost."""
    print(text, end=end, flush=True)
    if 1 in _lost:
        raise OutputLost(_lost[1].errno, _lost[1].strerror)
