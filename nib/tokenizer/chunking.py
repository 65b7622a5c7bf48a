"""Where a long document may be cut, so that its pieces have the same tokens as the whole.

Tokenizers run their split pattern over one piece at a time: memory stays flat, several processes can share one
document, and the pattern's backtracking cannot overflow (tiktoken panics at about a million white-space
characters in a row, whatever the pattern; a piece is at most half of that).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO

PIECE_BYTES = 1 << 19

# The split patterns of GPT-2, cl100k, o200k, Llama 3 and our own all end a match between a letter or digit and
# white space, and what they do next depends only on what follows. So a cut there changes no token. A tokenizer of
# Hugging Face's whose tokens reach over words has others at a cut, which decode to the same text.
_ASCII_CUT = re.compile(rb".*[A-Za-z0-9](?=[ \t\r\n])", re.DOTALL)
# The same for text without ASCII spaces: a letter of any script before white space or a full-width stop or comma.
_LETTER_CUT = re.compile(r".*[^\W\d_](?=[\s\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])", re.DOTALL)


def read_pieces(stream: BinaryIO, size: int = PIECE_BYTES) -> Iterator[tuple[bytes, bool]]:
    """Yield (piece, whether it is the last) of one document; pieces depend on its content only.

    A piece has at most `size` bytes and never ends inside a character of valid UTF-8.
    """
    rest = b""
    while True:
        block = rest + stream.read(size - len(rest))
        if len(block) < size:
            yield block, True
            return
        end = cut(block)
        yield block[:end], False
        rest = block[end:]


def cut(block: bytes) -> int:
    """The length of the piece to take from the front of `block`: in its second half, at the last safe place.

    A block with no safe place (half a megabyte without one space after a letter) is cut between characters.
    """
    half = len(block) // 2
    if found := _ASCII_CUT.match(block, half):
        return found.end()
    end = _whole_characters(block)
    start = next(i for i in range(half, half + 4) if block[i] & 0xC0 != 0x80 or i == half + 3)
    try:
        found_letter = _LETTER_CUT.match(block[start:end].decode("utf-8"))
    except UnicodeDecodeError:  # reported where the piece is encoded, which knows what to do about it
        return end
    return start + len(found_letter[0].encode("utf-8")) if found_letter else end


def _whole_characters(block: bytes) -> int:
    """The length of `block` without a UTF-8 character that its end cuts short."""
    for back in range(1, min(4, len(block)) + 1):
        byte = block[-back]
        if byte & 0xC0 != 0x80:  # the last character's first byte
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(block) - back if length > back else len(block)
    return len(block)
