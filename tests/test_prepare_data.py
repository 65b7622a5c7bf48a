"""prepare_data.py as a user runs it: what it writes, that it writes it whole, and what it says to bad input."""

from __future__ import annotations

import functools
import http.server
import json
import operator
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from data_helpers import TORTURE, Data, gpt2_cache

from nib import download as download_module
from nib.corpus import Part, Source, read_parts
from nib.encoding import Encoder, EncoderSettings
from nib.errors import InputError, RunError
from nib.pieces import PIECE_BYTES
from nib.prepare import BPE_SAMPLE_BYTES, _sample
from nib.tokenizer import train_char
from nib.workers import map_in_order

SCRIPT = Path(__file__).resolve().parent.parent / "prepare_data.py"


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(cwd: Path, *arguments: object, stdin: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        command(*arguments), cwd=cwd, input=stdin, capture_output=True, timeout=120, **options
    )


def prepared(cwd: Path, *arguments: object, **options: object) -> Data:
    """Run it, expect success, and read data/out."""
    done = run(cwd, *arguments, "--out=data/out", "--overwrite", **options)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""
    return Data(cwd / "data" / "out")


def left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def write_texts(directory: Path, count: int, first: int = 0) -> list[str]:
    """`count` text files, each a document, numbered from `first`."""
    directory.mkdir(exist_ok=True)
    texts = [f"document {number}\n" + f"line {number * 7}\n" * (number % 5) for number in range(first, first + count)]
    for number, text in enumerate(texts, start=first):
        (directory / f"{number:04d}.txt").write_text(text)
    return texts


def write_jsonl(path: Path, texts: list[str], **other: object) -> Path:
    path.write_text("".join(json.dumps({"text": text, **other}) + "\n" for text in texts))
    return path


# What it writes


def test_gpt2_shards_hold_the_tokens_of_tiktoken(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(gpt2_cache(tmp_path / "cache"))}
    texts = write_texts(tmp_path / "texts", 30) + [TORTURE]
    (tmp_path / "texts" / "torture.txt").write_text(TORTURE, newline="")
    data = prepared(tmp_path, "texts", "--tokenizer=gpt2", "--val-fraction=0", env=environment)
    encoding = data.tokenizer.encoding  # type: ignore[attr-defined]
    expected = [id for text in texts for id in [*encoding.encode_ordinary(text), 50256]]
    assert data.ids("train").tolist() == expected
    assert data.meta["format"] == "nib-data-1" and data.meta["dtype"] == "uint16"
    assert (data.meta["tokenizer"], data.meta["vocab_size"]) == ("gpt2", 50257)
    assert data.meta["documents"] == {"train": 31, "val": 0} and data.shards["val"] == []
    assert data.meta["source"] == ["texts"]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300", "char"])
def test_every_tokenizer_keeps_every_byte(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "t.txt").write_text(TORTURE, newline="")
    data = prepared(tmp_path, "t.txt", f"--tokenizer={tokenizer}", "--val-fraction=0.3")
    assert data.text("train") + data.text("val") == TORTURE
    assert sum(data.meta["bytes"].values()) == len(TORTURE.encode())


def test_a_large_vocabulary_takes_32_bits(tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x20000, 0x20000 + 70_000)))
    (tmp_path / "t.txt").write_text(text)
    data = prepared(tmp_path, "t.txt", "--tokenizer=char")
    assert data.meta["dtype"] == "uint32" and data.text("train") + data.text("val") == text


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 300)
    (tmp_path / "texts" / "large.txt").write_text("".join(texts) * 120 + TORTURE * 3000)
    write_jsonl(tmp_path / "texts" / "lines.jsonl", [*texts, TORTURE * 3000, ""])
    assert (tmp_path / "texts" / "large.txt").stat().st_size > 3 * PIECE_BYTES
    made = {}
    for workers in (1, 2, 3):
        data = prepared(tmp_path, "texts", "--tokenizer=bpe:500", f"--workers={workers}", "--shard-tokens=100_000")
        made[workers] = {path.name: path.read_bytes() for path in (tmp_path / "data" / "out").iterdir()}
    assert len(data.shards["train"]) > 3
    assert made[1] == made[2] == made[3]
    assert sum(data.meta["documents"].values()) == 300 + 1 + 301


