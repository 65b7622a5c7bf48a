"""Speed and memory of prepare_data.py, compared with tiktoken's batch encoding and the tokenizers library's training.

Prints a table and one JSON line last. `--check` fails if a number misses its target.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, timed

from nib.common.exits import RunError, run_script
from nib.common.options import option, parse

SPEED_TARGET, MEMORY_TARGET = 0.9, 500.0  # share of tiktoken's speed; MB of the whole process tree
TRAINING_TARGET = 2.0  # times the seconds that tokenizers takes to train


@dataclass
class Settings:
    megabytes: int = option(100, "size of the corpus for the speed, in MB", at_least=1)
    memory_megabytes: int = option(2000, "size of the text file for the memory; 0 skips that part", at_least=0)
    tokenizer: str = option("bpe:4096", "a tokenizer name; bpe:N is trained once, beforehand")
    workers: int = option(2, "worker processes of nib, and threads of tiktoken", at_least=1)
    rounds: int = option(3, "measurements of each, alternating; medians are compared", at_least=1)
    check: bool = option(False, "exit 1 when a target is missed")


def main() -> None:
    settings = parse(Settings, sys.argv[1:], usage="python bench/prepare_data.py", about=__doc__ or "").settings
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokenizer = make_tokenizer_file(directory, settings.tokenizer)
        result = measure_speed(directory, tokenizer, settings)
        if settings.tokenizer.startswith("bpe:"):
            result |= measure_training(directory, tokenizer, settings)
        if settings.memory_megabytes:
            result |= measure_memory(directory, settings)
    fast = all(share >= SPEED_TARGET for key, share in result.items() if key.endswith("_share"))
    small = result.get("peak_megabytes", 0) <= MEMORY_TARGET
    trained = result.get("training_ratio", 0) <= TRAINING_TARGET
    met = fast and small and trained
    print(json.dumps({"bench": "prepare_data", "workers": settings.workers, **result, "ok": met}))
    if settings.check and not met:
        limits = f"speed {SPEED_TARGET}, memory {MEMORY_TARGET} MB, training {TRAINING_TARGET} x tokenizers"
        raise RunError(f"a target was missed: {limits}")


def make_tokenizer_file(directory: Path, name: str) -> Path:
    from nib.tokenizer.load import make_tokenizer

    if not name.startswith("bpe:"):
        return make_tokenizer(name).save(directory)
    prepare(["stdlib", f"--tokenizer={name}", f"--out={directory / 'stdlib'}"])
    return directory / "stdlib" / "nib_tokenizer.json"


def standard_library() -> list[str]:
    from nib.data.documents import find_sources

    sources = find_sources(["stdlib"], "auto", "", Path("."), False)
    return [source.path.read_text("utf-8", "replace") for source in sources if source.path]


def documents(megabytes: int) -> list[str]:
    """The standard library's files, repeated with small changes."""
    found, size, texts = [], 0, standard_library()
    while size < megabytes * 1_000_000:
        found.append(f"# copy {len(found)}\n" + texts[len(found) % len(texts)])
        size += len(found[-1].encode())
    return found


def prepare(arguments: list[str]) -> float:
    return timed(["prepare_data.py", *arguments])[0]


