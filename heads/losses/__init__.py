"""Losses on logits by `kind`: one file each; see `heads.losses.base` for what a loss must offer."""

from typing import TYPE_CHECKING

from featcache.config import one_of, union_of
from heads.losses.base import LossConfig
from heads.losses.binary_cross_entropy import BinaryCrossEntropyConfig
from heads.losses.cross_entropy import CrossEntropyConfig

LOSSES = one_of(__name__, __path__, LossConfig)
"""Config class of every loss on logits by kind."""

if TYPE_CHECKING:
    AnyLoss = LossConfig
else:
    AnyLoss = union_of(LOSSES, default="bce")


def default_loss(task: str) -> LossConfig:
    """What trains heads where the user chooses nothing: softmax or sigmoid cross-entropy."""
    return CrossEntropyConfig() if task == "single_label" else BinaryCrossEntropyConfig()


__all__ = ["LOSSES", "AnyLoss", "default_loss"]
