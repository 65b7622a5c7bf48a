"""What a field of a JSON row or a column of Parquet holds, as the text of a document."""

from __future__ import annotations

from typing import Any

MESSAGES = "messages"  # the column of a chat, where there is none called text


def chat_text(messages: list[Any]) -> str | None:
    """Chat messages as plain text, a paragraph a message: `role: content`. None when they are none.

    A message that calls tools may have no content.
    """
    paragraphs = []
    for message in messages:
        if not isinstance(message, dict):
            return None
        found = {key: value for key, value in message.items() if value is not None}
        role, content = found.get("role", found.get("from")), found.get("content", found.get("value"))
        if content is None and (message.get("tool_calls") or message.get("function_call")):
            content = ""
        if isinstance(content, list):  # parts, of which pictures and sounds are left out
            texts: list[Any] = [
                part.get("text") if isinstance(part, dict) else part for part in content if not is_media(part)
            ]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        paragraphs.append(f"{role}: {content}\n")
    return "\n".join(paragraphs)


def is_media(part: Any) -> bool:
    """Whether a part of a message's content is one without a text, such as a picture or a sound.

    A row of Parquet has null for what it lacks and other rows have.
    """
    if not isinstance(part, dict) or part.get("text") is not None:
        return False
    return "text" not in part or not str(part.get("type") or "text").endswith("text")


def row_text(value: Any, where: str) -> tuple[str, str]:
    """The text that a field or column holds, and what is wrong with it, or ""."""
    text = chat_text(value) if isinstance(value, list) else value
    if isinstance(text, str):
        return text, ""
    if isinstance(value, list) and any(isinstance(message, dict) for message in value):
        return "", f"{where} holds a message without a role or content"
    return "", f"{where} holds {'null' if value is None else type(value).__name__}, not text"
