"""Compare chat templates in nib and in transformers: text, ids and masks must be the same.

    python bench/chat_templates.py [TRL_WHEEL]

Uses the templates of the package trl, from its wheel, which is downloaded if none is given. The tokenizer is a
byte-level BPE made here with the special tokens of all templates. Prints a table and one line of JSON.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nib.common.exits import InputError
from nib.data.chat import Chat
from nib.tokenizer.huggingface import read_tokenizer

SPECIAL = re.compile(r"<[|｜]\w[\w▁]*[|｜]>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|</?s>|<sop>|\[/?INST\]|\[gMASK\]")
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Where"}},
                       "required": ["city"]},
    },
}  # fmt: skip
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bern"}}}


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "one turn": ([message("user", "What is 2 + 2?"), message("assistant", "It is 4.")], None),
    "system, two turns": (
        [
            message("system", "Be brief."), message("user", "Hello"), message("assistant", "Hi there!\nWhat now?"),
            message("user", "Name a colour."), message("assistant", "Blue"),
        ],
        None,
    ),
    "white space, scripts, special tokens": (
        [
            message("user", "  é中文🙂 <|im_end|> </s>\n\n"), message("assistant", "\n Ça va 🙂\n\n"),
            message("user", "{{ 1 + 1 }} \"quoted\" & <b>"), message("assistant", "  fine  "),
        ],
        None,
    ),
    "tools": (
        [
            message("user", "Weather in Bern?"), message("assistant", "", tool_calls=[CALL]),
            message("tool", "sunny", name="get_weather"), message("assistant", "It is sunny."),
        ],
        [WEATHER],
    ),
    "parts": (
        [
            message("user", [{"type": "text", "text": "What is "}, {"type": "text", "text": "this?"}]),
            message("assistant", [{"type": "text", "text": "A test."}]),
        ],
        None,
    ),
    "reasoning": (
        [
            message("user", "3 * 3?"), message("assistant", "9", reasoning_content="Three threes."),
            message("user", "And 4 * 4?"), message("assistant", "<think>\nFour fours.\n</think>\n\n16"),
        ],
        None,
    ),
}  # fmt: skip


def templates_of(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jinja"))
        return {Path(name).stem: archive.read(name).decode("utf-8") for name in names}


def make_tokenizer(templates: dict[str, str], directory: Path) -> None:
    """Write a tokenizer with the special tokens of all the templates."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(templates.values(), trainer)
    special = sorted({token for source in templates.values() for token in SPECIAL.findall(source)} | {"<s>", "</s>"})
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)


def compare(templates: dict[str, str], directory: Path) -> dict[str, dict[str, list[str]]]:
    """The results by template and kind of check: "equal", "error", "refused: ..." or the difference."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(directory), read_tokenizer(directory)
    found: dict[str, dict[str, list[str]]] = {}
    for name, source in templates.items():
        theirs.chat_template = ours.chat_template = source
        chat = Chat(ours)
        outcome = found[name] = collections.defaultdict(list)
        for label, (messages, tools) in CONVERSATIONS.items():
            for prompt in (False, True):
                outcome["text"].append(compare_texts(theirs, chat, messages, tools, prompt))
            outcome["mask" if chat.has_generation else "subtracted"].append(
                compare_masks(theirs, chat, messages, tools, "special" not in label)
            )
    return found


def compare_texts(theirs: Any, chat: Chat, messages: Any, tools: Any, prompt: bool) -> str:
    texts, errors = [], []
    try:
        texts.append(theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:
        errors.append(" ".join(str(error).split())[:200])
    try:
        texts.append(chat.render(messages, tools, prompt))
    except InputError as error:
        errors.append(str(error))
    if len(texts) == 2:
        return "equal" if texts[0] == texts[1] else f"differs: {texts}"
    return "error" if len(errors) == 2 and errors[0].strip(": .") in errors[1] else f"differs: {texts} {errors}"


def compare_masks(theirs: Any, chat: Chat, messages: Any, tools: Any, same_ids: bool) -> str:
    """`same_ids` is false if a message contains special tokens: nib encodes them as text, transformers does not."""
    try:
        ids, mask = chat.encode_conversation(messages, tools)
    except InputError as error:
        return f"refused: {error}"
    wanted = theirs.apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=chat.has_generation
    )
    if same_ids and ids.tolist() != wanted["input_ids"]:
        return f"ids differ: {ids.tolist()} {wanted['input_ids']}"
    if chat.has_generation and same_ids and mask.tolist() != wanted["assistant_masks"]:
        learned = [
            theirs.decode([id for id, on in zip(ids, each, strict=True) if on])
            for each in (mask, wanted["assistant_masks"])
        ]
        return f"mask differs: {learned}"
    return "equal"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if len(sys.argv) > 1:
            wheel = Path(sys.argv[1])
        else:
            subprocess.run([sys.executable, "-m", "pip", "download", "-q", "trl", "--no-deps", "-d", name], check=True)
            wheel = next(place.glob("trl-*.whl"))
        templates = templates_of(wheel)
        make_tokenizer(templates, place / "tokenizer")
        found = compare(templates, place / "tokenizer")
    print(f"{len(templates)} templates of {wheel.name}, {len(CONVERSATIONS)} conversations")
    total: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, outcome in found.items():
        cells = []
        for kind, results in outcome.items():
            counts = collections.Counter(result.partition(":")[0] for result in results)
            total[kind] += counts
            cells.append(f"{kind}: " + ", ".join(f"{count} {result}" for result, count in counts.items()))
        print(f"{name:36} {'; '.join(cells)}")
        for result in sorted({result for results in outcome.values() for result in results if ":" in result}):
            print(f"    {result}")
    print(json.dumps({"wheel": wheel.name, "templates": len(templates), **total}))


if __name__ == "__main__":
    main()
