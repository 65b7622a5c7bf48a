"""Read a Hugging Face model directory: config.json, safetensors in one file or in shards, and the tokenizer.

No code in it is run, no path that a file names is followed, and every shape is compared with config.json before
memory is allocated for it. The package transformers is not needed.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nib.common.exits import InputError
from nib.common.wording import counted
from nib.formats.architectures import read_config_json
from nib.formats.places import NOT_WEIGHTS, ImportedModel, Stored, plain_name
from nib.tokenizer.huggingface import read_settings, read_tokenizer
from nib.tokenizer.tokenizer import Tokenizer

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")
MAY_BE_TIED = ("lm_head.weight", "embed_tokens.weight", "wte.weight")  # of tied weights, only one name may be stored


def find_config(path: Path) -> dict[str, Any]:
    """The config.json of a transformers model; {} if there is none, or if it belongs to something else, as in a run."""
    try:
        config = read_settings(path / CONFIG_FILE, optional=True)
    except InputError:
        return {}
    return config if "architectures" in config or "model_type" in config else {}


class HuggingFaceModel(ImportedModel):
    """A directory of one of the architectures in architectures.py; `config` is its config.json. Raises InputError."""

    def __init__(self, directory: Path, config: dict[str, Any] | None = None) -> None:
        self.directory = directory
        self.config = config or read_settings(directory / CONFIG_FILE)
        try:
            self.architecture, self.model_config, self.without_bias = read_config_json(self.config)
            self.tensors = self._find_tensors()
            if (layers := self.model_config["n_layer"]) > len(self.tensors):  # before so many layers are built
                raise InputError(f"there are no weights for {counted(layers, 'layer')}. Download the model again")
        except InputError as error:
            raise InputError(f"{directory}: {error}") from None

    def _find_tensors(self) -> dict[str, Stored]:
        """All tensors in the files, by plain name."""
        expected: dict[str, Any] | None = None
        if (self.directory / WEIGHTS_FILE).is_file():
            names = [WEIGHTS_FILE]
        elif (self.directory / INDEX_FILE).is_file():
            expected = read_settings(self.directory / INDEX_FILE).get("weight_map")
            if not isinstance(expected, dict) or not expected:
                raise InputError(f"{INDEX_FILE} has no weight_map. Give a complete model directory")
            names = sorted(set(map(str, expected.values())))
            for name in names:
                if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
                    raise InputError(f"{INDEX_FILE} names {name[:80]!r}, not a file beside it. Give a complete model")
        else:
            pickled = next((f"{path.name} is pickled and " for path in self.directory.glob("*.bin")), "")
            raise InputError(f"{pickled}there is no {WEIGHTS_FILE}. Give a model that is saved as safetensors")
        found: dict[str, Stored] = {}
        places: dict[str, str] = {}
        for name in names:
            path = self.directory / name
            if not path.is_file():
                raise InputError(f"the shard {name} is missing. Download the model again")
            try:
                file = safe_open(path, "pt")
                for tensor in file.keys():  # noqa: SIM118  not a dict
                    part = file.get_slice(tensor)
                    if part.get_dtype() not in DTYPES and not NOT_WEIGHTS.fullmatch(tensor):
                        kinds = "F32, BF16 or F16"
                        raise InputError(f"{tensor} is of type {part.get_dtype()}, not {kinds}. Give a plain model")
                    if (plain := plain_name(tensor)) in found:
                        raise InputError(f"{plain} is stored twice. Give a complete model directory")
                    found[plain] = Stored(tuple(part.get_shape()), functools.partial(file.get_tensor, tensor))
                    places[plain] = name
            except (SafetensorError, OSError, ValueError) as error:
                raise InputError(f"cannot read {name}: {str(error)[:120]}. Download the model again") from None
        for tensor in expected or ():
            plain = plain_name(tensor)
            if plain not in found and plain.endswith(MAY_BE_TIED):  # `match` checks whether it is needed
                continue
            if places.get(plain) != expected[tensor]:  # type: ignore[index]
                raise InputError(f"{tensor[:80]} is not in the shard that {INDEX_FILE} names. Download it again")
        # A model that was saved inside another module, as model.model.layers...: a common prefix is removed.
        inner = (self.architecture.names["wte"][0] + ".weight", "lm_head.weight")
        outer = {name.removesuffix(end) for name in found for end in inner if name.endswith("." + end)}
        prefix = outer.pop() if len(outer) == 1 else ""
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): stored for name, stored in found.items()}
        # A model saved without its head, such as OpenAI's GPT-2, has names without their first part.
        base = self.architecture.names["wte"][0].split(".")[0] + "."
        if any(name.startswith(base) for name in found):
            return found
        return {name if name.startswith("lm_head.") else base + name: stored for name, stored in found.items()}

    def tokenizer(self) -> Tokenizer:
        return read_tokenizer(self.directory, self.config)
