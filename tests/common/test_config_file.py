"""Config files: what they may say, what is refused, and that nothing but InputError comes of any text."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import NAMES, Options, quick, read, refused, sound
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from nib.common.exits import InputError
from nib.common.options import parse
from nib.training.settings import TrainSettings

# ---- config files --------------------------------------------------------------------------------------------------


def write_config(directory: Path, text: str) -> str:
    path = directory / "my.py"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_config_file_of_every_kind(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        '"""What it trains,\n\nand how long."""\n'
        "_width = 64  # a helper\nn_layer: int = _width // 16\nseed = 1e3; learning_rate = 3\n"
        '"""a comment"""\nbias, eval_only = False, True\ncompile = False\nnorm = "layer" + "norm"\n'
        "stop = ('a', 'b')\nout_dir = f'out/{_width}'\ndropout = max(0, 0.1)\n",
    )
    expected = Options(
        n_layer=4, seed=1000, learning_rate=3.0, bias=False, eval_only=True, compile="false", norm="layernorm",
        stop=["a", "b"], out_dir="out/64", dropout=0.1,
    )  # fmt: skip
    parsed = read(path, config_file=True)
    assert parsed.settings == expected and parsed.arguments == [path]
    assert parsed.given == set(vars(expected))
    assert type(parsed.settings.seed) is int and type(parsed.settings.learning_rate) is float


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfout_dir = 'caf\xc3\xa9'\n",
        b"\xef\xbb\xbf# -*- coding: utf-8 -*-\r\nout_dir = 'caf\xc3\xa9'\r\n",
        b"# -*- coding: latin-1 -*-\n# \xe9\nout_dir = 'caf\xe9'\n",
        b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\nout_dir = 'caf\xe9'\n",
        b'"""a\r\nb"""\r\nout_dir = "caf\xc3\xa9"\r\n',
        b"out_dir = 'caf\xc3\xa9'  # \xe2\x80\xa8 is no end of a line\n",
    ],
)
def test_a_config_file_is_decoded_as_python_does(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.py").write_bytes(content)
    namespace: dict[str, Any] = {}
    exec(compile(content, "my.py", "exec"), namespace)
    assert read(str(tmp_path / "my.py"), config_file=True).settings.out_dir == namespace["out_dir"] == "café"


@pytest.mark.parametrize("coding", ["no-such-coding", "hex", "ascii", "utf-16", "punycode", "undefined"])
def test_a_coding_line_that_is_wrong_is_said(coding: str, tmp_path: Path) -> None:
    (tmp_path / "my.py").write_bytes(f"# coding: {coding}\nout_dir = 'café'\n".encode())
    assert "or has a wrong coding line" in refused(str(tmp_path / "my.py"), config_file=True)


def test_command_line_is_above_file_is_above_default(tmp_path: Path) -> None:
    path = write_config(tmp_path, "n_layer = 3\nseed = 4\nstop = ['a']\nbias = True\n")
    for argv in ([path, "--seed=5", "--stop=b", "--no-bias"], ["--seed=5", "--stop=b", "--no-bias", path]):
        parsed = read(*argv, config_file=True)
        assert parsed.settings == Options(n_layer=3, seed=5, stop=["b"], bias=False)
        assert parsed.given == {"n_layer", "seed", "stop", "bias"}
    # A value on the command line wins also where the file's is impossible? No: the file is wrong, and said to be.
    assert "n_layer must be at least 1, not 0" in refused(
        write_config(tmp_path, "n_layer = 0\n"), "--n_layer=2", config_file=True
    )


def test_repository_configs_are_valid() -> None:
    for path in sorted((ROOT / "config").glob("*.py")):
        parsed = parse(TrainSettings, [str(path)], usage="", about="", config_file=True)
        parsed.settings.check()


BAD_CONFIGS: list[tuple[str, str]] = [
    ("n_layr = 4", r"unknown setting n_layr in .*my\.py. Did you mean n_layer\?"),
    ("zzzzzz = 4", r"unknown setting zzzzzz in .*my\.py. --help lists all names"),
    ("no_bias = True", r"unknown setting no_bias in .*my\.py. Did you mean bias\?"),
    ("n_layer = '6'", r"my\.py: n_layer must be a whole number, not '6'. The default is 6"),
    ("n_layer = 6.5", r"my\.py: n_layer must be a whole number, not 6\.5"),
    ("n_layer = True", r"n_layer must be a whole number, not True"),
    ("n_layer = None", r"n_layer must be a whole number, not None"),
    ("n_layer = 0", r"n_layer must be at least 1, not 0"),
    ("n_layer = 10**400", r"n_layer is too large"),
    ("n_layer = 10**5000", r"n_layer is too large"),
    ("learning_rate = -10**5000", r"learning_rate is too large"),
    ("n_layer = [10**5000]", r"n_layer must be a whole number, not this list"),
    ("learning_rate = 'fast'", r"learning_rate must be a number, not 'fast'"),
    ("learning_rate = float('nan')", r"learning_rate must be a finite number, not nan"),
    ("learning_rate = 1j", r"learning_rate must be a number, not 1j"),
    ("bias = 1", r"bias must be True or False, not 1. The default is true"),
    ("bias = 'true'", r"bias must be True or False, not 'true'"),
    ("norm = 'rms'", r"norm must be one of layernorm, rmsnorm, not 'rms'"),
    ("norm = ['rmsnorm']", r"norm must be text, not \['rmsnorm'\]"),
    ("compile = 1", r"compile must be text, not 1"),
    ("out_dir = 3", r"out_dir must be text, not 3"),
    ("out_dir = 'a\\0b'", r"out_dir holds a NUL or invalid Unicode"),
    ("out_dir = '\\n' * 3 + 'a'; n_layer = '\\n'", r"n_layer must be a whole number"),
    ("stop = 'a'", r"stop must be a list of texts, not 'a'"),
    ("stop = ['a', 3]", r"stop must be a list of texts"),
    ("n_layer = 4 +", r"my\.py is not valid Python: invalid syntax .*line 1"),
    ("x = (", r"my\.py is not valid Python: .*never closed.*line 1"),
    ("\x00", r"my\.py is not valid Python"),
    ("n_layer = " + "-" * 200_000 + "1", r"my\.py is not valid Python"),
    ("n_layer = " + "1 + " * 20_000 + "1", r"my\.py"),
    ("import os", r"my\.py, line 1: only assignments are read"),
    ("n_layer = 3\nfrom os import path", r"my\.py, line 2: only assignments are read"),
    ("for n_layer in (1, 2): pass", r"line 1: only assignments are read"),
    ("def f(): pass", r"line 1: only assignments are read"),
    ("print(3)", r"line 1: only assignments are read"),
    ("n_layer = 3\n\nn_layer = 1 / 0", r"my\.py, line 3: ZeroDivisionError: division by zero. Correct"),
    ("n_layer = width", r"my\.py, line 1: NameError: name 'width' is not defined"),
    ("n_layer = exit(0)", r"my\.py, line 1: SystemExit"),
    ("n_layer = [].x", r"AttributeError"),
]


@pytest.mark.parametrize(("text", "pattern"), BAD_CONFIGS, ids=lambda value: ascii(value)[1:40])
def test_bad_config_files(text: str, pattern: str, tmp_path: Path) -> None:
    message = refused(write_config(tmp_path, text), config_file=True)
    assert re.search(pattern, message), message


@pytest.mark.parametrize("kind", ["missing", "directory", "binary", "too long"])
def test_unreadable_config_files(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "small.py").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "directory").mkdir()
    monkeypatch.chdir(tmp_path)
    message = refused("x" * 300 if kind == "too long" else kind, config_file=True)
    assert message.startswith("cannot read config file") and message.endswith(f"There are: config{os.sep}small.py")
    (tmp_path / "config/small.py").unlink()
    message = refused(kind, config_file=True)
    assert "There are" not in message and message.endswith(". Give a file of lines like n_layer = 6")


def test_help_and_a_second_argument_do_not_run_the_config(tmp_path: Path) -> None:
    path = write_config(tmp_path, f"_x = open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "unexpected argument 'b'" in refused(path, "b", config_file=True)
    with pytest.raises(SystemExit):
        read(path, "--help", config_file=True)
    assert not (tmp_path / "ran").exists()


# ---- any text at all -----------------------------------------------------------------------------------------------
PYTHON_VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(),
        st.integers(-(10**320), 10**320), st.sampled_from(["layernorm", "rmsnorm", "auto", "true", 4, 0.5, ...]),
    ),
    lambda inner: st.one_of(st.lists(inner), st.tuples(inner), st.dictionaries(st.text(), inner)),
    max_leaves=4,
)  # fmt: skip


def read_config_text(directory: Path, text: str) -> Options | None:
    path = directory / "any.py"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        found = read(str(path), config_file=True).settings
    except InputError as error:
        assert str(error)
        return None
    sound(found)
    return found


@quick
@given(st.lists(st.tuples(NAMES, PYTHON_VALUES), max_size=4))
def test_any_assignments_are_parsed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, assignments: list[tuple[str, Any]]
) -> None:
    lines = [f"{name} = {value!r}\n" for name, value in assignments]
    read_config_text(
        shared_directory(tmp_path_factory), "".join(lines).replace("inf", "1e999").replace("nan", "0*1e999")
    )


@quick
@given(st.text())
def test_any_text_as_a_config_is_parsed_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    read_config_text(shared_directory(tmp_path_factory), text)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@quick
@given(st.integers(0, 60), st.integers(0, 8), st.text("'\"()[]{}=:;,.#\\ \n\tab19_\0é😀", max_size=3))
def test_a_damaged_config_is_parsed_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, lost: int, found: str
) -> None:
    sound_text = "_half = 2\nn_layer = 3 * _half\nbias = True\nnorm = 'layernorm'\n"
    damaged = sound_text[:at] + found + sound_text[at + lost :]
    read_config_text(shared_directory(tmp_path_factory), damaged)


def shared_directory(factory: pytest.TempPathFactory) -> Path:
    """One directory for all examples of a test: each writes its file anew."""
    if not hasattr(factory, "for_configs"):
        factory.for_configs = factory.mktemp("configs")  # type: ignore[attr-defined]
    return factory.for_configs  # type: ignore[attr-defined, no-any-return]
