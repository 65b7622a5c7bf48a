"""What SIGINT, SIGTERM and SIGHUP do: end the process at once, or raise where there is something to clean up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def exit_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def exit_on_interrupt() -> None:
    """From here on Ctrl-C ends the process with status 130, without an exception.

    The first call of every script. A KeyboardInterrupt while modules are imported would end in a traceback, be turned
    into another exception by an extension module, or get lost in a callback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, exit_at_once)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """In the body Ctrl-C raises KeyboardInterrupt, SIGTERM and SIGHUP raise SystemExit: it has something to clean up.

    SIGTERM and SIGHUP raise once: a terminal that is closed sends several, and the clean-up must not be cut short.
    Signals that are ignored (SIGHUP under nohup), or that somebody else handles, are left alone.
    """
    stopped_by = 0

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped_by
        before, stopped_by = stopped_by, number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        if not before:
            raise SystemExit(128 + number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other may set handlers, or runs them
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, exit_at_once):
                handlers[number] = signal.signal(number, stop)
    try:
        yield
    except Exception:  # extension modules that are imported turn what a handler raises into an exception of theirs
        if stopped_by:
            raise SystemExit(128 + stopped_by) from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class StopSignal:
    """Remembers that SIGINT, SIGTERM or SIGHUP came, so that the step can end and be saved.

    A second SIGINT or SIGTERM stops at once. A second SIGHUP does not: the kernel, the shell and torchrun each send
    one when a terminal is closed. Where SIGHUP is ignored, as under nohup, it stays so. With `at_once` the first stops.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.number, self.at_once = 0, at_once
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self.before = {number: signal.signal(number, self._arrived) for number in {*STOP_SIGNALS} - ignored}

    def _arrived(self, number: int, frame: object) -> None:
        if self.at_once or self.number == number != signal.SIGHUP:
            os._exit(128 + number)
        self.number = number

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
