"""Write the page: page.html with the numbers in it. It makes no network request, and no text in it can run as code."""

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
ID_ARRAYS = ("ids", "lens_ids", "share_ids", "near_ids")  # the page shows the text of these tokens


def make_page(ids: list[int], tokenizer: Tokenizer, snapshots: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The page as HTML. `snapshots` are in the order of training; `about` has the other data that page.html reads."""
    named = {*ids}
    for snapshot in snapshots:
        for name in snapshot.keys() & ID_ARRAYS:
            named |= set(snapshot[name].unique().tolist())
    data = about | {
        "tokens": ids, "names": {id: name_of(tokenizer, id) for id in sorted(named)}, "habits": HABITS,
        "temperatures": TEMPERATURES, "snapshots": [encode(snapshot) for snapshot in snapshots],
    }  # fmt: skip
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")  # so that no text can end the script element
    before, after = TEMPLATE.read_text(encoding="utf-8").split(PLACE)
    return before + text + after


def name_of(tokenizer: Tokenizer, id: int) -> list[str]:
    """A token as text; [name, "special"] for a special token, ["E2 82", "bytes"] for incomplete characters."""
    data = tokenizer.token_bytes[id] if id < tokenizer.vocab_size else b""
    if not data:
        return [tokenizer.token_text(id), "special"]
    try:
        return [data.decode("utf-8")]
    except UnicodeDecodeError:
        return [data.hex(" ").upper(), "bytes"]


def encode(value: Any) -> Any:
    """Tensors as base64 of their little-endian bytes, at most half the size of numbers in JSON."""
    if isinstance(value, dict):
        return {key: encode(each) for key, each in value.items()}
    if not isinstance(value, Tensor):
        return value
    array = value.detach().cpu().numpy()
    array = array.astype(np.float32) if array.dtype == np.float64 else array
    array = array.byteswap() if sys.byteorder == "big" else array
    data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
    return {"type": str(array.dtype), "shape": list(array.shape), "data": data}
