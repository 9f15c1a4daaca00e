"""What validation decides while a training goes on: when to lower the rate, and when to stop.

Both count epochs against the best value so far (not the one before), and keep plain numbers that a
checkpoint holds.
"""

import math
from dataclasses import dataclass
from typing import Any

from heads.optim import ScheduleConfig


@dataclass
class Watch:
    """Epochs in a row without a value above the best so far.

    Attributes:
        min_delta: how much above the best counts as better, 0 or more. The best itself moves only
            then, so that slow progress adds up to better.
        best: highest value that counted as better.
        bad_epochs: epochs since.
    """

    min_delta: float = 0.0
    best: float = -math.inf
    bad_epochs: int = 0

    def see(self, value: float) -> None:
        """Counts one epoch; `value` is higher for better."""
        if value > self.best + self.min_delta:
            self.best, self.bad_epochs = value, 0
        else:
            self.bad_epochs += 1

    def record(self) -> dict[str, Any]:
        """Plain values that `restore` takes."""
        # JSON knows no infinity: nothing was seen.
        return {"best": None if self.best == -math.inf else self.best, "bad": self.bad_epochs}

    def restore(self, record: dict[str, Any]) -> None:
        """Goes on where `record` was taken."""
        self.best = -math.inf if record["best"] is None else record["best"]
        self.bad_epochs = record["bad"]


class EarlyStop(Watch):
    """Says when enough epochs have brought nothing better.

    Reference: Prechelt, Early Stopping - But When?, 1998, in its plainest form.
    """

    def __init__(self, patience: int | None = None, min_delta: float = 0.0) -> None:
        """Stops after `patience` epochs without a better value; None = never."""
        super().__init__(min_delta)
        self.patience = patience

    @property
    def is_due(self) -> bool:
        """Whether to stop before another epoch."""
        return self.patience is not None and self.bad_epochs >= self.patience


class Plateau(Watch):
    """Multiplier of the learning rate that falls when the validation stands still.

    The same epochs as torch's `ReduceLROnPlateau` with threshold 0 lower the rate. Schedules of
    another shape keep it at 1.
    """

    def __init__(self, schedule: ScheduleConfig) -> None:
        """Begins at 1."""
        super().__init__()
        self.schedule, self.scale = schedule, 1.0

    def see(self, value: float) -> None:
        """Counts one epoch, and lowers the rate after too many bad ones."""
        super().see(value)
        if self.schedule.shape == "plateau" and self.bad_epochs > self.schedule.patience:
            self.scale *= self.schedule.factor
            self.bad_epochs = 0

    @property
    def min_lr(self) -> float:
        """Learning rate below which not to go."""
        return self.schedule.min_lr if self.schedule.shape == "plateau" else 0.0

    def record(self) -> dict[str, Any]:
        """Plain values that `restore` takes."""
        return super().record() | {"scale": self.scale}

    def restore(self, record: dict[str, Any]) -> None:
        """Goes on where `record` was taken."""
        super().restore(record)
        self.scale = record["scale"]
