"""A model.py that the user changed: its bugs keep their tracebacks, and its own tensors are right."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from model_helpers import random_model, randomise, tiny
from test_export import save_run
from torch import nn

import evaluate as evaluate_script
import model
import sample as sample_script
import train as train_script
from model import GPT, MLP, Attention, GPTConfig, KVCache
from nib.common.exits import InputError
from nib.cpu.build import kernels
from nib.cpu.fused_blocks import fuse_blocks
from nib.cpu.linear import pack_linears
from nib.formats.checkpoint import write_checkpoint
from nib.formats.load import Source, build, open_source, without_drawing
from nib.tokenizer.load import make_tokenizer

TINY = (
    "--dataset=words --n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --max_iters=2 --warmup_iters=1 "
    "--eval_interval=0 --device=cpu"
).split()
BUGS = [TypeError("my bug"), ValueError("my bug"), KeyError("my bug"), RuntimeError("my bug"), IndexError("my bug")]


@pytest.fixture(autouse=True)
def in_corpus(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(corpus / "data")
    monkeypatch.setattr(sys, "argv", ["train.py", *TINY])


def train(*arguments: str) -> int:
    return train_script.train(train_script.read_settings([*TINY, *arguments]))


def evaluate(*arguments: str) -> None:
    sys.argv[1:] = arguments
    evaluate_script.main()


COMMANDS: dict[str, Callable[[], object]] = {
    "train": lambda: train("--out_dir=out/new"),
    "resume": lambda: train("--out_dir=out/run", "--max_iters=3"),
    "init_from": lambda: train("--out_dir=out/new", "--init_from=run"),
    "sample": lambda: sample_script.main(["run", "--max-new-tokens=2"]),
    "evaluate": lambda: evaluate("run", "--data=words", "--max-tokens=9"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bug_in_the_model_keeps_its_type_and_place(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train("--out_dir=out/run")
    for kind, method in ((Attention, "__init__"), (Attention, "forward")):
        for bug in BUGS:

            def my_change(*_: object, bug: Exception = bug) -> None:
                raise bug

            with monkeypatch.context() as patch:
                patch.setattr(kind, method, my_change)
                with pytest.raises(type(bug)) as found:
                    COMMANDS[command]()
            assert found.value is bug and found.value.__cause__ is None and found.value.__context__ is None
            assert "my_change" in [entry.name for entry in found.traceback]


@pytest.mark.parametrize("options", [[], ["--quantize=int8"], ["--no-cache"]])
@pytest.mark.parametrize(
    "change",
    [lambda x: torch.cat([x, x], -1), lambda x: x[..., :3], lambda x: x.double(), lambda x: x.bfloat16()],
    ids=["wider", "narrower", "float64", "bfloat16"],
)
def test_what_a_layer_cannot_take_is_an_error_and_never_read_by_c(
    change: Callable[[torch.Tensor], torch.Tensor], options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train("--out_dir=out/run")
    forward = MLP.forward

    def my_change(self: MLP, x: torch.Tensor) -> torch.Tensor:
        return forward(self, change(x))

    monkeypatch.setattr(MLP, "forward", my_change)
    if options == ["--quantize=int8"] and change(torch.zeros(4)).shape == (4,):
        return  # 8-bit layers take every floating-point dtype
    with pytest.raises(RuntimeError, match="channels") as found:
        sample_script.main(["run", "--max-new-tokens=2", *options])
    assert "my_change" in [entry.name for entry in found.traceback]


def test_a_bug_ends_in_its_traceback_and_status_1(tmp_path: Path) -> None:
    shutil.copy(ROOT / "train.py", tmp_path)
    (tmp_path / "nib").symlink_to(ROOT / "nib")
    source = (ROOT / "model.py").read_text()
    place = "        x = self.wte(tokens)"
    (tmp_path / "model.py").write_text(source.replace(place, "        tokens.float() @ torch.zeros(3)\n" + place))
    done = run_script(str(tmp_path / "train.py"), *TINY, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "tokens.float() @ torch.zeros(3)" in done.stderr and f"{tmp_path / 'model.py'}" in done.stderr


def test_a_shape_that_cannot_be_is_bad_input() -> None:
    with pytest.raises(InputError, match="n_embd 15 is not divisible by n_head 2"):
        train("--n_embd=15")
    for name, value in (("n_head", 3), ("n_layer", "2"), ("sparkle", 1), ("bias", 0)):
        model = random_model(vocab_size=257)
        setattr(model.config, name, value)
        state = {"model_config": vars(model.config)}
        source = open_source(str(save_run(Path("out/odd") / name, model, **state)))
        with pytest.raises(InputError, match=rf"does not fit this model\.py: .*{name}"):
            sample_script.main([str(source.directory)])


def written(directory: Path, weights: dict[str, torch.Tensor], config: GPTConfig) -> Source:
    state = {"step": 3, "model_config": vars(config)}
    write_checkpoint(directory / "checkpoints", weights, {}, state, make_tokenizer("byte"))
    return open_source(str(directory))


def table(model: GPT) -> None:
    model.register_buffer("own", torch.arange(6.0).view(2, 3), persistent=False)


def saved(model: GPT) -> None:
    model.register_buffer("own", torch.zeros(3))


def plain(model: GPT) -> None:
    model.own = torch.linspace(0, 1, 3)


def learned(model: GPT) -> None:
    model.own = nn.Parameter(nn.init.trunc_normal_(torch.empty(3)))


def drawn(model: GPT) -> None:
    model.register_buffer("own", torch.randn(3), persistent=False)


def drawn_in_place(model: GPT) -> None:
    model.own = torch.empty(3).uniform_(-1, 1)


def derived(model: GPT) -> None:
    model.register_buffer("own", model.wte.weight.detach().sum(1), persistent=False)


def read(model: GPT) -> None:
    model.own = torch.tensor(model.wte.weight.std().item())


def tied(model: GPT) -> None:
    model.head = nn.Linear(32, 40, bias=False)
    model.head.weight = model.wte.weight


# Whether such a model can be made without drawing its weights.
CHANGES: dict[Callable[[GPT], None], bool] = {
    (lambda model: None): True, table: True, saved: True, plain: True, learned: False, drawn: False,
    drawn_in_place: False, derived: False, read: False, tied: False,
}  # fmt: skip


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rope"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("sampling", [False, True])
def test_a_loaded_model_is_the_one_that_was_made_and_filled(
    change: Callable[[GPT], None], position: str, sampling: bool, tmp_path: Path
) -> None:
    """Its weights are those of the checkpoint, and what is not saved is what its constructor makes of the seed."""

    def make() -> GPT:
        model = GPT(tiny(position=position))
        change(model)
        return model

    torch.manual_seed(5)
    expected = make()
    randomise(expected)
    weights = {name: tensor.clone() for name, tensor in expected.state_dict().items()}
    assert (without_drawing(make) is not None) == CHANGES[change]
    torch.manual_seed(5)
    model = build(written(tmp_path / "run", weights, expected.config), make, sampling=sampling)
    for ours, theirs in ((model.state_dict(), expected.state_dict()),) + (
        (dict(model.named_buffers()), dict(expected.named_buffers())),
        ({"own": getattr(model, "own", torch.ones(1))}, {"own": getattr(expected, "own", torch.ones(1))}),
    ):
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())
    if not sampling:
        assert len(list(model.parameters())) == len(list(expected.parameters())), "ties"


def test_a_parameter_that_was_not_trained_is_an_error(tmp_path: Path) -> None:
    def make() -> GPT:
        model = GPT(tiny())
        saved(model)
        return model

    source = open_source(str(save_run(tmp_path / "run", random_model())))
    for sampling in (False, True):
        with pytest.raises(InputError, match=r"does not fit this model\.py: .*own"):
            build(source, make, sampling=sampling)


def test_a_resumed_run_has_the_random_numbers_that_its_model_keeps_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(GPT):
        def __init__(self, config: GPTConfig) -> None:
            super().__init__(config)
            self.register_buffer("noise", torch.randn(config.n_embd), persistent=False)

        def hidden(self, tokens: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
            return super().hidden(tokens, cache) + self.noise

    monkeypatch.setattr(model, "GPT", Noisy)
    for settings in (["whole", "--max_iters=4"], ["parts", "--max_iters=2"], ["parts", "--max_iters=4"]):
        train(f"--out_dir=out/{settings[0]}", settings[1], "--schedule=constant", "--checkpoint_interval=2")
    whole, parts = (open_source(name).weights() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def refuse(self: Attention, *_: object) -> None:
    raise AssertionError


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_which_way_sampling_goes_is_said_unless_it_is_the_ordinary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path / "out/run", random_model(vocab_size=257))
    forward = Attention.forward
    changes = {
        "": forward,
        "their results differ from those of blocks.c": lambda self, x, *rest: 1.01 * forward(self, x, *rest),
    }
    for reason, change in changes.items():
        monkeypatch.setattr(Attention, "forward", change)
        for options in ([], ["--quantize=int8"], ["--json"], ["--dtype=bfloat16"]):
            assert sample_script.main(["run", "--max-new-tokens=2", "--device=cpu", *options]) == 0
            out, err = capsys.readouterr()
            assert err.splitlines()[:-1] == [f"sampling with model.py's own blocks: {reason}"] * bool(reason)
            assert "own blocks" not in out
    model = random_model()
    pack_linears(model)
    monkeypatch.setattr(Attention, "forward", refuse)
    assert fuse_blocks(model).startswith("AssertionError (test_changed_model.py, line ")
    monkeypatch.setattr("nib.cpu.fused_blocks.kernels", lambda: None)
    monkeypatch.setattr("nib.cpu.fused_blocks.made_kernels", lambda: (None, "no C compiler"))
    assert kernels() is not None and fuse_blocks(model) == "no C compiler"
