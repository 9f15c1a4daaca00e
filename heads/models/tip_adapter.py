"""Tip-Adapter: the training rows as a key-value memory beside the zero-shot classifier.

A row is compared with every training row; what resembles it votes for its class:

    z = scale · f Wᵀ + α · exp(-β (1 - f Fᵀ)) L

with f the unit feature, W (C, D) the classes' unit text features, F (N, D) the unit features of the
training rows (keys) and L (N, C) their one-hot labels (values). Nothing is trained unless
`train_keys` says so, which trains F (Tip-Adapter-F). Validation picks (α, β) from a grid.

Reference: Zhang et al., Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification,
2022, equations 4 to 6 and section 3.2. Departs from it: keys are the stored features of the rows,
not means over augmented views; keys of several classes are never held against all of C (votes are
added up class by class); the grid is coarse and logarithmic, on validation rows only.

Shapes: B rows, N keys, C classes, D width.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

import pandas as pd
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.nn import functional as F

from featcache.class_text import ensemble
from featcache.errors import ConfigError
from featcache.prompts import choose_zero_shot, expand
from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults

_HELD = 2**24
"""Cosines held at a time (64 MiB of float32)."""


class TipAdapterConfig(HeadConfig):
    """The training rows as a key-value memory beside the zero-shot classifier."""

    needs_prompts: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults(
        lr=1e-3, weight_decay=0.0, epochs=20, batch_size=256
    )

    kind: Literal["tip_adapter"] = "tip_adapter"
    """Head kind."""
    alphas: tuple[NonNegativeFloat, ...] = Field(
        default=(0.1, 0.3, 1.0, 3.0, 10.0, 30.0), min_length=1
    )
    """Weights of the training rows' votes (α), each 0 or more; validation picks one."""
    betas: tuple[PositiveFloat, ...] = Field(
        default=(1.0, 3.0, 5.5, 10.0, 30.0, 100.0), min_length=1
    )
    """How fast a vote falls with the cosine distance (β), each > 0; validation picks one."""
    train_keys: bool = False
    """Train the keys on the softmax cross-entropy (Tip-Adapter-F)."""
    train_alpha: NonNegativeFloat = 1.0
    """α while keys are trained, 0 or more."""
    train_beta: PositiveFloat = 5.5
    """β while keys are trained, > 0."""
    scale: PositiveFloat | None = None
    """Multiplier of the image-text cosines, > 0; unset = the backbone's own (100 for CLIP)."""
    templates: str | list[str] | None = None
    """Names of template sets and templates such as "a photo of a {name}.", one or several; unset =
    the set that `zero_shot` takes for the dataset."""

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """The templates asked for, or those of `zero_shot`.

        Raises:
            ConfigError: if `templates` names no known set.
        """
        columns = [str(column) for column in classes.columns]
        return expand(self.templates or choose_zero_shot(kind, columns), "head.templates")

    def only(self, candidate: str) -> Self:
        """The config with the one (α, β) of that name."""
        for alpha, beta in itertools.product(self.alphas, self.betas):
            if pair_name(alpha, beta) == candidate:
                return self.model_copy(update={"alphas": (alpha,), "betas": (beta,)})
        raise KeyError(candidate)

    def build(self, spec: FeatureSpec) -> "TipAdapter":
        """The head over the training rows of `spec`; a loaded run brings its keys itself.

        Raises:
            ConfigError: for a multi-label task.
            ValueError: if `spec` has no class text features.
        """
        if spec.task != "single_label":
            raise ConfigError(
                f"head tip_adapter: the cache's task is {spec.task}, expected single_label; "
                "choose another head"
            )
        if spec.prompts is None:
            raise ValueError("head tip_adapter needs class text features in FeatureSpec.prompts")
        keys, labels = torch.zeros(0, spec.feature_dim), torch.zeros(0, dtype=torch.int64)
        if spec.support is not None:
            (keys,), labels = spec.support()
        return TipAdapter(
            ensemble(spec.prompts),
            keys.cpu(),
            labels.cpu(),
            alphas=self.alphas,
            betas=self.betas,
            train=(self.train_alpha, self.train_beta) if self.train_keys else None,
            scale=self.scale or spec.logit_scale,
        )


