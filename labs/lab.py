"""What the labs share: each trains its variants on the same data and seeds, and prints one table.

    python labs/NAME.py [CONFIG.py] [--seeds=3] [--name=value ...]    train and compare; the settings are train.py's
    python labs/NAME.py sample.py RUN [...]                           any script of nib, with the lab's model

The runs are ordinary ones, out/labs/NAME/VARIANT-SEED. The same command resumes where it stopped; when all runs are
complete it prints the table again. Other settings need another --out_dir.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from nib.cpu.threads import choose_threads

choose_threads()  # before torch is imported
import model
from nib.common.exits import InputError, RunError, run_script
from nib.common.options import Parsed, option, parse
from nib.training.settings import TrainSettings

SCRIPTS = ("train.py", "sample.py", "evaluate.py", "look.py", "export.py")  # that also run with the model of a lab
DEFAULT = str(ROOT / "config/tiny.py")  # 200 steps of a model of 0.1 M parameters: 4 seconds on an idle machine
Variants = dict[str, dict[str, Any]]  # name: the variant's options, the baseline first
Measure = Callable[[Any], str]  # of a trained model, for an additional column


@dataclasses.dataclass
class LabSettings(TrainSettings):
    seeds: int = option(3, "how many seeds each variant is trained with", at_least=1, group="run")


def main(
    text: str, file: str, variants: Variants, measures: Mapping[str, Measure] = {}, common: tuple[str, ...] = (),
    **parts: Any,
) -> None:  # fmt: skip
    """Run the lab in `file`, or a script with the lab's model, and end the process.

    `text` is the lab's docstring, whose last paragraph is the conclusion. `parts` replace what has the same names in
    model.py. `measures` are by column heading. `common` are options of all variants, which the command line overrides.
    """
    for name, part in parts.items():
        setattr(model, name, part)
    arguments = sys.argv[1:]
    if arguments and arguments[0] in SCRIPTS:
        sys.argv = arguments
        run_script(importlib.import_module(Path(arguments[0]).stem).main)
    if not arguments or arguments[0].startswith("-"):
        arguments.insert(0, DEFAULT)
    run_script(lambda: compare(Path(file).stem, variants, [arguments[0], *common, *arguments[1:]], measures, text))


def compare(
    lab: str, variants: Variants, arguments: list[str], measures: Mapping[str, Measure] = {}, text: str = ""
) -> None:
    """Train all variants with all seeds, and print the table row by row. Raises InputError."""
    usage = f"python labs/{lab}.py [CONFIG.py] [--seeds=3] [--name=value ...]"
    parsed = parse(LabSettings, arguments, usage=usage, about=f"Lab: {lab}.", config_file=True)
    parsed.settings.check()
    if parsed.settings.dry_run or parsed.settings.eval_only:
        raise InputError("labs do not support dry_run and eval_only. Use them with train.py")
    if parsed.settings.init_from != "scratch":
        raise InputError("a lab's variants are trained from scratch. Leave out init_from")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError("a lab runs in one process. Start it with python instead of torchrun")
    seeds = [parsed.settings.seed + each for each in range(parsed.settings.seeds)]
    root = Path(parsed.settings.out_dir or Path("out/labs", lab))
    width, wide, first, apart = max(map(len, variants)) + 2, max(9, 6 * len(seeds)), None, []
    head = f"{'':{width}}{'parameters':>10}  bits per byte  - baseline   {'each seed':{wide}}"
    print("  ".join([head, *measures]).rstrip(), flush=True)
    for name, options in variants.items():
        folder = re.sub(r"[^\w-]+", "_", name).strip("_")
        results = [train_one(parsed, root / f"{folder}-{seed}", seed, options) for seed in seeds]
        found, trained = [value for value, _ in results], [each for _, each in results if each is not None]
        parameters = sum(each.numel() for each in trained[0].parameters()) if trained else 0
        mean = statistics.mean(found)
        first = mean if first is None else first
        apart += [abs(one - other) for one, other in itertools.combinations(filter(math.isfinite, found), 2)]
        row = f"{name:{width}}{parameters:>10,}{mean:15.3f}{mean - first:+12.3f}   "
        row += f"{' '.join(f'{each:.3f}' for each in found):{wide}}"
        for heading, measure in measures.items():
            row += f"  {' '.join(dict.fromkeys(map(measure, trained))):{len(heading)}}"
        print(row.rstrip(), flush=True)
    if apart:
        print(f"{len(seeds)} seeds; two seeds of the same variant are {statistics.mean(apart):.3f} apart on average")
    else:
        print("one seed: the difference between seeds is not known. Use --seeds=3")
    if text:
        print(f"\nFrom the table in labs/{lab}.py:\n" + text.strip().rpartition("\n\n")[2])


def train_one(parsed: Parsed[Any], out: Path, seed: int, options: dict[str, Any]) -> tuple[float, Any]:
    """The final validation bits per byte of a run and its model; infinity and None if the run failed.

    `options` that train.py does not know are fields of the lab's GPTConfig: they become its defaults.
    """
    import train
    from nib.formats.load import build, open_source, read_config

    known = {name: value for name, value in options.items() if name in vars(parsed.settings)}
    settings = dataclasses.replace(parsed.settings, out_dir=str(out), seed=seed, **known)
    base = model.GPTConfig
    own, types = {name: value for name, value in options.items() if name not in known}, get_type_hints(base)
    fields = [(name, types[name], dataclasses.field(default=value)) for name, value in own.items()]
    try:
        model.GPTConfig = dataclasses.make_dataclass("GPTConfig", fields, bases=(base,))  # type: ignore[assignment, misc]
        with contextlib.redirect_stdout(io.StringIO()):  # the output is also in the run's log.txt
            if status := train.train(Parsed(settings, parsed.arguments, parsed.given)):
                sys.exit(status)
    except RunError as error:
        print(f"{out}: {error}", file=sys.stderr)
        return float("inf"), None
    finally:
        model.GPTConfig = base  # type: ignore[misc]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    values = [line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line]
    if not values:
        raise InputError(f"{settings.dataset} has no validation split. Prepare it with a larger --val-fraction")
    source = open_source(str(out))
    config = read_config(source, base)
    return values[-1], build(source, lambda: model.GPT(config))
