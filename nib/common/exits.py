"""How a script ends: a user's mistake gives one line and an exit status, never a traceback."""

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

# The name of the thread that writes a checkpoint, and how long an exiting process waits for it. When one process has
# failed, torchrun kills the others after 30 seconds.
WRITER, LAST_WRITE_SECONDS = "checkpoint", 60.0


class InputError(Exception):
    """Bad usage or bad input; exit status 2. The message is one line: WHAT. FIX."""


class RunError(Exception):
    """A run with valid usage and input that failed; exit status 1."""


def leave(status: int) -> NoReturn:
    """End the process, after a checkpoint that is being written in a background thread is complete.

    One of several processes ends by os._exit: gloo's threads sometimes hang or abort in Python's normal shutdown.
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
def memory_errors(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors of the body, on the host or a device, into a RunError that ends in `advice`."""
    try:
        yield
    except MemoryError:
        raise RunError(f"there is not enough memory. {advice}") from None
    except RuntimeError as error:
        from nib.common.device import is_out_of_memory  # imports torch, which prepare_data.py does without

        too_many_bytes = "Storage size calculation overflowed" in str(error)  # torch's message beyond 64 bits
        if not too_many_bytes and not is_out_of_memory(error):
            raise
        raise RunError(f"there is not enough memory. {advice}") from None


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and end the process with the status it returns (None: 0), or with that of its error.

    2: `InputError`. 1: `RunError`, a full disk, or a result that cannot be written. 130: Ctrl-C. Any other exception
    is a bug and keeps its traceback. Under torchrun every process raises the same InputError; only the first process
    of each machine prints it.
    """
    guard_streams()
    try:
        status = main() or 0
        sys.stdout.flush()
        leave(status)
    except (InputError, RunError) as error:
        rank = os.environ.get("LOCAL_RANK", "0")  # not set if something other than torchrun set RANK
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        if alone or rank == "0" or not rank.isdigit() or isinstance(error, RunError):
            print("error:", printable(" ".join(str(error).split())), file=sys.stderr)
        leave(2 if isinstance(error, InputError) else 1)
    except OutputLost as error:
        if error.errno != errno.EPIPE:  # the reader has exited, as in `python sample.py | head`: no message
            print(f"error: cannot write to standard output: {error.strerror}. Send it elsewhere", file=sys.stderr)
        leave(1)
    except OSError as error:
        at = f": {error.filename}" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            how = "Make room, and run the same command again"
            print(printable(f"error: {error.strerror}{at}. {how}"), file=sys.stderr)
            leave(1)
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(printable(f"error: {error.filename} is longer than a name can be. Give a shorter one"), file=sys.stderr)
        leave(2)
    except KeyboardInterrupt:
        leave(130)
