"""A model directory of Hugging Face's, read: config.json, safetensors whole or in shards, and the tokenizer.

Nothing in it can run code, no path that a file names is followed, and every shape is compared with config.json
before memory is taken for it. The package transformers is not needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from nib.common.exits import InputError
from nib.common.wording import counted
from nib.formats.architectures import XIELU, read_config
from nib.formats.places import places, plain_name
from nib.tokenizer.huggingface import read_object, read_tokenizer
from nib.tokenizer.tokenizer import Tokenizer

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")
MAY_BE_TIED = ("lm_head.weight", "embed_tokens.weight", "wte.weight")  # then one of them is stored
# Buffers that older versions stored with the weights.
NOT_WEIGHTS = re.compile(r".*\.attn\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq")


def is_hugging_face(path: Path) -> bool:
    """Whether a directory says that it is a model of transformers."""
    if not (path / CONFIG_FILE).is_file():
        return False
    try:
        config = read_object(path / CONFIG_FILE)
    except InputError:
        return False
    return "architectures" in config or "model_type" in config


class HuggingFaceModel:
    """A directory of one of the architectures in architectures.py; has the members of checkpoint.Checkpoint.

    Opening it checks everything but the values of the weights. Raises InputError.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        config = read_object(directory / CONFIG_FILE)
        try:
            self.architecture, self.model_config, without_bias = read_config(config)
            model = self.model_config
            model["n_kv_head"] = model["n_kv_head"] or model["n_head"]
            if not model["head_size"] and model["n_embd"] % model["n_head"]:
                raise InputError(f"{model['n_head']} heads do not divide a width of {model['n_embd']}. Correct it")
            model["head_size"] = model["head_size"] or model["n_embd"] // model["n_head"]
            model["mlp_hidden"] = model["mlp_hidden"] or 4 * model["n_embd"]
            self.files = self._find_tensors()
            self.places = self._match(config, without_bias)
            self.state: dict[str, Any] = {"step": 0, "model_config": model}
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None

    def _find_tensors(self) -> dict[str, tuple[Path, tuple[int, ...], str]]:
        """The file, the shape and the name in it of every tensor, by its plain name."""
        expected: dict[str, Any] | None = None
        if (self.directory / WEIGHTS_FILE).is_file():
            names = [WEIGHTS_FILE]
        elif (self.directory / INDEX_FILE).is_file():
            expected = read_object(self.directory / INDEX_FILE).get("weight_map")
            if not isinstance(expected, dict) or not expected:
                raise InputError(f"{INDEX_FILE} has no weight_map. Give a whole model directory")
            names = sorted(set(map(str, expected.values())))
            for name in names:
                if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                    raise InputError(f"{INDEX_FILE} names {name[:80]!r}, not a file beside it. Give a whole directory")
        else:
            pickled = next((f"{path.name} is pickled and " for path in self.directory.glob("*.bin")), "")
            raise InputError(f"{pickled}there is no {WEIGHTS_FILE}. Give a model that is saved as safetensors")
        found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for name in names:
            path = self.directory / name
            if not path.is_file():
                raise InputError(f"the shard {name} is missing. Download the model again")
            try:
                with safe_open(path, "pt") as file:
                    for tensor in file.keys():  # noqa: SIM118  it is no dict
                        part = file.get_slice(tensor)
                        if part.get_dtype() not in DTYPES and not NOT_WEIGHTS.fullmatch(tensor):
                            kinds = "F32, BF16 or F16"
                            raise InputError(f"{tensor} is of type {part.get_dtype()}, not {kinds}. Give a plain model")
                        if (plain := plain_name(tensor)) in found:
                            raise InputError(f"{plain} is there twice. Give a whole model directory")
                        found[plain] = (path, tuple(part.get_shape()), tensor)
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(f"cannot read {name}: {str(error)[:120]}. Download the model again") from None
        for tensor in expected or ():
            plain = plain_name(tensor)
            if plain not in found and plain.endswith(MAY_BE_TIED):  # one of two names; _match sees what is needed
                continue
            if found.get(plain, (Path(),))[0].name != expected[tensor]:  # type: ignore[index]
                raise InputError(f"{tensor[:80]} is not in the shard that {INDEX_FILE} names. Download it again")
        return found

    def _match(self, config: dict[str, Any], without_bias: set[str]) -> list[Any]:
        """The places of our parameters, all of their tensors being there, of the right shape, and accounted for."""
        architecture, model, rest = self.architecture, self.model_config, set(self.files)
        if model["n_layer"] > len(rest):
            raise InputError(f"there are no weights for {counted(model['n_layer'], 'layer')}. Download the model again")
        # A model saved without its head, as the files of GPT-2 itself, has names without their first part.
        base = architecture.names["wte"][0].split(".")[0] + "."
        short = not any(name.startswith(base) for name in rest)
        self.prefix = base if short else ""
        embedding = self._stored(architecture.names["wte"][0] + ".weight")
        if model["tie_weights"] and embedding not in rest and "lm_head.weight" in rest:  # safetensors kept one name
            self.files[embedding] = self.files["lm_head.weight"]
            rest ^= {embedding, "lm_head.weight"}
        matched = []
        for place in places(architecture, model):
            layer_free = re.sub(r"^blocks\.\d+\.", "", place.ours)
            if layer_free.endswith(".bias") and layer_free.removesuffix(".bias") in without_bias:
                if any(self._stored(name) in rest for name, _ in place.parts):
                    raise InputError(f"{place.parts[0][0]} is there, but config.json says no bias. Correct config.json")
                continue  # zero
            for name, shape in place.parts:
                stored = self._stored(name)
                if stored not in rest:
                    raise InputError(f"the tensor {stored} is missing. Download the model again")
                if self.files[stored][1] != shape:
                    has = list(self.files[stored][1])
                    raise InputError(f"{stored} has the shape {has}, config.json says {list(shape)}. Correct it")
                rest.discard(stored)
            matched.append(place)
        if model["tie_weights"] and "lm_head.weight" in rest:
            self._check_tied(embedding)
            rest.discard("lm_head.weight")
        if config.get("hidden_act", "xielu") == "xielu" and architecture.model_type == "apertus":
            rest -= self._check_xielu()
        strange = sorted(name for name in rest if not NOT_WEIGHTS.fullmatch(name))
        if strange:
            raise InputError(f"the tensor {strange[0][:80]} has no place in {architecture.name}. Give a plain model")
        return matched

    def _stored(self, name: str) -> str:
        return name.removeprefix(self.prefix) if self.prefix else name

    def _check_tied(self, embedding: str) -> None:
        read = self._reader()
        if not torch.equal(read("lm_head.weight"), read(embedding)):
            raise InputError("tie_word_embeddings is true, but lm_head.weight is another matrix. Correct config.json")

    def _check_xielu(self) -> set[str]:
        """The names of xIELU's parameters. Raises InputError unless they make it relu2."""
        read, names = self._reader(), set()
        for layer in range(self.model_config["n_layer"]):
            values = {}
            for key in XIELU:
                name = f"model.layers.{layer}.mlp.act_fn.{key}"
                if name not in self.files or self.files[name][1] not in ((), (1,)):
                    raise InputError(f"the tensor {name} is missing or no number. Download the model again")
                values[key] = read(name).float().reshape(())
                names.add(name)
            rise, fall = F.softplus(values["alpha_p"]), F.softplus(values["alpha_n"]) + values["beta"]
            if not (abs(rise - 1) < 4e-3 and abs(fall) < 1e-6 and values["beta"] == 0):  # 4e-3: bfloat16; NaN is wrong
                raise InputError("its xIELU is not relu2, and nib does no other. Give a model without it")
        return names

    def _reader(self) -> Any:
        files: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            path = self.files[name][0]
            if path not in files:
                files[path] = safe_open(path, "pt")
            return files[path].get_tensor(self.files[name][2])

        return read

    def weights(self) -> dict[str, Tensor]:
        """Our parameters, in the dtype of the file. Raises InputError for a file that has changed under way."""
        read, weights = self._reader(), {}
        for place in self.places:
            try:
                parts = [read(self._stored(name)) for name, _ in place.parts]
            except (SafetensorError, OSError) as error:
                raise InputError(f"cannot read {self.directory}: {str(error)[:120]}. Download it again") from None
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            weights[place.ours] = whole.T.contiguous() if place.transposed else whole
        for place in places(self.architecture, self.model_config):
            if place.ours not in weights:
                weights[place.ours] = torch.zeros(place.shape)
        return weights

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.directory)
