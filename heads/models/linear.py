"""Linear probe: the yardstick every other head is compared with.

Several (learning rate, weight decay) pairs are trained side by side, at the price of one pass over
the features; validation picks one. With f the scaled feature of a row, for each pair:

    z = W f + b,   with `cosine` z = s ⟨f / |f|, W_c / |W_c|⟩ + b with one b for all classes

and the chosen loss of z, by default cross-entropy; with `text_weight` λ > 0 (single label)

    L = CE(z, y) + λ CE(κ ⟨f / |f|, T⟩, y),   T unit class text features, κ the backbone's scale.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
2021, section 3.2 (linear probe on frozen features); the second form of L is the loss of Flowers-102
probes with text alignment, the cosine form that of `heads.losses.additive_angular_margin`. Departs
from the former in the optimiser: minibatch AdamW over a grid, where the paper sweeps the penalty of
L-BFGS. With the features and T frozen the alignment part has no gradient: it is reported.
"""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from featcache.class_text import ensemble
from featcache.errors import BackboneError, ConfigError
from featcache.prompts import choose_zero_shot, expand
from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.losses.additive_angular_margin import AdditiveAngularMargin
from heads.losses.base import Loss
from heads.losses.stacked import stacked_loss

logger = logging.getLogger(__name__)

Scaling = Literal["standard", "l2", "unit", "none"]

LRS = (1e-2, 3e-2, 3e-3, 1e-1)
"""Learning rates of the default grid, the likeliest first."""
WEIGHT_DECAYS = (0.1, 0.0, 1.0)
"""Weight decays of the default grid, the likeliest first."""
GRID_PARAMETERS = 2**24
"""Weights that the default grid may have in all: 16.8 million."""


