"""The share of valid Python (accepted by ast.parse) among functions sampled from a model of Python source.

    python bench/parse_share.py out/small

Each sample continues two newlines and "def", and ends before the first line that is not indented. A sample without such
an end counts as a failure, or with --open is not counted.
"""

from __future__ import annotations

import ast
import json
import sys
import warnings

from common import parser_for

from model import GPT, GPTConfig
from nib.formats.load import open_source
from nib.generation.engine import generate_text
from nib.generation.request import SamplingSettings

PROMPT = "\n\ndef"  # without the space: tokenizers make it part of the next token


def first_function(text: str) -> str | None:
    """The function that `text` begins with, or None when the text ends before the function does."""
    lines = text.split("\n")
    for number, line in enumerate(lines[1:], start=1):
        if line.strip() and not line.startswith((" ", "\t", "#", ")")):
            return "\n".join(lines[:number])
    return None


def parses(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except (SyntaxError, ValueError):
        return False
    return True


def main() -> None:
    parser = parser_for(__doc__, check=False)
    parser.add_argument("run", nargs="?", help="a run or checkpoint (default: the newest run)")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max-new-tokens", type=int, default=250)
    parser.add_argument("--open", action="store_true", help="count only functions that ended")
    parser.add_argument("--check", type=float, default=None, metavar="SHARE", help="exit 1 if the share is lower")
    arguments = parser.parse_args()

    checkpoint = open_source(arguments.run)
    model = GPT(GPTConfig(**checkpoint.model_config))
    model.load_state_dict(checkpoint.weights())
    tokenizer = checkpoint.tokenizer()
    settings = SamplingSettings(
        num_samples=arguments.samples, temperature=arguments.temperature, max_new_tokens=arguments.max_new_tokens
    )
    texts = [PROMPT + sample.text for sample in generate_text(model, tokenizer, [PROMPT], settings)]
    functions = [first_function(text.lstrip()) for text in texts]
    ended = [function for function in functions if function is not None]
    accepted = sum(map(parses, ended))
    share = accepted / max(1, len(ended) if arguments.open else len(functions))
    print(f"{len(functions)} samples, {len(ended)} ended, {accepted} parse: {100 * share:.0f} %")
    print(json.dumps({"samples": len(functions), "ended": len(ended), "parse": accepted, "share": round(share, 3)}))
    if arguments.check is not None and share < arguments.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