def test_shards_are_the_whole_cut_evenly(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 50)
    whole = prepared(tmp_path, "texts", "--tokenizer=byte", "--val-fraction=0.2")
    cut = prepared(tmp_path, "texts", "--tokenizer=byte", "--val-fraction=0.2", "--shard-tokens=101")
    assert [len(shards) for shards in whole.shards.values()] == [1, 1]
    for split in ("train", "val"):
        assert len(cut.shards[split]) == -(-len(whole.ids(split)) // 101) > 2
        assert np.array_equal(cut.ids(split), whole.ids(split))
    assert sorted(whole.documents("train") + whole.documents("val")) == sorted(texts)
    one = prepared(
        tmp_path, "texts", "--tokenizer=byte", f"--shard-tokens={len(whole.ids('train'))}", "--val-fraction=0.2"
    )
    assert len(one.shards["train"]) == 1


# Sources and formats


def test_directories_are_read_in_order_without_what_is_hidden(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    for name in ("b/21.py", "a.txt", "b/12.py", ".hidden/x.py", "b/.x.py", "c.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "empty.py").write_text("")
    read = functools.partial(prepared, tmp_path, "--tokenizer=byte", "--val-fraction=0")
    assert read("texts").documents("train") == ["a.txt", "b/12.py", "b/21.py", "c.py"]
    assert read("texts", "--glob=*.py").documents("train") == ["b/12.py", "b/21.py", "c.py"]
    assert read("texts", "--glob=b/*").documents("train") == ["b/12.py", "b/21.py"]
    assert read("texts/c.py", "texts/b").documents("train") == ["c.py", "b/12.py", "b/21.py"]


def test_jsonl_parquet_and_files_of_the_same_documents_agree(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [*write_texts(tmp_path / "texts", 80), TORTURE]
    (tmp_path / "texts" / "x.txt").write_text(TORTURE, newline="")
    lines = "\ufeff\n\r\n" + "".join(json.dumps({"n": 1, "body": text}, ensure_ascii=False) + "\r\n" for text in texts)
    (tmp_path / "t.jsonl").write_text(lines.rstrip("\r\n"), newline="")
    pyarrow.parquet.write_table(pyarrow.table({"n": range(81), "body": texts}), tmp_path / "t.parquet")
    options = ("--tokenizer=byte", "--field=body", "--val-fraction=0.2", "--workers=1")
    for source in ("texts", "t.jsonl", "t.parquet"):
        data = prepared(tmp_path, source, *options)
        assert sorted(data.documents("train") + data.documents("val")) == sorted(texts)
        made = data.meta["sha256"]
        assert made == prepared(tmp_path, "texts", *options).meta["sha256"], source
    piped = prepared(tmp_path, "-", *options, "--format=jsonl", stdin=(tmp_path / "t.jsonl").read_bytes())
    assert piped.meta["sha256"] == made


def test_standard_input_may_be_read_twice(tmp_path: Path) -> None:
    text = (TORTURE * 50).encode()
    for tokenizer in ("byte", "char", "bpe:300"):
        data = prepared(tmp_path, "-", f"--tokenizer={tokenizer}", stdin=text)
        assert data.text("train") + data.text("val") == text.decode()


def test_a_tokenizer_of_other_data_is_taken_over(tmp_path: Path) -> None:
    write_texts(tmp_path / "texts", 30)
    (tmp_path / "texts" / "t.txt").write_text(TORTURE * 5)
    assert run(tmp_path, "texts", "--tokenizer=bpe:350").returncode == 0  # data/texts
    first = Data(tmp_path / "data" / "texts")
    for file in ("data/texts", "data/texts/nib_tokenizer.json"):
        data = prepared(tmp_path, "texts", f"--tokenizer={file}")
        assert data.meta["tokenizer"] == "bpe:350" and data.meta["sha256"] == first.meta["sha256"]


def test_the_standard_library_needs_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "stdlib_char")
    assert done.returncode == 0 and b"--dataset=stdlib_char" in done.stdout
    data = Data(tmp_path / "data" / "stdlib_char")
    assert data.meta["documents"]["train"] > 300 and data.meta["source"] == ["stdlib"]
    assert (Path(json.__file__)).read_text() in data.text("train") + data.text("val")
    assert left_over(tmp_path / "data") == ["stdlib_char"]


def test_a_small_corpus_says_that_its_vocabulary_is_smaller(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("abc abc abc abc")
    done = run(tmp_path, "t.txt", "--tokenizer=bpe:8192")
    assert b"260 tokens only" in done.stdout and Data(tmp_path / "data" / "t").meta["vocab_size"] == 260


def test_the_bpe_sample_is_spread_over_the_corpus() -> None:
    def parts() -> Iterator[Part]:
        return (Part(str(index), block) for index in range(1000))

    block = bytes(BPE_SAMPLE_BYTES // 250)
    taken = [int(part.where) for part in _sample(parts(), [Source("x", "text", size=1000 * len(block))])]
    assert len(taken) == 250 and taken == list(range(0, 1000, 4))
    assert len(list(_sample(parts(), [Source("x", "hub")]))) == 250
    assert len(list(_sample(parts(), [Source("x", "text", size=10)]))) == 250


# The split


def test_a_document_stays_in_its_split_when_the_corpus_grows(tmp_path: Path) -> None:
    texts = [f"text {number} " * (1 + number % 3) for number in range(600)]
    options = ("--tokenizer=byte", "--val-fraction=0.1")
    small = prepared(tmp_path, write_jsonl(tmp_path / "small.jsonl", texts[:300]), *options)
    random.Random(1).shuffle(texts)
    large = prepared(tmp_path, write_jsonl(tmp_path / "large.jsonl", texts + texts[:50]), *options)
    val = set(large.documents("val"))
    assert not val & set(large.documents("train")), "the same content in both splits"
    assert set(small.documents("val")) == val & set(small.documents("val") + small.documents("train"))
    assert 30 <= len(val) <= 90
    other = prepared(tmp_path, tmp_path / "small.jsonl", *options, "--seed=1")
    assert other.documents("val") != small.documents("val")


def test_one_of_several_documents_goes_to_val(tmp_path: Path) -> None:
    texts = [f"text {number} " * 5 for number in range(7)]
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    data = prepared(tmp_path, source, "--tokenizer=byte", "--val-fraction=1e-9", "--shard-tokens=64")
    (val,) = data.documents("val")
    assert data.documents("train") == [text for text in texts if text != val]
    assert data.meta["documents"] == {"train": 6, "val": 1}
    write_jsonl(tmp_path / "t.jsonl", texts[::-1])  # in another place of the file
    assert prepared(tmp_path, source, "--tokenizer=byte", "--val-fraction=1e-9").documents("val") == [val]


def test_a_single_document_gives_its_last_part(tmp_path: Path) -> None:
    text = "".join(random.Random(1).choices("abcdef \n", k=1_115_394))  # the size of tiny Shakespeare
    (tmp_path / "t.txt").write_text(text)
    data = prepared(tmp_path, "t.txt", "--tokenizer=char", "--val-fraction=0.1")
    assert data.meta["tokens"] == {"train": 1_003_854, "val": 111_540}, "nanoGPT's split"
    assert data.text("train") == text[:1_003_854] and data.text("val") == text[1_003_854:]
    none = prepared(tmp_path, "t.txt", "--tokenizer=char", "--val-fraction=0")
    assert none.text("train") == text and none.meta["tokens"]["val"] == 0


@pytest.mark.parametrize("seed", [1, 2, 3, 4])  # by its hash alone the document would go to val with some seeds
@pytest.mark.parametrize("fraction", [0.5, 0.52, 0.54, 0.9])
def test_a_single_document_is_not_cut_inside_a_character(tmp_path: Path, seed: int, fraction: float) -> None:
    from nib.prepare import prepare

    text = "中文🙂é" * 10
    (tmp_path / "t.txt").write_text(text)
    prepare([str(tmp_path / "t.txt")], tmp_path / "out", tokenizer="byte", val_fraction=fraction, seed=seed, workers=1)
    data = Data(tmp_path / "out")
    assert data.text("train") + data.text("val") == text  # each is valid UTF-8 by itself
    total = len(text.encode()) + 1
    assert 0 <= len(data.ids("train")) - int(total * (1 - fraction)) < 4


def test_a_long_document_has_one_hash_in_every_format(tmp_path: Path) -> None:
    from nib.tokenizer import ByteTokenizer

    encoder = Encoder(EncoderSettings(ByteTokenizer().save(tmp_path), "text", "error", 1337, "uint16"))
    text = ("some words " * 200_000)[: 2 * PIECE_BYTES + 1]
    (tmp_path / "t.txt").write_text(text)
    write_jsonl(tmp_path / "t.jsonl", [text])
    hashes = []
    for name, format in (("t.txt", "text"), ("t.jsonl", "jsonl")):
        parts = list(read_parts([Source(name, format, tmp_path / name)], "text"))
        results, _ = encoder(parts)
        assert [result.content_hash != 0 for result in results] == [part.first for part in parts]
        hashes.append(results[0].content_hash)
    assert len(results) == 1 and hashes[0] == hashes[1]


# Invalid text


def test_invalid_utf8_is_refused_replaced_or_left_out(tmp_path: Path) -> None:
    good, bad = b"good text\n" * 100_000, b"x" * 2_000_000 + b"\xff\xfeend"
    for name, content in {"a.txt": good, "b.txt": bad, "c.txt": good}.items():
        (tmp_path / name).write_bytes(content)
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for workers in ("--workers=1", "--workers=2"):
        refused = run(tmp_path, *files, "--out=data/out", "--tokenizer=byte", workers)
        assert refused.returncode == 2
        assert refused.stderr.startswith(f"error: {files[1]}: byte 0xff at offset 2000000 is not UTF-8".encode())
        assert left_over(tmp_path / "data") == []
    options = ("--out=data/out", "--overwrite", "--tokenizer=byte", "--val-fraction=0")
    done = run(tmp_path, *files, *options, "--invalid=skip")
    assert Data(tmp_path / "data" / "out").documents("train") == [good.decode()] * 2
    assert f"left out: {files[1]}: byte 0xff".encode() in done.stdout and b"left out 1 " in done.stdout
    done = run(tmp_path, *files, *options, "--invalid=replace")
    assert Data(tmp_path / "data" / "out").documents("train")[1] == "x" * 2_000_000 + "\ufffd\ufffdend"
    assert b"replaced 2 places" in done.stdout


def test_invalid_text_in_jsonl(tmp_path: Path) -> None:
    lines = [b'{"text": "one \xff"}', b'{"text": "two \\ud800"}', b'{"text": "three \xef\xbf\xbd"}']
    for line, reason in zip(lines, (b"offset 14 ", b"line 1: U+D800 ", b""), strict=True):
        (tmp_path / "t.jsonl").write_bytes(line)
        assert reason in run(tmp_path, "t.jsonl", "--tokenizer=byte", "--overwrite").stderr
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(lines))
    options = ("t.jsonl", "--tokenizer=char", "--val-fraction=0")
    assert prepared(tmp_path, *options, "--invalid=skip").text("train") == "three \ufffd"
    assert prepared(tmp_path, *options, "--invalid=replace").text("train") == "one \ufffdtwo \ufffdthree \ufffd"


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
    wait_for(lambda: any(file.stat().st_size for file in tmp_path.glob("data/.out.staging/*.tokens")))
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


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
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


def test_a_run_killed_between_the_two_renames_is_put_right(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("old")
    options = ("t.txt", "--out=data/out", "--tokenizer=byte", "--val-fraction=0")
    assert run(tmp_path, *options).returncode == 0
    (tmp_path / "data" / "out").rename(tmp_path / "data" / ".out.old")
    (tmp_path / "data" / ".out.staging" / "fetched").mkdir(parents=True)
    assert run(tmp_path, *options).returncode == 2  # it is back, and not overwritten
    assert Data(tmp_path / "data" / "out").text("train") == "old"
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


# URLs


class Server:
    """Serves one file; cuts the connection after `cut_after` bytes, `cuts` times."""

    def __init__(
        self, content: bytes, cut_after: int = 0, cuts: int = 0, ranges: bool = True, etag: str = "v1"
    ) -> None:
        self.content, self.cut_after, self.cuts, self.ranges, self.etag = content, cut_after, cuts, ranges, etag
        self.asked: list[str | None] = []
        self.changes_to: bytes | None = None
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.http.server_port}/texts/poem.txt"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                if not self.path.startswith("/texts/"):
                    self.send_error(404)
                    return
                wanted = self.headers["Range"]
                server.asked.append(wanted)
                same = self.headers["If-Range"] in (None, server.etag)
                start = int(wanted[6:-1]) if wanted and server.ranges and same else 0
                self.send_response(206 if start else 200)
                if server.etag:
                    self.send_header("ETag", server.etag)
                size = len(server.content)
                self.send_header("Content-Length", str(size - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
                self.end_headers()
                end = size
                if server.cuts:
                    server.cuts -= 1
                    end = start + server.cut_after
                self.wfile.write(server.content[start:end])
                if server.changes_to is not None:
                    server.content, server.etag = server.changes_to, server.etag and "v2"

        return Handler


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download_module.time, "sleep", lambda _: None)
    servers: list[Server] = []

    def start(*arguments: object, **options: object) -> Server:
        servers.append(Server(*arguments, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


POEM = b"".join(b"line %d of the poem\n" % number for number in range(30_000))


def test_a_cut_download_is_resumed_and_prepared(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(POEM, cut_after=200_000, cuts=2)
    done = run(tmp_path, server.url, "--tokenizer=byte", "--val-fraction=0")
    assert done.returncode == 0, done.stderr
    assert Data(tmp_path / "data" / "poem").text("train").encode() == POEM
    assert server.asked == [None, "bytes=200000-", "bytes=400000-"]
    assert left_over(tmp_path / "data") == ["poem"]


@pytest.mark.parametrize("etag, new", [("v1", POEM[::-1]), ("v1", POEM[:100_000]), ("", POEM[::-1] + b"longer")])
def test_a_cut_download_of_a_changed_file_starts_again(
    tmp_path: Path, serve: Callable[..., Server], etag: str, new: bytes
) -> None:
    server = serve(POEM, cut_after=200_000, cuts=1, etag=etag)
    server.changes_to = new
    assert download_module.download(server.url, tmp_path / "x") == len(new)
    assert (tmp_path / "x").read_bytes() == new


def test_a_server_without_ranges_is_asked_again(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(POEM, cut_after=200_000, cuts=2, ranges=False)
    assert download_module.download(server.url, tmp_path / "x") == len(POEM)
    assert (tmp_path / "x").read_bytes() == POEM


def test_a_download_that_gets_nowhere_or_is_not_the_file(tmp_path: Path, serve: Callable[..., Server]) -> None:
    server = serve(POEM, cut_after=200_000, cuts=100, ranges=False)
    with pytest.raises(RunError, match="the connection was cut"):
        download_module.download(server.url, tmp_path / "x")
    with pytest.raises(InputError, match=f"{len(POEM)} bytes, not the 7 "):
        download_module.download(serve(POEM).url, tmp_path / "x", 7)
    missing = run(tmp_path, server.url.replace("texts", "nothing"), "--tokenizer=byte")
    assert missing.returncode == 2 and b"the server says 404" in missing.stderr
    assert left_over(tmp_path / "data") == []


# Bad input, through the command line


@pytest.fixture(scope="module")
def bad_input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import pyarrow
    import pyarrow.parquet

    root = tmp_path_factory.mktemp("bad")
    (root / "t.txt").write_text("some text\n")
    (root / "binary.bin").write_bytes(bytes(range(256)))
    (root / "empty.txt").write_text("")
    (root / "nothing").mkdir()
    (root / "lines.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (root / "list.jsonl").write_text('{"text": "a"}\n\n[1, 2]\n')
    (root / "cut.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    (root / "number.jsonl").write_text('{"text": 3}\n')
    (root / "deep.jsonl").write_text("[" * 100_000)
    (root / "cut.parquet").write_bytes(b"PAR1 and no more")
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), root / "t.parquet")
    (root / "tokenizer.json").write_text("{}")
    (root / "loop").symlink_to("loop")
    return root


BAD = {
    "no source": ([], "no SOURCE"),
    "a source that is not there": (["missing.txt"], "missing.txt"),
    "a loop of links": (["loop"], "loop"),
    "several sources and no name": (["t.txt", "empty.txt"], "--out"),
    "unknown option": (["t.txt", "--tokeniser=byte"], "--tokenizer"),
    "an option without value": (["t.txt", "--tokenizer"], "--tokenizer"),
    "workers is a text": (["t.txt", "--workers=many"], "--workers"),
    "negative workers": (["t.txt", "--workers=-1"], "--workers"),
    "no tokens a shard": (["t.txt", "--shard-tokens=0"], "--shard-tokens"),
    "negative seed": (["t.txt", "--seed=-1"], "--seed"),
    "everything for validation": (["t.txt", "--val-fraction=1"], "below 1"),
    "negative fraction": (["t.txt", "--val-fraction=-0.1"], "--val-fraction"),
    "fraction is NaN": (["t.txt", "--val-fraction=nan"], "finite"),
    "unknown format": (["t.txt", "--format=csv"], "--format"),
    "unknown way with invalid text": (["t.txt", "--invalid=ignore"], "--invalid"),
    "unknown tokenizer": (["t.txt", "--tokenizer=gtp2"], "'gtp2'"),
    "bpe without a number": (["t.txt", "--tokenizer=bpe:many"], "bpe:8192"),
    "bpe below the bytes": (["t.txt", "--tokenizer=bpe:256"], "bpe:8192"),
    "a tokenizer file that is none": (["t.txt", "--tokenizer=tokenizer.json"], "tokenizer.json"),
    "a directory without tokenizer": (["t.txt", "--tokenizer=nothing"], "nothing"),
    "an encoding that cannot be downloaded": (["t.txt", "--tokenizer=cl100k_base"], "bpe:8192"),
    "an empty file": (["empty.txt", "--tokenizer=byte"], "no text"),
    "an empty file for bpe": (["empty.txt", "--tokenizer=bpe:300"], "no text"),
    "an empty file for char": (["empty.txt", "--tokenizer=char"], "no text"),
    "an empty directory": (["nothing", "--tokenizer=byte"], "nothing"),
    "no matching file": ([".", "--tokenizer=byte", "--glob=*.md"], "*.md"),
    "a binary file": (["binary.bin", "--tokenizer=byte"], "binary.bin: byte 0x80 at offset 128"),
    "a binary file for bpe": (["binary.bin", "--tokenizer=bpe:300"], "binary.bin: byte 0x80 at offset 128"),
    "a binary file for char": (["binary.bin", "--tokenizer=char"], "binary.bin: byte 0x80 at offset 128"),
    "a line without the field": (
        ["lines.jsonl", "--tokenizer=byte"],
        "lines.jsonl, line 2: no field 'text' among body",
    ),
    "a line that is no object": (["list.jsonl", "--tokenizer=byte"], "list.jsonl, line 3"),
    "a line that is cut": (["cut.jsonl", "--tokenizer=byte"], "cut.jsonl, line 2: not valid JSON"),
    "a field that is no text": (["number.jsonl", "--tokenizer=byte"], "number.jsonl, line 1: field 'text' holds int"),
    "JSON that is too deep": (["deep.jsonl", "--tokenizer=byte"], "deep.jsonl, line 1"),
    "text as JSONL": (["t.txt", "--format=jsonl", "--tokenizer=byte"], "t.txt, line 1: not valid JSON"),
    "a column that is not there": (["t.parquet", "--tokenizer=byte"], "--field=body"),
    "a row without text": (["t.parquet", "--field=body", "--tokenizer=byte"], "t.parquet, row 2"),
    "a cut Parquet file": (["cut.parquet", "--tokenizer=byte"], "cut.parquet"),
    "Parquet through a pipe": (["-", "--format=parquet", "--tokenizer=byte"], "pipe"),
    "an output that is a file": (["t.txt", "--out=empty.txt", "--tokenizer=byte"], "empty.txt"),
    "an output below a file": (["t.txt", "--out=empty.txt/x/y", "--tokenizer=byte"], "empty.txt"),
    "an output without a place": (["t.txt", "--out=/proc/none/x", "--tokenizer=byte"], "/proc/none"),
    "a character the tokenizer does not know": (["t.txt", "--tokenizer=known"], "'m' (U+006D)"),
    "a URL of a server that is not there": (["http://127.0.0.1:9/x.txt", "--tokenizer=byte"], "127.0.0.1:9"),
    "a URL that is none": (["http://", "--out=data/x", "--tokenizer=byte"], "http://"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_status_2(what: str, bad_input: Path, tmp_path: Path) -> None:
    arguments, mentioned = BAD[what]
    if what == "a character the tokenizer does not know":
        train_char(["so text\n"]).save(tmp_path)
        arguments = ["t.txt", f"--tokenizer={tmp_path}"]
    before = left_over(bad_input)
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9", "TIKTOKEN_CACHE_DIR": str(tmp_path), "no_proxy": "127.0.0.1"}
    done = run(bad_input, *arguments, "--workers=1", env=os.environ | nowhere)
    said = done.stderr.decode()
    assert done.returncode == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1 and mentioned in said, said
    if (bad_input / "data").exists():
        (bad_input / "data").rmdir()  # it is empty, or this fails
    assert left_over(bad_input) == before, "something was left behind"


@pytest.mark.parametrize("package, source", [("pyarrow", "t.parquet"), ("datasets", "openwebtext")])
def test_a_missing_package_is_named(package: str, source: str, bad_input: Path, tmp_path: Path) -> None:
    (tmp_path / f"{package}.py").write_text("raise ImportError")
    done = run(bad_input, source, "--tokenizer=byte", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and f"pip install {package}".encode() in done.stderr


def test_hub_corpora_are_streamed_through_datasets(tmp_path: Path) -> None:
    """With a stand-in for the package: what is asked of it, and what becomes of its rows."""
    (tmp_path / "datasets.py").write_text(
        "def load_dataset(*names, split, streaming):\n"
        "    assert names == ('HuggingFaceFW/fineweb-edu', 'sample-10BT') and split == 'train' and streaming\n"
        "    return ({'text': f'row {i}'} for i in range(100))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    data = prepared(tmp_path, "fineweb-edu", "--tokenizer=byte", "--val-fraction=0", env=environment)
    assert data.documents("train") == [f"row {number}" for number in range(100)]


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
