"""What 8-bit weights cost in validation loss: the whole split in float32 and quantised.

    python bench/quantize_loss.py [RUN] [--dataset data/stdlib]

Prints a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from model import GPT, GPTConfig
from nib.cpu.int8 import pack_int8, quantize
from nib.data.dataset import Dataset
from nib.formats.checkpoint import find_checkpoint, open_checkpoint
from nib.training.distributed import Cluster
from nib.training.validation import validate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run or checkpoint (default: the newest run)")
    parser.add_argument("--dataset", type=Path, default=Path("data/stdlib"))
    parser.add_argument("--tokens", type=int, default=0, help="only so many validation tokens; 0: all")
    parser.add_argument("--check", action="store_true", help="exit 1 when the loss rises by 0.01 nats or more")
    arguments = parser.parse_args()
    checkpoint, dataset = open_checkpoint(find_checkpoint(arguments.run)), Dataset(arguments.dataset)
    losses = {}
    for kind in ("float32", "int8"):
        model = GPT(GPTConfig(**checkpoint.model_config)).eval()
        model.load_state_dict(checkpoint.weights())
        if kind == "int8":
            quantize(model)
            pack_int8(model)
        losses[kind] = validate(
            model, dataset.val, dataset.tokenizer.byte_lengths(), block_size=model.config.block_size, batch=8,
            cluster=Cluster(0, 1, torch.device("cpu")), autocast=nullcontext(), limit=arguments.tokens,
        ).loss  # fmt: skip
        print(f"{kind:8} validation loss {losses[kind]:.5f} nats a token")
    rise = losses["int8"] - losses["float32"]
    print(f"the loss rises by {rise:.5f} nats; target under 0.01")
    print(json.dumps({**losses, "rise": rise, "torch": torch.__version__}))
    if arguments.check and rise >= 0.01:
        sys.exit(1)


if __name__ == "__main__":
    main()
