"""Rows of JSON and Parquet: the text of a document, and the messages of chats and preferences."""

from __future__ import annotations

import json
from typing import Any

MESSAGES = "messages"  # the field of a chat, used if there is no field called text
# The fields of a chat's or preference's row, and the usual names of ShareGPT's roles.
CHAT_COLUMNS = (MESSAGES, *"conversations conversation prompt completion system tools chosen rejected".split())
ROLES = {"human": "user", "input": "user", "gpt": "assistant", "output": "assistant"}


def learned_sides(row: dict[str, Any], field: str, kind: str) -> tuple[list[dict[str, Any]], str]:
    """The conversations or texts of a row, and what is wrong with the row, or "".

    A chat gives one {messages, tools, first}: messages before number `first` are not learned. A preference gives two,
    chosen and rejected, or two {prompt, text}. Without a prompt, the common beginning of both is the prompt.
    """
    if kind == "chat":
        side, fault = conversation(row, field)
        return [side], fault
    prompt: Any = row.get("prompt")
    given: list[Any] = [row.get("chosen"), row.get("rejected")]
    if None in given:
        return [], f"no chosen and rejected among {', '.join(map(str, list(row)[:10]))}"
    if given[0] == given[1]:
        return [], "chosen and rejected are the same"
    if isinstance(prompt, str) and not any(map(is_answer, given)):
        prompt = None  # as in TRL: the sides are whole conversations, which begin with it
    sides = []
    if all(isinstance(text, str) for text in given) and isinstance(prompt, str | None):
        pairs = enumerate(zip(*given, strict=False))
        same = next((place for place, (a, b) in pairs if a != b), min(map(len, given))) if prompt is None else 0
        # As in TRL, a space belongs to the word after it.
        same -= same > 0 and given[0][same - 1] == " "
        if row.get("system"):
            return [], "a system text beside texts. Put it into the prompt"
        sides = [{"prompt": (prompt or "") + text[:same], "text": text[same:]} for text in given]
        return sides, "" if all(side["text"] for side in sides) else "an empty side"
    for said in given:
        fields = {MESSAGES: said} if prompt is None else {"prompt": prompt, "completion": said}
        side, fault = conversation(fields | {key: row.get(key) for key in ("system", "tools")}, "text")
        if fault:
            return [], fault
        sides.append(side)
    if prompt is None:
        pairs = enumerate(zip(*(side["messages"] for side in sides), strict=False))
        first = next((place for place, (a, b) in pairs if a != b), min(len(side["messages"]) for side in sides))
        sides = [side | {"first": first} for side in sides]
    return sides, ""


def is_answer(side: Any) -> bool:
    """Whether a side of a preference goes on after the prompt: a text, or messages that begin with the assistant's."""
    first = side[0] if isinstance(side, list) and side else None
    role = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return not isinstance(role, str) or ROLES.get(role, role) == "assistant"


def conversation(row: dict[str, Any], field: str) -> tuple[dict[str, Any], str]:
    """The messages of a row, its tools, and the number of the first message to learn; what is wrong with it, or "".

    Messages are in `field`, in messages or conversations (ShareGPT), or in prompt and completion (texts or messages).
    """
    first = 0
    found = next((row[key] for key in (field, *CHAT_COLUMNS[:3]) if row.get(key) is not None and key != "text"), None)
    if found is None and row.get("prompt") is not None and row.get("completion") is not None:
        sides = zip(("user", "assistant"), (row["prompt"], row["completion"]), strict=True)
        turns = [[{"role": role, "content": said}] if isinstance(said, str) else said for role, said in sides]
        found = [*turns[0], *turns[1]] if all(isinstance(turn, list) for turn in turns) else turns
        first = len(turns[0]) if isinstance(turns[0], list) else 0
    if not isinstance(found, list):
        given = f"no messages, conversations, or prompt and completion among {', '.join(map(str, list(row)[:10]))}"
        return {}, given if found is None else f"its messages are {type(found).__name__}, not a list"
    if isinstance(row.get("system"), str) and row["system"]:
        found, first = [{"role": "system", "content": row["system"]}, *found], first + (first > 0)
    messages = []
    for number, message in enumerate(found, start=1):
        if not isinstance(message, dict):
            return {}, f"message {number} is {type(message).__name__}, not an object"
        kept = {key: value for key, value in message.items() if key not in ("from", "value")}
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not role:
            return {}, f"message {number} has no role"
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            return {}, f"message {number} has no content"
        messages.append(kept | {"role": ROLES.get(role, role), "content": content})
    if not messages:
        return {}, "an empty conversation"
    tools = row.get("tools") or None
    if isinstance(tools, str):  # some datasets store them as JSON text
        try:
            tools = json.loads(tools)
        except ValueError:
            return {}, "its tools are not valid JSON"
    prompted = any(message["role"] == "assistant" for message in messages[:first])
    return {"messages": messages, "tools": tools, "first": first if prompted else 0}, ""


def chat_text(messages: list[Any]) -> str | None:
    """Chat messages as plain text, one paragraph `role: content` for each. None if one of them is not a message.

    A message with tool calls may have no content.
    """
    paragraphs = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        found = {key: value for key, value in message.items() if value is not None}
        role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
        if content is None and (message.get("tool_calls") or message.get("function_call")):
            content = ""
        if isinstance(content, list):  # parts; images and audio are left out
            texts = content_texts([part for part in content if not is_media(part)])
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        paragraphs.append(f"{role}: {content}\n")
    return "\n".join(paragraphs)


def content_texts(content: Any) -> list[Any]:
    """The text of a message's content, or of each of its parts; None or another type for what is not a text."""
    parts = content if isinstance(content, list) else [content]
    return [part.get("text") if isinstance(part, dict) else part for part in parts]


def is_media(part: Any) -> bool:
    """Whether a part of a message's content is one without text, such as an image or audio.

    A row of Parquet has null for each key that only other rows have.
    """
    if not isinstance(part, dict) or part.get("text") is not None:
        return False
    return "text" not in part or not str(part.get("type") or "text").endswith("text")


def row_text(value: Any, where: str) -> tuple[str, str]:
    """The text in a field or column, and what is wrong with it, or ""."""
    text = chat_text(value) if isinstance(value, list) else value
    if isinstance(text, str):
        return text, ""
    if isinstance(value, list) and any(isinstance(message, dict) for message in value):
        return "", f"{where} holds a message without a role or content"
    return "", f"{where} holds {'null' if value is None else type(value).__name__}, not text"
