"""Ask a model the held-out questions of config/chat.py, and count the right answers.

    python bench/chat.py chat

Each conversation continues with the model's own answers, sampled greedily. An answer counts if it matches exactly and
the model ended it by itself. The first conversations are printed as `sample.py --chat` shows them.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

from common import parser_for

from nib.cpu.threads import choose_threads

choose_threads()  # before torch is imported
from nib.common.exits import run_script
from nib.data.questions import conversations
from nib.generation.chat import open_chat
from nib.generation.engine import stream_text
from nib.generation.request import SamplingSettings, make_samples
from sample import load_model

TARGET = 0.95
SEED = 7  # not the training corpus's


def main() -> int:
    parser = parser_for(__doc__)
    parser.add_argument("model", nargs="?", help="a run, a checkpoint or a Hugging Face directory")
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--shown", type=int, default=3, help="conversations to print")
    arguments = parser.parse_args()
    model, tokenizer, origin = load_model([arguments.model] if arguments.model else [], "auto", "float32")
    print(origin, file=sys.stderr)
    asked = list(conversations(arguments.conversations, SEED, held_out=True))
    answers = answer_all(asked, model, tokenizer)
    right, total = Counter[str](), Counter[str]()
    for messages, given in zip(asked, answers, strict=True):
        questions = [message["content"] for message in messages if message["role"] == "user"]
        expected = [message["content"] for message in messages if message["role"] == "assistant"]
        for question, wanted, found in zip(questions, expected, given, strict=True):
            total[kind_of(question)] += 1
            right[kind_of(question)] += found == wanted
    for kind in sorted(total):
        print(f"{kind:22} {right[kind]:4} of {total[kind]:4}")
    for messages, given in zip(asked[: arguments.shown], answers, strict=False):
        show(messages, given)
    print(f"held-out: {right.total()} of {total.total()} answered exactly")
    return int(arguments.check and right.total() < TARGET * total.total())


def answer_all(asked: list[list[dict[str, Any]]], model: Any, tokenizer: Any) -> list[list[str | None]]:
    """The answers of each conversation, turn by turn; None for an answer that the model did not end."""
    encode, settings = open_chat(tokenizer), SamplingSettings(temperature=0, max_new_tokens=50)
    answers: list[list[str | None]] = [[] for _ in asked]
    said: list[list[dict[str, Any]]] = [[] for _ in asked]
    for place in range(max(map(len, asked))):
        turns = [index for index, messages in enumerate(asked) if place < len(messages)]
        samples = {}
        for index in turns:
            if asked[index][place]["role"] == "assistant":
                (samples[index],) = make_samples([said[index]], tokenizer, settings, encode=encode)
            else:
                said[index].append(asked[index][place])
        for _ in stream_text(model, list(samples.values()), settings):
            pass
        for index, sample in samples.items():
            answers[index].append(sample.text if sample.finish_reason == "end_of_text" else None)
            said[index].append({"role": "assistant", "content": sample.text})
    return answers


def show(messages: list[dict[str, Any]], answers: list[str | None]) -> None:
    print()
    given = iter(answers)
    for message in messages:
        if message["role"] == "assistant":
            print(next(given))
        else:
            print("> " * (message["role"] == "user") + message["content"])


def kind_of(question: str) -> str:
    if " has " in question:
        return "look-up"
    words = re.sub(r"[0-9].*", "numbers", question).rstrip(".?").split()
    return " ".join(words[:1] if words[0] == "Reverse" else words[:2])


if __name__ == "__main__":
    run_script(main)
