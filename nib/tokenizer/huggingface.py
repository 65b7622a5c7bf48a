"""Hugging Face tokenizers: read theirs, which the package tokenizers runs, and write nib's as a tokenizer.json."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

from nib.common.exits import InputError
from nib.common.files import plain_file, read_object
from nib.tokenizer.byte_level import NAMED_TOKENS, HuggingFaceTokenizer
from nib.tokenizer.tokenizer import (
    _PROBE,
    END_OF_TEXT,
    MAX_FILE_BYTES,
    BpeTokenizer,
    CharTokenizer,
    Tokenizer,
    bytes_of_letters,
)

TOKENIZER_JSON, CONFIG_JSON, GENERATION_JSON = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
SPECIAL_JSON, ADDED_JSON = "special_tokens_map.json", "added_tokens.json"  # of directories without added_tokens_decoder
CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# The settings of tokenizer_config.json that are kept from reading to writing.
KEPT = (*NAMED_TOKENS, "chat_template", "add_bos_token", "add_eos_token")
GPT2_MODELS = ("gpt2", None)  # model types whose vocab.json and merges.txt go with GPT-2's split pattern


def read_tokenizer(directory: Path, model: dict[str, Any] | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face directory: tokenizer.json, or GPT-2's vocab.json and merges.txt.

    `model` is the content of config.json, if it was read before. A character tokenizer that `write_tokenizer` wrote
    becomes a CharTokenizer again. Raises InputError.
    """
    if model is None:
        model = read_settings(directory / "config.json", optional=True)
    settings, generation = (read_settings(directory / name, optional=True) for name in (CONFIG_JSON, GENERATION_JSON))
    if "added_tokens_decoder" not in settings:  # as in transformers
        settings |= read_settings(directory / SPECIAL_JSON, optional=True)
    template = read_text(directory / CHAT_TEMPLATE) if (directory / CHAT_TEMPLATE).is_file() else None
    if (directory / TOKENIZER_JSON).is_file():
        content = read_settings(directory / TOKENIZER_JSON)
        if letters := _characters(content):
            characters = CharTokenizer(letters)
            characters.add_special_tokens(token["content"] for token in content["added_tokens"])
            characters.stop_ids = frozenset(_end_ids(generation, GENERATION_JSON, characters))
            characters.chat_template = template or ""
            return characters
    elif (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        if model.get("model_type") not in GPT2_MODELS:
            raise InputError(f"{directory} has no {TOKENIZER_JSON}. Save its tokenizer again with transformers")
        content = _gpt2_content(directory, settings)
    else:
        raise InputError(f"there is no {TOKENIZER_JSON} in {directory}. Give a complete model directory")
    config = {key: _text_of(settings[key]) for key in KEPT if settings.get(key) is not None}
    if template is not None:
        config["chat_template"] = template
    if more := {path.stem: read_text(path) for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))}:
        templates = ({} if template is None else {"default": template}) | more
        config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    tokenizer = HuggingFaceTokenizer(directory.resolve().name[:90] or "huggingface", content, config, None)
    named = (tokenizer.tokenizer.token_to_id(token) for token in (str(config.get("eos_token", "")), END_OF_TEXT))
    first, last = ([] if id is None else [id] for id in named)
    stops = [*_end_ids(model, "config.json", tokenizer), *_end_ids(generation, GENERATION_JSON, tokenizer)]
    if ends := [*first, *stops, *last]:
        tokenizer.end_of_text = ends[0]
        tokenizer.token_bytes[ends[0]] = b""
        tokenizer.stop_ids = frozenset(stops) - {ends[0]}
    return tokenizer


def _end_ids(settings: dict[str, Any], file: str, tokenizer: Tokenizer) -> list[int]:
    """The eos_token_id of a settings file as a list, without ids that the tokenizer does not have."""
    found = settings.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(id) is int for id in ids):
        raise InputError(f"eos_token_id in {file} is {str(found)[:40]!r}, not a token id or a list. Correct it")
    return [id for id in ids if 0 <= id < tokenizer.vocab_size]


