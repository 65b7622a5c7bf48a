"""Kill training repeatedly, damage its checkpoints, and check that the resumed runs give the same model.

    python bench/soak.py --kills 200

Trains one undisturbed run. Then it trains runs with the same settings that are killed with SIGKILL at random moments,
also during a save, and sometimes damages the newest checkpoint (a flipped bit, a truncated, missing or foreign file).
The same command resumes each run until it is done. Final weights, optimizer state and the loss of every step must equal
those of the undisturbed run bit for bit. With --change the number of processes changes too (1, 2, or 2 with FSDP), and
the losses must agree up to rounding. With --dataset=chats the run trains on conversations with a loss mask, with
--dataset=chats:0.3,words:0.7 on a mixture. With --load every start has train.py's own number of threads, and 0, 1 or 2
busy loops beside it. Options of train.py may be added.

Dropout, accumulation, Muon and AdamW are on. Prints a table and one JSON line last; exit status 1 at any difference.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, timed
from safetensors.torch import load_file

from nib.formats.checkpoint import FILES, list_checkpoints

SETTINGS = (
    "--n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=8 --micro_batch_size=2 "
    "--warmup_iters=10 --eval_interval=50 --log_interval=1 --checkpoint_interval=5 --keep_checkpoints=3 "
    "--learning_rate=1e-3 --device=cpu"
).split()
JOBS = {  # additional settings
    "text": [],
    "lora": ["--init_from=out/base", "--lora_rank=4", "--lora_dropout=0.1"],
    "dpo": ["--init_from=out/base", "--dataset=pairs", "--learning_rate=1e-3"],
}
# With another number of processes sums are rounded differently: at first by about 1e-7 of a loss. Training magnifies
# that, but after 200 steps of this job the differences are still well below this.
ROUNDING = 5e-3


def make_corpus(root: Path) -> None:
    numbers = random.Random(1)
    (root / "texts").mkdir()
    for number in range(60):
        words = " ".join(numbers.choice(["alpha", "beta", "gamma", "delta\n", "epsilon"]) for _ in range(400))
        (root / "texts" / f"{number}.txt").write_text(words)
    with (root / "chats.jsonl").open("w") as file:
        for left, right in itertools.product(range(20), range(20)):
            row = {"prompt": f"{left} + {right}?", "completion": f"{left + right}" + "!" * (left % 5)}
            file.write(json.dumps(row) + "\n")
    chats, words = ["chats.jsonl", "--format=chat", "--tokenizer=byte"], ["texts", "--tokenizer=data/chats"]
    for sources, name in ((chats, "chats"), (words, "words")):
        timed([str(ROOT / "prepare_data.py"), *sources, f"--out=data/{name}", "--val-fraction=0.1"], root)


def make_pairs(root: Path) -> None:
    numbers = random.Random(2)
    rows = [{"prompt": f"{n} ", "chosen": "alpha " * numbers.randint(1, 3), "rejected": f"beta {n}"} for n in range(90)]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--format=preference", "--tokenizer=data/words", "--val-fraction=0.1"]
    timed([str(ROOT / "prepare_data.py"), "pairs.jsonl", *options], root)


def command_for(processes: int, parallel: str, settings: list[str], run: str) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*launcher, str(ROOT / "train.py"), *SETTINGS, *settings, f"--out_dir=out/{run}", f"--parallel={parallel}"]


def train_for(command: list[str], root: Path, seconds: float | None, loops: int | None = None) -> int | None:
    """Run the command and return its status, or kill it and all its descendants after `seconds` and return None.

    It has one thread, or with `loops` its own number of threads and so many busy loops beside it.
    """
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if loops is None else {})
    busy = [sys.executable, "-c", "while True: pass"]
    neighbours = [subprocess.Popen(busy, start_new_session=True) for _ in range(loops or 0)]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        return None
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def descendants(pid: int) -> list[int]:
    """All descendants of `pid`; not a process group, since torchrun gives each worker its own session."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    children = [int(child) for child in listed.split()]
    return children + [below for child in children for below in descendants(child)]


