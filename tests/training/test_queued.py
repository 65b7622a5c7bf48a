"""Steps nobody waits for, as on a GPU, on the CPU: the device decides what is skipped, and the loop reads it later."""

from __future__ import annotations

import pytest
import torch
from test_not_finite import skipped, spoil_gradients, spoil_loss, state_of
from test_optimizer import give_gradients, make_model, optimizers_of
from test_train import in_corpus, metrics, tensors, train

from nib.common.exits import RunError
from nib.training.optimizer import Muon
from nib.training.run import Run

__all__ = ["in_corpus"]  # the fixture that gives each test a directory with data/


TIMES = ("seconds", "tokens_per_second", "memory_bytes")


def queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs on the CPU work as on a GPU."""
    made = Run.__init__

    def init(self: Run, *arguments: object) -> None:
        made(self, *arguments)  # type: ignore[arg-type]
        self.queued = True

    monkeypatch.setattr(Run, "__init__", init)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_queued_run_is_the_run_bit_for_bit(
    optimizer: str, dtype: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a skipped first step, a skipped step in the middle and one just before a checkpoint, in another order."""
    settings = [f"--optimizer={optimizer}", f"--dtype={dtype}", "--max_iters=13", "--log_interval=5"]
    found = []
    for out in ("plain", "queued"):
        with monkeypatch.context() as patch:
            if out == "queued":
                queue(patch)
            spoil_gradients(patch, {1, 4, 8})
            assert train(*settings, "--checkpoint_interval=8", f"--out_dir=out/{out}") == 0
        said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line or "validation" in line]
        lines = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(f"out/{out}")]
        progress = {k: v for k, v in state_of(f"out/{out}")["progress"].items() if k != "seconds"}
        files = [tensors(f"out/{out}", file) for file in ("model.safetensors", "optimizer.safetensors")]
        found.append((sorted(said), lines, progress, state_of(f"out/{out}")["scaler"], files))
    *plain, weights = found[0]
    *queued, others = found[1]
    assert queued == plain and skipped("out/plain") == 3
    for ours, theirs in zip(weights, others, strict=True):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_queued_run_ends_after_too_many_skipped_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out while one more step is under way, after which the run is saved as it is."""
    queue(monkeypatch)
    spoil_loss(monkeypatch, {3, 4, 5})
    with pytest.raises(
        RunError, match=r"not finite in 2 steps in a row, the last of them step 4\. The newest checkpoint"
    ):
        train("--max_iters=12", "--max_skipped_steps=2", "--log_interval=50", "--out_dir=out/lost")
    assert (state_of("out/lost")["step"], skipped("out/lost")) == (5, 3)


def test_a_skipped_step_of_muon_changes_nothing_where_the_device_decides() -> None:
    model = make_model()
    *_, muon = optimizers_of(model)
    assert isinstance(muon, Muon)
    for muon.found_inf in (None, torch.zeros(())):
        give_gradients(model, 0)
        muon.step()
    before = [*(p.detach().clone() for p in model.parameters()), *(s["momentum_buffer"] for s in muon.state.values())]
    before = [tensor.clone() for tensor in before]
    give_gradients(model, 1)
    model.blocks[0].mlp.up.weight.grad[0, 0] = torch.nan
    model.blocks[1].mlp.up.weight.grad[0, 0] = torch.inf
    muon.found_inf = torch.ones(())
    muon.step()
    after = [*model.parameters(), *(s["momentum_buffer"] for s in muon.state.values())]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
