"""The compiled products: right at any size, each row for itself to the bit, and no trouble where they cannot be."""

from __future__ import annotations

import ctypes
import platform
import shutil

import pytest
import torch
from model_helpers import random_model, random_tokens
from torch.nn import functional as F

from nib.cpu import build as native
from nib.cpu.build import Kernels, compiled, kernels, load, made_kernels
from nib.cpu.int8 import Int8Linear, pack_int8, quantize, quantize_rows
from nib.cpu.linear import RowsLinear, pack_linears

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
QUICK = ["-O0", "-fPIC"]  # to compile
PLAIN = ["-O3", "-fPIC"]  # what any processor of the kind has
INTEL = platform.machine() == "x86_64"


@pytest.fixture
def no_kernels(monkeypatch):
    for module in ("cpu.build", "cpu.linear", "cpu.int8"):
        monkeypatch.setattr(f"nib.{module}.kernels", lambda: None)


def matrices(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(N * K)
    weight = torch.randn(N, K)
    return weight, *quantize_rows(weight), torch.randn(N)


@needs_compiler
@pytest.mark.parametrize("flags", [native.FLAGS, PLAIN] + [[*PLAIN, "-mavx2", "-mfma"]] * INTEL)
@torch.inference_mode()
def test_products_are_right_for_every_number_of_rows_and_size(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(native, "FLAGS", flags)
    made = Kernels(ctypes.CDLL(str(compiled(tmp_path))))
    assert made.agree()
    for N, K in ((1, 1), (7, 5), (48, 64), (25, 100), (100, 771)):
        weight, integers, scale, bias = matrices(N, K)
        for rows in (1, 2, 3, 7, 8, 13, 20):
            x = torch.randn(rows, K)
            for product, whole, added in (
                (made.linear(weight, None, None), weight, None),
                (made.linear(weight.bfloat16(), None, bias), weight.bfloat16(), bias),
                (made.linear(integers, scale, bias), integers * scale[:, None], bias),
            ):
                expected = F.linear(x.double(), whole.double(), None if added is None else added.double())
                # A float32 sum of K products, each below 25: far more than its rounding, far less than one term.
                assert (product(x) - expected).abs().max() < 1e-5 * (1 + K**0.5)


@needs_compiler
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_whatever_its_batch_and_the_threads():
    weight, integers, scale, bias = matrices(100, 771)
    x, threads = torch.randn(2, 11, 771), torch.get_num_threads()
    for matrix, factor in ((weight, None), (weight.bfloat16(), None), (integers, scale)):
        product = kernels().linear(matrix, factor, bias)
        together = product(x)
        assert together.shape == (2, 11, 100)
        for begin, end in ((3, 4), (2, 5), (0, 7), (3, 11)):
            assert torch.equal(product(x[1, begin:end]), together[1, begin:end])
        torch.set_num_threads(3)
        try:
            assert torch.equal(product(x), together)
        finally:
            torch.set_num_threads(threads)


def with_changed_source(monkeypatch, directory, name: str, change) -> None:
    """Compile copies from now on, of which the one of this name is changed."""
    directory.mkdir()
    for source in native.SOURCES:
        text = source.read_text()
        (directory / source.name).write_text(change(text) if source.name == name else text)
    monkeypatch.setattr(native, "SOURCES", [directory / source.name for source in native.SOURCES])


@needs_compiler
def test_compiled_once_and_again_for_another_source(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", QUICK)
    first = compiled(tmp_path)
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert compiled(tmp_path) == first and [path.name for path in tmp_path.iterdir()] == [first.name]
    monkeypatch.delenv("CC")
    for name in ("kernels.c", "blocks.c"):
        with_changed_source(monkeypatch, tmp_path / name.replace(".", "-"), name, lambda text: text + "\n")
        assert compiled(tmp_path) != first


@needs_compiler
def test_a_damaged_library_is_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "FLAGS", QUICK)
    compiled(tmp_path).write_bytes(b"\0" * 100)
    assert Kernels(load(tmp_path)).agree()
    assert compiled(tmp_path).stat().st_size > 1000


@pytest.mark.parametrize("trouble", ["no compiler", "a compiler that fails", "wrong results", "no place to write"])
def test_whatever_is_wrong_with_the_compiler_there_are_just_no_kernels(tmp_path, monkeypatch, trouble):
    monkeypatch.setattr(native, "FLAGS", QUICK)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if trouble == "no compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif trouble == "a compiler that fails":
        monkeypatch.setenv("CC", "false")
    elif trouble == "wrong results":
        with_changed_source(
            monkeypatch, tmp_path / "wrong", "kernels.c", lambda text: text.replace("*= m.scale[j]", "+= m.scale[j]")
        )
    else:
        (tmp_path / "nib").write_text("a file where the directory should be")
    found, reason = made_kernels.__wrapped__()
    assert (found is not None) == (trouble == "no place to write" and bool(shutil.which("cc")))
    assert bool(reason) == (found is None) and "\n" not in reason


@pytest.mark.parametrize("place", [{}, {"XDG_CACHE_HOME": "cache"}, {"HOME": "home"}])
def test_without_a_home_directory_nothing_is_kept_and_no_directory_is_made(tmp_path, monkeypatch, place):
    """Also for a user without an entry in passwd, as containers have."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.getuid", lambda: 54321)
    with native.cache_directory() as directory:
        assert directory.is_dir() and directory.is_absolute()
    assert not directory.exists() and not list(tmp_path.iterdir())


def test_without_kernels_float32_layers_stay_as_they_are(no_kernels):
    model = random_model()
    before = list(model.modules())
    assert not pack_linears(model) and list(model.modules()) == before


@torch.inference_mode()
def test_with_and_without_kernels_8_bits_agree(monkeypatch):
    with_them, without, tokens = random_model(), random_model(), random_tokens(11, 24)
    for model in (with_them, without):
        quantize(model)
    pack_int8(with_them)
    with monkeypatch.context() as patch:
        patch.setattr("nib.cpu.int8.kernels", lambda: None)
        pack_int8(without)
    assert all(module.few_rows is None for module in without.modules() if isinstance(module, Int8Linear))
    a, b = with_them(tokens)[0], without(tokens)[0]
    assert (a - b).abs().max() < 1e-5 * b.abs().max()
    few = with_them(tokens[:1, :5])[0]  # few rows go by the kernel, these 264 by the matrix in float32
    assert (few - a[:1, :5]).abs().max() < 1e-5 * a.abs().max()


@needs_compiler
@pytest.mark.parametrize("rows", [1, 500])  # few go to kernels.c, many to oneDNN
@pytest.mark.parametrize("x", [torch.zeros(1, 15), torch.zeros(1, 32), torch.zeros(1, 16).double()])
def test_a_layer_reads_no_more_than_it_was_given(rows: int, x: torch.Tensor) -> None:
    float32 = RowsLinear(kernels(), torch.zeros(8, 16), None)
    int8 = Int8Linear(*quantize_rows(torch.ones(8, 16)), None)  # takes every floating-point dtype
    int8.pack()
    for layer in (float32, int8) if x.shape[1] != 16 else (float32,):
        with pytest.raises(RuntimeError, match="a linear layer of 16 channels in float32 was given"):
            layer(x.expand(rows, -1))
