"""Training on several datasets at once, each with its share of the sequences: --dataset=a:0.7,b:0.3."""

from __future__ import annotations

import hashlib
import math
from fractions import Fraction

from nib.common.exits import InputError
from nib.common.wording import typed
from nib.data.dataset import Dataset
from nib.data.paths import find_dataset


def read_names(text: str) -> dict[str, Fraction]:
    """The datasets that the setting `dataset` names, with their shares, which add up to 1. Raises InputError.

    The name of a single existing dataset may contain a colon or a comma.
    """
    if not set(":,") & set(text) or find_dataset(text).exists():
        return {text: Fraction(1)}
    how = "Write each as NAME:WEIGHT, as in a:0.7,b:0.3"
    weights: dict[str, Fraction] = {}
    for part in text.split(","):
        name, _, written = part.strip().rpartition(":")
        try:
            weight = float(written)
        except ValueError:
            weight = math.nan
        if not name or not 0 <= weight < math.inf:
            raise InputError(f"dataset {text!r}: {part.strip()!r} is not a name with a weight. {how}")
        if name in weights:
            raise InputError(f"dataset {text!r} names {name} twice. Add its weights up")
        weights[name] = Fraction(str(weight))  # exactly 0.7, not the nearest float
    if not all(weights.values()):
        name = next(name for name, weight in weights.items() if not weight)
        raise InputError(f"dataset {text!r}: the weight of {name} is 0. Give it one above 0, or leave it out")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


class Mixture:
    """Datasets of one tokenizer, with their shares of the training sequences."""

    def __init__(self, parts: dict[str, Dataset], shares: list[Fraction]) -> None:
        """Raises InputError for datasets of different tokenizers, or conversations of different templates."""
        self.parts, self.shares = list(parts.values()), shares
        for name, part in parts.items():
            part.name = name
        first = next((part for part in self.parts if part.chat), self.parts[0])  # the model gets its chat template
        self.directory = ", ".join(str(part.directory) for part in self.parts)  # for messages
        self.tokenizer, self.vocab_size = first.tokenizer, first.vocab_size
        self.kind = "preference" if any(part.kind == "preference" for part in self.parts) else first.kind
        for part in self.parts:
            one, other = (
                (each.token_bytes, each.end_of_text, each.special_tokens) for each in (self.tokenizer, part.tokenizer)
            )
            if one != other:
                old, new = sorted((part, first), key=lambda each: each.vocab_size)
                how = f"Prepare {old.directory} again with --tokenizer={typed(new.directory)}"
                raise InputError(f"{part.directory} has another tokenizer than {first.directory}. {how}")
            if part.chat and part.tokenizer.chat_template != self.tokenizer.chat_template:
                what = f"{part.directory} has another chat template than {first.directory}"
                raise InputError(f"{what}. Prepare one of them again with --chat-template=FILE")
            part.tokenizer = self.tokenizer

    def fingerprint(self) -> str:
        """A hash that identifies the corpora; their shares are in the settings."""
        return hashlib.sha256(" ".join(part.fingerprint() for part in self.parts).encode()).hexdigest()
