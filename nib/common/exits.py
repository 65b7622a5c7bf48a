"""How a script ends: one line and a status, never a traceback for a mistake of the user's."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from nib.common.streams import OutputLost, guard_streams
from nib.common.wording import printable

# The thread that writes a checkpoint, and how long a process that fails waits for it: torchrun kills after 30 seconds.
WRITER, LAST_WRITE_SECONDS = "checkpoint", 60.0


class InputError(Exception):
    """Bad usage or bad input; exit status 2. The message is one line: what is wrong. what to do."""


class RunError(Exception):
    """A run that was asked for rightly and failed; exit status 1."""


def leave(status: int) -> NoReturn:
    """End the process. One of several goes without teardown, in which gloo's threads were seen to hang or abort.

    A checkpoint that is being written in the background is written to its end first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(status)
    for thread in threading.enumerate():
        if thread.name == WRITER:
            thread.join(LAST_WRITE_SECONDS)
    os._exit(status)


@contextlib.contextmanager
def script_errors() -> Iterator[None]:
    """Leave the process with the exit status of the contract when the body ends in one of these errors.

    2 `InputError`, 1 `RunError`, a full disk and a result that cannot be written, 130 Ctrl-C. Any other exception is a
    bug and keeps its traceback. Under torchrun every process of a machine meets the same InputError; only the first
    one there says it.
    """
    guard_streams()
    try:
        yield
    except (InputError, RunError) as error:
        rank = os.environ.get("LOCAL_RANK", "0")  # not set where RANK was left by something else than torchrun
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone or rank == "0" or not rank.isdigit() or isinstance(error, RunError):
            print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
        leave(2 if isinstance(error, InputError) else 1)
    except OutputLost as error:
        if error.errno != errno.EPIPE:  # a reader that went away, as in `python sample.py | head`, needs no words
            print(f"error: cannot write to standard output: {error.strerror}. Send it elsewhere", file=sys.stderr)
        leave(1)
    except OSError as error:
        at = f": {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            how = "Make room, and give the same command again"
            print(printable(f"error: {error.strerror}{at}. {how}"), file=sys.stderr)
            leave(1)
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(printable(f"error: {error.filename} is longer than a name can be. Give a shorter one"), file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        leave(130)


def run_script(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process with the status it returns (None: 0), or that of its error."""
    with script_errors():
        status = main() or 0
        sys.stdout.flush()
        leave(status)
