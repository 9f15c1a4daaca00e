"""One-vs-rest: a yes/no classifier for one class, or one for each class, that share nothing.

With f the scaled feature of a row and, for each class c, weights of its own:

    z_c = w_c · ReLU(V_c f + a_c) + b_c,   or w_c · f + b_c without hidden units

and the focal loss of z, unless another is chosen. Precision and recall count p_c = σ(z_c) from
`metrics.threshold` on.

Reference: systems "MultiCLIP" (multi-label image and caption classification), its `clip_head`: one
network, one class, focal loss (Lin et al., Focal Loss for Dense Object Detection, 2017). Departs
from it in training all classes at once where no class is named, and in the scaling of features.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import NonNegativeInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from featcache.errors import ConfigError
from featcache.manifest import Task
from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.losses.base import Loss, LossConfig
from heads.losses.focal import FocalConfig
from heads.mlp import RowScale, RowScaling

CHUNK_ELEMENTS = 2**24
"""Hidden units of rows held at a time, in elements (64 MiB of float32)."""

UNSCORED = -1e4
"""Logit of the classes that are not trained: probability 0, and never predicted."""


class OneVsRestConfig(HeadConfig):
    """Classifiers of one class each against everything else."""

    takes_loss: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OptimDefaults(
        lr=1e-3, weight_decay=0.01, epochs=100, batch_size=1024
    )

    kind: Literal["one_vs_rest"] = "one_vs_rest"
    """Head kind."""
    class_index: NonNegativeInt | None = None
    """The one class to tell from the rest, by its number in the class table; metrics are of it
    alone. Unset (and no `class_name`) = all classes."""
    class_name: str | None = None
    """The one class by its name, in place of `class_index`."""
    feature: Literal["projected", "pooled", "multimodal", "text"] = "projected"
    """projected = image features in the space shared with text; pooled = the wider ones before it;
    multimodal = the joint encoder's of image and caption (blip); text = the captions' own."""
    scaling: RowScaling = "standard"
    """standard = each column to mean 0 and deviation 1 over the training rows; l2 = each row to
    norm 1, times the root of the width; none = as stored."""
    hidden: NonNegativeInt | None = None
    """Hidden units of each class's network, 0 = a linear classifier; unset = as many as the feature
    is wide for one class, 0 for all classes."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.class_index is not None and self.class_name is not None:
            raise ValueError(
                f"class_index={self.class_index} and class_name={self.class_name!r} both choose "
                "the class; set one of the two"
            )
        return self

    def arrays(self) -> tuple[str, ...]:
        """The array that `feature` names."""
        names = {"multimodal": "image/multimodal_pooled", "text": "text/projected"}
        return (names.get(self.feature, f"image/{self.feature}"),)

    def wants_statistics(self) -> bool:
        """True for `scaling=standard`."""
        return self.scaling == "standard"

    def default_loss(self, task: Task) -> LossConfig | None:
        """Focal loss, with the defaults of its own."""
        return FocalConfig()

    def build(self, spec: FeatureSpec) -> "OneVsRest":
        """The classifiers.

        Raises:
            ConfigError: if there is no such class, or one class alone is asked for where each row
                has exactly one.
        """
        chosen = self._chosen(spec)
        hidden = self.hidden
        if hidden is None:
            hidden = 0 if chosen is None else spec.feature_dim
        return OneVsRest(
            RowScale(spec.feature_dim, self.scaling, spec.mean, spec.std),
            spec.feature_dim,
            spec.num_classes,
            hidden=hidden,
            chosen=chosen,
            criterion=spec.criterion
            if chosen is None or spec.criterion is None
            else spec.criterion.of_class(chosen),
        )

    def _chosen(self, spec: FeatureSpec) -> int | None:
        if self.class_index is None and self.class_name is None:
            return None
        option = "class_index" if self.class_name is None else "class_name"
        if spec.task == "single_label":
            raise ConfigError(
                f"head.{option} is for multi_label data, the cache is single_label; leave it out "
                "to train all classes"
            )
        if self.class_index is not None:
            if self.class_index >= spec.num_classes:
                raise ConfigError(
                    f"head.class_index={self.class_index}: the cache has classes 0 to "
                    f"{spec.num_classes - 1}"
                )
            return self.class_index
        names = spec.classes["name"].tolist()
        if names.count(self.class_name) != 1:
            found = "no" if self.class_name not in names else "more than one"
            raise ConfigError(
                f"head.class_name={self.class_name!r}: the cache has {found} class of that name "
                f"({', '.join(map(str, names[:5]))}, …); head.class_index names it by number"
            )
        return names.index(self.class_name)


