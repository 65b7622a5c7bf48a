"""The page: the numbers as text in page.html, which shows them. It makes no request, and no prompt can run in it."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nib.look.snapshot import HABITS, TEMPERATURES
from nib.tokenizer.tokenizer import Tokenizer

TEMPLATE = Path(__file__).with_name("page.html")
PLACE = "/*DATA*/"
NAMED = ("ids", "lens_ids", "share_ids", "near_ids")  # arrays of tokens that the page names


def make_page(ids: list[int], tokenizer: Tokenizer, snapshots: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The page as HTML: `snapshots` in the order of training, `about` the rest, with `prompt_tokens` and `shown`."""
    named = {*ids}
    for snapshot in snapshots:
        for name in NAMED:
            named |= set(snapshot[name].unique().tolist()) if name in snapshot else set()
    data = about | {
        "tokens": ids, "names": {id: name_of(tokenizer, id) for id in sorted(named)}, "habits": HABITS,
        "temperatures": TEMPERATURES, "snapshots": [encode(snapshot) for snapshot in snapshots],
    }  # fmt: skip
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # so that no text ends the script
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    return before + text + after


def name_of(tokenizer: Tokenizer, id: int) -> list[str]:
    """A token as text; ["E2 82", "bytes"] where it is no whole character, and special tokens by their names."""
    data = tokenizer.token_bytes[id] if id < tokenizer.vocab_size else b""
    if not data:
        return [tokenizer.token_text(id), "special"]
    try:
        return [data.decode("utf-8")]
    except UnicodeDecodeError:
        return [data.hex(" ").upper(), "bytes"]


def encode(value: Any) -> Any:
    """Arrays as base64 of their bytes, lowest first; half the size of numbers in JSON, or less."""
    if isinstance(value, dict):
        return {key: encode(each) for key, each in value.items()}
    if not isinstance(value, Tensor):
        return value
    array = value.detach().cpu().numpy()
    array = array.astype(np.float32) if array.dtype == np.float64 else array
    array = array.byteswap() if sys.byteorder == "big" else array
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"type": str(array.dtype), "shape": list(array.shape), "data": data}
