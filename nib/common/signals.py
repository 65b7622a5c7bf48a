"""What SIGINT, SIGTERM and SIGHUP do: end the process at once, or raise an exception if there is cleaning up to do."""

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
    """Make Ctrl-C end the process with status 130, without an exception. Every script calls this first.

    A KeyboardInterrupt during imports would end in a traceback, be turned into another exception by an extension
    module, or be lost in a callback.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored
        signal.signal(signal.SIGINT, exit_at_once)


@contextmanager
def stop_signals_raise() -> Iterator[None]:
    """In the body Ctrl-C raises KeyboardInterrupt, and SIGTERM and SIGHUP raise SystemExit, so that it can clean up.

    SIGTERM and SIGHUP raise only once: a closing terminal sends several, and must not interrupt the clean-up.
    Signals that are ignored (SIGHUP under nohup) or have another handler are left alone.
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
    if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers, and runs them
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, exit_at_once):
                handlers[number] = signal.signal(number, stop)
    try:
        yield
    except Exception:  # an extension module may turn what the handler raised into its own exception, during an import
        if stopped_by:
            raise SystemExit(128 + stopped_by) from None
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class StopSignal:
    """Records that SIGINT, SIGTERM or SIGHUP arrived, so that the current step can finish and be saved.

    A second SIGINT or SIGTERM ends the process at once. A second SIGHUP does not: the kernel, the shell and torchrun
    each send one when a terminal closes. An ignored SIGHUP (nohup) stays ignored. With `at_once` the first signal ends.
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
