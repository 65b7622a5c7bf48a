"""Conversations as token ids, and which of these are learned.

`Chat(tokenizer)` applies the tokenizer's chat template: `render` gives the text that transformers renders,
`prompt_ids` the ids that a model answers, `encode_conversation` the ids it is trained on. `stop_ids` end an answer.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nib.common.exits import InputError
from nib.common.files import plain_file
from nib.common.wording import printable
from nib.data.rows import content_texts
from nib.data.shards import FIRST, LEARNED
from nib.data.template import CLOSE, GUARD, OPEN, OTHER, ChatTemplate, TemplateFault
from nib.tokenizer.byte_level import HuggingFaceTokenizer
from nib.tokenizer.tokenizer import Tokenizer

MAX_TEMPLATE_BYTES = 1 << 20
MARKS = re.compile(f"[{OPEN}{CLOSE}]")  # around what is in {% generation %}
Messages = list[dict[str, Any]]
# For tokenizers without a template. Its special tokens get ids after the vocabulary.
PLAIN_TEMPLATE = """\
{%- set system = 1 if messages and messages[0].role == 'system' else 0 -%}
{%- for message in messages -%}
    {%- set expected = 'system' if system and loop.first else ['user', 'assistant'][(loop.index0 - system) % 2] -%}
    {%- if message.role != expected -%}
        {{- raise_exception('message ' ~ loop.index ~ ' is of the role ' ~ message.role ~ ', not ' ~ expected) -}}
    {%- endif -%}
    {%- if message.content is not string -%}
        {{- raise_exception('message ' ~ loop.index ~ ' is no text') -}}
    {%- endif -%}
    {%- set tags = {'system': '<|system|>', 'user': '<|user|>', 'assistant': '<|assistant|>'} -%}
    {{- tags[message.role] + message.content + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


def read_template(path: Path) -> str:
    """The chat template in a file. Raises InputError."""
    try:
        text = plain_file(path, MAX_TEMPLATE_BYTES).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise InputError(f"cannot read the chat template {path}: {reason}. Give a file of jinja") from None
    if not text.strip():
        raise InputError(f"the chat template {path} is empty. Give a file of jinja")
    return text


def fit_tokenizer(tokenizer: Tokenizer, template: str = "") -> None:
    """Give a tokenizer a chat template (by default its own, else PLAIN_TEMPLATE), its special tokens and its stop ids.

    A Hugging Face tokenizer gets neither PLAIN_TEMPLATE nor new tokens: its model has no embeddings for them. Raises
    InputError.
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        template = template or tokenizer.chat_template or PLAIN_TEMPLATE
        tokenizer.add_special_tokens(re.findall(r"<\|\w+\|>", template))
    if template:
        tokenizer.chat_template = template
    tokenizer.stop_ids |= Chat(tokenizer).stop_ids - {tokenizer.end_of_text}


def said(side: dict[str, Any]) -> Iterator[str]:
    """The texts in a side, which `nib.data.rows.learned_sides` returns."""
    of_messages = [message["content"] for message in side.get("messages", [])]
    for content in [*of_messages, side.get("prompt"), side.get("text")]:
        yield from (text for text in content_texts(content) if isinstance(text, str))


def shown(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    """The text of tokens for a terminal. Tokens with the bit LEARNED are green, or in [[ ]] without colours."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\x1b[30;42m", "\x1b[0m") if colours else ("[[", "]]")
    names = {id: name for name, id in tokenizer.special_tokens.items()}
    text = ""
    for run in np.split(tokens, np.flatnonzero(np.diff(tokens >= LEARNED)) + 1):
        ids = (run & (FIRST - 1)).tolist()
        data = b"".join(names[id].encode() if id in names else tokenizer.token_bytes[id] for id in ids)
        lines = [printable(line) for line in data.decode("utf-8", errors="replace").split("\n")]
        text += "\n".join(begin + line + end if run[0] >= LEARNED and line else line for line in lines)
    return text


class Chat:
    """Applies the chat template of a tokenizer. Raises InputError if it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        source = tokenizer.chat_template
        if not source:
            raise InputError(f"tokenizer {tokenizer.name} has no chat template. {OTHER.replace('another one', 'one')}")
        self.template = ChatTemplate(source, tokenizer.named_tokens())
        self.has_generation = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        specials = sorted((token for token in tokenizer.special_tokens if len(token) > 1), key=len, reverse=True)
        self.specials = re.compile("|".join(map(re.escape, specials)) or "(?!)")
        self.turn_end = re.compile(rf"(?:{self.specials.pattern})\s*\Z")

    def render(self, messages: Messages, tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text that transformers renders. Raises InputError if the template fails."""
        return MARKS.sub("", self.template.render(messages, tools, add_generation_prompt))

    def prompt_ids(self, messages: Messages) -> list[int]:
        """The ids of a prompt for the assistant's next message. Special tokens in messages stay text."""
        return self._encode(self._guarded_render(messages, None, True))[0].tolist()

    @functools.cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's, and the template's end-of-turn token."""
        stops = self.tokenizer.stop_ids | {self.tokenizer.end_of_text}
        word = getattr(self.tokenizer, "characters", "")[-1:] or "Hi"  # a text that a character tokenizer can encode
        for text in (word, [{"type": "text", "text": word}]):  # some templates accept only content in parts
            try:
                ids, mask = self.encode_conversation(
                    [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
                )
            except TemplateFault:
                raise
            except InputError:
                continue
            learned = ids[mask == 1]
            said = np.flatnonzero(np.isin(learned, self.tokenizer.encode(word)))[-1]
            stops |= set(self.tokenizer.special_tokens.values()).intersection(learned[said:].tolist())
            break
        return frozenset(id for id in stops if id is not None)

    def encode_conversation(
        self, messages: Messages, tools: Any = None, train_on: str = "assistant", first: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids, uint32 (T,), and the mask, uint8 (T,): 1 where the token is learned.

        `train_on` is all (every token) or assistant: what the assistant writes in message `first` (counted from 0) and
        later, with its end-of-turn tokens. The ids are those of transformers' apply_chat_template, except that special
        tokens in messages stay text. Raises InputError if the template fails, leaves something out, or does not show
        what the assistant writes.
        """
        rendered = self._guarded_render(messages, tools, False)
        text = MARKS.sub("", rendered)
        self._check_whole(messages, tools, text)
        ids, places = self._encode(text)
        if train_on == "all":
            return ids, np.ones(len(ids), dtype=np.uint8)
        if not any(message.get("role") == "assistant" for message in messages[first:]):
            raise InputError("there is no assistant turn")
        if self.has_generation:
            spans = self._marked(rendered, text)
            prompt = MARKS.sub("", self._guarded_render(messages[:first], tools, False)) if first else ""
            if not text.startswith(prompt):
                raise InputError("the chat template renders the prompt differently when an answer follows")
            spans = [span for span in spans if span[0] >= len(prompt)]
        else:
            spans = self._subtracted(messages, tools, text, first)
        mask = np.zeros(len(ids), dtype=np.uint8)
        for begin, end in spans:
            mask[(places[:, 0] < end) & (places[:, 1] > begin)] = 1
        if not mask.any():
            raise InputError("by the chat template, no text in it is the assistant's")
        return ids, mask

    def _guarded(self, value: Any) -> Any:
        """`value` with a mark inside all special tokens, so that they stay text."""
        if isinstance(value, str):
            if found := re.search(f"[{OPEN}{CLOSE}{GUARD}]", value):
                raise InputError(f"the text holds U+{ord(found[0]):04X}, which is not a character")
            return self.specials.sub(lambda token: token[0][0] + GUARD + token[0][1:], value)
        if isinstance(value, dict):
            return {key: self._guarded(item) for key, item in value.items()}
        return [self._guarded(item) for item in value] if isinstance(value, list) else value

    def _guarded_render(self, messages: Messages, tools: Any, add_generation_prompt: bool) -> str:
        guarded, guarded_tools = self._guarded(messages), self._guarded(tools)
        rendered = self.template.render(guarded, guarded_tools, add_generation_prompt)
        if (guarded, guarded_tools) != (messages, tools):
            plain = self.template.render(messages, tools, add_generation_prompt)
            if rendered.replace(GUARD, "") != plain:
                raise InputError("the chat template acts on a special token in a message")
        return rendered

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a rendered text without its guards, and the span of characters of each id, (T, 2)."""
        ids: list[int] = []
        places: list[np.ndarray] = [np.zeros((0, 2), dtype=np.int64)]
        at = 0
        for index, piece in enumerate(text.split(GUARD)):
            found, where = self.tokenizer.encode_chat(piece, continued=index > 0)
            ids += found
            places.append(where + at)
            at += len(piece) + 1
        return np.array(ids, dtype=np.uint32), np.concatenate(places)

    def _check_whole(self, messages: Messages, tools: Any, text: str) -> None:
        """Raise InputError if the template leaves out a message's text or tools, or prints parts as a Python list."""
        for number, message in enumerate(self._guarded(messages), start=1):
            content = message.get("content")
            for said in [""] if content is None else content_texts(content):
                if not isinstance(said, str):
                    raise InputError(f"message {number} has a part that is not text")
                last = said.strip().rpartition("\n")[2].strip()
                if message.get("role") in ("system", "user", "assistant") and last not in text:
                    shown = last.replace(GUARD, "")[:40]
                    raise InputError(f"the chat template leaves out what message {number} says, {shown!r}")
            if isinstance(content, list) and content and str(content) in text:
                raise InputError(f"the chat template does not take content in parts, which message {number} has")
        if tools and self.render(messages) == self.render(messages, tools):
            raise InputError("the chat template does not show the tools")
        if any(message.get("tool_calls") for message in messages):
            without = [{key: item for key, item in message.items() if key != "tool_calls"} for message in messages]
            try:
                same = self.render(without, tools) == self.render(messages, tools)
            except InputError:
                same = False
            if same:
                raise InputError("the chat template does not show the tool calls")

    def _marked(self, rendered: str, text: str) -> list[tuple[int, int]]:
        """The spans of {% generation %} blocks, each with the end-of-turn token if it comes right after the block."""
        spans, at, ended = [], 0, True
        for index, piece in enumerate(MARKS.split(rendered)):
            if index % 2 == 1:
                if piece:
                    spans.append((at, at + len(piece)))
                if piece.strip():
                    ended = self.turn_end.search(piece) is not None
            elif not ended and (piece or at == len(text)):  # adjacent blocks are one
                token = self.specials.match(piece)
                if token is None:
                    raise InputError("{% generation %} in the chat template leaves out the token that ends a turn")
                spans[-1], ended = (spans[-1][0], at + token.end()), True
            at += len(piece)
        return spans

    def _subtracted(self, messages: Messages, tools: Any, text: str, first: int) -> list[tuple[int, int]]:
        """The span that each assistant turn adds to the rendered turns before it, up to its end-of-turn token."""
        spans = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant" or index < first:
                continue
            before = self._guarded_render(messages[:index], tools, True)
            after = self._guarded_render(messages[: index + 1], tools, False)
            while not text.startswith(after) and (end := self.turn_end.search(after)):
                after = after[: end.start()]  # end-of-text, which some templates put only after the last turn
            if not after.startswith(before) or not text.startswith(after):
                raise InputError(
                    f"the chat template renders message {index + 1}, or what is before it, differently when another "
                    "message follows, and has no {% generation %} block that marks it"
                )
            if not self.turn_end.search(after, len(before)):
                raise InputError(f"the chat template ends message {index + 1} without a special token to learn")
            spans.append((len(before), len(after.rstrip())))
        return spans
