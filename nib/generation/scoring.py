"""Score texts (log-likelihood under a model) and multiple-choice questions."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nib.common.exits import InputError
from nib.data.dataset import Dataset
from nib.data.documents import find_sources, read_parts
from nib.data.encode import part_text
from nib.data.sequences import ValidationConversations
from nib.tokenizer.huggingface import begin_of_text
from nib.tokenizer.tokenizer import Tokenizer

MAX_LOGITS = 1 << 24  # elements at a time: 64 MB in float32


@dataclass
class TextScore:
    """The sums over some texts. `loss` is in nats per predicted token."""

    texts: int = 0
    tokens: int = 0
    bytes: int = 0  # of the text that was predicted
    nats: float = 0.0

    @property
    def loss(self) -> float:
        return self.nats / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(1, self.bytes)

    def count(self, ids: list[int], log_probs: list[float], each: Callable[[int, float], None] | None) -> None:
        """Add the surprise of predicted ids to the sum, and call `each` with every one of them and its surprise."""
        self.nats -= math.fsum(log_probs)
        for id, log_prob in zip(ids, log_probs, strict=True):
            if each:
                each(id, -log_prob)


@dataclass
class Window:
    """At most context + 1 consecutive ids; those from index `first` on are predicted from all before them."""

    ids: list[int]
    first: int


def windows(ids: list[int], context: int, stride: int) -> Iterator[Window]:
    """Windows that predict each id except the first once, from at least context - stride ids if there are so many."""
    done = 1
    for begin in range(0, max(0, len(ids) - 1), stride):
        end = min(begin + context + 1, len(ids))
        yield Window(ids[begin:end], done - begin)
        done = end
        if end == len(ids):
            return


def token_log_probs(model: Any, group: list[Window]) -> list[list[float]]:
    """The log-probability in nats of each predicted id of each window."""
    width = max(2, *(len(window.ids) for window in group)) - 1  # at least 1, also for windows of a single id
    inputs, targets = torch.zeros(len(group), width, dtype=torch.int64), torch.full((len(group), width), -1)
    for number, window in enumerate(group):
        size = len(window.ids) - 1
        inputs[number, :size] = torch.tensor(window.ids[:-1])
        targets[number, window.first - 1 : size] = torch.tensor(window.ids[window.first :])
    return target_log_probs(model, inputs, targets)


@torch.inference_mode()
def target_log_probs(model: Any, inputs: Tensor, targets: Tensor) -> list[list[float]]:
    """The log-probability in nats of each target of each row that is not -1, in their order."""
    device = next(model.parameters()).device
    x = model.hidden(inputs.to(device))  # (B, T, C)
    rows, columns = (targets >= 0).nonzero(as_tuple=True)
    found: list[list[float]] = [[] for _ in inputs]
    step = max(1, MAX_LOGITS // model.config.vocab_size)
    for begin in range(0, len(rows), step):
        row, column = rows[begin : begin + step], columns[begin : begin + step]
        log_probs = F.log_softmax(model.logits(x[row.to(device), column.to(device)]).float(), dim=-1)  # (step, V)
        values = log_probs.gather(1, targets[row, column].to(device)[:, None])[:, 0]
        for number, value in zip(row.tolist(), values.tolist(), strict=True):
            found[number].append(value)
    return found


def in_groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def score_texts(
    model: Any, tokenizer: Tokenizer, texts: Iterable[list[int]], *, context: int, stride: int, batch: int,
    max_tokens: int = 0, each: Callable[[int, float], None] | None = None,
) -> TextScore:  # fmt: skip
    """Score texts (ids without end-of-text), each separately, up to `max_tokens` tokens in total (0: no limit).

    The first id is predicted from the begin-of-text id, mostly end-of-text. If the tokenizer or model has none, the
    first id and its bytes do not count. `each` is called with every predicted id and its surprise, in order.
    """
    score, lengths, known = TextScore(), tokenizer.byte_lengths(), model.config.vocab_size
    begin, is_added = begin_of_text(tokenizer)
    start = [] if begin is None or (begin >= known and not is_added) else [begin]

    def all_windows() -> Iterator[Window]:
        for ids in texts:
            room = max_tokens - score.tokens if max_tokens else len(ids)
            if room <= 0:
                return
            kept = ids[:room]
            tokenizer.check_ids(start + kept, known, "a text", start)
            predicted = kept if start else kept[1:]
            score.texts += 1
            score.tokens += len(predicted)
            score.bytes += int(lengths[predicted].sum())
            yield from windows(start + kept, context, stride)

    for group in in_groups(all_windows(), batch):
        for window, log_probs in zip(group, token_log_probs(model, group), strict=True):
            score.count(window.ids[window.first :], log_probs, each)
    return score


def score_conversations(
    model: Any, tokenizer: Tokenizer, dataset: Dataset, *, context: int, batch: int, max_tokens: int = 0,
    each: Callable[[int, float], None] | None = None,
) -> TextScore:  # fmt: skip
    """Score the learned tokens of the validation split's conversations, as `score_texts` scores texts.

    Each conversation is truncated to `context`, as in training. Raises InputError for a dataset of another tokenizer.
    """
    if (dataset.tokenizer.token_bytes, dataset.tokenizer.special_tokens) != (
        tokenizer.token_bytes, tokenizer.special_tokens
    ):  # fmt: skip
        what = f"the conversations of {dataset.directory} were prepared with another tokenizer than the model's"
        raise InputError(f"{what}. Prepare them with --tokenizer=RUN or HF_DIR, the model")
    score, lengths = TextScore(), tokenizer.byte_lengths()
    sequences = ValidationConversations(dataset.val, context, max_tokens)
    for first in range(0, sequences.size, batch):
        inputs, targets = sequences.batch(first, batch)
        for right, log_probs in zip(targets.tolist(), target_log_probs(model, inputs, targets), strict=True):
            learned = [id for id in right if id >= 0]
            score.texts += 1
            score.tokens += len(learned)
            score.bytes += int(lengths[learned].sum())
            score.count(learned, log_probs, each)
    return score


def texts_of_dataset(dataset: Dataset, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The documents of the validation split, in the ids of `tokenizer`."""
    ids = dataset.val.read(0, dataset.val.tokens) if dataset.val.tokens else np.zeros(0, dtype=np.int64)
    same = dataset.tokenizer.token_bytes == tokenizer.token_bytes
    end = dataset.tokenizer.end_of_text
    ends = np.flatnonzero(ids == end) if end is not None else np.zeros(0, dtype=np.int64)
    for begin, stop in itertools.pairwise([-1, *ends.tolist(), len(ids)]):
        document = ids[begin + 1 : stop].tolist()
        if not same:
            document = tokenizer.encode(dataset.tokenizer.decode(document))
        if document:
            yield document


