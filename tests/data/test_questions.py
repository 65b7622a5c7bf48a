"""The built-in questions: their answers are right, the same each time, and those held out are never learned."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nib.data.questions import Messages, conversations, write_questions


def exchanges(messages: Messages) -> list[tuple[str, str]]:
    """Question and answer, and a system message as the question before the first."""
    given = [message for message in messages if message["role"] != "system"]
    assert [message["role"] for message in given] == ["user", "assistant"] * (len(given) // 2)
    contents = [message["content"] for message in given]
    return list(zip(contents[::2], contents[1::2], strict=True))


def answer_of(question: str, before: list[tuple[str, str]], system: str) -> str:
    """Worked out from the words alone."""
    if found := re.fullmatch(r"What is (\d+) \+ (\d+)\?", question):
        return str(int(found[1]) + int(found[2]))
    if found := re.fullmatch(r"Add (\d) to that\.", question):
        return str(int(before[-1][1]) + int(found[1]))
    if found := re.fullmatch(r"Reverse ([a-z]{3,5})\.", question):
        return found[1][::-1]
    if found := re.fullmatch(r"Sort the letters of ([a-z]{3,5})\.", question):
        return "".join(sorted(found[1]))
    if found := re.fullmatch(r"Sort (\d(, \d){2,5})\.", question):
        return ", ".join(sorted(found[1].split(", "), key=int))
    if found := re.fullmatch(r"(.*)\. What does (\w+) have\?", question):
        facts = re.findall(r"(\w+) has (\d) (\w+)", found[1])
        assert len({who for who, _, _ in facts}) == len({what for _, _, what in facts}) == len(facts) >= 2
        ((_, number, what),) = [fact for fact in facts if found[2] == fact[0]]
        return f"{number} {what}"
    if found := re.fullmatch(r"My name is (\w+)\.", question):
        return f"Hello, {found[1]}!"
    if question == "What is my name?":
        name = [told[11:-1] for told, _ in before if told.startswith("My name is ")][-1]
        return f"Your name is {name}."
    assert question == "Who are you?"
    return f"I am {re.fullmatch(r'You are (.*)[.]', system)[1]}."  # type: ignore[index]


def problems(messages: Messages) -> set[object]:
    """What the questions of a conversation are about, the parts of each sorted."""
    found: set[object] = set()
    before = ""
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant":
            before = text
        elif " has " in text:
            found.add(frozenset(re.findall(r"\w+ has \d \w+", text)))
        elif numbers := [int(number) for number in re.findall(r"\d+", text)]:
            found.add((text.split()[0] == "Sort", *sorted(numbers + ([int(before)] if text.startswith("Add") else []))))
        elif word := re.search(r"(?<=Reverse |ters of |name is |You are )(\w+)(?=\.)", text):
            found.add("".join(sorted(word[0].lower())))
    return found


@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_is_right_and_every_kind_of_question_is_there(held_out):
    beginnings = set()
    for messages in conversations(300, held_out=held_out):
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        turns = exchanges(messages)
        for place, (question, answer) in enumerate(turns):
            assert answer == answer_of(question, turns[:place], system), question
            beginnings.add("look up" if " has " in question else re.sub(r" \w+\.| \d.*|(?<=the).*", "", question))
    kinds = [
        "What is",
        "Add",
        "Reverse",
        "Sort",
        "Sort the",
        "look up",
        "My name is",
        "What is my name?",
        "Who are you?",
    ]
    assert beginnings == set(kinds)


def test_no_problem_that_is_held_out_is_learned():
    learned = set[object]().union(*map(problems, conversations(4000)))
    asked = set[object]().union(*map(problems, conversations(400, seed=7, held_out=True)))
    assert len(learned) > 10_000 and len(asked) > 500 and not learned & asked


def test_a_seed_gives_the_same_questions_each_time_and_another_gives_others():
    first = list(conversations(50))
    assert first == list(conversations(50)) and first == list(conversations(60))[:50]
    assert not any(messages in first for messages in conversations(50, seed=2))


def test_the_corpus_is_a_file_of_conversations(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("nib.data.questions.COUNT", 20)
    write_questions(tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    assert rows == [{"messages": messages} for messages in conversations(20)]
