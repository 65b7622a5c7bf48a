"""How well models predict texts: loss, perplexity and bits per byte, side by side; and multiple-choice questions.

python evaluate.py small                                     on the validation split of its dataset
python evaluate.py small gpt2 --data notes.txt --data stdlib
python evaluate.py out/small --data questions.jsonl --json
python evaluate.py small --data notes.txt --tokens           each token with its surprise
"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nib.common.exits import InputError, memory_errors, run_script
from nib.common.options import ADAPTER, DEVICES, DTYPES, option, parse
from nib.common.streams import write_result
from nib.cpu.threads import choose_threads

if TYPE_CHECKING:
    from nib.formats.load import Source

USAGE = "python evaluate.py [RUN|CHECKPOINT|HF_DIR]... [--data NAME|FILE...]... [--tokens] [--option=value]..."
ABOUT = """Scores models on whole texts: each text separately, each of its tokens once. --data is a prepared dataset,
whose validation split is used, or a file of text, JSONL or Parquet. JSONL with {"context", "endings", "label"} is a
multiple-choice task."""
TEXT_COLUMNS = "model data texts tokens loss perplexity bits_per_byte context stride".split()
CHOICE_COLUMNS = "model data questions accuracy stderr accuracy_norm stderr_norm".split()


@dataclass
class Settings:
    data: list[str] = option([], "datasets, files or tasks; may be given several times. None: the dataset of the run")
    context: int = option(0, "tokens in a window; 0: all that the model takes", at_least=0)
    stride: int = option(0, "tokens from one window to the next, up to context; 0: half of it", at_least=0)
    max_tokens: int = option(0, "stop after this many tokens of each dataset or file; 0: never", at_least=0)
    batch_size: int = option(8, "windows at once", at_least=1)
    adapter: str = option("", ADAPTER)
    field: str = option("text", "the JSONL field or Parquet column that holds the text")
    tokens: bool = option(False, "also print each token of the texts with its surprise in nats: -ln(its probability)")
    json: bool = option(False, "print one JSON object per line instead of tables")
    device: str = option("auto", DEVICES)
    dtype: str = option("auto", "of the weights; auto takes 16 bits on a GPU", choices=DTYPES)


def main() -> None:
    parsed = parse(Settings, sys.argv[1:], usage=USAGE, about=ABOUT)
    write_result("", end="")  # fail now if standard output is closed
    settings = parsed.settings
    if settings.context and settings.stride > settings.context:
        raise InputError(f"--stride {settings.stride} is above --context {settings.context}. Lower it")

    choose_threads()
    from nib.formats.load import open_source

    models = parsed.arguments
    if settings.data:  # which takes several values, as of a shell's *.txt
        models = [name for name in models if not is_data(name)]
        settings.data += [name for name in parsed.arguments if name not in models]
    results = []
    with memory_errors("Lower --batch-size or --context, or use a smaller model"):
        for target in models or [""]:
            source = open_source(target or None, adapter=settings.adapter)
            results += evaluate(source, target or str(source.directory), settings)
    if settings.json:
        for result in results:
            write_result(json.dumps(result))
        return
    for columns in (TEXT_COLUMNS, CHOICE_COLUMNS):
        if rows := [result for result in results if columns[4] in result]:
            write_result(table(rows, columns))


def is_data(name: str) -> bool:
    """Whether a name without an option before it is a dataset or a text file, not a model."""
    from nib.data.paths import find_dataset
    from nib.data.shards import dataset_files
    from nib.formats.load import existing

    if (path := existing(name)) is None:
        return find_dataset(name).exists()
    return (path.is_file() and path.suffix != ".pt") or bool(dataset_files(path))


def evaluate(source: Source, name: str, settings: Settings) -> list[dict[str, Any]]:
    """One result for each --data. Raises InputError."""
    from model import GPT, GPTConfig
    from nib.common.device import cast, pick_device, pick_dtype
    from nib.data.mixture import read_names
    from nib.data.open import open_dataset
    from nib.data.paths import find_dataset
    from nib.formats.load import build, read_config
    from nib.generation import scoring

    own = getattr(source, "state", {}).get("settings", {}).get("dataset")
    wanted = settings.data or ([*read_names(str(own))] if own else [])
    if not wanted:
        raise InputError(f"{name} does not say what it was trained on. Give --data")
    device, tokenizer = pick_device(settings.device), source.tokenizer()
    config = read_config(source, GPTConfig)
    context = min(settings.context or config.block_size, config.block_size)
    stride = min(settings.stride or max(1, context // 2), context)
    files = {data for data in wanted if Path(data).is_file()}
    # A name with an extension or a slash is the file, even if a dataset is called so too.
    as_path = {data for data in settings.data if "/" in data or Path(data).suffix}
    prepared = [data for data in wanted if data not in files & as_path]
    prepared = [data for data in prepared if data not in files or (find_dataset(data) / "meta.json").exists()]
    datasets = {data: open_dataset(data) for data in prepared}
    tasks = [(data, None if data in datasets else scoring.read_choices(Path(data))) for data in wanted]
    choices = [data for data, questions in tasks if questions is not None]
    if choices and settings.tokens:
        raise InputError(f"{choices[0]} holds questions, and --tokens is for texts. Leave out --tokens")
    model = build(source, lambda: GPT(config)).to(device).eval()
    for part, parameter in model.named_parameters():
        parameter.data = cast(parameter.data, pick_dtype(settings.dtype, device), part)
    results: list[dict[str, Any]] = []

    def show(id: int, surprise: float) -> None:
        text = tokenizer.token_text(id)
        if settings.json:
            write_result(json.dumps({"model": name, "id": id, "text": text, "surprise": surprise}))
        else:
            write_result(f"{surprise:8.4f}  {text!r}")

    for data, questions in tasks:
        if questions is not None:
            found = scoring.score_choices(model, tokenizer, questions, settings.batch_size)
            results.append({"model": name, "data": data, **found})
            continue
        options: dict[str, Any] = dict(
            context=context, batch=settings.batch_size, max_tokens=settings.max_tokens,
            each=show if settings.tokens else None,
        )  # fmt: skip
        dataset = datasets.get(data)
        if dataset and dataset.chat:
            score = scoring.score_conversations(model, tokenizer, dataset, **options)
        elif dataset:
            texts = scoring.texts_of_dataset(dataset, tokenizer)
            score = scoring.score_texts(model, tokenizer, texts, stride=stride, **options)
        else:
            texts = scoring.texts_of_file(Path(data), settings.field, tokenizer)
            score = scoring.score_texts(model, tokenizer, texts, stride=stride, **options)
        if not score.tokens:
            raise InputError(f"there is no text in {data}. Give a source that has some")
        results.append({
            "model": name, "data": data, "texts": score.texts, "tokens": score.tokens, "bytes": score.bytes,
            "loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte,
            "context": context, "stride": 0 if dataset and dataset.chat else stride,
        })  # fmt: skip
    return results


def table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as aligned columns: texts left-aligned, numbers right-aligned."""
    cells = [list(columns)]
    for row in rows:
        values = [row[column] for column in columns]
        cells.append([f"{value:.4f}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    sides = ["<" if isinstance(rows[0][column], str) else ">" for column in columns]
    lines = ([f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)] for line in cells)
    return "\n".join("  ".join(line).rstrip() for line in lines)


if __name__ == "__main__":
    run_script(main)