def measure_speed(directory: Path, tokenizer: Path, settings: Settings) -> dict[str, float]:
    from nib.tokenizer.load import load_tokenizer
    from nib.tokenizer.tokenizer import BpeTokenizer

    loaded = load_tokenizer(tokenizer)
    assert isinstance(loaded, BpeTokenizer), "only a BPE tokenizer has something to be compared with"
    texts = documents(settings.megabytes)
    size = sum(len(text.encode()) for text in texts) / 1e6
    one, many, lines = directory / "one.txt", directory / "many", directory / "lines.jsonl"
    one.write_text("".join(texts), "utf-8")
    many.mkdir()
    for index, text in enumerate(texts):
        (many / f"{index:06d}.txt").write_text(text, "utf-8")
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")

    seconds: dict[str, list[float]] = {}
    for _ in range(settings.rounds):
        began = time.monotonic()
        loaded.encoding.encode_ordinary_batch(texts, num_threads=settings.workers)
        seconds.setdefault("tiktoken", []).append(time.monotonic() - began)
        for source in (many, one, lines):
            taken = prepare(
                [str(source), f"--tokenizer={tokenizer}", f"--workers={settings.workers}", "--overwrite"]
                + [f"--out={directory / 'out'}"]
            )
            seconds.setdefault(source.name, []).append(taken)
    speeds = {name: size / statistics.median(times) for name, times in seconds.items()}
    print(f"{size:.0f} MB, {settings.tokenizer}, {settings.workers} at a time, median of {settings.rounds}")
    print(f"{'':40}{'MB/s':>8}{'share':>8}")
    shown = {
        "tiktoken": "tiktoken encode_ordinary_batch, in memory",
        "many": f"prepare_data.py, {len(texts)} files",
        "one.txt": "prepare_data.py, one file",
        "lines.jsonl": "prepare_data.py, JSONL",
    }
    for name, line in shown.items():
        print(f"{line:42}{speeds[name]:>6.1f}{speeds[name] / speeds['tiktoken']:>8.2f}")
    shares = {
        f"{name.partition('.')[0]}_share": round(speeds[name] / speeds["tiktoken"], 3) for name in list(shown)[1:]
    }
    return {"tiktoken_mb_per_s": round(speeds["tiktoken"], 2), **shares}


def measure_training(directory: Path, tokenizer: Path, settings: Settings) -> dict[str, float]:
    """Seconds that training `bpe:N` adds to preparing a file, relative to the tokenizers library's training on it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    one, out = directory / "one.txt", f"--out={directory / 'out'}"
    common = [str(one), out, "--overwrite", f"--workers={settings.workers}"]
    ours, theirs = [], []
    for _ in range(settings.rounds):
        ready = prepare([*common, f"--tokenizer={tokenizer}"])
        ours.append(prepare([*common, f"--tokenizer={settings.tokenizer}"]) - ready)
        peer = Tokenizer(models.BPE())
        peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        size = int(settings.tokenizer.removeprefix("bpe:"))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)  # type: ignore[call-arg]
        began = time.monotonic()
        peer.train([str(one)], trainer)
        theirs.append(time.monotonic() - began)
    mine, peers = statistics.median(ours), statistics.median(theirs)
    print(f"training {settings.tokenizer}: {mine:.1f} s, tokenizers alone {peers:.1f} s: {mine / peers:.2f} times")
    return {"training_ratio": round(mine / peers, 3)}


def measure_memory(directory: Path, settings: Settings) -> dict[str, float]:
    """The peak memory for one large text file, including the training of the tokenizer."""
    text = "".join(standard_library()).encode()
    big = directory / "big.txt"
    with open(big, "wb") as file:
        while file.tell() < settings.memory_megabytes * 1_000_000:
            file.write(text)
    command = [sys.executable, str(ROOT / "prepare_data.py"), str(big), f"--tokenizer={settings.tokenizer}"]
    command += [f"--workers={settings.workers}", f"--out={directory / 'big'}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = Peak(process.pid)
    began = time.monotonic()
    if process.wait():
        raise RunError(f"prepare_data.py ended with status {process.returncode}")
    seconds = time.monotonic() - began
    megabytes = peak.stop() / 1e6
    print(
        f"one text file of {settings.memory_megabytes} MB: {seconds:.0f} s, peak {megabytes:.0f} MB over all processes"
    )
    return {"memory_input_megabytes": settings.memory_megabytes, "peak_megabytes": round(megabytes, 1)}


class Peak:
    """The peak resident memory of a process with its descendants (Linux), polled twenty times a second."""

    def __init__(self, pid: int) -> None:
        self.pid, self.bytes, self.running = pid, 0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, tree_bytes(self.pid))
            time.sleep(0.05)

    def stop(self) -> int:
        self.running = False
        self.thread.join()
        return self.bytes


def tree_bytes(root: int) -> int:
    """The resident bytes of a process and its descendants; shared pages are counted once per process."""
    parents, sizes = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended just now
            continue
        parents[int(stat.parent.name)], sizes[int(stat.parent.name)] = int(fields[1]), int(fields[21]) * 4096
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(sizes.get(pid, 0) for pid in tree)


if __name__ == "__main__":
    run_script(main)
