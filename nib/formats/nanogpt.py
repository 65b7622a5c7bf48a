"""nanoGPT's ckpt.pt, read without running any code from it."""

from __future__ import annotations

import dataclasses
import pickle
import re
from pathlib import Path

import torch

from nib.common.exits import InputError
from nib.common.wording import counted
from nib.data.nanogpt import META_FILE, read_meta
from nib.formats.architectures import ARCHITECTURES, number
from nib.formats.places import ImportedModel, Stored, plain_name
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import Tokenizer

CHECKPOINT_FILE = "ckpt.pt"
GPT2_VOCAB = (50257, 50304)  # nanoGPT rounds it up to 50304
SIZES = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
# nanoGPT uses the exact GELU since February 2023 and used the tanh approximation before. The file does not say which.
SETTINGS = {
    "n_kv_head": 0, "head_size": 0, "mlp_hidden": 0, "mlp": "gelu", "norm": "layernorm", "norm_eps": 1e-5,
    "position": "learned", "qk_norm": False, "window": 0, "tie_weights": True, "dropout": 0.0,
}  # fmt: skip


class NanoGPTCheckpoint(ImportedModel):
    """A ckpt.pt, read with weights_only. Raises InputError."""

    architecture = dataclasses.replace(ARCHITECTURES[0], name="nanoGPT", transposed=False)

    def __init__(self, path: Path) -> None:
        self.directory = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            arguments, self.dataset = content["model_args"], str(content.get("config", {}).get("dataset", ""))
            self.tensors = {
                plain_name(str(name)): Stored(tuple(tensor.shape), tensor.detach)
                for name, tensor in content["model"].items()
            }
            shape = {name: number(arguments.get(name), name, int, 1, 1 << 24) for name in SIZES}
            if shape["n_layer"] > len(self.tensors):  # before so many layers are built
                raise InputError(f"there are no weights for {counted(shape['n_layer'], 'layer')}. Give another ckpt.pt")
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
                pickle.UnpicklingError) as error:  # fmt: skip
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0]
            raise InputError(f"{path} is not a nanoGPT checkpoint: {reason[:150]}. Give its ckpt.pt") from None
        self.model_config = SETTINGS | shape | {"bias": arguments.get("bias") is not False}

    def tokenizer(self) -> Tokenizer:
        """Its dataset's tokenizer: meta.pkl beside it or in data/, else GPT-2's if the vocabulary size agrees."""
        name = self.dataset if re.fullmatch(r"\w[\w.-]*", self.dataset) else "none"
        for directory in (self.directory.parent, Path("data") / name, self.directory.parent.parent / "data" / name):
            if (directory / META_FILE).is_file():
                return read_meta(directory / META_FILE)
        if self.model_config["vocab_size"] not in GPT2_VOCAB:
            raise InputError(f"{self.directory} has no tokenizer. Put the {META_FILE} of its dataset beside it")
        return make_tokenizer("gpt2")