class LinearConfig(HeadConfig):
    """Linear classifier on scaled features, with any loss on logits."""

    takes_loss: ClassVar[bool] = True
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
    norm 1, times the root of the width; unit = each row to norm 1; none = as stored."""
    bias: bool = True
    """Add a per-class offset (with `cosine`: one for all classes)."""
    cosine: bool = False
    """Logits are multiples of cosines between scaled features and class weights, as `--loss aam`
    needs them."""
    cosine_scale: PositiveFloat | None = None
    """Multiplier of the cosines, > 0; unset = the one of `--loss aam`, otherwise the backbone's
    own."""
    init: Literal["zero", "text"] = "zero"
    """zero = all weights 0 (with `cosine`, where that has no direction: random ones); text = start
    as the zero-shot classifier of the class names, which needs `scaling=l2`, or `cosine` with
    `scaling` l2 or none."""
    text_weight: NonNegativeFloat = 0.0
    """Weight of the text alignment loss, 0 or more, published 0.3; its accuracy is reported beside
    the classifier's. Frozen features get no gradient from it."""
    templates: str | list[str] | None = None
    """Prompt templates of `init=text` and `text_weight`: names of sets, or format strings over the
    class table's columns, one or several; unset = the set that suits the dataset."""
    lrs: tuple[PositiveFloat, ...] | None = Field(default=None, min_length=1)
    """Peak learning rates trained side by side, each > 0; unset = 0.003, 0.01, 0.03 and 0.1, fewer
    where the weights of all pairs would be over 16.8 million; `optim.lr` replaces them by one."""
    weight_decays: tuple[NonNegativeFloat, ...] | None = Field(default=None, min_length=1)
    """Weight decays trained side by side, each 0 or more; unset = 0, 0.1 and 1, fewer likewise;
    `optim.weight_decay` replaces them."""

    @model_validator(mode="after")
    def _text_is_met_as_it_is(self) -> Self:
        if (
            self.init == "text"
            and self.scaling != "l2"
            and not (self.cosine and self.scaling == "none")
        ):
            raise ValueError(
                f"init=text with scaling={self.scaling}: text is compared with features of norm 1; "
                "set scaling=l2"
            )
        if self.feature != "projected" and self.wants_prompts():
            raise ValueError(
                f"feature={self.feature} is not in the space of text, which init={self.init} with "
                f"text_weight={self.text_weight:g} needs; set feature=projected"
            )
        if self.cosine_scale is not None and not self.cosine:
            raise ValueError(f"cosine_scale={self.cosine_scale:g} is read with cosine=true only")
        return self

    def arrays(self) -> tuple[str, ...]:
        """The array that `feature` names."""
        name = "multimodal_pooled" if self.feature == "multimodal" else self.feature
        return (f"image/{name}",)

    def wants_statistics(self) -> bool:
        """True for `scaling=standard`, and where offsets start from the mean feature."""
        return self.scaling == "standard" or self.init == "text"

    def wants_prompts(self) -> bool:
        """True for `init=text` and for the text alignment loss."""
        return self.init == "text" or self.text_weight > 0

    def gives_cosines(self) -> bool:
        """True for `cosine`."""
        return self.cosine

    def template_names(self, classes: pd.DataFrame, kind: str) -> list[str]:
        """The templates that the options mean for a class table, none without text.

        Raises:
            ConfigError: if `templates` names no known set.
        """
        if not self.wants_prompts():
            return []
        columns = [str(column) for column in classes.columns]
        return expand(self.templates or choose_zero_shot(kind, columns), "head.templates")

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
            if getattr(self, plural) not in (None, (value,)):
                raise ConfigError(
                    f"optim.{name}={value:g} contradicts head.{plural}={getattr(self, plural)}; "
                    "set one of the two"
                )
            update[plural] = (value,)
        return self.model_copy(update=update)

    def pairs(self, num_parameters: int) -> list[tuple[float, float]]:
        """(lr, weight decay) pairs to train; every value that is set by hand is among them.

        Args:
            num_parameters: weights of one classifier.
        """
        fitting = max(GRID_PARAMETERS // num_parameters, 1)
        if self.lrs is None and self.weight_decays is None:
            return sorted([(lr, decay) for decay in WEIGHT_DECAYS for lr in LRS][:fitting])
        if self.lrs is None:
            lrs = tuple(sorted(LRS[: max(fitting // len(self.weight_decays or ()), 1)]))
            return list(itertools.product(lrs, self.weight_decays or ()))
        decays = self.weight_decays
        if decays is None:
            decays = tuple(sorted(WEIGHT_DECAYS[: max(fitting // len(self.lrs), 1)]))
        return list(itertools.product(self.lrs, decays))

    def only(self, candidate: str) -> Self:
        """The config with the one pair of that name."""
        for pair in itertools.product(self.lrs or LRS, self.weight_decays or WEIGHT_DECAYS):
            if pair_name(*pair) == candidate:
                update = {"lrs": pair[:1], "weight_decays": pair[1:]}
                return self.model_copy(update=update)
        raise KeyError(candidate)

    def build(self, spec: FeatureSpec) -> "Linear":
        """The classifiers; all begin alike.

        Raises:
            BackboneError: if text is needed and is not as wide as the features.
            ConfigError: for options that contradict the task, the loss or each other.
        """
        pairs = self.pairs(spec.num_classes * spec.feature_dim)
        if (
            self.lrs is None
            and self.weight_decays is None
            and len(pairs) < len(LRS) * len(WEIGHT_DECAYS)
        ):
            logger.warning(
                "linear: %d of %d (lr, weight decay) pairs are tried, %d classes by %d features "
                "make the others too large; set head.lrs and head.weight_decays to choose",
                len(pairs),
                len(LRS) * len(WEIGHT_DECAYS),
                spec.num_classes,
                spec.feature_dim,
            )
        scale = self._scale(spec)
        text = self._text(spec)
        weight = offset = None
        if self.init == "text" and text is not None:
            # Entries of about 1, as features have them: the same learning rates fit.
            weight = text * math.sqrt(spec.feature_dim)
            if not self.cosine:
                weight = weight * (scale / spec.feature_dim)
            if spec.task == "multi_label" and spec.mean is not None:
                # An even chance for the mean image, where zero-shot would affirm every class.
                offset = -scale * (text @ F.normalize(spec.mean, dim=0))
        elif self.cosine:
            weight = torch.randn(spec.num_classes, spec.feature_dim)
        return Linear(
            spec.feature_dim,
            spec.num_classes,
            bias=self.bias,
            scaling=self.scaling,
            criterion=spec.criterion,
            pairs=pairs,
            mean=spec.mean,
            std=spec.std,
            cosine_scale=scale if self.cosine else None,
            weight=weight,
            offset=offset,
            text=text if self.text_weight else None,
            text_scale=spec.logit_scale,
            text_weight=self.text_weight,
        )

    def _scale(self, spec: FeatureSpec) -> float:
        """Multiplier of cosines."""
        loss = spec.criterion
        if isinstance(loss, AdditiveAngularMargin):
            if self.cosine_scale not in (None, loss.scale):
                raise ConfigError(
                    f"head.cosine_scale={self.cosine_scale:g} contradicts loss.scale="
                    f"{loss.scale:g}; leave head.cosine_scale out"
                )
            return loss.scale
        return self.cosine_scale or spec.logit_scale

    def _text(self, spec: FeatureSpec) -> Tensor | None:
        """(C, P) unit class text features, if wanted."""
        if not self.wants_prompts() or spec.prompts is None:
            return None
        if self.text_weight and spec.task != "single_label":
            raise ConfigError(
                f"head.text_weight={self.text_weight:g} is for single_label data, the cache is "
                f"{spec.task}; leave it out"
            )
        if spec.prompts.shape[-1] != spec.feature_dim:
            raise BackboneError(
                f"text features have width {spec.prompts.shape[-1]}, image features "
                f"{spec.feature_dim}; init=text and text_weight need both in the shared space"
            )
        return ensemble(spec.prompts)


def pair_name(lr: float, weight_decay: float) -> str:
    """Name of a candidate."""
    return f"lr {lr:g}, weight decay {weight_decay:g}"


class Linear(Head):
    """G linear classifiers over the same features; `forward` answers with the first."""

    mean: Tensor
    std: Tensor
    cosine_scale: Tensor | None
    text: Tensor | None

    def __init__(
        self,
        feature_dim: int,
        num_classes: int,
        *,
        bias: bool = True,
        scaling: Scaling = "l2",
        criterion: Loss | None = None,
        pairs: Sequence[tuple[float, float]] = ((1e-2, 0.0),),
        mean: Tensor | None = None,
        std: Tensor | None = None,
        cosine_scale: float | None = None,
        weight: Tensor | None = None,
        offset: Tensor | None = None,
        text: Tensor | None = None,
        text_scale: float = 100.0,
        text_weight: float = 0.0,
    ) -> None:
        """Classifiers that all start alike, by default with zero weights.

        Args:
            feature_dim: D.
            num_classes: C.
            bias: add a per-class offset, or one in all with cosines.
            scaling: see `LinearConfig.scaling`.
            criterion: the loss on logits; unset = the head only predicts.
            pairs: G (learning rate, weight decay).
            mean: (D,) of the training rows, read by `scaling="standard"`.
            std: (D,) likewise; columns that do not vary are only centred.
            cosine_scale: s of cosine logits; unset = plain products.
            weight: (C, D) to start from.
            offset: (C,) offsets to start from.
            text: (C, D) unit class text features of the alignment loss.
            text_scale: κ of the alignment loss.
            text_weight: λ.
        """
        super().__init__()
        self.scaling, self.criterion, self.pairs = scaling, criterion, tuple(pairs)
        self.text_scale, self.text_weight = text_scale, text_weight
        if weight is None:
            weight = torch.zeros(num_classes, feature_dim)
        if offset is None:
            offset = torch.zeros(num_classes)
        if cosine_scale is not None:
            offset = offset.mean()
        self.weights = nn.ParameterList(weight.clone() for _ in pairs)
        self.biases = nn.ParameterList(offset.clone() for _ in pairs if bias)
        self.register_buffer("mean", torch.zeros(feature_dim) if mean is None else mean.clone())
        std = torch.ones(feature_dim) if std is None else std
        self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)))
        scale = None if cosine_scale is None else torch.tensor(cosine_scale)
        self.register_buffer("cosine_scale", scale)
        self.register_buffer("text", text, persistent=False)

    def scale(self, features: Tensor) -> Tensor:
        """(B, D) what the classifiers multiply with, from (B, D) features as stored."""
        if self.scaling == "standard":
            features = (features - self.mean) / self.std
        if self.cosine_scale is not None:
            return F.normalize(features, dim=1)
        if self.scaling == "l2":
            return F.normalize(features, dim=1) * math.sqrt(features.shape[1])
        if self.scaling == "unit":
            return F.normalize(features, dim=1)
        return features

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits of the first classifier; see `Head.forward`."""
        return self._logits(self.scale(features), 0)

    def candidates(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Name and (B, C) logits of each classifier, in grid order."""
        scaled = self.scale(*features)
        for index, pair in enumerate(self.pairs):
            yield pair_name(*pair), self._logits(scaled, index)

    def monitors(self, *features: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Class text against the features, as the alignment loss has it, under "text"."""
        if self.text is not None:
            yield "text", self._text_logits(*features)

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """Sum over classifiers under "loss" (each then gets its own gradient), and the best's."""
        assert self.criterion is not None, "built without a loss"
        weights, biases = [*self.weights], [*self.biases]
        if self.cosine_scale is not None:
            weights = [F.normalize(weight, dim=1) for weight in weights]
            if (
                not self.criterion.needs_cosines
            ):  # which scale them, and take one offset, themselves
                weights = [self.cosine_scale * weight for weight in weights]
                biases = [bias.expand(len(weights[0])) for bias in biases]
        losses = stacked_loss(self.criterion, self.scale(*features), weights, biases, targets)
        parts = {}
        if self.text is not None:
            parts["text_loss"] = F.cross_entropy(self._text_logits(*features), targets)
            losses = losses + self.text_weight * parts["text_loss"]
        return {"loss": losses.sum(), "best_loss": losses.detach().min(), **parts}

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
        if self.cosine_scale is not None:
            state["cosine_scale"] = self.cosine_scale
        return state

    def _logits(self, scaled: Tensor, index: int) -> Tensor:
        weight = self.weights[index]
        bias = self.biases[index] if self.biases else None
        if self.cosine_scale is not None:
            logits = self.cosine_scale * F.linear(scaled, F.normalize(weight, dim=1))
            return logits if bias is None else logits + bias
        return F.linear(scaled, weight, bias)

    def _text_logits(self, features: Tensor) -> Tensor:
        assert self.text is not None
        return self.text_scale * F.linear(F.normalize(features, dim=1), self.text)
