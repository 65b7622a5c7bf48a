"""A conversation: each turn computes what is new in it only, and writes what it would with nothing kept."""

from __future__ import annotations

import pytest
import torch
from test_engine import BYTES, make_model, make_settings, watch_hidden

from nib.generation.chat import Conversation, Message
from nib.generation.engine import stream_text
from nib.generation.request import Sample, make_samples


def encode(messages: list[Message]) -> list[int]:
    return BYTES.encode("".join(f"{message['role'][0]}{message['content']}\n" for message in messages) + "a")


def turn(conversation: Conversation, model, question: str, **changes) -> Sample:
    settings = make_settings(max_new_tokens=6, **changes)
    messages, _ = conversation.ask(question)
    (sample,) = make_samples([messages], BYTES, settings, 257, encode)
    for _ in stream_text(model, [sample], settings, conversation.make_rows):
        pass
    return sample


QUESTIONS = ["one?", "two", "three is a longer one", "4"]


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope", "none"])
@pytest.mark.parametrize("shape", [{}, {"n_kv_head": 1, "window": 5}])
def test_turns_write_the_same_with_a_kept_cache_and_without_any(position, shape):
    model = make_model(block_size=128, position=position, **shape)
    kept, none, anew = (Conversation(encode, 128, 6, "be") for _ in range(3))
    for question in QUESTIONS:
        found = turn(kept, model, question)
        anew.rows = None
        for other in (turn(none, model, question, cache=False), turn(anew, model, question)):
            assert found.tokens == other.tokens and found.prompt == other.prompt
        # The model may write half a character, which is another one when the next turn encodes it.
        for conversation in (kept, none, anew):
            conversation.answer(found.text)


def test_a_turn_computes_only_what_is_new_in_it(monkeypatch):
    model = make_model(block_size=128, position="rope")
    conversation, calls, known = Conversation(encode, 128, 6, "be"), watch_hidden(model, monkeypatch), 0
    for question in QUESTIONS:
        sample = turn(conversation, model, question)
        assert calls[0] == (1, len(sample.prompt_tokens) - known)
        # What was written last has not been shown to the model, and these words of ours begin with other letters.
        known = len(sample.prompt_tokens)
        conversation.answer("\t")
        calls.clear()
    assert len(sample.prompt_tokens) > 50


def test_an_answer_that_is_kept_as_it_was_written_is_not_computed_again(monkeypatch):
    model = make_model(vocab_size=256, block_size=128, position="rope")
    with torch.no_grad():
        model.wte.weight[128:] = 0  # no half characters
    conversation, calls = Conversation(encode, 128, 6, ""), watch_hidden(model, monkeypatch)
    first = turn(conversation, model, "one?", temperature=0)
    conversation.answer(first.text)
    calls.clear()
    second = turn(conversation, model, "two", temperature=0)
    assert first.text.isascii() and len(first.tokens) == 6
    assert calls[0] == (1, len(second.prompt_tokens) - len(first.prompt_tokens) - 5)


def test_an_interrupted_answer_leaves_nothing_that_the_next_turn_builds_on(monkeypatch):
    model = make_model(block_size=128, position="rope")
    conversation, calls = Conversation(encode, 128, 6, ""), watch_hidden(model, monkeypatch)
    sample = turn(conversation, model, "one?")
    sample.finish("interrupted")
    conversation.answer(sample.text)
    calls.clear()
    second = turn(conversation, model, "two")
    assert calls[0] == (1, len(second.prompt_tokens))


def test_a_full_context_loses_its_oldest_turns_until_half_of_it_is_free_and_keeps_the_system_message():
    conversation = Conversation(encode, 64, 1000, "be")
    left_out = []
    for number in range(12):
        messages, left = conversation.ask(f"question {number}")
        left_out.append(left)
        assert messages[0] == {"role": "system", "content": "be"} and messages[-1]["content"] == f"question {number}"
        assert [message["role"] for message in messages[1:]] == (["user", "assistant"] * 9)[: len(messages) - 1]
        assert len(encode(messages)) <= (32 if left else 48)
        conversation.answer("yes")
    assert sum(map(bool, left_out)) < 6 and sum(left_out) > 6
    messages, left = conversation.ask("x" * 100)  # is alone too long
    assert len(messages) == 2 and left


def test_a_question_without_an_answer_was_not_asked():
    conversation = Conversation(encode, 64, 6, "")
    conversation.ask("lost")
    messages, _ = conversation.ask("kept")
    assert messages == [{"role": "user", "content": "kept"}]


def test_several_samples_of_one_turn_are_computed_anew():
    model = make_model(block_size=128, position="rope")
    conversation = Conversation(encode, 128, 6, "")
    conversation.answer(turn(conversation, model, "one?").text)
    settings = make_settings(max_new_tokens=6, num_samples=2)
    samples = make_samples([conversation.ask("two")[0]], BYTES, settings, 257, encode)
    for _ in stream_text(model, samples, settings, conversation.make_rows):
        pass
    conversation.rows = None
    assert samples[0].tokens == turn(conversation, model, "two").tokens
