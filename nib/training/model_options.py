"""The model's options as settings: read from GPTConfig in model.py, without importing torch.

Each field of GPTConfig is a setting of the same name and default; the comment at the end of its line is its help.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
import tokenize
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nib.common.options import option

MODEL_FILE = Path(__file__).resolve().parents[2] / "model.py"
FROM_DATASET = "vocab_size"  # the only field that is not a setting


def imports_torch(node: ast.stmt) -> bool:
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    modules += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
    return any(module.split(".")[0] == "torch" for module in modules)


def load_config(path: Path = MODEL_FILE) -> tuple[type, dict[str, str]]:
    """GPTConfig, and the comment of each of its fields.

    model.py is executed up to the end of that class, without the imports of torch, which take a second. If that fails,
    all of model.py is executed.
    """
    with tokenize.open(path) as file:
        source = file.read()
    up_to_config = re.match(r".*?^class GPTConfig\b.*?(?=^[^\s#]|\Z)", source, re.DOTALL | re.MULTILINE)
    try:
        tree = ast.parse(up_to_config[0] if up_to_config else source)  # the whole file takes 5 ms
    except SyntaxError:  # a text in the class has lines that are not indented
        tree = ast.parse(source, filename=str(path))
    config = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "GPTConfig")
    above = tree.body[: tree.body.index(config) + 1]
    beginning = ast.Module([node for node in above if not imports_torch(node)], type_ignores=[])
    module = types.ModuleType("model_config")
    sys.modules[module.__name__] = module  # dataclass and typing look up names of annotations there
    try:
        exec(compile(beginning, str(path), "exec"), module.__dict__)
    except Exception:  # it needs torch, or has a bug, which is raised again below
        exec(compile(source, str(path), "exec"), module.__dict__)
    lines, comments = source.split("\n"), {}
    for node in config.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            last = lines[(node.end_lineno or 0) - 1].encode()  # columns count bytes
            comments[node.target.id] = last[node.end_col_offset :].decode().lstrip(" #").rstrip()
    return module.GPTConfig, comments


def model_settings(config: type, comments: dict[str, str]) -> type:
    """A dataclass of options: one for each field of `config`, in the same order."""
    types, made = get_type_hints(config), []
    for field in dataclasses.fields(config):
        if field.name == FROM_DATASET:
            continue
        kind: Any = types[field.name]
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        kind = type(choices[0]) if choices else kind
        if (
            not all(isinstance(choice, str) for choice in choices)
            or kind not in (int, float, bool, str)
            or field.default is dataclasses.MISSING
        ):
            raise TypeError(f"GPTConfig.{field.name} needs a default, and a type of int, float, bool, str or Literal")
        made.append((field.name, kind, option(field.default, comments[field.name], choices=choices, group="model")))
    return dataclasses.make_dataclass("ModelSettings", made, init=False, repr=False, eq=False)
