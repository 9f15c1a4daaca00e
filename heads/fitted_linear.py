"""Linear classifiers that are fitted at once to all training rows, rather than trained in steps.

One classifier for each strength of a penalty; validation picks one of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat
from torch import Tensor

from heads.base import Head, HeadConfig
from heads.mlp import RowScale, RowScaling


class FittedLinearConfig(HeadConfig):
    """Options that linear classifiers fitted at once share; each kind has penalties of its own."""

    feature: Literal["projected", "pooled", "tokens"] = "projected"
    """projected = features after the projection into the space shared with text; pooled = the wider
    ones before it; tokens = all tokens of an image side by side, as many in every image."""
    scaling: RowScaling = "standard"
    """standard = each column to mean 0 and deviation 1 over the training rows; l2 = each row to
    norm 1, times the root of the width; none = as stored."""
    penalties: tuple[PositiveFloat, ...] = Field(min_length=1)
    """Weights of the squared weights, each > 0; validation picks one."""

    def arrays(self) -> tuple[str, ...]:
        """The array that `feature` names."""
        return (f"image/{self.feature}",)

    def wants_statistics(self) -> bool:
        """True for `scaling=standard`."""
        return self.scaling == "standard"

    def only(self, candidate: str) -> Self:
        """The config with the one penalty of that name."""
        for penalty in self.penalties:
            if penalty_name(penalty) == candidate:
                return self.model_copy(update={"penalties": (penalty,)})
        raise KeyError(candidate)


def penalty_name(penalty: float) -> str:
    """Name of a candidate."""
    return f"penalty {penalty:g}"


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
            weights: (G, C, D) float32; (G, C, L D) for tokens side by side.
            biases: (G, C) float32.
            names: G names of candidates.
        """
        super().__init__()
        self.scale = scale
        self.register_buffer("weights", weights)
        self.register_buffer("biases", biases)
        self.names = tuple(names)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits of the first classifier from (B, D) or (B, L, D) features as stored."""
        return F.linear(self.scale(features).flatten(1), self.weights[0], self.biases[0])

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and (B, C) logits of each classifier."""
        scaled = self.scale(*features).flatten(1)
        for name, weight, bias in zip(self.names, self.weights, self.biases, strict=True):
            yield name, F.linear(scaled, weight, bias)

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """One classifier, by default the first, and the scaling of its features."""
        index = self.names.index(candidate) if candidate else 0
        scaling = {f"scale.{name}": tensor for name, tensor in self.scale.state_dict().items()}
        part = slice(index, index + 1)
        return {"weights": self.weights[part], "biases": self.biases[part], **scaling}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts a classifier back, of as many tokens a row as it was fitted to.

        Raises:
            ValueError: if names or other sizes differ from this head's own.
        """
        own = self.weights.shape
        weights = state.get("weights")
        if weights is not None and weights.ndim == 3 and weights.shape[2] % own[2] == 0:
            self.weights = self.weights.new_zeros(*own[:2], weights.shape[2])
        super().load_trained_state(state)


def scaled_in_parts(scale: RowScale, features: Tensor, step: int = 65_536) -> Tensor:
    """(N, D) float32 `scale(features)`, tokens side by side, without a temporary of that size."""
    result = features.new_empty(len(features), features[0].numel(), dtype=torch.float32)
    for start in range(0, len(features), step):
        result[start : start + step] = scale(features[start : start + step]).flatten(1)
    return result
