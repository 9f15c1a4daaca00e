"""Early stopping and the plateau schedule."""

import random

import pytest
import torch

from heads.optim import ScheduleConfig
from heads.watch import EarlyStop, Plateau


def _epochs_until_stop(values: list[float], patience: int, min_delta: float = 0.0) -> int:
    stop = EarlyStop(patience, min_delta)
    for epoch, value in enumerate(values, 1):
        stop.see(value)
        if stop.is_due:
            return epoch
    return len(values) + 1


def test_f26_the_first_epoch_is_no_failure_and_each_is_held_against_the_best() -> None:
    losses = [5.0, 4.0, 4.5, 4.4, 4.3, 3.9]  # below the one before, but not below the best
    assert _epochs_until_stop([-loss for loss in losses], patience=1) == 3
    assert _epochs_until_stop([-loss for loss in losses], patience=3) == 5
    assert _epochs_until_stop([-loss for loss in losses], patience=4) == 7
    assert _epochs_until_stop([-9.0], patience=1) == 2


def test_f26_slow_progress_adds_up() -> None:
    slow = [0.001 * epoch for epoch in range(100)]
    assert _epochs_until_stop(slow, patience=4, min_delta=0.0029) == 101
    assert _epochs_until_stop(slow, patience=2, min_delta=0.0029) == 3


def test_without_patience_it_never_stops() -> None:
    stop = EarlyStop()
    for _ in range(1000):
        stop.see(0.0)
    assert not stop.is_due


@pytest.mark.parametrize("patience", [0, 2])
def test_plateau_lowers_the_rate_in_the_epochs_of_torch(patience: int) -> None:
    schedule = ScheduleConfig(shape="plateau", factor=0.3, patience=patience, min_lr=1e-3)
    plateau = Plateau(schedule)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", factor=0.3, patience=patience, threshold=0.0, min_lr=1e-3, eps=0.0
    )
    draw = random.Random(0)
    for _ in range(60):
        value = round(draw.random(), 2)
        plateau.see(value)
        theirs.step(value)
        own = max(0.5 * plateau.scale, plateau.min_lr)
        assert own == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert own == 1e-3


def test_other_schedules_have_no_plateau() -> None:
    plateau = Plateau(ScheduleConfig(shape="cosine", patience=0))
    for _ in range(5):
        plateau.see(0.0)
    assert (plateau.scale, plateau.min_lr) == (1.0, 0.0)


def test_both_go_on_from_their_records() -> None:
    schedule = ScheduleConfig(shape="plateau", factor=0.5, patience=1)
    values = [0.1, 0.3, 0.2, 0.2, 0.2, 0.4, 0.1, 0.1]
    straight, broken = Plateau(schedule), Plateau(schedule)
    assert EarlyStop(3).record() == {"best": None, "bad": 0}
    for number, value in enumerate(values):
        straight.see(value)
        again = Plateau(schedule)
        again.restore(broken.record())
        broken = again
        broken.see(value)
        assert broken.record() == straight.record(), number
    assert straight.scale == 0.25
