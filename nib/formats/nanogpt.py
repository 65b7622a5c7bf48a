"""What nanoGPT leaves behind: ckpt.pt, and datasets of train.bin, val.bin and perhaps meta.pkl. None of it can run."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nib.common.exits import InputError
from nib.common.wording import counted
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer, Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from nib.data.shards import SplitWriter

CHECKPOINT_FILE, META_FILE = "ckpt.pt", "meta.pkl"
MAX_META_BYTES = 16 << 20
COPY_TOKENS = 1 << 22
GPT2_VOCAB = (50257, 50304)  # nanoGPT rounds it up


class NanoGPTCheckpoint:
    """A ckpt.pt, read with weights_only; has the members of nib.formats.checkpoint.Checkpoint. Raises InputError.

    nanoGPT computes the exact gelu since February 2023; before, it was the approximation by tanh, which a file does
    not tell.
    """

    def __init__(self, path: Path) -> None:
        import torch

        from nib.formats.architectures import ARCHITECTURES, number
        from nib.formats.places import places, plain_name

        self.directory = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            stored, arguments = content["model"], content["model_args"]
            self.dataset = str(content.get("config", {}).get("dataset", ""))
            stored = {plain_name(str(name)): tensor for name, tensor in stored.items()}
            if "lm_head.weight" in stored:  # tied: one matrix, of which either name may have been kept
                stored.setdefault("transformer.wte.weight", stored["lm_head.weight"])
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, EOFError,
                pickle.UnpicklingError) as error:  # fmt: skip
            reason = f"no {error}" if isinstance(error, KeyError) else str(error).strip().partition("\n")[0]
            raise InputError(f"{path} is no checkpoint of nanoGPT: {reason[:150]}. Give its ckpt.pt") from None
        try:
            sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
            shape = {name: number(arguments.get(name), name, int, 1, 1 << 24) for name in sizes}
            if shape["n_embd"] % shape["n_head"] or shape["n_layer"] > len(stored):
                raise InputError("its sizes do not fit together")
            bias = arguments.get("bias") is not False
            self.model_config: dict[str, Any] = shape | {
                "n_kv_head": shape["n_head"], "head_size": shape["n_embd"] // shape["n_head"], "bias": bias,
                "mlp_hidden": 4 * shape["n_embd"], "mlp": "gelu", "norm": "layernorm", "position": "learned",
                "norm_eps": 1e-5, "qk_norm": False, "window": 0, "tie_weights": True, "dropout": 0.0,
            }  # fmt: skip
            self.tensors: dict[str, Tensor] = {}
            for place in places(ARCHITECTURES[0], self.model_config):
                tensor = stored.pop(place.parts[0][0], None)
                if tensor is None or tuple(tensor.shape) != place.shape:
                    raise InputError(f"the tensor {place.parts[0][0]} is missing or has another shape")
                self.tensors[place.ours] = tensor
            self.state: dict[str, Any] = {"step": 0, "model_config": self.model_config}
            head = stored.pop("lm_head.weight", None)
            if head is not None and not torch.equal(head, self.tensors["wte.weight"]):
                raise InputError("its head is not tied to its embedding")
            strange = [name for name in stored if not name.endswith((".attn.bias", ".attn.masked_bias"))]
            if strange:
                raise InputError(f"the tensor {strange[0][:80]} has no place")
        except InputError as error:
            raise InputError(f"{path}: {error}. Give an unchanged nanoGPT's ckpt.pt") from None

    def weights(self) -> dict[str, Tensor]:
        return self.tensors

    def tokenizer(self) -> Tokenizer:
        """That of its dataset: meta.pkl beside it or in data/, else GPT-2's where the sizes agree."""
        name = self.dataset if re.fullmatch(r"\w[\w.-]*", self.dataset) else "none"
        for directory in (self.directory.parent, Path("data") / name, self.directory.parent.parent / "data" / name):
            if (directory / META_FILE).is_file():
                return read_meta(directory / META_FILE)
        if self.model_config["vocab_size"] not in GPT2_VOCAB:
            raise InputError(f"{self.directory} has no tokenizer. Put the {META_FILE} of its dataset beside it")
        return make_tokenizer("gpt2")


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, texts, lists and dictionaries; whatever names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_meta(path: Path) -> CharTokenizer:
    """The character tokenizer in a meta.pkl. Raises InputError."""
    try:
        if path.stat().st_size > MAX_META_BYTES:
            raise ValueError("it is too large")
        letters = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()["itos"]
        characters = [letters[id] for id in range(len(letters))]
        if not all(isinstance(each, str) and len(each) == 1 for each in characters):
            raise ValueError("its tokens are not characters")
        if not characters or sorted(set(characters)) != characters:
            raise ValueError("its characters are not in order")
        return CharTokenizer("".join(characters))
    except Exception as error:  # a broken pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is no meta.pkl of characters: {reason[:100]}. Prepare the text itself") from None


def is_dataset(sources: list[str]) -> bool:
    """Whether the one source is a directory of nanoGPT's token files."""
    return len(sources) == 1 and all((Path(sources[0]) / f"{split}.bin").is_file() for split in ("train", "val"))


def dataset_tokenizer(directory: Path, name: str) -> Tokenizer:
    """That of meta.pkl, else the one called `name`."""
    return read_meta(directory / META_FILE) if (directory / META_FILE).exists() else make_tokenizer(name)


def copy_tokens(directory: Path, tokenizer: Tokenizer, writer: SplitWriter) -> None:
    """Append both splits to `writer`, every id being looked at. Raises InputError."""
    lengths, end = tokenizer.byte_lengths(), tokenizer.end_of_text
    for split in ("train", "val"):
        path = directory / f"{split}.bin"
        if path.stat().st_size % 2:
            raise InputError(f"{path} has an odd number of bytes, not tokens of 2. Give nanoGPT's own files")
        documents = 0
        with path.open("rb") as file:
            while data := file.read(2 * COPY_TOKENS):
                tokens = np.frombuffer(data, dtype="<u2")
                if tokens.max() >= tokenizer.vocab_size:
                    size = tokenizer.vocab_size
                    ids = f"id {tokens.max()}, {tokenizer.name} only {counted(size, 'id')}"
                    raise InputError(f"{path} has {ids}. Give the --tokenizer it was made with")
                writer.files[split].write(tokens.astype(writer.dtype).tobytes())
                writer.tokens[split] += len(tokens)
                writer.bytes[split] += int(lengths[tokens].sum())
                documents += int((tokens == end).sum()) if end is not None else 0
        writer.documents[split] = documents or min(1, writer.tokens[split])
