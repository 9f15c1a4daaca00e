"""Linear classifiers that are fitted at once to all training rows, rather than trained in steps.

One classifier for each strength of a penalty; validation picks one of them.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heads.base import Head
from heads.mlp import RowScale


class FittedLinear(Head):
    """G linear classifiers over the same scaled features; `forward` answers with the first."""

    trainable = False
    weights: Tensor
    biases: Tensor

    def __init__(
        self,
        scale: RowScale,
        weights: Tensor,
        biases: Tensor,
        names: Sequence[str] = ("",),
    ) -> None:
        """Classifiers as they were fitted.

        Args:
            scale: what features go through first.
            weights: (G, C, D) float32.
            biases: (G, C) float32.
            names: G names of candidates.
        """
        super().__init__()
        self.scale = scale
        self.register_buffer("weights", weights)
        self.register_buffer("biases", biases)
        self.names = tuple(names)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits of the first classifier from (B, D) features as stored."""
        return F.linear(self.scale(features), self.weights[0], self.biases[0])

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and (B, C) logits of each classifier."""
        scaled = self.scale(*features)
        for name, weight, bias in zip(self.names, self.weights, self.biases, strict=True):
            yield name, F.linear(scaled, weight, bias)

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """One classifier, by default the first, and the scaling of its features."""
        index = self.names.index(candidate) if candidate else 0
        scaling = {f"scale.{name}": tensor for name, tensor in self.scale.state_dict().items()}
        part = slice(index, index + 1)
        return {"weights": self.weights[part], "biases": self.biases[part], **scaling}


def scaled_in_parts(scale: RowScale, features: Tensor, step: int = 65_536) -> Tensor:
    """(N, D) float32 `scale(features)` without a second temporary of that size."""
    result = torch.empty_like(features, dtype=torch.float32)
    for start in range(0, len(features), step):
        result[start : start + step] = scale(features[start : start + step])
    return result