def _characters(content: dict[str, Any]) -> str:
    """The characters of a tokenizer.json of a character tokenizer, in the order of their ids; "" for another kind."""
    model, decoder = content.get("model"), content.get("decoder")
    if not isinstance(model, dict) or decoder != {"type": "Fuse"} or model.get("merges") != []:
        return ""
    vocab = model.get("vocab")
    letters = "".join(vocab) if isinstance(vocab, dict) else ""
    plain = vocab == {letter: id for id, letter in enumerate(letters)} and sorted(set(letters)) == list(letters)
    return letters if plain and not content.get("normalizer") and not content.get("pre_tokenizer") else ""


def read_text(path: Path) -> str:
    """The text of a file of at most MAX_FILE_BYTES. Raises InputError."""
    try:
        return plain_file(path, MAX_FILE_BYTES).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}. Give a complete model directory") from None


def read_settings(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file of at most MAX_FILE_BYTES; {} if it is `optional` and missing. Raises InputError."""
    if optional and not path.is_file():
        return {}
    try:
        return read_object(path, MAX_FILE_BYTES)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Give a complete model directory") from None
    except ValueError:
        raise InputError(f"{path} is not a JSON object. Give a complete model directory") from None


def _text_of(value: Any) -> Any:
    """The text of a special token, which may be stored as an object with `content`."""
    return value["content"] if isinstance(value, dict) and isinstance(value.get("content"), str) else value


def _gpt2_content(directory: Path, settings: dict[str, Any]) -> dict[str, Any]:
    vocab = read_settings(directory / "vocab.json")
    lines = read_text(directory / "merges.txt").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    special = {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
    added = _added_tokens(directory, settings)
    special |= {token["content"]: token["id"] for token in added if token["special"]}
    prefix = settings.get("add_prefix_space") is True
    split = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    content = _content(vocab, merges, special, split)
    content["added_tokens"] += [token for token in added if token["content"] not in special]
    content["added_tokens"].sort(key=lambda token: token["id"])
    content["model"]["ignore_merges"] = False
    begin = _text_of(settings.get("bos_token", END_OF_TEXT))
    if settings.get("add_bos_token") is True and isinstance(begin, str) and begin in special:
        single = [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        tokens = {begin: {"id": begin, "ids": [special[begin]], "tokens": [begin]}}
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": tokens,
        }  # fmt: skip
    return content


def _added_tokens(directory: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that were added to a vocab.json, as in a tokenizer.json. Raises InputError."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    file = CONFIG_JSON if "added_tokens_decoder" in settings else ADDED_JSON
    try:
        if file == CONFIG_JSON:
            tokens = [flags | token | {"id": int(id)} for id, token in settings["added_tokens_decoder"].items()]
        else:
            lists = [settings.get(f"{kind}_special_tokens") or [] for kind in ("additional", "extra")]
            named = {_text_of(token) for token in itertools.chain(map(settings.get, NAMED_TOKENS), *lists)}
            ids = read_settings(directory / ADDED_JSON, optional=True)
            tokens = [flags | {"id": id, "content": token, "special": token in named} for token, id in ids.items()]
        if all(isinstance(token["content"], str) and type(token["id"]) is int for token in tokens):
            return tokens
    except (ValueError, TypeError, AttributeError, KeyError):
        pass
    raise InputError(f"the added tokens in {directory / file} are not texts with ids. Give a complete model directory")


def _content(vocab: dict[str, int], merges: list[str], special: dict[str, int], split: Any) -> dict[str, Any]:
    """The content of a tokenizer.json for a BPE."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": id, "content": token, **flags, "special": True} for token, id in special.items()]
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    # ignore_merges: a word in the vocabulary is one token, as in tiktoken.
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
             "vocab": vocab, "merges": merges}  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": split, "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip


def begin_of_text(tokenizer: Tokenizer) -> tuple[int | None, bool]:
    """The begin-of-text id, and whether transformers puts it before a text by default."""
    if before := special_ids_around(tokenizer)[0]:
        return before[0], True
    token = tokenizer.config.get("bos_token") if isinstance(tokenizer, HuggingFaceTokenizer) else None
    found = tokenizer.tokenizer.token_to_id(token) if isinstance(token, str) else None  # type: ignore[attr-defined]
    return (tokenizer.end_of_text if found is None else found), False


