"""Conversations with checkable answers, made from a seed: the training data and the test of config/chat.py.

Sums, words to reverse, letters and numbers to sort, facts to look up, a name that the user or a system message gives,
and second turns that need the first. The hash of a problem, such as 17 + 25 or the letters of a word in any order,
decides whether it is held out. A held-out problem occurs in no training conversation.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

Messages = list[dict[str, str]]
COUNT = 20_000  # conversations of the corpus
HELD_OUT = 0.1  # of all problems
CHARACTERS = 130  # a conversation gets questions until it has so many
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PEOPLE = "Ada Ben Cleo Dan Eva Finn Gina Hugo Ida Jon Kim Leo Mia Noah Olga Paul Rosa Sam Tina Uma Vera Will".split()
THINGS = "apples books cups dogs eggs forks hats jars keys lamps maps nuts pens rings shoes toys".split()


class Questions:
    """Draws questions: only held-out problems, or only others."""

    def __init__(self, seed: int, held_out: bool) -> None:
        self.random, self.held_out = random.Random(seed), held_out
        self.kinds = {  # with their frequencies: what takes longer to learn is more frequent
            self.add: 3, self.add_twice: 2, self.reverse: 1, self.sort_letters: 2, self.sort_numbers: 2,
            self.look_up: 4, self.own_name: 1,
        }  # fmt: skip

    def conversation(self) -> Messages:
        """A few questions, one after another; in some conversations a system message gives the assistant a name."""
        messages: Messages = []
        if self.random.randrange(4) == 0:
            name = self.name()
            messages = [{"role": "system", "content": f"You are {name}."}, *ask("Who are you?", f"I am {name}.")]
        while sum(len(message["content"]) for message in messages) < CHARACTERS:
            (kind,) = self.random.choices(list(self.kinds), list(self.kinds.values()))
            messages += kind()
        return messages

    def fits(self, *problem: object) -> bool:
        digest = hashlib.sha256(repr(problem).encode()).digest()
        return (int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32) == self.held_out

    def add(self) -> Messages:
        left, right = self.summands()
        return ask(f"What is {left} + {right}?", f"{left + right}")

    def add_twice(self) -> Messages:
        while True:
            (left, right), more = self.summands(), self.random.randrange(10)
            if self.fits("sum", *sorted((left + right, more))):
                break
        return [
            *ask(f"What is {left} + {right}?", f"{left + right}"),
            *ask(f"Add {more} to that.", f"{left + right + more}"),
        ]

    def summands(self) -> list[int]:
        while True:
            numbers = [self.random.randrange(50), self.random.randrange(50)]
            if self.fits("sum", *sorted(numbers)):
                return numbers

    def reverse(self) -> Messages:
        word = self.word()
        return ask(f"Reverse {word}.", word[::-1])

    def sort_letters(self) -> Messages:
        word = self.word()
        return ask(f"Sort the letters of {word}.", "".join(sorted(word)))

    def sort_numbers(self) -> Messages:
        while True:
            numbers = self.random.sample(range(10), self.random.randint(3, 6))
            if self.fits("numbers", *sorted(numbers)):
                return ask(f"Sort {join(numbers)}.", join(sorted(numbers)))

    def look_up(self) -> Messages:
        count = self.random.randint(2, 3)
        while True:
            people, things = self.random.sample(PEOPLE, count), self.random.sample(THINGS, count)
            things = [f"{self.random.randint(2, 9)} {thing}" for thing in things]
            has = [f"{person} has {thing}" for person, thing in zip(people, things, strict=True)]
            if self.fits("facts", *sorted(has)):
                break
        place = self.random.randrange(count)
        return ask(f"{', '.join(has[:-1])} and {has[-1]}. What does {people[place]} have?", things[place])

    def own_name(self) -> Messages:
        name = self.name()
        first, last = ask(f"My name is {name}.", f"Hello, {name}!"), ask("What is my name?", f"Your name is {name}.")
        between = self.random.choice([[], self.add(), self.reverse()])
        return [*first, *between, *last]

    def word(self) -> str:
        while True:
            word = "".join(self.random.choices(LETTERS, k=self.random.randint(3, 5)))
            if self.fits("word", *sorted(word)):
                return word

    def name(self) -> str:
        return self.word().capitalize()


def ask(question: str, answer: str) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def conversations(count: int, seed: int = 1337, held_out: bool = False) -> Iterator[Messages]:
    """`count` conversations: only with held-out problems, or only with others."""
    questions = Questions(seed, held_out)
    for _ in range(count):
        yield questions.conversation()


def write_questions(path: Path) -> None:
    """Write the training corpus as a JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        for messages in conversations(COUNT):
            file.write(json.dumps({"messages": messages}) + "\n")
