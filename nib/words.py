"""Numbers and their nouns in messages."""


def counted(number: object, noun: str) -> str:
    """A number, or one that is written already, and the noun in the form that goes with it: 1 token, 2 tokens."""
    return f"{number} {noun if str(number) == '1' else noun + 's'}"