def pair_name(alpha: float, beta: float) -> str:
    """Name of a candidate."""
    return f"alpha {alpha:g}, beta {beta:g}"


class TipAdapter(Head):
    """Zero-shot logits and the votes of keys; `forward` answers with the first (α, β)."""

    vectors: Tensor
    keys: Tensor
    labels: Tensor

    def __init__(
        self,
        vectors: Tensor,
        keys: Tensor,
        labels: Tensor,
        *,
        alphas: tuple[float, ...] = (1.0,),
        betas: tuple[float, ...] = (5.5,),
        train: tuple[float, float] | None = None,
        scale: float = 100.0,
    ) -> None:
        """Keys from training rows.

        Args:
            vectors: (C, D) unit class vectors.
            keys: (N, D) float32 features of the training rows, of any length.
            labels: (N,) int64 their classes.
            alphas: candidates' α.
            betas: candidates' β.
            train: (α, β) under which keys are trained; None = keys stay.
            scale: multiplier of the image-text cosines.
        """
        super().__init__()
        self.register_buffer("vectors", vectors)
        order = torch.argsort(labels, stable=True)  # votes of a class lie side by side
        unit = F.normalize(keys[order].float(), dim=-1)
        self.trainable = train is not None
        self.train_pair = train
        if self.trainable:
            self.keys = nn.Parameter(unit)
        else:
            self.register_buffer("keys", unit)
        self.register_buffer("labels", labels[order])
        self.alphas, self.betas, self.scale = alphas, betas, scale

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits of the first (α, β); see `Head.forward`."""
        return self._logits(features, self.alphas[0], self.betas[0])

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and (B, C) logits of each (α, β)."""
        unit = F.normalize(features[0], dim=-1)
        zero_shot = self.scale * F.linear(unit, self.vectors)
        for beta in self.betas:
            votes = self._votes(unit, beta)
            for alpha in self.alphas:
                yield pair_name(alpha, beta), torch.add(zero_shot, votes, alpha=alpha)

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Softmax cross-entropy of the logits at `train_alpha` and `train_beta`."""
        if self.train_pair is None:
            return super().loss(features, targets, progress)
        return {"loss": F.cross_entropy(self._logits(features[0], *self.train_pair), targets)}

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """Keys and their classes, the same for each (α, β)."""
        return {"keys": self.keys.detach(), "labels": self.labels}

    def load_trained_state(self, state: Mapping[str, Tensor]) -> None:
        """Puts keys back, as many as there are.

        Raises:
            ValueError: if names or widths differ from this head's own.
        """
        if state.keys() == {"keys", "labels"} and len(state["keys"]) == len(state["labels"]):
            count = len(state["labels"])
            self.keys.data = self.keys.new_zeros(count, self.keys.shape[1])
            self.labels = self.labels.new_zeros(count)
        super().load_trained_state(state)

    def _logits(self, features: Tensor, alpha: float, beta: float) -> Tensor:
        unit = F.normalize(features.float(), dim=-1)
        zero_shot = self.scale * F.linear(unit, self.vectors).float()
        return torch.add(zero_shot, self._votes(unit, beta), alpha=alpha)

    def _votes(self, unit: Tensor, beta: float) -> Tensor:
        """(B, C) sums of exp(-β (1 - cosine)) over each class's keys, keys taken in parts."""
        votes = unit.new_zeros(len(self.vectors), len(unit))
        size = max(1, math.floor(_HELD / max(len(unit), 1)))
        keys = F.normalize(self.keys, dim=-1) if self.trainable else self.keys
        for part, labels in zip(
            torch.split(keys, size), torch.split(self.labels, size), strict=True
        ):
            cosines = F.linear(part, unit).float()  # (n, B), half under autocast
            near = torch.exp(beta * (cosines - 1.0))
            votes = votes.index_add(0, labels, near)
        return votes.t()