def special_ids_around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that transformers puts before and after a text by default."""
    special = {*tokenizer.special_tokens.values(), *tokenizer.encode_prompt("")}
    known = "".join(token.decode() for token in tokenizer.token_bytes[:1000] if token.isalnum() and token.isascii())
    ids = tokenizer.encode_prompt(known[:1])
    inside = [place for place, id in enumerate(ids) if id not in special] or [len(ids)]
    return ids[: inside[0]], ids[inside[-1] + 1 :]


def as_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json for the tokenizer, tested on a text. Raises InputError if the ids differ."""
    import tokenizers

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.content
    letter_of = {byte: letter for letter, byte in bytes_of_letters().items()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = tokenizer.special_tokens
    if isinstance(tokenizer, CharTokenizer):
        content = _content({character: id for id, character in enumerate(tokenizer.characters)}, [], special, None)
        content["decoder"] = {"type": "Fuse"}
        probe = tokenizer.characters
    else:
        split: dict[str, Any] = byte_level
        merges: list[tuple[bytes, bytes]] = []
        if isinstance(tokenizer, BpeTokenizer):
            merges = merges_of(tokenizer.ranks)
            pattern = {"Regex": as_onig(tokenizer.pattern)}
            by_pattern = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            split = {"type": "Sequence", "pretokenizers": [by_pattern, byte_level]}
        word = {id: "".join(letter_of[byte] for byte in token) for id, token in enumerate(tokenizer.token_bytes)}
        vocab = {word[id]: id for id, token in enumerate(tokenizer.token_bytes) if token}
        if clash := next((token for token in special if token in vocab), None):
            raise InputError(f"the special token {clash!r} of {tokenizer.name} is also an ordinary token. Rename it")
        letters = [" ".join("".join(letter_of[byte] for byte in part) for part in pair) for pair in merges]
        content = _content(vocab | special, letters, special, split)
        probe = _PROBE
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.encode_special_tokens = True
    ids = theirs.encode(probe, add_special_tokens=False).ids
    if ids != tokenizer.encode(probe) or theirs.decode(ids) != probe:
        raise InputError(f"tokenizer {tokenizer.name} cannot be written as a {TOKENIZER_JSON}. Use gpt2, bpe:N or byte")
    return content


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each token is merged from, in the order of the ranks: a tokenizer.json stores merges, not ranks.

    Applying all merges of lower rank to a token's bytes leaves two parts: its pair. This also holds inside a longer
    text, where the merges between these bytes come in the same order.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(left + right, rank) for left, right in itertools.pairwise(parts)]
            best = min(pairs)
            if best >= rank:
                break  # no merge makes it: it is found only as a whole word
            place = pairs.index(best)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def as_onig(pattern: str) -> str:
    """A split pattern of tiktoken, for Oniguruma, the regular expressions of the package tokenizers.

    In Oniguruma {1,3}+ is a repeated repeat, not possessive, and $ matches the end of a line, not of the text.
    """
    return re.sub(r"\$(?=\||$)", r"\\z", re.sub(r"(\{\d+,?\d*\})\+", r"\1", pattern))


def write_tokenizer(
    tokenizer: Tokenizer, directory: Path, block_size: int, content: dict[str, Any] | None = None
) -> None:
    """Write the files from which transformers' AutoTokenizer makes the same ids. Raises InputError.

    `content` is what `as_tokenizer_json` returned, if it was called before: it takes 0.5 s for GPT-2's tokenizer.
    """
    content = content or as_tokenizer_json(tokenizer)
    (directory / TOKENIZER_JSON).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    config: dict[str, Any] = {}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        config = dict(tokenizer.config)
        if tokenizer.end_of_text is not None:
            config["eos_token"] = tokenizer.tokenizer.id_to_token(tokenizer.end_of_text)
    elif tokenizer.end_of_text is not None:
        config = dict.fromkeys(("bos_token", "eos_token"), END_OF_TEXT)
    several = isinstance(config.get("chat_template"), list)  # by name: they stay in tokenizer_config.json
    if not several:
        config.pop("chat_template", None)
    if tokenizer.chat_template and not several:
        (directory / CHAT_TEMPLATE).write_text(tokenizer.chat_template, encoding="utf-8")
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": block_size}
    config["clean_up_tokenization_spaces"] = False
    (directory / CONFIG_JSON).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
