"""Look inside a model: write one HTML page that shows what it does with a text and needs no network.

python look.py --prompt 'def main('                       the newest run under out/
python look.py out/small --prompt FILE:notes.txt --output notes.html
python look.py small --prompt 'import ' --checkpoints     with a slider over the run's checkpoints
"""

from __future__ import annotations

from nib.common.signals import exit_on_interrupt

if __name__ == "__main__":  # before the other imports, so that Ctrl-C during them leaves no traceback
    exit_on_interrupt()

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nib.common.exits import InputError, memory_errors, run_script
from nib.common.options import ADAPTER, DEVICES, Parsed, option, parse
from nib.cpu.threads import choose_threads
from nib.generation.request import SamplingSettings, read_prompt

if TYPE_CHECKING:
    from nib.formats.load import Source

USAGE = "python look.py [RUN|CHECKPOINT|HF_DIR] --prompt TEXT|FILE:path [--name=value]..."
ABOUT = (
    "Shows what a model does with a text, and how it would continue it: surprise, next tokens, attention, the "
    "prediction after each layer, shares in a logit, positions, embeddings. Writes one HTML file that needs no network."
)
MOST_CHECKPOINTS = 12  # on one page; evenly spaced ones if the run has more


@dataclass
class Options:
    prompt: str = option("", "the text to look at, or FILE:path to read it from a file")
    output: str = option("look.html", "the page to write")
    max_new_tokens: int = option(
        16, "maximum number of tokens to generate after the prompt, as sample.py does", at_least=0
    )
    adapter: str = option("", ADAPTER)
    checkpoints: bool = option(False, "also show what the run's other checkpoints do with the same text")
    device: str = option("auto", DEVICES)


def main() -> None:
    parsed = parse(Options, sys.argv[1:], usage=USAGE, about=ABOUT, max_arguments=1)
    prompt = read_prompt(parsed.settings.prompt)
    if not prompt:
        raise InputError("there is no text to look at. Give --prompt TEXT or --prompt FILE:path")
    check_writable(Path(parsed.settings.output))

    choose_threads()
    with memory_errors("Give a shorter prompt, or use a smaller model"):
        look(parsed, prompt)


def check_writable(output: Path) -> None:
    """Raise InputError now, before the work, if the page cannot be written."""
    new = not output.exists()
    try:
        output.open("ab").close()
        if new:
            output.unlink()
    except OSError as error:
        raise InputError(f"cannot write {output}: {error.strerror}. Give a file as --output") from None


def look(parsed: Parsed[Options], prompt: str) -> None:
    """Write the page. Raises InputError."""
    from model import GPT, GPTConfig
    from nib.common.device import pick_device
    from nib.formats.load import build, open_source, read_config
    from nib.generation.engine import generate_text
    from nib.look.page import make_page
    from nib.look.snapshot import check_length, take_snapshot

    options, device = parsed.settings, pick_device(parsed.settings.device)
    source = open_source(parsed.arguments[0] if parsed.arguments else None, adapter=options.adapter)
    sources: Sequence[Source] = checkpoints_beside(source) if options.checkpoints else [source]
    tokenizer, config = source.tokenizer(), read_config(source, GPTConfig)
    prompt_ids = tokenizer.encode_prompt(prompt)
    if len(prompt_ids) > config.block_size:
        raise InputError(f"the prompt has {len(prompt_ids)} tokens, the context {config.block_size}. Shorten it")
    new = min(options.max_new_tokens, config.block_size - len(prompt_ids))
    check_length(config, len(prompt_ids) + new)

    def load(source: Source) -> Any:  # float32, so that sums are exact; unfused, so that hooks see every part
        return build(source, lambda: GPT(config)).float().to(device).eval()

    model, settings = load(source), SamplingSettings(max_new_tokens=new)
    (sample,) = generate_text(model, tokenizer, [prompt], settings)
    ids = sample.prompt_tokens + sample.tokens
    snapshots = []
    for each in sources:
        snapshot = take_snapshot(model if each is source else load(each), ids, tokenizer)
        snapshots.append(snapshot | {"step": getattr(each, "state", {}).get("step")})
    about = {
        "model": str(source.directory), "parameters": sum(each.numel() for each in model.parameters()),
        "config": vars(config), "prompt_tokens": len(sample.prompt_tokens),
        "ended": sample.finish_reason == "end_of_text",
        "vocab_size": min(config.vocab_size, tokenizer.vocab_size),
        "shown": sources.index(source), "defaults": {
            "temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p,
        },
    }  # fmt: skip
    if len(snapshots) > 1:
        print(f"checkpoints: steps {', '.join(str(each['step']) for each in snapshots)}")
    page = make_page(ids, tokenizer, snapshots, about)
    Path(options.output).write_text(page, encoding="utf-8")
    print(f"{options.output}: {len(ids)} tokens, {len(page) / 1e6:.1f} MB; open it in a browser")


def checkpoints_beside(source: Source) -> list[Source]:
    """The checkpoints of the source's run, including the source, in the order of training. Raises InputError."""
    from nib.formats.checkpoint import BrokenCheckpoint, list_checkpoints
    from nib.formats.load import open_source

    if not getattr(source, "state", {}):
        raise InputError(f"{source.directory} has no checkpoints of nib's training. Leave out --checkpoints")
    paths = [path for path in list_checkpoints(source.directory.parent)[::-1] if path.name != source.directory.name]
    step = max(1.0, len(paths) / (MOST_CHECKPOINTS - 1))
    found: list[Source] = [source]
    for index in range(min(len(paths), MOST_CHECKPOINTS - 1)):
        path = paths[int(index * step)]
        try:
            found.append(open_source(str(path)))
        except BrokenCheckpoint as error:
            print(f"warning: {path.name} is skipped: {error}", file=sys.stderr)
    return sorted(found, key=lambda each: int(each.state["step"]))  # type: ignore[union-attr]


if __name__ == "__main__":
    run_script(main)
