"""Options from the command line and from config files, checked against one dataclass.

An option is written only in the dataclass: the parser, the checks and `--help` use its type, default, limits and
one line of help. Imports nothing heavy, so that `--help` answers at once.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import math
import operator
import os
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from nib.common.exits import InputError
from nib.common.streams import write_result

T = TypeVar("T")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
LARGEST = {int: 2**63, float: 2**1023}  # what 64 bits hold; Python's int is unbounded
LIMITS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le, "below": operator.lt}

# What several scripts take.
DEVICES = "auto, cpu, cuda, cuda:N or mps"
DTYPES = ("auto", "float32", "bfloat16", "float16")
ADAPTER = "a low-rank adapter to add to the model: a peft directory, or a LoRA run"


def option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), at_least: float | None = None,
    above: float | None = None, at_most: float | None = None, below: float | None = None, group: str = "options",
) -> Any:  # fmt: skip
    """A dataclass field that is an option, with its default, one line of help, and the limits of its value.

    If `choices` contains "true" and "false", the option is a switch with further values, such as compile=auto. An
    option of type list[str] may be given several times.
    """
    meta = dict(help=help, choices=choices, group=group, at_least=at_least, above=above, at_most=at_most, below=below)
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass
class Parsed(typing.Generic[T]):
    """A parsed command line: the checked settings, the positional arguments, and the names that were set."""

    settings: T
    arguments: list[str]
    given: set[str]


def parse(
    cls: type[T],
    argv: list[str],
    *,
    usage: str,
    about: str,
    config_file: bool = False,
    max_arguments: int | None = None,
) -> Parsed[T]:
    """Read `argv` into an instance of the dataclass `cls`. With --help, print the help and exit.

    With `config_file` the first positional argument is a config file, whose values the command line overrides.
    Raises InputError for an unknown name, a value of the wrong type or outside its limits.
    """
    parser = _Parser(cls, "_" if config_file else "-")
    values, arguments, help_wanted = parser.command_line(argv)
    if help_wanted:
        write_result(parser.help_text(usage, about))
        sys.exit(0)
    limit = 1 if config_file else max_arguments
    if limit is not None and len(arguments) > limit:
        raise InputError(f"unexpected argument {arguments[limit]!r}. Options are written --name=value; see --help")
    if config_file and arguments:
        values = {**parser.config_file(Path(arguments[0])), **values}
    return Parsed(cls(**values), arguments, set(values))


class _Parser:
    """Turns text, or a config file's Python values, into the fields of one dataclass."""

    def __init__(self, cls: type, separator: str) -> None:
        types = typing.get_type_hints(cls)
        self.fields = {field.name: field for field in dataclasses.fields(cls)}
        self.types: dict[str, Any] = {name: types[name] for name in self.fields}
        self.separator = separator

    def shown(self, name: str) -> str:
        return "--" + name.replace("_", self.separator)

    def is_switch(self, name: str) -> bool:
        return self.types[name] is bool or "true" in self.fields[name].metadata["choices"]

    def command_line(self, argv: list[str]) -> tuple[dict[str, Any], list[str], bool]:
        """The options, the positional arguments, and whether --help was given. With --help, errors do not count."""
        values: dict[str, Any] = {}
        arguments: list[str] = []
        mistake: InputError | None = None
        rest = list(argv)
        while rest:
            argument = rest.pop(0)
            if argument in ("-h", "--help"):
                return {}, [], True
            if argument == "--":
                arguments += rest
                break
            if not argument.startswith("-") or argument == "-":
                arguments.append(argument)
                continue
            try:
                name, value = self.option(argument, rest)
            except InputError as error:
                mistake = mistake or error
                continue
            values[name] = values.get(name, []) + value if isinstance(value, list) else value
        if mistake:
            raise mistake
        return values, arguments, False

    def option(self, argument: str, rest: list[str]) -> tuple[str, Any]:
        """The name and the value of an option. A value in the next argument is removed from `rest`."""
        key, equals, text = argument.partition("=")
        name, negated = self.find(key, "option " + key)
        if negated:
            if equals:
                raise InputError(f"{key} takes no value. Write {self.shown(name)}={text} or {key}")
            text = "false"
        elif not equals:
            text = self.following(name, key, rest)
        return name, self.from_text(name, text)

    def following(self, name: str, key: str, rest: list[str]) -> str:
        """The value of an option that was written without `=`: the next argument, or "true" for a switch."""
        if self.is_switch(name):
            words = TRUE + FALSE + self.fields[name].metadata["choices"]
            return rest.pop(0) if rest and rest[0].lower() in words else "true"
        if not rest or (rest[0].startswith("--") and self.known(rest[0].partition("=")[0])):
            raise InputError(f"option {key} needs a value. Write {key}=VALUE")
        return rest.pop(0)

    def known(self, key: str) -> bool:
        try:
            self.find(key, key)
        except InputError:
            return False
        return True

    def find(self, key: str, what: str) -> tuple[str, bool]:
        """The field that `key` names, and whether it is the `--no-` form. Raises InputError with the nearest name."""
        name = key.lstrip("-").replace("-", "_")
        if name in self.fields and (not key.startswith("-") or key.startswith("--")):
            return name, False
        if key.startswith("--no") and name[3:] in self.fields and self.is_switch(name[3:]):
            return name[3:], True
        near = _nearest(name, self.fields, 0.5)
        shown = self.shown(near) if near and key.startswith("-") else near
        raise InputError(f"unknown {what}. " + (f"Did you mean {shown}?" if near else "--help lists all names"))

    def config_file(self, path: Path) -> dict[str, Any]:
        """The values that a config file assigns. Its expressions are executed: it is the user's own Python."""
        try:
            with tokenize.open(path) as file:  # which respects a byte order mark and a coding line
                source = file.read()
        except (OSError, SyntaxError, UnicodeError, LookupError) as error:
            have = sorted(str(file) for file in Path("config").glob("*.py"))
            reason = (
                error.strerror if isinstance(error, OSError) else "it is not UTF-8 text, or has a wrong coding line"
            )
            how = f"There are: {' '.join(have)}" if have else "Give a file of lines like n_layer = 6"
            raise InputError(f"cannot read config file {path}: {reason}. {how}") from None
        try:
            tree = ast.parse(source, filename=str(path))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
            raise InputError(f"config file {path} is not valid Python: {error}. Write lines like n_layer = 6") from None
        for node in tree.body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not docstring and not isinstance(node, ast.Assign | ast.AnnAssign):
                raise InputError(f"{path}, line {node.lineno}: only assignments are read. Write lines like n_layer = 6")
        namespace: dict[str, Any] = {}
        try:
            exec(compile(tree, str(path), "exec"), namespace)
        except (Exception, SystemExit) as error:
            line = error.__traceback__.tb_next.tb_lineno if error.__traceback__ and error.__traceback__.tb_next else "?"
            raise InputError(f"{path}, line {line}: {type(error).__name__}: {error}. Correct that line") from None
        values = {}
        for name, value in namespace.items():
            if name.startswith("_"):  # a helper variable of the file
                continue
            self.find(name, f"setting {name} in {path}")
            values[name] = self.from_python(name, value, f"{path}: {name}")
        return values

    def from_text(self, name: str, text: str) -> Any:
        kind, where = self.types[name], self.shown(name)
        if kind == list[str]:
            return [text]
        if kind is bool:
            if text.lower() not in TRUE + FALSE:
                raise InputError(
                    f"{where} is true or false, not {_shown(text)}. Write {where} or {self.shown('no_' + name)}"
                )
            return text.lower() in TRUE
        if kind in (int, float):
            for read in (int, float):
                with contextlib.suppress(ValueError):
                    return self.checked(name, read(text), where)
            raise InputError(f"{where} must be {_article(kind)}, not {_shown(text)}. {self.example(name)}")
        if self.is_switch(name) and text.lower() in TRUE + FALSE:
            text = "true" if text.lower() in TRUE else "false"
        return self.checked(name, text, where)

    def from_python(self, name: str, value: Any, where: str) -> Any:
        kind = self.types[name]
        if self.is_switch(name) and kind is str and isinstance(value, bool):
            value = str(value).lower()
        accepted = {float: (int, float), int: (int, float), list[str]: (list, tuple)}.get(kind, (kind,))
        wrong = not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool))
        if wrong or (kind == list[str] and not all(isinstance(item, str) for item in value)):
            raise InputError(f"{where} must be {_article(kind)}, not {_shown(value)}. {self.example(name)}")
        return list(value) if kind == list[str] else self.checked(name, value, where)

    def checked(self, name: str, value: Any, where: str) -> Any:
        kind, limits = self.types[name], self.fields[name].metadata
        if kind in (int, float):
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{where} must be a finite number, not {value}. {self.example(name)}")
            if kind is int and value != int(value):
                raise InputError(f"{where} must be a whole number, not {value}. {self.example(name)}")
            if abs(value) >= LARGEST[kind]:
                raise InputError(f"{where} is too large. {self.example(name)}")
            value = kind(value)
            for limit, holds in LIMITS.items():
                if limits[limit] is not None and not holds(value, limits[limit]):
                    wanted = f"{limit.replace('_', ' ')} {limits[limit]}"
                    raise InputError(f"{where} must be {wanted}, not {value}. {self.example(name)}")
        elif kind is str and ("\0" in value or value != value.encode("utf-8", "ignore").decode("utf-8")):
            raise InputError(f"{where} holds a NUL or invalid Unicode: {_shown(value)}. {self.example(name)}")
        if limits["choices"] and value not in limits["choices"]:
            near = _nearest(str(value), limits["choices"], 0.6)
            hint = f"Did you mean {near}?" if near else "Choose one of them"
            raise InputError(f"{where} must be one of {', '.join(limits['choices'])}, not {_shown(value)}. {hint}")
        return value

    def example(self, name: str) -> str:
        default = self.fields[name].default
        return "See --help" if default in ("", dataclasses.MISSING) else f"The default is {_literal(default)}"

    def help_text(self, usage: str, about: str) -> str:
        try:
            width = int(os.environ.get("COLUMNS") or 0) or os.get_terminal_size().columns or 110
        except (ValueError, OSError):  # standard output is not a terminal
            width = 110
        width = max(70, min(width, 120))
        lines = [f"usage: {usage}", "", *textwrap.wrap(about, width)]
        group = None
        for name, field in self.fields.items():
            if field.metadata["group"] != group:
                group = field.metadata["group"]
                lines += ["", f"{group}:"]
            kind = self.types[name]
            choices = field.metadata["choices"]
            value = "|".join(choices) or {bool: "", int: "int", float: "float"}.get(kind, "TEXT")
            default = "" if kind == list[str] or field.default == "" else f" [{_literal(field.default)}]"
            head = f"  {self.shown(name)}{'=' if value else ''}{value}"
            body = textwrap.wrap((field.metadata["help"] + default).strip(), width - 34) or [""]
            if len(head) > 32:
                lines.append(head)
                head = ""
            lines.append(f"{head:<34}{body[0]}")
            lines += [" " * 34 + line for line in body[1:]]
        note = "Booleans: --name, --name=true or --no-name. Numbers may be written 1e4 or 10_000. - and _ are the same."
        lines += ["", note]
        return "\n".join(lines)


def _nearest(word: str, words: Iterable[str], cutoff: float) -> str:
    """The most similar of `words`; empty if none is as similar as `cutoff` (1: the same)."""
    import difflib  # here, not at the top, since it takes 1 ms of --help

    return (difflib.get_close_matches(word, words, n=1, cutoff=cutoff) or [""])[0]


def _article(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    return names.get(kind, "a list of texts")


def _shown(value: Any) -> str:
    """A value for a message, shortened if it is long."""
    try:
        text = repr(value)
    except Exception:  # an int of over 4300 digits, or an object whose __repr__ fails
        return f"this {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
