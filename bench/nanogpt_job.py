"""The CPU example of nanoGPT's README in nib and in nanoGPT: loss and seconds of a character-level model.

    python bench/nanogpt_job.py --nanogpt PATH_TO_CLONE --text input.txt [--rounds 3]

4 layers, 4 heads, width 128, context 64, batch 12. Both train 2000 steps on the same text and split, each with its own
train.py. nib evaluates both models on the whole validation split. Prints a table and one JSON line last.
"""

from __future__ import annotations

import json
import pickle
import statistics
import tempfile
from pathlib import Path

import torch
from common import finish, load_nanogpt, parser_for, timed
from torch import nn

from nib.data.dataset import Dataset
from nib.data.sequences import ValidationWindows

NANOGPT = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=1 --eval_interval=2000 "
    "--log_interval=500 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0 --always_save_checkpoint=True"
).split()


def prepare(text: Path, directory: Path, clone: Path) -> Dataset:
    """The text for both sides: the same characters, the same split."""
    timed(["prepare_data.py", str(text), f"--out={directory}", "--tokenizer=char", "--val-fraction=0.1"])
    dataset = Dataset(directory)
    theirs = clone / "data/shakespeare_char"
    for split, stream in (("train", dataset.train), ("val", dataset.val)):
        stream.read(0, stream.tokens).astype("uint16").tofile(theirs / f"{split}.bin")
    (theirs / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": dataset.vocab_size}))
    return dataset


@torch.no_grad()
def full_loss(logits_of, dataset: Dataset, block_size: int) -> float:  # type: ignore[no-untyped-def]
    """Mean loss over the whole validation split, in consecutive windows."""
    total, count, batch = 0.0, 0, 64
    windows = ValidationWindows(dataset.val, block_size, 0)
    for first in range(0, windows.size, batch):
        inputs, targets = windows.batch(first, batch)
        loss = torch.nn.functional.cross_entropy(
            logits_of(inputs).flatten(0, 1).double(), targets.flatten(), ignore_index=-1, reduction="sum"
        )
        total, count = total + float(loss), count + int((targets >= 0).sum())
    return total / count


def run_nib(text: Path, directory: Path, seed: int) -> tuple[float, float]:
    """Seconds of the whole process, and the loss on the validation split."""
    out = directory / f"nib-{seed}"
    command = ["train.py", "config/shakespeare_char.py", f"--seed={seed}"]
    seconds, _ = timed([*command, f"--dataset={text}", f"--out_dir={out}", "--eval_interval=0", "--device=cpu"])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return seconds, lines[-1]["val_loss"]


def nanogpt_model(clone: Path, out: Path) -> nn.Module:
    """The model that nanoGPT saved in `out`."""
    module = load_nanogpt(clone)
    saved = torch.load(out / "ckpt.pt", map_location="cpu", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    return model.eval()


def run_nanogpt(clone: Path, dataset: Dataset, directory: Path, seed: int) -> tuple[float, float]:
    out = directory / f"nanogpt-{seed}"
    # nanoGPT's seed is a constant in its source: change it for each round.
    source = (clone / "train.py").read_text().replace("torch.manual_seed(1337", f"torch.manual_seed({seed}")
    (clone / "train_seeded.py").write_text(source)
    seconds, _ = timed(["train_seeded.py", *NANOGPT, f"--out_dir={out}"], clone)
    model = nanogpt_model(clone, out)
    return seconds, full_loss(lambda inputs: model(inputs, inputs)[0], dataset, 64)


def main() -> None:
    parser = parser_for(__doc__, nanogpt=True, rounds=3)
    parser.add_argument("--text", type=Path, required=True, help="a text, such as tiny Shakespeare's input.txt")
    arguments = parser.parse_args()
    clone, text = arguments.nanogpt.resolve(), arguments.text.resolve()

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prepared = directory / "text"
        dataset = prepare(text, prepared, clone)
        rows = []
        for seed in range(1337, 1337 + arguments.rounds):
            rows.append((*run_nib(prepared, directory, seed), *run_nanogpt(clone, dataset, directory, seed)))
            print("nib {:6.1f} s, loss {:.4f}    nanoGPT {:6.1f} s, loss {:.4f}".format(*rows[-1]), flush=True)
    nib_seconds, nib_loss, seconds, loss = (statistics.median(column) for column in zip(*rows, strict=True))
    spread = max(row[3] for row in rows) - min(row[3] for row in rows)
    print(f"medians: nib {nib_loss:.4f}, nanoGPT {loss:.4f} (its spread {spread:.4f})")
    result = dict(nib_loss=nib_loss, nanogpt_loss=loss, spread=spread, nib_seconds=nib_seconds, nanogpt_seconds=seconds)
    finish(result, nib_loss <= loss + max(spread, 0.01), arguments.check)


if __name__ == "__main__":
    main()