def last_step(run: Path) -> int:
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def damage(run: Path, dice: random.Random) -> str:
    """Damage the newest checkpoint in one of five ways, if there is an older one. Returns the way, or ""."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if len(checkpoints) < 2:
        return ""
    path = checkpoints[0] / dice.choice(FILES)
    if not path.exists():  # deleted by an earlier call, and no run has noticed yet
        return ""
    kind = dice.choice(["bit flipped", "cut short", "missing", "foreign", "emptied"])
    content = bytearray(path.read_bytes())
    if kind == "bit flipped":
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    elif kind == "cut short":
        del content[dice.randrange(len(content)) :]
    elif kind == "foreign":
        content = bytearray(dice.randbytes(len(content)))
    elif kind == "emptied":
        content.clear()
    path.unlink() if kind == "missing" else path.write_bytes(content)
    return kind


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def compare(one: Path, other: Path) -> tuple[int, int]:
    """How many bytes of weights, optimizer state and losses were compared, and how many differ."""
    compared = differ = 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        left, right = (load_file(list_checkpoints(run / "checkpoints")[0] / file) for run in (one, other))
        differ += sum(value.nbytes for name, value in left.items() if name not in right)
        for name in left.keys() & right.keys():
            a, b = left[name].contiguous().numpy().tobytes(), right[name].contiguous().numpy().tobytes()
            compared += len(a)
            differ += sum(x != y for x, y in zip(a, b, strict=True)) if a != b else 0
    for a, b in zip(losses(one), losses(other), strict=True):
        compared += 8
        differ += 8 * (a != b)
    return compared, differ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--dataset", default="words", help="words, chats, or a mixture such as chats:0.3,words:0.7")
    parser.add_argument("--steps", type=int, default=200, help="steps per run")
    parser.add_argument("--dropout", type=float, default=0.1, help="0 with --change: masks depend on the processes")
    parser.add_argument("--damage", type=float, default=0.25, help="probability of damage after a kill")
    parser.add_argument("--change", action="store_true", help="change the number of processes at every start")
    parser.add_argument("--job", choices=JOBS, default="text", help="lora and dpo start from a model trained on text")
    parser.add_argument("--load", action="store_true", help="change the load of the machine at every start")
    parser.add_argument("--seed", type=int, default=1)
    arguments, options = parser.parse_known_args()
    dice = random.Random(arguments.seed)
    dropout = 0.0 if arguments.change else arguments.dropout
    settings = [f"--dataset={arguments.dataset}", f"--max_iters={arguments.steps}", f"--dropout={dropout}"]
    settings += options
    ways = [(1, "ddp"), (2, "ddp"), (2, "fsdp")] if arguments.change else [(1, "ddp")]
    kills = writing = damaged = runs = compared = differ = 0
    largest = 0.0

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_corpus(root)
        if arguments.job != "text":
            make_pairs(root)
            train_for(command_for(1, "ddp", ["--dataset=words", "--max_iters=20"], "base"), root, None)
            settings += JOBS[arguments.job]
        began = time.monotonic()
        if train_for(command_for(1, "ddp", settings, "whole"), root, None, 0 if arguments.load else None) != 0:
            sys.exit((root / "log").read_text())
        # Kills come between the import of torch and the last save; torchrun and FSDP start more slowly.
        longest = (time.monotonic() - began) * (3 if arguments.change or arguments.load else 1.2)
        while kills < arguments.kills:
            runs += 1
            run = root / "out" / f"killed-{runs}"
            while True:
                before = last_step(run)
                alive = dice.uniform(0.2, 1.0) * longest
                loops = dice.choice((0, 1, 2)) if arguments.load else None
                status = train_for(command_for(*dice.choice(ways), settings, run.name), root, alive, loops)
                if status == 0:
                    break
                if status is not None:
                    sys.exit(f"training failed with status {status}:\n{(root / 'log').read_text()[-3000:]}")
                kills += 1
                longest *= 1.2 if last_step(run) == before else 1.0  # the machine has become slower
                writing += any((run / "checkpoints").glob(".step-*"))
                if dice.random() < arguments.damage and damage(run, dice):
                    damaged += 1
                print(f"kill {kills}: run {runs}, step {before} -> {last_step(run)}", flush=True)
            if arguments.change:
                pairs = zip(losses(root / "out/whole"), losses(run), strict=True)
                largest = max(largest, *(abs(a - b) / abs(a) for a, b in pairs))
                differ += largest > ROUNDING
            else:
                found = compare(root / "out/whole", run)
                compared, differ = compared + found[0], differ + found[1]
            shutil.rmtree(run)

    result = dict(kills=kills, while_writing=writing, damaged=damaged, runs=runs, bytes_compared=compared)
    result |= dict(largest_relative_loss_difference=largest) if arguments.change else {}
    for key, value in {**result, "differences": differ}.items():
        print(f"{key.replace('_', ' '):>36}  {value}")
    print(json.dumps({**result, "differences": differ}))
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
