"""Linear probe: the yardstick every other head is compared with.

Several (learning rate, weight decay) pairs are trained side by side, at the price of one pass over
the features; validation picks one.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
2021, section 3.2 (linear probe on frozen features). Departs from it in the optimiser: minibatch
AdamW over a grid, where the paper sweeps the penalty of L-BFGS.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from featcache.errors import ConfigError
from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.losses.binary_cross_entropy import stacked_binary_cross_entropy
from heads.losses.cross_entropy import stacked_cross_entropy

Scaling = Literal["standard", "l2", "none"]


class LinearConfig(HeadConfig):
    """Linear classifier on scaled features: softmax for one label a row, sigmoids for several."""

    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults(
        lr=None, weight_decay=None, epochs=50, batch_size=4096
    )

    kind: Literal["linear"] = "linear"
    """Head kind."""
    feature: Literal["projected", "pooled", "multimodal"] = "projected"
    """projected = features after the projection into the space shared with text; pooled = the wider
    ones before it; multimodal = the joint encoder's of each image and its first caption (blip)."""
    scaling: Scaling = "standard"
    """standard = each column to mean 0 and deviation 1 over the training rows; l2 = each row to
    norm 1, times the root of the width; none = as stored."""
    bias: bool = True
    """Add a per-class offset."""
    lrs: tuple[PositiveFloat, ...] = Field(default=(3e-3, 1e-2, 3e-2, 1e-1), min_length=1)
    """Peak learning rates trained side by side, each > 0; `optim.lr` replaces them by one."""
    weight_decays: tuple[NonNegativeFloat, ...] = Field(default=(0.0, 0.1, 1.0), min_length=1)
    """Weight decays trained side by side, each 0 or more; `optim.weight_decay` replaces them."""

    def arrays(self) -> tuple[str, ...]:
        """The array that `feature` names."""
        name = "multimodal_pooled" if self.feature == "multimodal" else self.feature
        return (f"image/{name}",)

    def wants_statistics(self) -> bool:
        """True for `scaling=standard`."""
        return self.scaling == "standard"

    def with_optim(self, lr: float | None, weight_decay: float | None) -> Self:
        """This config with the grid replaced by what `optim` sets.

        Raises:
            ConfigError: if the grid is set to something else by hand.
        """
        update: dict[str, Any] = {}
        for name, plural, value in (
            ("lr", "lrs", lr),
            ("weight_decay", "weight_decays", weight_decay),
        ):
            if value is None:
                continue
            if plural in self.model_fields_set and getattr(self, plural) != (value,):
                raise ConfigError(
                    f"optim.{name}={value:g} contradicts head.{plural}={getattr(self, plural)}; "
                    "set one of the two"
                )
            update[plural] = (value,)
        return self.model_copy(update=update)

    def only(self, candidate: str) -> Self:
        """The config with the one pair of that name."""
        for lr, weight_decay in itertools.product(self.lrs, self.weight_decays):
            if pair_name(lr, weight_decay) == candidate:
                update = {"lrs": (lr,), "weight_decays": (weight_decay,)}
                return self.model_copy(update=update)
        raise KeyError(candidate)

    def build(self, spec: FeatureSpec) -> "Linear":
        """Zero weights: the start does not depend on any random number."""
        return Linear(
            spec.feature_dim,
            spec.num_classes,
            bias=self.bias,
            scaling=self.scaling,
            multi_label=spec.task == "multi_label",
            pairs=list(itertools.product(self.lrs, self.weight_decays)),
            mean=spec.mean,
            std=spec.std,
        )


def pair_name(lr: float, weight_decay: float) -> str:
    """Name of a candidate."""
    return f"lr {lr:g}, weight decay {weight_decay:g}"


class Linear(Head):
    """G linear classifiers over the same features; `forward` answers with the first."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        bias: bool = True,
        scaling: Scaling = "l2",
        multi_label: bool = False,
        pairs: Sequence[tuple[float, float]] = ((1e-2, 0.0),),
        mean: Tensor | None = None,
        std: Tensor | None = None,
    ) -> None:
        """Zero weights.

        Args:
            feature_dim: D.
            num_classes: C.
            bias: add a per-class offset.
            scaling: see `LinearConfig.scaling`.
            multi_label: train sigmoids instead of a softmax.
            pairs: G (learning rate, weight decay).
            mean: (D,) of the training rows, read by `scaling="standard"`.
            std: (D,) likewise; columns that do not vary are only centred.
        """
        super().__init__()
        self.scaling, self.multi_label, self.pairs = scaling, multi_label, tuple(pairs)
        self.weights = nn.ParameterList(torch.zeros(num_classes, feature_dim) for _ in pairs)
        self.biases = nn.ParameterList(torch.zeros(num_classes) for _ in pairs if bias)
        self.register_buffer("mean", torch.zeros(feature_dim) if mean is None else mean.clone())
        std = torch.ones(feature_dim) if std is None else std
        self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)))

    def scale(self, features: Tensor) -> Tensor:
        """(B, D) what the classifiers multiply with, from (B, D) features as stored."""
        if self.scaling == "standard":
            return (features - self.mean) / self.std
        if self.scaling == "l2":
            return F.normalize(features, dim=1) * math.sqrt(features.shape[1])
        return features

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits of the first classifier; see `Head.forward`."""
        return self._logits(self.scale(features), 0)

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and (B, C) logits of each classifier, in grid order."""
        scaled = self.scale(*features)
        for index, pair in enumerate(self.pairs):
            yield pair_name(*pair), self._logits(scaled, index)

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Sum over classifiers under "loss" (each then gets its own gradient), and the best's."""
        stacked = stacked_binary_cross_entropy if self.multi_label else stacked_cross_entropy
        losses = stacked(self.scale(*features), [*self.weights], [*self.biases], targets)
        return {"loss": losses.sum(), "best_loss": losses.detach().min()}

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """One group for each pair that occurs; offsets have no weight decay."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for index, (own_lr, own_decay) in enumerate(self.pairs):
            groups.setdefault((own_lr, own_decay), []).append(self.weights[index])
            if self.biases:
                groups.setdefault((own_lr, 0.0), []).append(self.biases[index])
        return [
            {"params": parameters, "lr": own_lr, "weight_decay": own_decay}
            for (own_lr, own_decay), parameters in groups.items()
        ]

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """Weight, offset and scaling of one classifier, by default the first."""
        names = [pair_name(*pair) for pair in self.pairs]
        index = names.index(candidate) if candidate else 0
        state = {"weights.0": self.weights[index].detach()}
        if self.biases:
            state["biases.0"] = self.biases[index].detach()
        if self.scaling == "standard":
            state |= {"mean": self.mean, "std": self.std}
        return state

    def _logits(self, scaled: Tensor, index: int) -> Tensor:
        bias = self.biases[index] if self.biases else None
        return F.linear(scaled, self.weights[index], bias)
