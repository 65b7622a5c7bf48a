"""Bad input through the real command lines: one line that begins with `error: `, exit status 2, nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, run_script

TINY = """
dataset = "letters"
n_layer, n_head, n_embd, block_size = 1, 2, 16, 32
batch_size, max_iters, eval_tokens = 4, 2, 64
position, norm, mlp, optimizer = "learned", "layernorm", "relu", "adamw"
device, compile = "cpu", False
"""
LONG = "x" * 300  # longer than a file system takes

# What is wrong: the command line, and what the message must say (a regular expression).
# In the directory: tiny.py, a sound config; data/words (bytes), data/letters (characters); out/done, a run on letters.
CASES: dict[str, tuple[str, str]] = {
    # train.py
    "misspelt option": ("train.py tiny.py --n_layr=2", r"unknown option --n_layr\. Did you mean --n_layer\?"),
    "misspelt key in a config": (
        "train.py misspelt.py",
        r"unknown setting learning_rat in misspelt\.py.*learning_rate\?",
    ),
    "option of no kind": ("train.py tiny.py -z", r"unknown option -z"),
    "text for a number": ("train.py tiny.py --n_layer=six", r"--n_layer must be a whole number, not 'six'"),
    "text for a number in a config": ("train.py typed.py", r"typed\.py: n_layer must be a whole number, not '6'"),
    "fraction for a whole number": ("train.py tiny.py --n_layer=2.5", r"--n_layer must be a whole number, not 2\.5"),
    "word for a switch": ("train.py tiny.py --bias=perhaps", r"--bias is true or false, not 'perhaps'"),
    "negative number": ("train.py tiny.py --batch_size=-4", r"--batch_size must be at least 1, not -4"),
    "zero layers": ("train.py tiny.py --n_layer 0", r"error: n_layer must be at least 1, not 0"),
    "NaN": ("train.py tiny.py --learning_rate=nan", r"--learning_rate must be a finite number, not nan"),
    "infinity": ("train.py tiny.py --max_seconds=inf", r"--max_seconds must be a finite number, not inf"),
    "dropout of one": ("train.py tiny.py --dropout=1", r"error: dropout must be below 1, not 1"),
    "number beyond 64 bits": ("train.py tiny.py --max_iters=1e30", r"--max_iters is too large"),
    "batch beyond all memory": ("train.py tiny.py --batch_size=1e12", r"--batch_size must be at most 1048576"),
    "misspelt choice": ("train.py tiny.py --optimizer=adam", r"--optimizer must be one of .*Did you mean adamw\?"),
    "option without its value": ("train.py tiny.py --out_dir", r"option --out_dir needs a value"),
    "negated number": ("train.py tiny.py --no-n_layer", r"unknown option --no-n_layer"),
    "min_lr above learning_rate": ("train.py tiny.py --min_lr=0.5", r"min_lr 0\.5 is above learning_rate 0\.001"),
    "micro-batch above the batch": (
        "train.py tiny.py --micro_batch_size=8",
        r"micro_batch_size 8 is above batch_size 4",
    ),
    "no budget": ("train.py tiny.py --max_iters=0", r"the run has no end\. Set one of them"),
    "two configs": ("train.py tiny.py typed.py", r"unexpected argument 'typed\.py'"),
    "missing config": ("train.py nothere.py", r"cannot read config file nothere\.py: No such file"),
    "directory for a config": ("train.py data", r"cannot read config file data: Is a directory"),
    "dangling link for a config": ("train.py dangling.txt", r"cannot read config file dangling\.txt: No such file"),
    "binary config": ("train.py binary.bin", r"cannot read config file binary\.bin: it is not UTF-8 text"),
    "config with a syntax error": ("train.py unclosed.py", r"unclosed\.py is not valid Python: .*line 1"),
    "config that imports": ("train.py imports.py", r"imports\.py, line 1: only assignments are read"),
    "config that raises": ("train.py raises.py", r"raises\.py, line 2: ZeroDivisionError"),
    "unknown resume": ("train.py tiny.py --resume=yes", r"--resume must be one of auto, never, must, not 'yes'"),
    "unknown parallel": ("train.py tiny.py --parallel=tensor", r"--parallel must be one of ddp, fsdp, not 'tensor'"),
    # prepare_data.py
    "no source": ("prepare_data.py", r"no SOURCE, or an empty one\. Give a file"),
    "missing source": ("prepare_data.py nothere.txt", r"no source nothere\.txt"),
    "source with too long a name": (f"prepare_data.py {LONG} --out=data/x", r"x{300}"),
    "source that cannot be read": ("prepare_data.py dangling.txt --tokenizer=byte", r"no source dangling\.txt"),
    "no file that matches": ("prepare_data.py texts --glob='*.md'", r"no file in texts matches \*\.md"),
    "empty corpus": ("prepare_data.py empty.txt --tokenizer=byte", r"there is no text in empty\.txt"),
    "empty corpus for characters": ("prepare_data.py empty.txt --tokenizer=char", r"there is no text"),
    "empty corpus for BPE": ("prepare_data.py empty.txt --tokenizer=bpe:300", r"there is no text in empty\.txt"),
    "binary file as text": (
        "prepare_data.py binary.bin --tokenizer=byte",
        r"binary\.bin: byte 0xff at offset 0 is not UTF-8",
    ),
    "JSONL without the field": (
        "prepare_data.py rows.jsonl --field=body --tokenizer=byte",
        r"rows\.jsonl, line 1.*body",
    ),
    "JSONL that is none": ("prepare_data.py tiny.py --format=jsonl --tokenizer=byte", r"tiny\.py, line 2.*JSON"),
    "JSONL field that is no text": ("prepare_data.py rows.jsonl --field=n --tokenizer=byte", r"rows\.jsonl, line 1"),
    "Parquet that is none": (
        "prepare_data.py fake.parquet --tokenizer=byte",
        r"fake\.parquet (is not a valid|needs pyarrow)",
    ),
    "Parquet from a pipe": (
        "prepare_data.py - --format=parquet --tokenizer=byte",
        r"Parquet cannot be read from a pipe",
    ),
    "existing output": ("prepare_data.py texts --out=data/words", r"data/words exists\. Give --overwrite"),
    "output that is no data": ("prepare_data.py empty.txt --out=texts --overwrite", r"texts is not prepared data"),
    "output inside a file": ("prepare_data.py texts --out=tiny.py/x --tokenizer=byte", r"cannot write tiny\.py/x: "),
    "output with too long a name": (f"prepare_data.py texts --out=data/{LONG} --tokenizer=byte", r"x{300}"),
    "unknown tokenizer": (
        "prepare_data.py texts --tokenizer=gpt9",
        r"no tokenizer 'gpt9'\. There are byte, char, bpe:N",
    ),
    "tokenizer file that is none": ("prepare_data.py texts --tokenizer=tiny.py", r"tiny\.py is not a tokenizer"),
    "vocabulary below the bytes": ("prepare_data.py texts --tokenizer=bpe:10", r"--tokenizer=bpe:10: N is 257"),
    "vocabulary that is no number": ("prepare_data.py texts --tokenizer=bpe:x", r"--tokenizer=bpe:x: N is 257"),
    "share above one": ("prepare_data.py texts --val-fraction=1.5", r"--val-fraction must be below 1, not 1\.5"),
    "negative workers": ("prepare_data.py texts --workers=-2", r"--workers must be at least 0, not -2"),
    "no tokens in a shard": ("prepare_data.py texts --shard-tokens=0", r"--shard-tokens must be at least 1, not 0"),
    "unknown format": ("prepare_data.py texts --format=csv", r"--format must be one of auto, text, jsonl, parquet"),
    "several sources without a name": ("prepare_data.py texts tiny.py", r"no default name for several sources"),
    # sample.py
    "misspelt sampling option": (
        "sample.py --temprature=1",
        r"unknown option --temprature\. Did you mean --temperature\?",
    ),
    "probability above one": ("sample.py --top-p=2", r"--top-p must be at most 1, not 2"),
    "temperature that is NaN": ("sample.py --temperature nan", r"--temperature must be a finite number"),
    "negative length": ("sample.py --max-new-tokens=-1", r"--max-new-tokens must be at least 0, not -1"),
    "no samples": ("sample.py --num-samples=0", r"--num-samples must be at least 1, not 0"),
    "two runs": ("sample.py done other", r"unexpected argument 'other'"),
    "empty stop text": ("sample.py done --stop=", r"a stop text cannot be empty"),
    "standard input twice": ("sample.py done --prompt - --prompt -", r"standard input can only be read once"),
    "conversation with a prompt": ("sample.py --interactive --prompt=a", r"Leave out --prompt or --interactive"),
    "missing prompt file": (
        "sample.py done --prompt FILE:nothere",
        r"cannot read the prompt from nothere: No such file",
    ),
    "directory for a prompt": (
        "sample.py done --prompt FILE:data",
        r"cannot read the prompt from data: Is a directory",
    ),
    "binary prompt": ("sample.py done --prompt FILE:binary.bin", r"the prompt in binary\.bin is not UTF-8 at byte 0"),
}
# The same, found after torch is loaded.
LATE_CASES: dict[str, tuple[str, str]] = {
    # train.py
    "n_embd not divisible": ("train.py tiny.py --n_embd=15", r"n_embd 15 is not divisible by n_head 2"),
    "n_head not divisible": ("train.py tiny.py --n_kv_head=3", r"n_head 2 is not divisible by n_kv_head 3"),
    "odd heads for rope": ("train.py tiny.py --position=rope --n_embd=6", r"position=rope needs an even head size"),
    "device that is not there": ("train.py tiny.py --device=cuda:97", r"device cuda:97 is not there.*--device=auto"),
    "unknown device": ("train.py tiny.py --device=abacus", r"device 'abacus' is not known\. Use auto"),
    "missing corpus": ("train.py tiny.py --dataset=nowhere", r"no dataset 'nowhere' under data/.*Prepared: .*words"),
    "corpus with too long a name": (f"train.py tiny.py --dataset={LONG}", r"x{300}"),
    "mixture of no weight": ("train.py tiny.py --dataset=words:0,letters:0", r"the weight of words is 0\. Give it one"),
    "mixture without a weight": ("train.py tiny.py --dataset=words,letters:1", r"'words' is not a name with a weight"),
    "mixture with a missing corpus": ("train.py tiny.py --dataset=words:1,nowhere:1", r"no dataset 'nowhere' under"),
    "mixture of two tokenizers": (
        "train.py tiny.py --dataset=letters:1,words:1",
        r"data/words has another tokenizer than data/letters\. Prepare data/letters again with --tokenizer=data/words",
    ),
    "corpus without meta.json": ("train.py tiny.py --dataset=bare", r"no prepared data in data/bare\. Make it with"),
    "corpus with a hostile meta.json": ("train.py tiny.py --dataset=garbled", r"garbled/meta\.json is not what"),
    "corpus with a flipped byte": ("train.py tiny.py --dataset=flipped", r"train-00000\.bin does not have the content"),
    "corpus with a shard missing": (
        "train.py tiny.py --dataset=missing",
        r"cannot read .*val-00000\.bin: No such file",
    ),
    "split shorter than a window": (
        "train.py tiny.py --block_size=100_000",
        r"the training split has \d+ tokens, fewer",
    ),
    "window beyond all memory": ("train.py tiny.py --block_size=1e14", r"the training split has \d+ tokens, fewer"),
    "nothing to validate on": ("train.py tiny.py --dataset=noval --eval_only", r"validation"),
    "nothing to validate": ("train.py tiny.py --eval_only", r"no checkpoint"),
    "batch that does not split": (
        "train.py tiny.py --batch_size=6 --micro_batch_size=4",
        r"micro_batch_size 4 does not divide the 6 sequences of one process\. Use 6, 3, 2, 1, or 0",
    ),
    "out_dir is a file": ("train.py tiny.py --out_dir=tiny.py", r"cannot write to tiny\.py: .*Give another --out_dir"),
    "out_dir inside a file": (
        "train.py tiny.py --out_dir=tiny.py/run",
        r"cannot write to tiny\.py/run: Not a directory",
    ),
    "out_dir with too long a name": (
        f"train.py tiny.py --out_dir={LONG}",
        r"x{300}",
    ),
    "resume=must without a run": ("train.py tiny.py --resume=must", r"no checkpoint in out/tiny to resume"),
    "resume=never over a run": ("train.py tiny.py --out_dir=out/done --resume=never", r"out/done already holds a run"),
    "resume with another model": ("train.py tiny.py --out_dir=out/done --n_layer=2", r"n_layer is 2 but .*made with 1"),
    "resume with another corpus": ("train.py tiny.py --out_dir=out/done --dataset=words", r"dataset is 'words' but"),
    "init_from something absent": ("train.py tiny.py --init_from=nothing", r"there is no run or checkpoint nothing"),
    "init_from with too long a name": (f"train.py tiny.py --init_from={LONG}", r"x{300}"),
    "init_from no checkpoint": ("train.py tiny.py --init_from=data", r"data is neither a run nor a checkpoint"),
    "init_from another vocabulary": (
        "train.py tiny.py --init_from=out/done --dataset=words",
        r"out/done has 12 token ids, data/words 257",
    ),
    "init_from another shape": (
        "train.py tiny.py --init_from=out/done --n_embd=32",
        r"n_embd is 32 but out/done has 16",
    ),
    "rank that is no number": (
        "RANK=one WORLD_SIZE=2 train.py tiny.py",
        r"RANK, LOCAL_RANK and WORLD_SIZE must be num",
    ),
    # sample.py
    "character without an id": ("sample.py done --prompt=abQ", r"the character 'Q' \(U\+0051\) is not among the 12"),
    "missing run": ("sample.py nothere", r"there is no run or checkpoint nothere"),
    "run with too long a name": (f"sample.py {LONG}", r"x{300}"),
    "directory that is no run": ("sample.py data", r"data is neither a run nor a checkpoint"),
    "file that is no checkpoint": ("sample.py tiny.py", r"tiny\.py is neither a run nor a checkpoint"),
    "run without a checkpoint": ("sample.py out/begun", r"out/begun.*checkpoint"),
    "damaged checkpoint": ("sample.py out/cut/checkpoints/step-00000002", r"model\.safetensors is damaged: its sha256"),
    "checkpoint of no model": ("sample.py out/shape/checkpoints/step-00000002", r"does not fit this model\.py"),
    "sampling on no device": ("sample.py done --device=cuda:97", r"device cuda:97 is not there"),
}

# Loads torch, which takes most of the time of these cases, once. Then it runs each script in a process forked off, in
# the directory, with the arguments and the environment that a line of its standard input says.
LOADED = """
import json, os, runpy, signal, sys
sys.path[0] = os.getcwd()  # which the child leaves, and the scripts import model.py later
import train, sample
print(flush=True)
for line in sys.stdin:
    case = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.chdir(case["place"])
        os.environ.update(case["environment"])
        for number, name in ((0, os.devnull), (1, os.devnull), (2, case["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.argv = case["command"]
        runpy.run_path(case["command"][0], run_name="__main__")
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def lay_out(root: Path) -> None:
    """The files that the cases name."""
    files = {
        "tiny.py": TINY, "misspelt.py": TINY + "learning_rat = 1e-3\n", "typed.py": TINY + "n_layer = '6'\n",
        "unclosed.py": "n_layer = (6\n", "imports.py": "import os\n", "raises.py": "n_layer = 6\nn_head = 6 // 0\n",
        "empty.txt": "", "rows.jsonl": '{"text": "one", "n": 1}\n{"text": "two", "n": 2}\n', "fake.parquet": "no" * 50,
        "letters.txt": "abcdefghij\n" * 60 + "a bad cab\n" * 60,
    }  # fmt: skip
    for name, text in files.items():
        (root / name).write_text(text)
    (root / "binary.bin").write_bytes(bytes(range(255, 0, -1)) * 4)
    (root / "dangling.txt").symlink_to("nothere.txt")
    (root / "data" / "bare").mkdir()
    (root / "out" / "begun" / "checkpoints").mkdir(parents=True)


def damage(root: Path) -> None:
    """Copies of the sound corpus and of the sound run, each broken in one way."""
    for name in ("garbled", "flipped", "missing"):
        shutil.copytree(root / "data" / "letters", root / "data" / name)
    (root / "data" / "garbled" / "meta.json").write_text('{"tokens": {"train": 1e99}, "vocab_size": "all"}')
    shard = root / "data" / "flipped" / "train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    (root / "data" / "missing" / "val-00000.bin").unlink()
    for name in ("cut", "shape"):
        shutil.copytree(root / "out" / "done", root / "out" / name)
    weights = root / "out" / "cut" / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    checkpoint = root / "out" / "shape" / "checkpoints" / "step-00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    state["model_config"]["n_embd"] = 24
    (checkpoint / "state.json").write_text(json.dumps(state))
    sums = json.loads((checkpoint / "checksums.json").read_text())
    sums["state.json"] = hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


@pytest.fixture(scope="session")
def workplace(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad-input") / "place"
    shutil.copytree(corpus, root)
    lay_out(root)
    for command in (
        "prepare_data.py letters.txt --tokenizer=char --val-fraction=0.2 --workers=1",
        "prepare_data.py letters.txt --tokenizer=char --val-fraction=0 --workers=1 --out=data/noval",
        "train.py tiny.py --out_dir=out/done",
    ):
        done = run_script(*shlex.split(command), cwd=root)
        assert done.returncode == 0, done.stderr
    damage(root)
    return root


def contents(root: Path) -> dict[str, str]:
    """Every name below `root` with a hash of what it holds, apart from stamps that a check has been made."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.suffix == ".checked":
            continue
        content = b"directory" if path.is_dir() else os.fsencode(os.readlink(path)) if path.is_symlink() else None
        found[str(path.relative_to(root))] = hashlib.sha256(content or path.read_bytes()).hexdigest()
    return found


@pytest.fixture(scope="session")
def loaded() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", LOADED]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "\n"
        yield process


def split(line: str) -> tuple[dict[str, str], list[str]]:
    """A command line into the variables in front of it, and the script with its arguments."""
    words = shlex.split(line)
    count = next(index for index, word in enumerate(words) if word.endswith(".py"))
    variables = dict(word.split("=") for word in words[:count])
    return variables, [str(ROOT / words[count]), *words[count + 1 :]]


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    shutil.copytree(workplace, tmp_path / "place", symlinks=True)
    return tmp_path / "place"


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_changes_nothing(case: str, place: Path) -> None:
    variables, command = split(CASES[case][0])
    before = contents(place)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=place, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    check(done.returncode, done.stderr, CASES[case][1])
    assert contents(place) == before


@pytest.mark.parametrize("case", LATE_CASES)
def test_bad_input_found_late_is_one_line_and_changes_nothing(
    case: str, place: Path, loaded: subprocess.Popen[str]
) -> None:
    variables, command = split(LATE_CASES[case][0])
    before, stderr = contents(place), place.parent / "stderr"
    message = dict(place=str(place), environment=variables, command=command, stderr=str(stderr))
    assert loaded.stdin is not None and loaded.stdout is not None
    print(json.dumps(message), file=loaded.stdin, flush=True)
    check(int(loaded.stdout.readline()), stderr.read_text(), LATE_CASES[case][1])
    assert contents(place) == before


def check(status: int, stderr: str, pattern: str) -> None:
    said = stderr.splitlines()
    assert "Traceback" not in stderr, stderr[-1500:]
    assert len(said) == 1 and said[0].startswith("error: "), stderr[-1500:]
    assert re.search(pattern, said[0]), said[0]
    assert len(said[0]) < 1000
    assert status == 2


def test_there_are_enough_cases() -> None:
    cases = [*CASES.values(), *LATE_CASES.values()]
    assert len(cases) >= 40 and len({line for line, _ in cases}) == len(cases)
