"""The small network that multimodal heads are made of, and what its inputs are brought to.

One modality's vector goes through Linear(d→d), ReLU, Linear(d→C); the same form with one output
says how far a modality is to be trusted. A row without that modality is a row of zeros.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heads.base import OptimDefaults

RowScaling = Literal["standard", "l2", "none"]
OPTIM_DEFAULTS = OptimDefaults(lr=1e-3, weight_decay=0.01, epochs=60, batch_size=1024)
"""Of all heads made of these networks, so that they compare; chosen on validation rows of a drawn
garden with 3,400 training rows: half as many epochs or a third of the rate score less."""


class RowScale(nn.Module):
    """Brings raw cached vectors to entries of size one, whatever the backbone's own scale."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        width: int,
        scaling: RowScaling = "l2",
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        """Nothing to train.

        Args:
            width: D.
            scaling: standard = each column to mean 0 and deviation 1; l2 = each row to norm 1,
                times the root of D; none = as stored.
            mean: (D,) of the training rows, read by `standard`; unset = zeros, to be loaded.
            std: (D,) likewise, unset = ones; columns that do not vary are only centred.
        """
        super().__init__()
        self.scaling = scaling
        if scaling == "standard":
            std = torch.ones(width) if std is None else std
            self.register_buffer("mean", torch.zeros(width) if mean is None else mean.clone())
            self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) float32 scaled rows from (B, D) rows as stored."""
        if self.scaling == "standard":
            return (features - self.mean) / self.std
        if self.scaling == "l2":
            return F.normalize(features, dim=-1) * math.sqrt(features.shape[-1])
        return features


class Mlp(nn.Sequential):
    """Linear(D→H), ReLU, Linear(H→outputs) on scaled vectors."""

    def __init__(
        self, width: int, outputs: int, hidden: int | None = None, dropout: float = 0.0
    ) -> None:
        """Torch's own initial values.

        Args:
            width: D.
            outputs: C for a classifier, 1 for a router's scalar.
            hidden: H; unset = D.
            dropout: share of hidden units that training drops, 0 to below 1.
        """
        hidden = hidden or width
        super().__init__(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, outputs),
        )


def present(features: Tensor) -> Tensor:
    """(B,) bool: which rows hold the modality at all; the cache's rows without it are zeros."""
    return features.flatten(1).any(1)
