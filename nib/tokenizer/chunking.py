"""Cut long documents into pieces whose tokens are the same as those of the whole document.

Tokenizers run their split pattern over one piece at a time. So memory use is constant, several processes can share
one document, and the pattern's backtracking cannot overflow (tiktoken panics at about a million white-space
characters in a row, with any pattern; a piece is at most half of that).
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO

PIECE_BYTES = 1 << 19

# The split patterns of GPT-2, cl100k, o200k, Llama 3 and nib all end a match between a letter or digit and white
# space, and the next match depends only on what follows. So a cut there changes no token. A Hugging Face tokenizer
# with tokens across words may give other tokens at a cut; they decode to the same text.
_ASCII_CUT = re.compile(rb".*[A-Za-z0-9](?=[ \t\r\n])", re.DOTALL)
# The same for text without ASCII spaces: a letter of any script before white space or full-width punctuation.
_LETTER_CUT = re.compile(r".*[^\W\d_](?=[\s\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])", re.DOTALL)


def read_pieces(stream: BinaryIO, size: int = PIECE_BYTES) -> Iterator[tuple[bytes, bool]]:
    """Yield (piece, whether it is the last) of one document. The pieces depend only on its content.

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
    """The length of the piece to take from the front of `block`: up to the last safe place in its second half.

    A block without a safe place (a quarter of a megabyte without a space after a letter) is cut between characters.
    """
    half = len(block) // 2
    if found := _ASCII_CUT.match(block, half):
        return found.end()
    start = next(i for i in range(half, half + 4) if block[i] & 0xC0 != 0x80 or i == half + 3)
    try:  # without an incomplete character at the end
        text, size = codecs.utf_8_decode(block[start:], "strict", False)
    except UnicodeDecodeError:  # reported, or replaced, when the piece is encoded
        return start + codecs.utf_8_decode(block[start:], "replace", False)[1]
    found_letter = _LETTER_CUT.match(text)
    return start + (len(found_letter[0].encode("utf-8")) if found_letter else size)
