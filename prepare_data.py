"""Turn text into token shards that train.py reads: `python prepare_data.py SOURCE...`"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nib.common.exits import InputError, memory_errors, run_script
from nib.common.options import option, parse

USAGE = "python prepare_data.py SOURCE... [--option=value]..."
ABOUT = """Tokenizes text into data/NAME for train.py. A SOURCE is a file (text, JSON, Parquet), a directory, - for
standard input, an http(s) URL, or one of stdlib, stdlib_char, questions (chats), shakespeare, shakespeare_char,
openwebtext, fineweb-edu.
Each text file, JSONL line, element of a JSON array or Parquet row is a document. Chat messages become plain text.
With --format=chat each row (messages, prompt and completion, or ShareGPT's conversations) becomes a conversation with
a loss mask; with --format=preference each row of chosen and rejected becomes a pair. From a directory with nanoGPT's
train.bin and val.bin the tokens are copied."""
FORMATS = ("auto", "text", "jsonl", "parquet", "json", "chat", "preference")


@dataclass
class Settings:
    out: str = option("", "the data directory to make; by default data/NAME, named after the source")
    tokenizer: str = option(
        "auto", "auto (gpt2, or the built-in corpus's own), byte, char, bpe:N, NAME, FILE or HF_DIR"
    )
    format: str = option("auto", "the format of the files; auto: by the file name's extension", choices=FORMATS)
    train_on: str = option("assistant", "which tokens of a chat are learned", choices=("assistant", "all"))
    chat_template: str = option("", "a file with the jinja template for chats; empty: the tokenizer's own")
    show: int = option(0, "print the first so many rows of chats, with the learned tokens in colour", at_least=0)
    field: str = option("text", "the JSONL field or Parquet column that holds the text")
    glob: str = option("", "which files of a directory to read, '*.py' or 'docs/**/*.md'; empty: all but hidden ones")
    val_fraction: float = option(0.01, "share of the documents that is kept for validation", at_least=0, below=1)
    workers: int = option(0, "processes; 0: one per core. The result does not depend on it", at_least=0, at_most=1024)
    shard_tokens: int = option(100_000_000, "tokens per shard file", at_least=1)
    seed: int = option(1337, "decides which documents are kept for validation", at_least=0)
    invalid: str = option(
        "error",
        "what to do with invalid UTF-8; skip: leave the document out, and also rows without text",
        choices=("error", "replace", "skip"),
    )
    overwrite: bool = option(False, "replace the dataset in the data directory, once the new one is complete")


def main() -> None:
    parsed = parse(Settings, sys.argv[1:], usage=USAGE, about=ABOUT)
    if not all(parsed.arguments or [""]):
        raise InputError("no SOURCE, or an empty one. Give a file, a directory, - or stdlib; see --help")

    chat_only = sorted({"train_on", "chat_template", "show"} & parsed.given)
    if chat_only and parsed.settings.format not in ("chat", "preference"):
        raise InputError(f"--{chat_only[0].replace('_', '-')} is for chats. Give --format=chat too")

    from nib.data.chat import read_template
    from nib.data.paths import find_dataset
    from nib.data.prepare import BUILTIN_DATASETS, dataset_name, prepare

    sources, settings = parsed.arguments, asdict(parsed.settings)
    out = Path(settings.pop("out") or Path("data") / dataset_name(sources))
    builtin = dict(BUILTIN_DATASETS.get(sources[0], {})) if len(sources) == 1 else {}
    if builtin:
        sources = [builtin.pop("source")]
    for name in ("tokenizer", "val_fraction", "format"):
        if name not in parsed.given or settings[name] == "auto":
            settings[name] = builtin.get(name, "gpt2" if name == "tokenizer" else settings[name])
    if settings["chat_template"]:
        settings["chat_template"] = read_template(Path(settings["chat_template"]))
    with memory_errors("Lower --workers, or give smaller files"):
        prepare(sources, out, **settings)
    name = out.name if find_dataset(out.name) == out else str(out)
    print(f"train on it: python train.py {shlex.quote(f'--dataset={name}')}")


if __name__ == "__main__":
    run_script(main)
