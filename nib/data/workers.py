"""Worker processes.

A worker shares nothing with its parent but two pipes: it works under any script, does not import torch, and ends by
itself if the parent dies in any way.
"""

from __future__ import annotations

import collections
import itertools
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from nib.common.exits import InputError, RunError

_ROOT = Path(__file__).resolve().parents[2]
_START = "import sys; sys.path[0] = sys.argv[1]; from nib.data.workers import serve; serve()"


class Worker:
    """A process that makes one object, `make(*arguments)`, and calls it once for each call of the Worker.

    `make` is a class or function of a module of nib.
    """

    def __init__(self, make: Callable[..., Callable], *arguments: object) -> None:
        # Its own session: Ctrl-C in the terminal reaches only the parent, which then ends its workers.
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(_ROOT)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.first: list[object] = [(make, arguments)]

    def __call__(self, *arguments: object) -> Any:
        """Raises the object's InputError, or RunError if the process died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            for message in [*self.first, arguments]:
                _send(self.process.stdin, message)
            self.first = []
            answer, error = pickle.load(self.process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            status = self.process.wait()
            raise RunError(f"a worker process died (status {status}), perhaps out of memory. Try --workers=1") from None
        if error is not None:
            raise InputError(error)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def _send(pipe: IO[bytes], message: object) -> None:
    pickle.dump(message, pipe, protocol=5)
    pipe.flush()


def serve() -> None:
    """Run the worker process: reads what to make and then arguments from stdin, writes answers to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a print must not mix with the answers
    try:
        make, arguments = pickle.load(requests)
        function = make(*arguments)
        while True:
            arguments = pickle.load(requests)
            try:
                answer: tuple[object, str | None] = function(*arguments), None
            except InputError as error:
                answer = None, str(error)
            _send(answers, answer)
    except (EOFError, BrokenPipeError):  # the parent has finished or died: exit without flushing
        os._exit(0)
    except MemoryError:  # the parent reports it in one line
        os._exit(1)


def map_in_order(
    make: Callable[[Any], Callable], setting: object, items: Iterable[Any], count: int
) -> Generator[tuple[Any, Any], None, None]:
    """Yield (item, `make(setting)(item)`) in the order of `items`, computed by `count` processes.

    With a `count` of 1 the work is done in this process. Only enough items to keep all processes busy are read ahead.
    Raises the error of the first failing item; close the generator to end the processes.
    """
    if count == 1:
        function = make(setting)
        for item in items:
            yield item, function(item)
        return
    workers: list[Worker] = []
    mine, closed = threading.local(), threading.Event()

    def call(item: object) -> object:
        """In a thread that keeps one worker busy: a request, its answer, the next request."""
        if not hasattr(mine, "worker"):
            mine.worker = Worker(make, setting)
            workers.append(mine.worker)
            if closed.is_set():  # while it was started
                mine.worker.process.kill()
        return mine.worker(item)

    threads = ThreadPoolExecutor(count)
    pending: collections.deque[tuple[Any, Future]] = collections.deque()
    remaining = iter(items)
    try:
        while True:
            for item in itertools.islice(remaining, 2 * count + 1 - len(pending)):
                pending.append((item, threads.submit(call, item)))
            if not pending:
                return
            done, future = pending.popleft()
            yield done, future.result()
    finally:
        closed.set()
        for worker in workers:
            worker.process.kill()
        threads.shutdown(cancel_futures=True)
        for worker in workers:
            worker.close()
