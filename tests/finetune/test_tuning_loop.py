"""The loop of fine-tuning: what is kept, when it stops, what gets gradients."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune.train import run
from finetune.tuning import loop as tuning_loop
from finetune.tuning.loop import Measured
from finetune.tuning.tuned import Tuned
from heads.run_folder import RunError

from . import colours
from .colours import config


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colours.make(tmp_path_factory.mktemp("toy"))


def pretend(monkeypatch: pytest.MonkeyPatch, accuracies: list[float], losses: list[float]) -> None:
    """Lets validation find these, epoch by epoch; what is measured at the end is real."""
    coming: Iterator[tuple[float, float]] = iter(zip(accuracies, losses, strict=True))
    measure = tuning_loop.measure

    def pretended(*inputs: Any) -> Measured:
        found = measure(*inputs)
        accuracy, loss = next(coming)
        return Measured(found.part, found.features, {"cls": accuracy}, loss, 0.0)

    monkeypatch.setattr(tuning_loop, "measure", pretended)


def test_f25_best_adapter_and_head_are_restored_together(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code kept the last adapter beside the best head."""
    pretend(monkeypatch, [0.5, 0.9, 0.3], [1.0, 0.9, 0.8])
    after: list[dict[str, Tensor]] = []
    copied, saved = Tuned.copied, tuning_loop.Fit.save

    def save(self: tuning_loop.Fit, path: Path) -> None:
        after.append(copied(self.tuned))
        saved(self, path)

    monkeypatch.setattr(tuning_loop.Fit, "save", save)
    report = run(config(toy, tmp_path / "out", adapter="lora"))
    assert report.metrics["best_epoch"] == 2
    adapter = load_file(tmp_path / "out" / "adapter.safetensors")
    head = load_file(tmp_path / "out" / "head" / "head.safetensors")
    kept = {f"adapter/{name}": t for name, t in adapter.items()}
    kept |= {f"objective/head.{name}": t for name, t in head.items()}
    assert kept.keys() == after[1].keys()
    for name, tensor in kept.items():
        assert torch.equal(tensor, after[1][name]), name
    changed = [name for name in kept if not torch.equal(after[1][name], after[2][name])]
    assert any(name.startswith("adapter/") for name in changed)
    assert any(name.startswith("objective/") for name in changed)


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ([3.0, 2.99, 2.985, 2.97, 2.96, 2.955, 2.952], 7),  # slow progress adds up to better
        ([3.0, 2.99, 2.99, 2.99, 2.0, 1.0, 0.5], 4),  # three epochs no better than the first
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], 7),  # the first epoch is no failure
    ],
)
def test_f26_stopping_compares_with_the_best_so_far(
    toy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
    epochs: int,
) -> None:
    """The released code compared with the epoch before, and the first one with 0."""
    pretend(monkeypatch, [0.5] * 7, losses)
    optim = {"epochs": 7, "batch_size": 48}
    report = run(config(toy, tmp_path / "out", adapter="linear", optim=optim))
    assert report.metrics["epochs"] == epochs


def test_f27_gradients_are_of_the_trained_tensors_and_of_training_alone(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released code built graphs in evaluation, and froze the vision tower alone."""
    score, seen = tuning_loop.score, []

    def scored(*inputs: Any) -> Any:
        seen.append(torch.is_grad_enabled() or inputs[1].requires_grad)
        return score(*inputs)

    frozen: dict[str, Tensor] = {}
    train = Tuned.train

    def remember(self: Tuned, mode: bool = True) -> Tuned:
        model = self.adapter.towers.model
        if not frozen:
            frozen.update(copy.deepcopy(model.state_dict()))
        if not mode and self.objective.head is not None:
            with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
            own = {id(p) for p in self.parameters()}
            assert with_gradient == {n for n, p in model.named_parameters() if id(p) in own}
            unchanged = set(frozen) - set(self.adapter.state())
            for name in unchanged & model.state_dict().keys():
                assert torch.equal(model.state_dict()[name], frozen[name]), name
        return train(self, mode)

    monkeypatch.setattr(Tuned, "train", remember)
    monkeypatch.setattr(tuning_loop, "score", scored)
    run(config(toy, tmp_path / "out", adapter="lora"))
    assert seen
    assert not any(seen)


@pytest.mark.parametrize("changes", [{"accumulate": 3}, {"checkpoint_blocks": True}])
def test_less_memory_gives_the_same_training(
    toy: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    optim = {"lr": 1e-3, "steps": 4, "batch_size": 16, "clip_norm": 1.0}
    for name, options in (("plain", optim), ("less", optim | changes)):
        run(config(toy, tmp_path / name, adapter="lora", optim=options))
    plain, less = (load_file(tmp_path / n / "adapter.safetensors") for n in ("plain", "less"))
    for name, tensor in plain.items():
        torch.testing.assert_close(less[name], tensor, atol=2e-6, rtol=1e-4)


def test_a_loss_that_is_no_number_ends_the_run_with_its_step(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"at optimiser step [1-9]"):
        run(config(toy, tmp_path / "out", optim={"lr": 1e30, "epochs": 3, "batch_size": 16}))
    assert not (tmp_path / "out").exists()


def test_weights_that_the_last_step_has_spoiled_are_no_result(toy: Path, tmp_path: Path) -> None:
    """No loss follows that step: features say it."""
    with pytest.raises(RunError, match=r"features of '.*' are NaN or infinite"):
        run(config(toy, tmp_path / "out", adapter="full", optim={"lr": 1e30, "steps": 1}))
    assert not (tmp_path / "out").exists()


def test_rates_fall_from_their_peaks_to_the_last_one(toy: Path, tmp_path: Path) -> None:
    optim = {
        "lr": 2e-4,
        "final_lr": 1e-6,
        "steps": 6,
        "batch_size": 48,
        "schedule": {"shape": "cosine", "warmup_steps": 0},
    }
    run(config(toy, tmp_path / "out", adapter="lora", optim=optim, stop={"patience": None}))
    rates = [line["lr"] for line in colours.history_of(tmp_path / "out")]
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(
        torch.optim.SGD([torch.zeros(1)], 2e-4), 6, 1e-6
    )
    for rate in rates:
        assert rate == pytest.approx(expected.get_last_lr()[0])
        expected.optimizer.step()
        expected.step()
