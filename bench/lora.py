"""LoRA in nib and in peft with transformers: peak memory and tokens/s for the same model and sizes, float32, CPU.

    pip install peft
    python bench/smollm2.py smollm2
    python bench/lora.py smollm2 [--rounds 3] [--steps 6]

Rank 16, all linear layers, 2 sequences of 256 tokens per step. The two alternate, each in its own process, whose peak
resident memory is reported. Prints a table and one JSON line last.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, finish, parser_for, timed

MEMORY, SEQUENCES, LENGTH, RANK = 2.2e9, 2, 256, 16
PEFT = """
import statistics, sys, time, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

place, steps, sequences, length, rank = sys.argv[1], *map(int, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config).train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer, seconds = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0), []
for step in range(steps):
    began = time.perf_counter()
    tokens = torch.randint(model.config.vocab_size, (sequences, length))
    model(input_ids=tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds.append(time.perf_counter() - began)
print(sequences * length / statistics.median(seconds[1:]))
"""


def measured(command: list[str], cwd: str) -> tuple[str, float]:
    """The output of the command, and its peak resident memory in bytes."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{command[:2]} failed")
    return said, usage.ru_maxrss * 1024.0


def main() -> None:
    parser = parser_for(__doc__, rounds=3)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    model, found = str(options.model.resolve()), {"nib": ([], []), "peft": ([], [])}  # type: ignore[var-annotated]
    with tempfile.TemporaryDirectory() as place:
        Path(place, "text.txt").write_text("".join(f"line {n} counts {n * n}\n" for n in range(9000)))
        timed([str(ROOT / "prepare_data.py"), "text.txt", f"--tokenizer={model}"], place)
        for turn in range(options.rounds):
            run = f"--out_dir=out/{turn}"
            train = [
                sys.executable, str(ROOT / "train.py"), "--dataset=text", f"--init_from={model}", "--device=cpu", run,
                f"--lora_rank={RANK}", f"--batch_size={SEQUENCES}", f"--micro_batch_size={SEQUENCES}",
                f"--block_size={LENGTH}", "--dtype=float32", f"--max_iters={options.steps}", "--log_interval=1",
                "--eval_tokens=300",
            ]  # fmt: skip
            peak = measured(train, place)[1]
            lines = Path(place, f"out/{turn}/metrics.jsonl").read_text().splitlines()
            rates = [json.loads(line)["tokens_per_second"] for line in lines[1:]]
            sizes = [options.steps, SEQUENCES, LENGTH, RANK]
            said, theirs = measured([sys.executable, "-c", PEFT, model, *map(str, sizes)], place)
            for side, rate, size in (("nib", statistics.median(rates), peak), ("peft", float(said), theirs)):
                found[side][0].append(rate)
                found[side][1].append(size)
                print(f"{side:5} {rate:8.1f} tokens/s {size / 1e9:6.2f} GB", flush=True)
    ratio = statistics.median(a / b for a, b in zip(found["nib"][0], found["peft"][0], strict=True))
    peak, theirs = max(found["nib"][1]), max(found["peft"][1])
    print(f"speed {ratio:.2f} x peft, peak memory {peak / theirs:.2f} of peft's")
    finish({"speed": ratio, "bytes": peak, "peft_bytes": theirs}, ratio > 1 and peak <= MEMORY, options.check)


if __name__ == "__main__":
    main()
