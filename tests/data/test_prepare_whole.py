"""prepare_data.py, disturbed: its output appears whole or not at all, downloads go on, memory stays flat."""

from __future__ import annotations

import functools
import http.server
import operator
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_helpers import SCRIPT, Data, command, left_over, run

from nib.common.exits import InputError
from nib.data.download import download
from nib.data.workers import map_in_order

# Whole or not at all


@pytest.fixture
def half_done(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run with two workers that has written tokens and waits for more text on its standard input."""
    process = subprocess.Popen(
        command("-", "--out=data/out", "--tokenizer=byte", "--workers=2"),
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(b"some text\n" * 1_500_000)
    process.stdin.flush()
    wait_for(lambda: any(file.stat().st_size for file in tmp_path.glob("data/.out.staging/*/*.tokens")))
    yield process
    process.kill()
    process.communicate()


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    listed = subprocess.check_output(["ps", "-e", "-o", "pid=,ppid="], text=True)
    return [int(line.split()[0]) for line in listed.splitlines() if int(line.split()[1]) == pid]


def is_running(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_run_leaves_nothing(
    tmp_path: Path, half_done: subprocess.Popen[bytes], number: signal.Signals, status: int
) -> None:
    workers = children(half_done.pid)
    assert len(workers) == 2
    half_done.send_signal(number)
    assert half_done.wait(60) == status
    assert half_done.stderr is not None and half_done.stderr.read() == b""
    wait_for(lambda: not any(map(is_running, workers)))
    assert left_over(tmp_path / "data") == []


WAITING = """
import io, os, signal, sys, threading, time
from nib.data.documents import StandardInput
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # this thread takes the signal, not the reader
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
io.BufferedReader(StandardInput()).read(10)
"""


def test_a_signal_that_interrupts_no_read_is_seen() -> None:
    command = [sys.executable, "-c", WAITING]
    with subprocess.Popen(command, cwd=SCRIPT.parent, stdin=subprocess.PIPE) as process:
        try:
            assert process.wait(20) == 143
        finally:
            process.kill()


def test_after_a_kill_the_next_run_succeeds(tmp_path: Path, half_done: subprocess.Popen[bytes]) -> None:
    workers = children(half_done.pid)
    half_done.kill()
    half_done.wait()
    wait_for(lambda: not any(map(is_running, workers)))
    assert left_over(tmp_path / "data") == [".out.staging"]
    (tmp_path / "t.txt").write_text("text")
    assert run(tmp_path, "t.txt", "--out=data/out", "--tokenizer=byte").returncode == 0
    assert Data(tmp_path / "data" / "out").meta["documents"]["train"] == 1
    assert left_over(tmp_path / "data") == ["out"]


def test_two_runs_for_one_output(tmp_path: Path, half_done: subprocess.Popen[bytes]) -> None:
    (tmp_path / "t.txt").write_text("text")
    second = run(tmp_path, "t.txt", "--out=data/out", "--tokenizer=byte")
    assert second.returncode == 2 and b"another run is preparing" in second.stderr
    assert half_done.stdin is not None
    half_done.communicate(timeout=60)  # closes its input
    assert half_done.returncode == 0
    assert Data(tmp_path / "data" / "out").text("train").startswith("some text\nsome")


def test_a_worker_that_dies_ends_the_run(tmp_path: Path, half_done: subprocess.Popen[bytes]) -> None:
    for worker in children(half_done.pid):
        os.kill(worker, signal.SIGKILL)
    _, said = half_done.communicate(b"more text\n" * 1_000_000, timeout=60)
    assert half_done.returncode == 1 and said.startswith(b"error: a worker process died (status -9)")
    assert left_over(tmp_path / "data") == []


def test_an_output_is_replaced_only_on_request_and_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("old")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    options = ("--out=data/out", "--tokenizer=byte", "--val-fraction=0")
    assert run(tmp_path, "t.txt", *options).returncode == 0
    (tmp_path / "t.txt").write_text("new")
    refused = run(tmp_path, "t.txt", *options)
    assert refused.returncode == 2 and b"--overwrite" in refused.stderr
    assert run(tmp_path, "bad.txt", *options, "--overwrite").returncode == 2
    assert Data(tmp_path / "data" / "out").text("train") == "old"
    assert run(tmp_path, "t.txt", *options, "--overwrite").returncode == 0
    assert Data(tmp_path / "data" / "out").text("train") == "new"
    assert left_over(tmp_path / "data") == ["out"]


def test_overwrite_does_not_remove_what_is_not_prepared_data(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for out in ("mine", "t.txt"):
        refused = run(tmp_path, "t.txt", f"--out={out}", "--tokenizer=byte", "--overwrite")
        assert refused.returncode == 2 and b"is not prepared data" in refused.stderr
    assert left_over(tmp_path) == ["mine", "t.txt"] and left_over(tmp_path / "mine") == ["thesis.txt"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk: both are an OSError at the write."""
    (tmp_path / "t.txt").write_text("text\n" * 400_000)
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    done = run(tmp_path, "t.txt", "--tokenizer=byte", preexec_fn=limit)
    assert done.returncode == 1 and done.stderr.startswith(b"error: cannot write data/t: ")
    assert done.stderr.count(b"\n") == 1 and left_over(tmp_path / "data") == []


@pytest.mark.parametrize("limit", [7, 12])
@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_a_low_limit_of_open_files_is_named(tmp_path: Path, limit: int, tokenizer: str) -> None:
    (tmp_path / "t.txt").write_text("text\n" * 800_000)  # for three workers
    lower = functools.partial(resource.setrlimit, resource.RLIMIT_NOFILE, (limit, limit))
    done = run(tmp_path, "t.txt", f"--tokenizer={tokenizer}", "--workers=3", preexec_fn=lower)
    assert done.returncode == 1 and done.stderr.count(b"\n") == 1, done.stderr
    assert done.stderr.startswith(b"error: Too many open files. Raise the limit of open files (ulimit -n), or lower")
    assert left_over(tmp_path / "data") == []


# URLs


POEM = b"".join(b"line %d of the poem\n" % number for number in range(30_000))


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Serves the poem, or its first bytes before it cuts the connection, at the URL that it returns."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        sent = len(POEM)

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            if not self.path.startswith("/texts/"):
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(POEM)))
            self.end_headers()
            self.wfile.write(POEM[: self.sent])

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def start(sent: int = len(POEM)) -> str:
        Handler.sent = sent
        return f"http://127.0.0.1:{server.server_port}/texts/poem.txt"

    yield start
    server.shutdown()
    server.server_close()


