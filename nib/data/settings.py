"""The options of prepare_data.py. Imports nothing heavy, so that `--help` answers at once."""

from __future__ import annotations

from dataclasses import dataclass

from nib.common.options import option

ROWS = ("chat", "preference")  # formats with a loss mask
FORMATS = ("auto", "text", "jsonl", "parquet", "json", *ROWS)


@dataclass
class PrepareSettings:
    out: str = option("", "the data directory to make; by default data/NAME, named after the source")
    tokenizer: str = option(
        "auto",
        "auto (gpt2, or the built-in corpus's own), byte, char, bpe:N, a tiktoken encoding, "
        "a dataset or run, a Hugging Face directory, or a nib_tokenizer.json",
    )
    format: str = option("auto", "the format of the files; auto: by the file name's extension", choices=FORMATS)
    train_on: str = option("assistant", "which tokens of a chat are learned", choices=("assistant", "all"))
    chat_template: str = option("", "a file with the jinja template for chats; empty: the tokenizer's own")
    show: int = option(0, "print this many of the first rows of chats, with the learned tokens in colour", at_least=0)
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

    @property
    def kind(self) -> str:
        """The format if its rows have a loss mask, else ""."""
        return self.format if self.format in ROWS else ""
