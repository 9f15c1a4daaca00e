"""Nearest neighbours among the training rows: what features know without any training.

The k training rows with the largest cosines vote for their classes, each with weight 1 or
exp(cosine / τ); validation picks k.

Reference: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
2018, section 3.4 (weighted votes, τ = 0.07). Departs from it: k is picked on validation rows, and
several labels a row vote each for itself. Neighbours are found by scikit-learn.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from heads.base import FeatureSpec, Head, HeadConfig

_FLOOR = 1e-6
"""Share of votes of a class without any, so that logits stay finite."""


class KnnConfig(HeadConfig):
    """The nearest training rows vote."""

    kind: Literal["knn"] = "knn"
    """Head kind."""
    feature: Literal["projected", "pooled"] = "projected"
    """projected = features after the projection into the space shared with text; pooled = the wider
    ones before it."""
    neighbours: tuple[PositiveInt, ...] = Field(default=(1, 5, 10, 20, 50, 100), min_length=1)
    """Numbers of rows that vote (k), each 1 or more; validation picks one."""
    weights: Literal["cosine", "equal"] = "cosine"
    """cosine = a vote weighs exp(cosine / temperature); equal = each weighs 1."""
    temperature: PositiveFloat = 0.07
    """Temperature of the weights (τ), > 0."""

    def arrays(self) -> tuple[str, ...]:
        """The array that `feature` names."""
        return (f"image/{self.feature}",)

    def only(self, candidate: str) -> Self:
        """The config with the one k of that name."""
        for count in self.neighbours:
            if count_name(count) == candidate:
                return self.model_copy(update={"neighbours": (count,)})
        raise KeyError(candidate)

    def build(self, spec: FeatureSpec) -> "Knn":
        """The head over the training rows of `spec`; a loaded run brings its own."""
        shape = (0, spec.num_classes) if spec.task == "multi_label" else (0,)
        keys, targets = torch.zeros(0, spec.feature_dim), torch.zeros(shape, dtype=torch.int64)
        if spec.support is not None:
            (keys,), targets = spec.support()
        return Knn(
            keys.cpu(),
            targets.cpu(),
            spec.num_classes,
            neighbours=self.neighbours,
            temperature=self.temperature if self.weights == "cosine" else None,
        )


def count_name(count: int) -> str:
    """Name of a candidate."""
    return f"k {count}"


class Knn(Head):
    """Votes of the nearest keys; `forward` answers with the first k."""

    trainable = False
    keys: Tensor
    targets: Tensor

    def __init__(
        self,
        keys: Tensor,
        targets: Tensor,
        num_classes: int,
        *,
        neighbours: tuple[int, ...] = (10,),
        temperature: float | None = 0.07,
    ) -> None:
        """Keys from training rows.

        Args:
            keys: (N, D) float32 features of the training rows, of any length.
            targets: (N,) int64 their classes, or (N, C) multi-hot.
            num_classes: C.
            neighbours: candidates' k; more than N means N.
            temperature: τ; None = equal votes.
        """
        super().__init__()
        self.register_buffer("keys", F.normalize(keys.float(), dim=-1))
        self.register_buffer("targets", targets.to(torch.uint8 if targets.ndim == 2 else None))
        self.num_classes, self.neighbours, self.temperature = num_classes, neighbours, temperature
        self._index: Any = None

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits of the first k; see `Head.forward`.

        Log shares of the votes for one label a row, log odds for several.
        """
        return self._votes(*self._nearest(features, self.neighbours[0]))

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and (B, C) logits of each k; neighbours are searched for once."""
        cosines, rows = self._nearest(features[0], max(self.neighbours))
        for count in self.neighbours:
            yield count_name(count), self._votes(cosines[:, :count], rows[:, :count])

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """Keys and their labels, the same for each k."""
        return {"keys": self.keys, "targets": self.targets}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts keys back, as many as there are.

        Raises:
            ValueError: if names or widths differ from this head's own.
        """
        if state.keys() == {"keys", "targets"} and len(state["keys"]) == len(state["targets"]):
            count = len(state["keys"])
            self.keys = self.keys.new_zeros(count, self.keys.shape[1])
            self.targets = self.targets.new_zeros(count, *self.targets.shape[1:])
        super().load_trained_state(state)
        self._index = None

    def _nearest(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """(B, k) cosines, largest first, and (B, k) int64 numbers of the keys."""
        from sklearn.neighbors import NearestNeighbors

        if self._index is None:
            search = NearestNeighbors(metric="cosine", algorithm="brute")
            self._index = search.fit(self.keys.cpu().numpy())
        unit = F.normalize(features.float(), dim=-1).cpu().numpy()
        count = min(count, len(self.keys))
        distances, rows = self._index.kneighbors(unit, n_neighbors=count)
        cosines = torch.from_numpy(1.0 - distances.astype(np.float32))
        return cosines.to(features.device), torch.from_numpy(rows).to(features.device)

    def _votes(self, cosines: Tensor, rows: Tensor) -> Tensor:
        weights = torch.ones_like(cosines)
        if self.temperature is not None:
            weights = torch.softmax(cosines / self.temperature, dim=1)
        weights = weights / weights.sum(1, keepdim=True)
        shares = cosines.new_zeros(len(cosines), self.num_classes)
        if self.targets.ndim == 1:
            shares.scatter_add_(1, self.targets.to(rows.device)[rows], weights)
            return shares.clamp_(min=_FLOOR).log_()
        for place in range(rows.shape[1]):  # never B x k x C at once
            hot = self.targets.to(rows.device)[rows[:, place]].to(weights.dtype)
            shares.addcmul_(hot, weights[:, place : place + 1])
        return torch.logit(shares, eps=_FLOOR)
