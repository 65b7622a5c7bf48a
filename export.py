"""Write a model for other tools: a Hugging Face directory, a GGUF file for llama.cpp, or an adapter for peft.

python export.py small exported/small            for transformers and vLLM
python export.py out/small small-gguf --format gguf
python export.py out/tuned tuned-peft --format peft      the adapter of a LoRA run; --merge writes the merged model
"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nib.common.exits import InputError, memory_errors, run_script
from nib.common.options import ADAPTER, DTYPES, option, parse

if TYPE_CHECKING:
    from nib.formats.load import Source

USAGE = "python export.py RUN|CHECKPOINT|HF_DIR OUT_DIR [--option=value]..."
ABOUT = """Writes the model into the new directory OUT_DIR, with its tokenizer and a model card. The model's options
decide the architecture: GPT-2, Llama, Mistral, Qwen3, Arcee or Starcoder2."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass
class Settings:
    dtype: str = option("auto", "of the weights; auto: as stored", choices=DTYPES)
    max_shard_size: str = option("5GB", "largest weights file, in bytes, KB, MB or GB; larger models are split")
    format: str = option(
        "hf",
        "hf: a Hugging Face directory; gguf: one file for llama.cpp; peft: the adapter alone",
        choices=("hf", "gguf", "peft"),
    )
    adapter: str = option("", f"{ADAPTER}; with --merge or --format=peft")
    merge: bool = option(False, "add the adapter of a run with lora_rank to its base, in float32, then cast to dtype")


def main() -> None:
    parsed = parse(Settings, sys.argv[1:], usage=USAGE, about=ABOUT, max_arguments=2)
    if len(parsed.arguments) != 2:
        raise InputError("export.py takes a model and a new directory. See --help")
    settings, out = parsed.settings, Path(parsed.arguments[1])
    shard_bytes = parse_size(settings.max_shard_size)
    if out.exists():
        raise InputError(f"{out} exists. Give a new directory")
    if str(out) != str(out).encode("utf-8", "ignore").decode("utf-8"):  # safetensors would refuse it later
        raise InputError(f"{out} is not UTF-8. Give another directory")

    from model import GPT, GPTConfig
    from nib.cpu.fused_blocks import computes_otherwise
    from nib.formats.export import export, export_adapter
    from nib.formats.load import open_source, read_config, read_weights

    with memory_errors("Lower --max-shard-size, or use a machine with more memory"):
        source = open_source(parsed.arguments[0], settings.adapter)
        config = read_config(source, GPTConfig)
        check_adapter(source, settings)
        weights = read_weights(source, lambda: GPT(config))
        if settings.format == "peft":
            check_same_rotation(config, read_config(source.base, GPTConfig))  # type: ignore[union-attr]
            name = export_adapter(source, weights, out, settings.dtype)  # type: ignore[arg-type]
        else:
            if computes_otherwise(GPT, config):
                how = "Change them too, or export a model that was trained with nib's model.py"
                print(f"warning: model.py computes something else than other programs will. {how}", file=sys.stderr)
            name = export(source, config, weights, out, settings.dtype, shard_bytes, settings.format)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{source.directory} is in {out} as {name}, {size / 1e6:.1f} MB")


def check_adapter(source: Source, settings: Settings) -> None:
    """Raise InputError if the options do not fit the source: an adapter, or a whole model."""
    from nib.formats.adapter import AdaptedModel

    adapted = isinstance(source, AdaptedModel)
    if settings.merge and settings.format == "peft":
        raise InputError("--merge makes a whole model, --format=peft an adapter alone. Leave one out")
    if not adapted and (settings.merge or settings.format == "peft"):
        raise InputError(f"{source.directory} has no adapter: it was not trained with lora_rank. Leave out the option")
    if adapted and not settings.merge and settings.format != "peft":
        raise InputError(f"{source.directory} is an adapter. Add --merge for a whole model, or --format=peft")


def check_same_rotation(config: Any, base: Any) -> None:
    """Raise InputError if the run lengthened its base's context: peft's files cannot store rotary settings."""
    for name, value in vars(base).items():
        if name.startswith("rope_") and value != getattr(config, name):
            raise InputError(f"{name} differs from the base's, which peft's files cannot store. Use --merge")


def parse_size(text: str) -> int:
    """A number of bytes such as 500MB. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B|)", text.upper())
    if not found or not 1 <= float(found[1]) * UNITS[found[2]] < 2**60:
        raise InputError(f"--max-shard-size is {text!r}, not a size. Write 500MB or 5GB")
    return int(float(found[1]) * UNITS[found[2]])


if __name__ == "__main__":
    run_script(main)
