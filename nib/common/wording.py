"""How numbers and paths are written in messages."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path


def counted(number: object, noun: str) -> str:
    """A number, which may already be text, and the noun in singular or plural: 1 token, 2 tokens."""
    return f"{number} {noun if str(number) == '1' else noun + 's'}"


def typed(path: Path | str) -> str:
    """`path` quoted for a shell, so that no script takes it for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def way_out(error: Exception, otherwise: str) -> str:
    """The advice for a file that cannot be read: `otherwise`, unless the limit of open files is the cause."""
    full = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
    return "Raise the limit of open files (ulimit -n)" if full else otherwise


def printable(text: object) -> str:
    """`text` on one line, with escapes for control characters."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in str(text))


def size(number: int) -> str:
    """A number of bytes: 4.53 MB."""
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if number >= each[0]), (1.0, "bytes"))
    return f"{number / unit:.3g} {name}"


def amount(number: float) -> str:
    """A number of tokens, short: 85, 14.7k, 0.51M."""
    units = ((999.5e6, 1e9, "B"), (1e5, 1e6, "M"), (999.5, 1e3, "k"))  # smallest number, unit, name
    _, unit, name = next((each for each in units if number >= each[0]), (0, 1, ""))
    return f"{number / unit:.3g}{name}"


def duration(seconds: float) -> str:
    """3.1 hours."""
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"))
    unit, name = next((each for each in units if seconds >= 2 * each[0]), (1, "seconds"))
    return f"{seconds / unit:,.{int(seconds < 10 * unit)}f} {name}"
