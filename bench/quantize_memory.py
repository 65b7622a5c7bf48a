"""Peak resident memory of sample.py with a GPT-2 of 124 M random weights, in float32 and in int8.

    python bench/quantize_memory.py

Each runs in its own process; the baseline is a process that only imports torch. Prints a table and one JSON line last.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import GPT2, ROOT, parser_for

from model import GPT, GPTConfig
from nib.formats.checkpoint import write_checkpoint
from nib.tokenizer.load import make_tokenizer

# The resident bytes after generating 20 tokens, with the model still in memory, and their peak.
MEASURE = """
import sys, torch
from common import resident
if len(sys.argv) > 1:
    import sample
    from nib.generation.request import SamplingSettings
    from nib.generation.engine import generate_text
    model, tokenizer, _ = sample.load_model(sys.argv[1:2], "cpu", "float32", *sys.argv[2:])
    generate_text(model, tokenizer, ["a"], SamplingSettings(max_new_tokens=20))
print(resident("VmRSS"), resident("VmHWM"), file=sys.stderr)
"""


def measure(*arguments: str) -> list[int]:
    """Resident and peak resident bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "bench")}, check=True,
    )  # fmt: skip
    return [int(number) for number in done.stderr.split("\n")[-2].split()]


def main() -> None:
    parser_for(__doc__, check=False).parse_args()
    torch.manual_seed(0)
    model, found = GPT(GPTConfig(**GPT2)), {}
    with tempfile.TemporaryDirectory() as name:
        state = {"step": 0, "model_config": vars(model.config)}
        saved = write_checkpoint(Path(name), model.state_dict(), {}, state, make_tokenizer("byte"))
        found["torch alone"] = measure()
        found["float32"] = measure(str(saved))
        found["int8"] = measure(str(saved), "int8")
    for kind, numbers in found.items():
        print("{:12} {:5.0f} MB resident, {:5.0f} MB at the peak".format(kind, *(number / 1e6 for number in numbers)))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
