"""A DPO example: a model of Python source learns to prefer those of its own functions that ast.parse accepts.

    python bench/prefer_parsing.py out/small [--samples 800] [--out parsing]

Uses only a run and nib's own commands: sample functions, pair each valid one with invalid ones, prepare the pairs and
train. The share of valid functions is measured on new samples, before and after. Prints one JSON line last.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import ROOT, parser_for
from parse_share import PROMPT, first_function, parses

REJECTED = 4  # for each chosen one


def main() -> None:
    parser = parser_for(__doc__, check=False)
    parser.add_argument("run")
    parser.add_argument("--samples", type=int, default=800)
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--out", default="parsing", help="name of the pairs' file, of their dataset and of the run")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--epochs", type=float, default=2)
    options = parser.parse_args()

    texts = sample(options.run, options.samples, options.max_new_tokens, seed=1)
    good = [text for text in texts if is_whole(text)]
    bad = [text for text in texts if not is_whole(text)]
    if not good or not bad:
        sys.exit(f"of {len(texts)} functions {len(good)} are whole: nothing to prefer. Sample more")
    rows = []
    for number, chosen in enumerate(good):
        for turn in range(REJECTED):
            rejected = bad[(number * REJECTED + turn) % len(bad)]
            rows.append({"prompt": PROMPT, "chosen": ended(chosen), "rejected": ended(rejected)})
    pairs = Path(f"{options.out}.jsonl")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    call("prepare_data.py", str(pairs), "--format=preference", f"--tokenizer={options.run}", "--val-fraction=0.05",
         f"--out=data/{options.out}", "--overwrite")  # fmt: skip
    call("train.py", f"--dataset={options.out}", f"--init_from={options.run}", f"--out_dir=out/{options.out}",
         f"--learning_rate={options.learning_rate}", "--batch_size=16", "--max_iters=0", "--warmup_iters=5",
         f"--max_epochs={options.epochs}", "--eval_interval=20", "--log_interval=1")  # fmt: skip
    shares = {}
    for name, run in (("before", options.run), ("after", f"out/{options.out}")):
        new = sample(run, options.samples // 2, options.max_new_tokens, seed=2)
        shares[name] = sum(map(is_whole, new)) / len(new)
        print(f"{name}: {100 * shares[name]:.1f} % of {len(new)} functions are whole")
    print(json.dumps({"samples": len(texts), "whole": len(good), "pairs": len(rows), **shares}))


def sample(run: str, count: int, length: int, seed: int) -> list[str]:
    """`count` samples of the run that continue PROMPT."""
    lines = call("sample.py", run, f"--prompt={PROMPT}", f"--num-samples={count}", f"--max-new-tokens={length}",
                 f"--seed={seed}", "--json", show=False)  # fmt: skip
    return [json.loads(line)["text"] for line in lines.splitlines()]


def is_whole(text: str) -> bool:
    function = first_function((PROMPT + text).lstrip())
    return function is not None and parses(function)


def ended(text: str) -> str:
    """The text up to the end of the line after its function: that line shows that the function has ended."""
    function = first_function((PROMPT + text).lstrip())
    if function is None:
        return text
    begin = len(PROMPT + text) - len((PROMPT + text).lstrip())
    rest = (PROMPT + text)[begin + len(function) :]
    line = rest.lstrip("\n").split("\n")[0]
    return (PROMPT + text)[: begin + len(function) + rest.index(line) + len(line)][len(PROMPT) :]


def call(script: str, *arguments: str, show: bool = True) -> str:
    done = subprocess.run([sys.executable, str(ROOT / script), *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    if show:
        print(done.stdout, end="")
    return done.stdout


if __name__ == "__main__":
    main()
