"""Make text into token shards that train.py reads: `python prepare_data.py SOURCE...`"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nib.common.exits import InputError, run_script
from nib.common.options import option, parse

USAGE = "python prepare_data.py SOURCE... [--option=value]..."
ABOUT = """Tokenizes text into data/NAME for train.py. A SOURCE is a file (text, JSON, Parquet), a directory, - for
standard input, an http(s) URL, or one of stdlib, stdlib_char, questions (chats), shakespeare, shakespeare_char,
openwebtext, fineweb-edu.
Each text file, JSONL line, element of a JSON array or Parquet row is a document; a column of chat messages becomes
plain text, unless --format=chat makes conversations of rows of messages, of prompt and completion or of conversations
(ShareGPT), with a mask of what is learned; --format=preference makes pairs of chosen and rejected. A directory of
nanoGPT's train.bin and val.bin is taken over."""
FORMATS = ("auto", "text", "jsonl", "parquet", "json", "chat", "preference")


@dataclass
class Settings:
    out: str = option("", "the data directory to make; by default data/NAME, after the source")
    tokenizer: str = option(
        "auto", "auto (gpt2, or the built-in corpus's own), byte, char, bpe:N, NAME, FILE or HF_DIR"
    )
    format: str = option("auto", "what files hold; auto: by the ending", choices=FORMATS)
    train_on: str = option("assistant", "what is learned of a chat", choices=("assistant", "all"))
    chat_template: str = option("", "a file of jinja that renders chats; empty: the tokenizer's own")
    show: int = option(0, "print the first rows of chats, with what is learned in colour", at_least=0)
    field: str = option("text", "the JSONL field or Parquet column that holds the text")
    glob: str = option("", "which files of a directory to read, '*.py' or 'docs/**/*.md'; empty: all but hidden ones")
    val_fraction: float = option(0.01, "share of the documents that is kept for validation", at_least=0, below=1)
    workers: int = option(0, "processes; 0 is one a core. The result does not depend on it", at_least=0, at_most=1024)
    shard_tokens: int = option(100_000_000, "tokens a shard file", at_least=1)
    seed: int = option(1337, "decides which documents are kept for validation", at_least=0)
    invalid: str = option(
        "error",
        "about invalid UTF-8; skip: leave the document out, and rows without a text",
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

    from nib.common.memory import memory_errors
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
