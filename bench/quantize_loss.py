"""How much 8-bit weights raise the loss on the whole validation split.

    python bench/quantize_loss.py [MODEL] [--dataset data/stdlib]

The dataset must have been prepared with the model's own tokenizer. Windows have at most 1,024 tokens. Prints both
losses and one JSON line last.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from common import finish, parser_for
from torch import nn

from model import GPT, GPTConfig
from nib.cpu.int8 import quantize_rows
from nib.data.dataset import Dataset
from nib.data.sequences import ValidationWindows
from nib.formats.load import build, open_source, read_config
from nib.training.distributed import Cluster
from nib.training.validation import validate

TARGET = 0.01  # nats


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument(
        "model", nargs="?", help="a run, a checkpoint or a Hugging Face directory (default: the newest run)"
    )
    parser.add_argument("--dataset", type=Path, default=Path("data/stdlib"))
    parser.add_argument("--tokens", type=int, default=0, help="validation tokens to use; 0: all")
    arguments = parser.parse_args()
    source, dataset = open_source(arguments.model), Dataset(arguments.dataset)
    config = read_config(source, GPTConfig)
    windows = ValidationWindows(dataset.val, min(1024, config.block_size), arguments.tokens)
    losses = {}
    for kind in ("float32", "int8"):
        model = build(source, lambda: GPT(config)).eval()
        if kind == "int8":
            round_to_int8(model)
        losses[kind] = validate(
            model, windows, dataset.tokenizer.byte_lengths(), batch=8, cluster=Cluster(0, 1, torch.device("cpu")),
            autocast=nullcontext(),
        ).loss  # fmt: skip
        print(f"{kind:8} validation loss {losses[kind]:.5f} nats a token")
    rise = losses["int8"] - losses["float32"]
    print(f"the loss rises by {rise:.5f} nats; target under {TARGET}")
    finish({**losses, "rise": rise}, rise < TARGET, arguments.check)


@torch.no_grad()
def round_to_int8(model: GPT) -> None:
    """Round the matrices to their 8-bit values. --quantize int8 changes nothing else."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)) and module is not getattr(model, "wpe", None):
            integers, scale = quantize_rows(module.weight)
            module.weight.copy_(integers * scale[:, None])


if __name__ == "__main__":
    main()