def test_a_url_is_fetched_and_prepared(tmp_path: Path, serve: Callable[..., str]) -> None:
    done = run(tmp_path, serve(), "--tokenizer=byte", "--val-fraction=0")
    assert done.returncode == 0, done.stderr
    assert Data(tmp_path / "data" / "poem").text("train").encode() == POEM
    assert left_over(tmp_path / "data") == ["poem"]


def test_a_download_that_is_cut_or_is_not_the_file(tmp_path: Path, serve: Callable[..., str]) -> None:
    cut = run(tmp_path, serve(200_000), "--tokenizer=byte")
    assert cut.returncode == 1 and b"the connection was cut. Check the network and run again" in cut.stderr
    missing = run(tmp_path, serve().replace("texts", "nothing"), "--tokenizer=byte")
    assert missing.returncode == 2 and b"the server says 404" in missing.stderr
    with pytest.raises(InputError, match=f"{len(POEM)} bytes, not the expected 7"):
        download(serve(), tmp_path / "x", 7)
    assert left_over(tmp_path / "data") == []


# Costs


def test_help_and_usage_errors_import_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import atexit, runpy, sys; heavy = {'numpy', 'torch', 'tiktoken', 'tqdm', 'tokenizers'};"
        "atexit.register(lambda: print('heavy:', sorted(heavy & set(sys.modules))));"
        "sys.argv = sys.argv[1:]; sys.path[0] = sys.argv.pop(1); runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    for arguments in (["--help"], [], ["t.txt", "--sed=1"]):
        line = [sys.executable, "-c", program, str(SCRIPT), str(SCRIPT.parent), *arguments]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == (0 if arguments == ["--help"] else 2) and "heavy: []" in done.stdout


def test_workers_keep_the_order_and_are_not_read_far_ahead_of() -> None:
    taken = 0

    def items() -> Iterator[str]:
        nonlocal taken
        for number in range(60):
            taken += 1
            yield f"item {number}"

    # Any picklable callable serves: this one calls a method of the item.
    for given, (item, answer) in enumerate(map_in_order(operator.methodcaller, "upper", items(), 2)):
        assert (item, answer) == (f"item {given}", f"ITEM {given}")
        assert taken - given <= 6
    assert given == 59


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (5, 100):
        with open(tmp_path / "t.txt", "wb") as file:
            for _ in range(megabytes):
                file.write(b"some words in a line, and more of them\n" * 25_641)
        process = subprocess.Popen(
            command("t.txt", "--tokenizer=byte", "--workers=1", "--overwrite"), cwd=tmp_path, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks.append(usage.ru_maxrss / (1 << 10 if sys.platform == "linux" else 1 << 20))
    assert peaks[1] - peaks[0] < 20, f"{peaks} MB for 5 and 100 MB of text"
