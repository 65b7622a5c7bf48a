"""The page in a real browser: its probabilities, its keys and clicks, its layout, and that nothing in it can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import Call
from model_helpers import LLAMA, random_model
from test_look import BYTES, HOSTILE, make_run

import look
from model import Attention
from nib.generation.request import SamplingSettings
from nib.generation.sampling import choose
from nib.look.page import make_page
from nib.look.snapshot import take_snapshot
from nib.tokenizer.tokenizer import CharTokenizer

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium on PATH: apt-get install chromium")
VOCABULARY = 700  # more than the logits that a page holds
DRAWS = 10000
# Temperature, top-k, top-p.
SETTINGS = [(0.8, 200, 1.0), (1.5, 0, 0.9), (0.5, 20, 0.6), (2.0, 0, 1.0), (0.0, 0, 1.0), (2.0, 0, 0.98)]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser
        assert not browser.problems
        assert all(address.startswith("file://") for address in browser.requests)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(**LLAMA | dict(vocab_size=VOCABULARY, block_size=64, n_head=4, n_kv_head=2))


def write_page(path: Path, model: Any) -> list[int]:
    tokenizer = CharTokenizer("".join(map(chr, range(0x4E00, 0x4E00 + VOCABULARY))))
    ids = torch.randint(VOCABULARY, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    about = {"model": "out/x", "parameters": 1, "config": vars(model.config), "prompt_tokens": 20, "ended": False,
             "vocab_size": VOCABULARY, "shown": 0,
             "defaults": {"temperature": 0.8, "top_k": 200, "top_p": 1.0}}  # fmt: skip
    path.write_text(make_page(ids, tokenizer, [take_snapshot(model, ids, tokenizer) | {"step": 0}], about), "utf-8")
    return ids


def test_its_probabilities_are_those_that_sample_draws_by(browser: Browser, model: Any, tmp_path: Path) -> None:
    """Of evenly spread uniform numbers, each token is drawn by its share of them."""
    ids = write_page(tmp_path / "page.html", model)
    browser.open(tmp_path / "page.html")
    uniforms = (torch.arange(DRAWS) + 0.5) / DRAWS
    with torch.no_grad():
        logits = model(torch.tensor([ids[:20]]))[0][0, -1]
    for temperature, k, p in SETTINGS:
        settings = SamplingSettings(temperature=temperature, top_k=k, top_p=p)
        drawn = np.bincount(choose(logits.expand(DRAWS, -1), uniforms, settings), minlength=VOCABULARY) / DRAWS
        shown = browser.run(
            f"set({{t: {round(20 * temperature)}, k: KS.indexOf({k}), p: {round(100 * p)}}}); "
            "Array.from(document.querySelectorAll('#candidates [data-p]')).map(e => [+e.dataset.id, +e.dataset.p])"
        )
        assert [id for id, _ in shown[:10]] == logits.topk(10).indices.tolist()
        for id, probability in shown:
            assert abs(probability - drawn[id]) < 1.5 / DRAWS, (temperature, k, p)
        came = browser.run("+document.getElementById('came-p').dataset.p")
        assert abs(came - drawn[ids[20]]) < 1.5 / DRAWS


def test_the_sliders_are_moved_by_hand(browser: Browser, model: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", model)
    browser.open(tmp_path / "page.html")
    before = browser.run("document.querySelector('#candidates [data-p]').dataset.p")
    browser.run("document.getElementById('t').focus()")
    browser.press("ArrowLeft")
    after = browser.run("document.querySelector('#candidates [data-p]').dataset.p")
    assert float(after) > float(before) and browser.run("document.getElementById('t-out').textContent") == "0.75"


def test_shares_and_the_lens_are_shown_as_they_were_found(browser: Browser, model: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", model)
    browser.open(tmp_path / "page.html")
    for over in ("false", "true"):
        browser.run(f"set({{over: {over}}})")
        found = browser.run("Object.assign({}, document.querySelector('#share-rows [data-sum]').dataset)")
        assert abs(float(found["sum"]) - float(found["logit"])) < 1e-4
    last = browser.run("+Array.from(document.querySelectorAll('#layers [data-p]')).at(-1).dataset.p")
    assert abs(last - browser.run("Math.exp(-S.surprise[state.at])")) < 1e-6


def test_keys_and_clicks_select_a_position_everywhere(browser: Browser, model: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", model)
    browser.open(tmp_path / "page.html")
    assert browser.run("state.at") == 19
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.run("state.at") == 17
    browser.click("#text [data-i='4']")
    assert browser.run("state.at") == 4
    assert browser.run("document.getElementById('where').textContent").startswith("5 / 30")
    assert browser.run("document.querySelector('#lens-table thead .sel').dataset.i") == "4"
    assert browser.run("document.querySelector('#arcs .chosen').dataset.i") == "4"
    browser.click("#grid [data-head='6']")
    assert browser.run("document.getElementById('head-name').textContent").startswith("Layer 2, head 3")
    browser.press("ArrowUp")
    assert browser.run("[state.head, state.at]") == [2, 4]
    browser.click("#theme")
    assert browser.run("document.documentElement.classList.contains('dark')")


def test_without_the_first_token_rows_still_add_to_one(browser: Browser, model: Any, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", model)
    browser.open(tmp_path / "page.html")
    browser.click("#nofirst")
    sums = browser.run(
        "Array.from({length: T - 1}, (_, i) => weights(3).slice(tri(i + 1, 1), tri(i + 1, i + 1) + 1)"
        ".reduce((a, b) => a + b, 0))"
    )
    assert len(sums) == 29 and all(abs(each - 1) < 0.05 for each in sums)  # each weight is a byte


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 900, 1400])
def test_it_fits_its_window(browser: Browser, model: Any, width: int, dark: bool, tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", model)
    browser.open(tmp_path / "page.html", width, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.documentElement.classList.contains('dark')") is dark


@pytest.mark.parametrize("prompt", [HOSTILE, "🙂é\u0301\u202egnirts\x00\x07\t\n\n x", "a"])
def test_a_prompt_is_shown_and_never_run(
    browser: Browser, prompt: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / f"out/{HOSTILE}", BYTES, block_size=128)
    (tmp_path / "prompt").write_text(prompt, encoding="utf-8")
    assert not call(look.main, f"out/{HOSTILE}", "--prompt=FILE:prompt", "--max-new-tokens=0", cwd=tmp_path).returncode
    browser.open(tmp_path / "look.html")
    assert browser.run("window.hacked === undefined && document.images.length === 0")
    assert browser.run("document.querySelectorAll('#text .tok').length") == len(prompt.encode())
    if prompt == HOSTILE:
        assert browser.run("document.getElementById('text').textContent") == HOSTILE
    browser.press("ArrowRight")


def test_a_panel_that_cannot_be_made_says_why(
    browser: Browser, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "out/run", BYTES)
    monkeypatch.setattr(Attention, "forward", lambda self, x, *inputs: self.out(x.cumsum(1)))
    assert not call(look.main, "--prompt=abc", "--max-new-tokens=0", cwd=tmp_path).returncode
    browser.open(tmp_path / "look.html")
    shown = browser.run("document.querySelector('#attention .missing').textContent")
    assert "cannot be made" in shown and "scaled_dot_product_attention" in shown
    assert browser.run("document.getElementById('attention-body').hidden")
    assert not browser.run("document.getElementById('lens-body').hidden")


def test_the_slider_over_training_changes_every_panel(browser: Browser, tmp_path: Path, call: Call) -> None:
    make_run(tmp_path / "out/run", BYTES, (5, 6, 7))
    assert not call(look.main, "--prompt=abcabc", "--max-new-tokens=0", "--checkpoints", cwd=tmp_path).returncode
    browser.open(tmp_path / "look.html")
    panels = (
        "['candidates', 'text', 'layers', 'share-rows', 'scores', 'near']"
        ".map(id => document.getElementById(id).outerHTML)"
    )
    assert browser.run("document.getElementById('step').textContent") == "step 7"
    before = browser.run(panels)
    browser.run("document.getElementById('snap').focus()")
    browser.press("ArrowLeft")
    assert browser.run("document.getElementById('step').textContent") == "step 6"
    assert all(old != new for old, new in zip(before, browser.run(panels), strict=True))
