"""The speed of a job on a shared machine, relative to an idle one: beside busy loops, and beside another run.

    python bench/shared_machine.py [--jobs train,sample] [--sizes 0.8m,1.1m,10m,124m] [--old CHECKOUT] [--rounds 3]

The jobs are train.py and sample.py as a user starts them, best on 2 cores; torchrun is train.py in two processes. A
loop is `while True: pass`; the other run is train.py with config/small.py's model. With --old, another checkout of nib
alternates with this one; with --nanogpt, a clone trains the smallest model under the same conditions. With
`--jobs peers`, nib, transformers and llama.cpp (if transformers, llama-cpp-python and gguf are installed) decode a
GPT-2 of 124 M. Prints the speeds relative to an idle machine (medians over the rounds), then the speeds, and one JSON
line last; --plot draws the relative speeds of nib and its peers.
"""

from __future__ import annotations

import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import GPT2, ROOT, finish, parser_for, timed

NEIGHBOURS = ("alone", "loop", "two loops", "run")
TARGETS = {"loop": 0.5, "two loops": 0.3, "run": 0.5}
WARM_SECONDS = 1.5  # of training, not counted
PATIENCE = 12.0  # seconds that sample.py may take, its start included
OWN: dict[str, Any] = dict(start_new_session=True)  # as in a terminal of its own: Linux shares cores among sessions
# For train.py; 124 M in deeper blocks than GPT-2's, since the vocabulary is config/small.py's.
SIZES = {
    "0.8m": "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --mlp=gelu --optimizer=adamw",
    "1.1m": "config/small.py",
    "10m": "--n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=4",
    "124m": "--n_layer=17 --n_head=12 --n_embd=768 --block_size=256 --batch_size=1 --optimizer=adamw",
}
TOKENS = {"0.8m": 6000, "1.1m": 8000, "10m": 2000, "124m": 150}  # sampled in a turn, some seconds' worth
PEERS = ("nib", "nib int8", "transformers", "llama.cpp f32", "llama.cpp q8_0")
BESIDE = {"loop": "beside a busy process", "two loops": "beside two", "run": "beside a training run"}
PLOTTED = {
    "training 0.8 M parameters": {"nib train 0.8m": "tab:blue", "nanoGPT train 0.8m": "tab:gray"},
    "generating text, GPT-2 (124 M)": {
        "nib gpt2": "tab:blue", "llama.cpp f32 gpt2": "tab:green", "transformers gpt2": "tab:gray",
    },
}  # fmt: skip
SAMPLES = {"sample": "", "sample_int8": "--quantize=int8", "sample_x8": "--num-samples=8"}


def python(checkout: Path, script: str, *arguments: str, cwd: Path, processes: int = 1) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    command = [sys.executable, *launcher, str(checkout / script), *arguments, "--device=cpu"]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **OWN)


def training(checkout: Path, size: str, data: Path, out: Path, processes: int = 1) -> subprocess.Popen[str]:
    """train.py without an end."""
    shape = SIZES[size].replace("config/", f"{checkout}/config/").split()
    endless = "--max_iters=1000000 --eval_interval=0 --checkpoint_interval=0 --log_interval=1".split()
    arguments = [*shape, *endless, f"--dataset={data}", f"--out_dir={out}"]
    if "--batch_size=1" in arguments and processes > 1:
        arguments.append(f"--batch_size={processes}")  # a sequence for each
    return python(checkout, "train.py", *arguments, cwd=out.parent, processes=processes)


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        if "torch.distributed.run" in process.args:
            process.terminate()  # it ends its processes, which kill() would leave behind
        else:
            process.kill()
        process.wait()


def metrics(out: Path) -> list[tuple[float, int]]:
    """Seconds of training and tokens so far, for every step."""
    file = out / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(line["seconds"], line["tokens"]) for line in lines]