def texts_of_file(path: Path, field: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The documents of a text, JSONL or Parquet file or a directory. Raises InputError."""
    sources = find_sources([str(path)], "auto", "", path, spool=False)
    pieces: list[str] = []
    for part in read_parts(sources, field):
        text, _, fault = part_text(part, field, "skip")
        if fault:
            how = "Correct it, or prepare the text with prepare_data.py --invalid=skip and give that dataset"
            raise InputError(f"{fault}. {how}")
        pieces.append(text)
        if part.last:
            if ids := tokenizer.encode("".join(pieces)):
                yield ids
            pieces = []


def read_choices(path: Path) -> list[dict[str, Any]] | None:
    """The questions of a JSON file, {"context": ..., "endings": [...], "label": ...} in each row; None for other files.

    Raises InputError if the first row is a question and a later row is not.
    """
    sources = find_sources([str(path)], "auto", "", path, spool=False)
    if sources[0].format not in ("jsonl", "json"):
        return None
    questions: list[dict[str, Any]] = []
    for part in read_parts(sources, ""):
        try:
            row = json.loads(part.data.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if not questions and not (isinstance(row, dict) and "endings" in row):
            return None
        if (question := as_question(row)) is None:
            shape = '{"context": TEXT, "endings": [TEXT, ...], "label": NUMBER}'
            raise InputError(f"{part.where}: not {shape}. Mend it")
        if halves := re.findall("[\ud800-\udfff]", "".join([question["context"], *question["endings"]])):
            raise InputError(f"{part.where}: U+{ord(halves[0]):04X} is a lone surrogate. Correct it")
        questions.append(question)
    return questions or None


def as_question(row: Any) -> dict[str, Any] | None:
    if not isinstance(row, dict):
        return None
    context, endings, label = row.get("context", row.get("ctx")), row.get("endings"), row.get("label")
    if isinstance(label, str) and label.isdecimal() and len(label) < 10:  # int() fails on over 4300 digits
        label = int(label)
    if not isinstance(context, str) or not isinstance(endings, list) or type(label) is not int:
        return None
    texts = len(endings) > 1 and all(isinstance(each, str) and each for each in endings)
    return {"context": context, "endings": endings, "label": label} if texts and 0 <= label < len(endings) else None


def score_choices(model: Any, tokenizer: Tokenizer, questions: list[dict[str, Any]], batch: int) -> dict[str, float]:
    """How often the right ending of a question is the most probable one, with the standard error of that share.

    As it is, and as `accuracy_norm` with its log-probability per character, as HellaSwag is reported (arXiv 1905.07830)
    and lm-evaluation-harness does. An ending is joined to its context by a space.
    """

    def endings() -> Iterator[Window]:
        for question in questions:
            for ending in question["endings"]:
                window = ending_window(tokenizer, question["context"], ending, config.block_size, config.vocab_size)
                tokenizer.check_ids(window.ids, config.vocab_size, "a question")
                yield window

    config = model.config
    sums = iter(math.fsum(each) for group in in_groups(endings(), batch) for each in token_log_probs(model, group))
    plain, normalized = [], []
    for question in questions:
        values = [next(sums) for _ in question["endings"]]
        per_character = [value / len(ending) for value, ending in zip(values, question["endings"], strict=True)]
        plain.append(values.index(max(values)) == question["label"])
        normalized.append(per_character.index(max(per_character)) == question["label"])
    found: dict[str, float] = {"questions": len(questions)}
    for name, right in (("", plain), ("_norm", normalized)):
        share = sum(right) / len(right)
        error = math.sqrt(share * (1 - share) / max(1, len(right) - 1))
        found |= {f"accuracy{name}": share, f"stderr{name}": error}
    return found


def ending_window(tokenizer: Tokenizer, context: str, ending: str, block_size: int, known: int) -> Window:
    """The ids of context and ending, of which the ending's are predicted; truncated at the left if too long."""
    joined = ending if not context or context[-1].isspace() or ending[0].isspace() else " " + ending
    stem = context.rstrip()  # a token may hold the space and the word after it
    before, whole = tokenizer.encode(stem), tokenizer.encode(stem + context[len(stem) :] + joined)
    if not before:
        before = [end for end in [tokenizer.end_of_text] if end is not None and end < known]
        whole = before + whole
    first = max(1, min(len(before), len(whole) - 1))
    cut = max(0, len(whole) - block_size - 1)
    return Window(whole[cut:], max(1, first - cut))
