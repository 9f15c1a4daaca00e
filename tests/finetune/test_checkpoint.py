"""A training goes on from its saved state as if nothing had happened."""

from pathlib import Path

import pytest
import torch
from torch import nn

from finetune.checkpoint import read_state, save_state, seed_all
from heads.run_folder import RunError


def _training(width: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Dropout(), nn.Linear(4, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for step in range(start, stop):
        seed_all(7, step)
        loss = model(torch.randn(8, 3)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_saved_and_restored_equals_never_stopped(tmp_path: Path) -> None:
    model, optimizer = _training()
    _steps(model, optimizer, 0, 6)
    expected = {name: t.clone() for name, t in model.state_dict().items()}

    model, optimizer = _training()
    _steps(model, optimizer, 0, 3)
    best = {"0.weight": model.get_parameter("0.weight").detach().clone()}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))  # its state is made by the first use
    save_state(
        tmp_path / "last.safetensors",
        tensors={"model": model.state_dict(), "best": best},
        optimizer=optimizer,
        scaler=scaler,
        values={"step": 3, "history": [{"loss": 1.5}]},
    )
    model, optimizer = _training()
    _steps(model, optimizer, 0, 1)  # whatever was there is replaced
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    saved = read_state(tmp_path / "last.safetensors")
    saved.restore({"model": model.state_dict()}, optimizer, scaler)
    assert saved.values == {"step": 3, "history": [{"loss": 1.5}]}
    assert torch.equal(saved.tensors["best"]["0.weight"], best["0.weight"])
    assert scaler.get_scale() == 8.0
    _steps(model, optimizer, saved.values["step"], 6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_moments_lie_in_memory_as_their_parameters_do(tmp_path: Path) -> None:
    """A fused step over a moment in another order would take other elements' moments."""

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        loss = model(torch.randn(2, 3, 8, 8)).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    model, optimizer = made()
    step(model, optimizer, 1)
    save_state(
        tmp_path / "last", tensors={"model": model.state_dict()}, optimizer=optimizer, values={}
    )
    step(model, optimizer, 2)
    resumed, optimizer = made()
    read_state(tmp_path / "last").restore({"model": resumed.state_dict()}, optimizer)
    step(resumed, optimizer, 2)
    assert torch.equal(resumed.weight, model.weight)


def test_another_model_is_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    model, optimizer = _training()
    _steps(model, optimizer, 0, 1)
    save_state(file, tensors={"model": model.state_dict()}, optimizer=optimizer, values={})
    other = nn.Linear(3, 5)
    before = other.weight.clone()
    saved = read_state(file)
    with pytest.raises(RunError, match=r"model/0\.bias is there.*--restart"):
        saved.restore({"model": other.state_dict()}, torch.optim.AdamW(other.parameters()))
    with pytest.raises(RunError, match=r"exp_avg of optimizer parameter 0 is \(4, 3\), expected"):
        saved.restore({}, torch.optim.AdamW(other.parameters()))
    assert torch.equal(other.weight, before)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RunError, match="damaged"):
        read_state(file)


def test_seeds_depend_on_every_number() -> None:
    drawn = set()
    for numbers in ((0, 0), (0, 1), (1, 0), (0, 0, 1)):
        seed_all(*numbers)
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 4
