"""Text streams and samples: whole characters, stop strings over the borders of tokens, and how a sample ends."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nib.common.exits import InputError
from nib.generation.request import Sample, SamplingSettings, TextStream, make_samples
from nib.tokenizer.load import make_tokenizer
from nib.tokenizer.tokenizer import CharTokenizer

BYTES = make_tokenizer("byte")


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from("ab🙂中é\n"), max_size=30),
    st.lists(st.integers(0, 90), max_size=12),
    st.lists(st.text(st.sampled_from("ab🙂中é\n"), min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_is_whole_characters_up_to_the_first_stop(text, cuts, stops):
    data, stream, shown = text.encode(), TextStream(stops), ""
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[begin:end] for begin, end in itertools.pairwise(borders)]
    come = b""
    for piece in pieces:
        come += piece
        shown += stream.push(piece)
        assert text.startswith(shown) and not any(stop in shown for stop in stops)
        if not stops:
            assert shown == come.decode("utf-8", errors="ignore"), "what is whole comes at once"
    shown += stream.push(b"", final=True)
    # The stop that is complete first ends the text, at its beginning.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    assert any(shown == text[:begin] for _, begin in ends) if ends else shown == text


@pytest.mark.parametrize("data", [b"ok \xff\xfe end", b"cut \xf0\x9f\x99", b"\xe4\xb8a\x80"])
def test_bytes_that_are_no_text_are_shown_as_python_decodes_them(data):
    stream = TextStream(["zz"])
    shown = "".join(stream.push(bytes([byte])) for byte in data) + stream.push(b"", final=True)
    assert shown == data.decode("utf-8", errors="replace")


def written(tokens: list[int], **changes) -> tuple[Sample, list[str]]:
    """A byte-level sample that was given these tokens until it was finished, and the pieces of text that came."""
    (sample,) = make_samples(["p"], BYTES, SamplingSettings(**changes))
    pieces = []
    for token in tokens:
        pieces.append(sample.append(token))
        if sample.finish_reason:
            break
    return sample, pieces


def test_a_sample_ends_at_end_of_text_a_stop_or_its_length():
    sample, pieces = written([*"é!".encode(), 256, 65])
    assert (sample.text, sample.finish_reason, pieces) == ("é!", "end_of_text", ["", "é", "!", ""])
    assert sample.tokens == list("é!".encode())
    sample, pieces = written(list(b"one STOP two"), stop=["STOP", "two"])
    assert (sample.text, sample.finish_reason) == ("one ", "stop")
    assert bytes(sample.tokens) == b"one STOP" and "".join(pieces) == "one "
    sample, pieces = written(list(b"abSTab"), stop=["STOP"], max_new_tokens=4)
    assert (sample.text, sample.finish_reason, pieces) == ("abST", "length", ["a", "b", "", "ST"])
    sample, pieces = written(list("🙂".encode())[:3], max_new_tokens=3)
    assert (sample.text, pieces) == ("\ufffd", ["", "", "\ufffd"])
    sample, _ = written(list(b"abS"), stop=["STOP"])
    assert sample.finish("interrupted") == "S" and sample.text == "abS" and sample.finish_reason == "interrupted"


def test_an_empty_prompt_starts_with_every_tokenizer():
    assert make_samples([""], BYTES, SamplingSettings())[0].prompt_tokens == [256]
    assert make_samples([""], CharTokenizer("\nab"), SamplingSettings())[0].prompt_tokens == [0]
    assert make_samples([""], CharTokenizer("\x00\nab"), SamplingSettings())[0].prompt_tokens == [1]
    assert make_samples([""], CharTokenizer("ab"), SamplingSettings())[0].prompt_tokens == [0]
    assert make_samples(["<|endoftext|>"], BYTES, SamplingSettings())[0].prompt_tokens == list(b"<|endoftext|>")


def test_prompts_and_stops_that_cannot_be_used_are_errors():
    for prompts, stop in ((["az"], []), (["\udcff"], []), (["a"], [""])):
        with pytest.raises(InputError):
            make_samples(prompts, CharTokenizer("ab"), SamplingSettings(stop=stop))
