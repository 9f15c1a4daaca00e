"""Losses on image-text pairs by `kind`: one file each; see `base` for what one must offer."""

from typing import TYPE_CHECKING

from featcache.config import one_of, union_of
from finetune.losses.base import PairLossConfig

PAIR_LOSSES = one_of(__name__, __path__, PairLossConfig)
"""Config class of every loss on pairs by kind."""

if TYPE_CHECKING:
    AnyPairLoss = PairLossConfig
else:
    AnyPairLoss = union_of(PAIR_LOSSES, default="info_nce")

__all__ = ["PAIR_LOSSES", "AnyPairLoss", "PairLossConfig"]