class OneVsRest(Head):
    """One small network for each class that is trained."""

    def __init__(
        self,
        scale: RowScale,
        feature_dim: int,
        num_classes: int,
        *,
        hidden: int = 0,
        chosen: int | None = None,
        criterion: Loss | None = None,
    ) -> None:
        """Networks from torch's global generator; linear ones start at zero.

        Args:
            scale: what rows go through first.
            feature_dim: D.
            num_classes: C.
            hidden: H, 0 = linear.
            chosen: the one class to train; unset = all.
            criterion: the loss on logits of the trained classes; unset = the head only predicts.
        """
        super().__init__()
        self.scale, self.criterion, self.num_classes = scale, criterion, num_classes
        self.chosen = chosen
        self.scored_classes: Sequence[int] | None = None if chosen is None else [chosen]
        trained = num_classes if chosen is None else 1
        self.first: nn.ParameterList | None = None
        if hidden:
            reach = 1 / math.sqrt(feature_dim)
            self.first = nn.ParameterList(
                [
                    torch.empty(trained, hidden, feature_dim).uniform_(-reach, reach),
                    torch.empty(trained, hidden).uniform_(-reach, reach),
                ]
            )
            reach = 1 / math.sqrt(hidden)
            weight = torch.empty(trained, hidden).uniform_(-reach, reach)
        else:
            weight = torch.zeros(trained, feature_dim)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(trained))

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits from (B, D) features as stored; see `Head.forward`."""
        logits = self._trained_logits(features)
        if self.chosen is None:
            return logits
        whole = logits.new_full((len(logits), self.num_classes), UNSCORED)
        whole[:, self.chosen] = logits[:, 0]
        return whole

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """The chosen loss, of the chosen class's column alone if there is one."""
        assert self.criterion is not None, "built without a loss"
        if self.chosen is not None and not self.criterion.reads_all_labels:
            targets = targets[:, self.chosen : self.chosen + 1]
        return {"loss": self.criterion(self._trained_logits(*features), targets)}

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """Weights, and the statistics that scale the rows."""
        return {**super().trained_state(), **self.scale.state_dict(prefix="scale.")}

    def _trained_logits(self, features: Tensor) -> Tensor:
        """(B, c) logits of the classes that are trained."""
        scaled = self.scale(features)
        if self.first is None:
            return F.linear(scaled, self.weight, self.bias)
        size = max(1, CHUNK_ELEMENTS // (len(scaled) * self.weight.shape[1]))
        parts = zip(*(p.split(size) for p in (*self.first, self.weight, self.bias)), strict=True)
        if size >= len(self.weight) or not torch.is_grad_enabled():
            return torch.cat([_two_layers(scaled, *part) for part in parts], 1)
        # Hidden units are made again in the backward pass rather than kept for all classes.
        return torch.cat(
            [checkpoint(_two_layers, scaled, *part, use_reentrant=False) for part in parts], 1
        )


def _two_layers(
    rows: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor
) -> Tensor:
    """(B, c) logits of c networks, from (c, H, D), (c, H), (c, H) and (c,) parameters."""
    hidden = F.linear(rows, first.flatten(0, 1), first_bias.flatten()).relu()
    by_class = hidden.view(len(rows), *second.shape)
    return torch.einsum("bch,ch->bc", by_class, second) + second_bias