def training_speed(checkout: Path, size: str, data: Path, seconds: float, processes: int = 1) -> float:
    """Tokens a second of train.py, by its own count, once it is warm."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "run")
        with ended(training(checkout, size, data, out, processes)) as process:
            while True:
                time.sleep(0.2)
                found = [each for each in metrics(out) if each[0] > WARM_SECONDS]
                if len(found) > 1 and found[-1][0] - found[0][0] > seconds:
                    break
                if process.poll() is not None:
                    sys.exit(f"train.py ended: {process.args}")
    (began, before), (end, after) = found[0], found[-1]
    return (after - before) / (end - began)


def sampling_speed(checkout: Path, size: str, run: Path, options: str) -> float:
    """Tokens a second of sample.py, by its own count."""
    arguments = [str(run), "--json", f"--max-new-tokens={TOKENS[size]}", "--prompt=import os", *options.split()]
    with ended(python(checkout, "sample.py", *arguments, cwd=run.parent)) as process:
        try:
            out, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # ends the text, and says how fast it was so far
            out, _ = process.communicate()
    return float(json.loads(out.splitlines()[0])["tokens_per_second"])


def nanogpt_speed(clone: Path, seconds: float) -> float:
    """Tokens a second of nanoGPT's README job, from the times it prints."""
    shape = "--device=cpu --compile=False --eval_interval=100000 --eval_iters=1 --log_interval=5 --block_size=64"
    shape += " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 --max_iters=100000"
    command = [sys.executable, "-u", "train.py", "config/train_shakespeare_char.py", *shape.split()]
    times: list[float] = []
    popen = subprocess.Popen(command, cwd=clone, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with ended(popen) as process:
        began = time.perf_counter()
        for line in process.stdout or ():
            if match := re.match(r"iter \d+: .* time ([\d.]+)ms", line):
                times.append(float(match[1]) / 1000)
                if len(times) > 10 and time.perf_counter() - began > 2 * seconds:
                    break
    return 12 * 64 / statistics.mean(times[3:])


def peer_speed(name: str, tokens: int = 100) -> float:
    """Tokens a second of a peer's decoding of 124 M random weights, in a process of its own."""
    command = [sys.executable, __file__, "--peer", name, "--tokens", str(tokens)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def decode_as(name: str, tokens: int) -> None:
    """Print how fast this engine decodes a GPT-2 of random weights: run in its own process."""
    if name.startswith("nib"):
        from nib.cpu.threads import choose_threads

        choose_threads()  # as sample.py does, before torch is imported
    from decode import fast_model, llama_speed, open_llama, transformers_speed, write

    if name == "transformers":
        from transformers import GPT2Config, GPT2LMHeadModel

        theirs = GPT2LMHeadModel(GPT2Config(eos_token_id=None, bos_token_id=None)).eval()
        print(transformers_speed(theirs, 64, tokens)[1])
        return
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(**GPT2)).eval()
    if name.startswith("nib"):
        from nib.cpu.process import tune_for_sampling

        tune_for_sampling()
        print(write(fast_model(model, 8 if name.endswith("int8") else 32), (64,), tokens)[1])
        return
    with tempfile.TemporaryDirectory() as directory:
        llama = open_llama(model, Path(directory), name.endswith("q8_0"))
        print(llama_speed(llama, 64, tokens)[1])


def installed(name: str) -> bool:
    modules = {"nib": "torch", "transformers": "transformers"}.get(name.split()[0], "llama_cpp, gguf")
    return not subprocess.run([sys.executable, "-c", f"import {modules}"], capture_output=True).returncode


@contextmanager
def beside(neighbour: str, checkout: Path, data: Path) -> Iterator[None]:
    """Keep the machine busy with these neighbours meanwhile."""
    with ExitStack() as stack:
        if neighbour == "run":
            out = Path(stack.enter_context(tempfile.TemporaryDirectory()), "run")
            stack.enter_context(ended(training(checkout, "1.1m", data, out)))
            while len(metrics(out)) < 5:
                time.sleep(0.1)
        for _ in range({"loop": 1, "two loops": 2}.get(neighbour, 0)):
            loop = [sys.executable, "-c", "while True: pass"]
            stack.enter_context(ended(subprocess.Popen(loop, text=True, **OWN)))
        yield


def plot(shares: dict[str, dict[str, float]], path: Path) -> None:
    """Bars of the share that is left of each program's speed alone: training on the left, decoding on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axes, (title, tasks) in zip(panels, PLOTTED.items(), strict=True):
        tasks = {task: colour for task, colour in tasks.items() if task in shares}
        for number, (task, colour) in enumerate(tasks.items()):
            row = {each: share for each, share in shares[task].items() if each != "alone"}
            width = 0.8 / len(tasks)
            at = [group + (number + 0.5) * width - 0.4 for group in range(len(row))]
            bars = axes.bar(at, list(row.values()), width * 0.92, color=colour, label=task.split()[0])
            axes.bar_label(bars, [f"{share:.2f}" for share in row.values()], fontsize=8, color="dimgray")
            axes.set_xticks(range(len(row)), [BESIDE[each] for each in row])
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="speed / speed alone", ylim=(0, 1.05))
    figure.savefig(path)


def main() -> None:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("--seconds", type=float, default=5.0, help="of training that a turn measures")
    jobs = ",".join(["train", *SAMPLES])
    parser.add_argument("--jobs", default=jobs, help="of train, torchrun, sample, sample_int8, sample_x8 and peers")
    parser.add_argument("--sizes", default=",".join(SIZES), help="of nib's models")
    parser.add_argument("--neighbours", default=",".join(NEIGHBOURS))
    parser.add_argument("--data", type=Path, help="a prepared dataset; default: the built-in stdlib, prepared here")
    parser.add_argument("--runs", type=Path, help="where the sampled models are, or will be made")
    parser.add_argument("--old", type=Path, help="another checkout of nib, to take turns with this one")
    parser.add_argument("--nanogpt", type=Path, help="a clone of karpathy/nanoGPT with its data prepared")
    parser.add_argument("--plot", type=Path, help="draw the peers' relative speeds into this file")
    parser.add_argument("--peer", help="used by the script itself")
    parser.add_argument("--tokens", type=int, default=100, help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.peer:
        decode_as(arguments.peer, arguments.tokens)
        return
    neighbours, jobs = arguments.neighbours.split(","), arguments.jobs.split(",")
    checkouts = {"nib": ROOT} | ({"old": arguments.old.resolve()} if arguments.old else {})
    with tempfile.TemporaryDirectory() as name:
        data = (arguments.data or Path(name, "data/stdlib")).resolve()
        runs = (arguments.runs or Path(name)).resolve()
        runs.mkdir(parents=True, exist_ok=True)
        if not data.exists():
            timed(["prepare_data.py", "stdlib", f"--out={data}", "--tokenizer=bpe:2048"])
        tasks = {}
        for size in arguments.sizes.split(","):
            for who, checkout in checkouts.items():
                if "train" in jobs:
                    tasks[f"{who} train {size}"] = (checkout, training_speed, checkout, size, data, arguments.seconds)
                if "torchrun" in jobs:
                    how = (checkout, size, data, arguments.seconds, 2)
                    tasks[f"{who} torchrun {size}"] = (checkout, training_speed, *how)
                for job in [job for job in jobs if job in SAMPLES]:
                    tasks[f"{who} {job} {size}"] = (checkout, sampling_speed, checkout, size, runs / size, SAMPLES[job])
            if any(job in SAMPLES for job in jobs) and not (runs / size).exists():
                shape = SIZES[size].replace("config/", f"{ROOT}/config/").split()
                short = "--max_iters=20 --eval_interval=0 --eval_tokens=1000".split()
                python(ROOT, "train.py", *shape, *short, f"--dataset={data}", f"--out_dir={runs / size}",
                       cwd=runs).communicate()  # fmt: skip
        if arguments.nanogpt:
            tasks["nanoGPT train 0.8m"] = (ROOT, nanogpt_speed, arguments.nanogpt.resolve(), arguments.seconds)
        if "peers" in jobs:
            for peer in PEERS:
                if installed(peer):
                    tasks[f"{peer} gpt2"] = (ROOT, peer_speed, peer)
                else:
                    print(f"{peer} was left out: it is not installed")
        found: dict[str, dict[str, list[float]]] = {task: {each: [] for each in neighbours} for task in tasks}
        for _ in range(arguments.rounds):
            for neighbour in neighbours:
                for task, (checkout, measure, *how) in tasks.items():
                    with beside(neighbour, checkout, data):
                        found[task][neighbour].append(measure(*how))
    speeds = {task: {each: statistics.median(values) for each, values in row.items()} for task, row in found.items()}
    shares = {task: {each: row[each] / row["alone"] for each in row if "alone" in row} for task, row in speeds.items()}
    for title, table, form in (("share of the speed alone", shares, "12.2f"), ("tokens/s", speeds, "12,.0f")):
        print(f"{title:28}" + "".join(f"{each:>12}" for each in neighbours))
        for task, row in table.items():
            print(f"{task:28}" + "".join(f"{value:{form}}" for value in row.values()), flush=True)
    if arguments.plot:
        plot(shares, arguments.plot)
    ours = [(share, TARGETS[each]) for task, row in shares.items() if task.startswith("nib")
            for each, share in row.items() if each in TARGETS]  # fmt: skip
    met = all(share >= target for share, target in ours)
    finish(dict(shares=shares, speeds=speeds, turns=found), met, arguments.check)


if __name__ == "__main__":
    main()
