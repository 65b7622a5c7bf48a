"""How a script ends: one line and a status, never a traceback for a mistake of the user's."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn


class InputError(Exception):
    """Bad usage or bad input; exit status 2. The message is one line: what is wrong. what to do."""


class RunError(Exception):
    """A run that was asked for rightly and failed; exit status 1."""


def leave(status: int) -> NoReturn:
    """End the process. One of several goes without teardown, in which gloo's threads were seen to hang or abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    os._exit(status)


@contextlib.contextmanager
def script_errors() -> Iterator[None]:
    """Leave the process with the exit status of the contract when the body ends in one of these errors.

    2 `InputError`, 1 `RunError`, 130 Ctrl-C. Any other exception is a bug and keeps its traceback. Under torchrun
    every process meets the same InputError; only the first one says it.
    """
    try:
        yield
    except (InputError, RunError) as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not rank.isdigit() or isinstance(error, RunError):
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        leave(2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # the reader went away, as in `python sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(0)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"error: {error.filename} is longer than a name can be. Give a shorter one", file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        leave(130)


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process with the status it returns (None: 0), or that of its error."""
    with script_errors():
        status = main() or 0
        sys.stdout.flush()
        leave(status)
