"""Guesses of the tokens to come, from the text itself: where its newest tokens stood before, it went on somehow.

The model then judges several tokens in the time of one (prompt lookup; speculative decoding is arXiv 2211.17192). A
guess is kept where it is the very token that would have been drawn with that position's random number, so that the
text is the one that is written without guesses.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST, SHORTEST = 4, 2  # tokens that must have stood together before; the longest repetition is asked first


class Repetitions:
    """The tokens of one text, indexed by what came before them."""

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # tokens in a row to the place of the one that came after
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            place = len(self.tokens)
            for length in range(SHORTEST, min(LONGEST, place) + 1):
                self.follows[tuple(self.tokens[place - length :])] = place
            self.tokens.append(token)

    def guess(self, count: int) -> list[int]:
        """`count` tokens that followed the last time that the text ended as it does now; [] where it never did.

        Where the text ends before that, it is taken to go round.
        """
        for length in range(min(LONGEST, len(self.tokens)), SHORTEST - 1, -1):
            place = self.follows.get(tuple(self.tokens[-length:]))
            if place is not None:
                period = len(self.tokens) - place
                return [self.tokens[place + i % period] for i in range(count)]
        return []
