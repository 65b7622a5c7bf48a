"""Turn text into token shards that train.py reads: `python prepare_data.py SOURCE...`"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import shlex
import sys
from pathlib import Path

from nib.common.exits import InputError, memory_errors, run_script
from nib.common.options import parse
from nib.data.settings import PrepareSettings

USAGE = "python prepare_data.py SOURCE... [--option=value]..."
ABOUT = """Tokenizes text into data/NAME for train.py. A SOURCE is a file (text, JSON, Parquet), a directory, - for
standard input, an http(s) URL, or one of stdlib, stdlib_char, questions (chats), shakespeare, shakespeare_char,
openwebtext, fineweb-edu.
Each text file, JSONL line, element of a JSON array or Parquet row is a document. Chat messages become plain text.
With --format=chat each row (messages, prompt and completion, or ShareGPT's conversations) becomes a conversation with
a loss mask; with --format=preference each row of chosen and rejected becomes a pair. From a directory with nanoGPT's
train.bin and val.bin the tokens are copied."""


def main() -> None:
    parsed = parse(PrepareSettings, sys.argv[1:], usage=USAGE, about=ABOUT)
    if not all(parsed.arguments or [""]):
        raise InputError("no SOURCE, or an empty one. Give a file, a directory, - or stdlib; see --help")

    from nib.data.paths import find_dataset
    from nib.data.prepare import BUILTIN_DATASETS, dataset_name, prepare

    sources, settings = parsed.arguments, parsed.settings
    out = Path(settings.out or Path("data") / dataset_name(sources))
    defaults = {"tokenizer": "gpt2"} | (BUILTIN_DATASETS.get(sources[0], {}) if len(sources) == 1 else {})
    sources = [defaults.pop("source")] if "source" in defaults else sources
    for name, value in defaults.items():
        if name not in parsed.given or getattr(settings, name) == "auto":
            setattr(settings, name, value)
    chat_only = sorted({"train_on", "chat_template", "show"} & parsed.given)
    if chat_only and not settings.kind:
        raise InputError(f"--{chat_only[0].replace('_', '-')} is for chats. Give --format=chat too")
    if settings.kind == "preference" and settings.train_on == "all":
        raise InputError("--train-on=all is for chats: of preferences only the answers are learned. Leave it out")
    with memory_errors("Lower --workers, or give smaller files"):
        prepare(sources, out, settings)
    name = out.name if find_dataset(out.name) == out else str(out)
    print(f"train on it: python train.py {shlex.quote(f'--dataset={name}')}")


if __name__ == "__main__":
    run_script(main)
