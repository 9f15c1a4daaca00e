"""Two-layer classifier on one modality's vector: the yardstick for heads that fuse several.

With f the scaled vector of a row, image, caption or both read together by a joint encoder:
z = W₂ ReLU(W₁ f + b₁) + b₂.

Reference: systems "MultiCLIP" (multi-label image and caption classification), its `naive` head on
the joint encoder's pooled vector. Departures: any single modality can be read, so that each has its
own yardstick; vectors are scaled first; the loss is free to choose.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt
from torch import Tensor

from heads.base import Features, FeatureSpec, Head, HeadConfig, OptimDefaults
from heads.losses.base import Loss
from heads.mlp import OPTIM_DEFAULTS, Mlp, RowScale, RowScaling

Feature = Literal["projected", "pooled", "multimodal", "text"]
ARRAYS: Mapping[Feature, str] = {
    "projected": "image/projected",
    "pooled": "image/pooled",
    "multimodal": "image/multimodal_pooled",
    "text": "text/projected",
}
"""Array of the cache by the name that options use."""


class NaiveConfig(HeadConfig):
    """Linear, ReLU, linear on the vector of one modality."""

    takes_loss: ClassVar[bool] = True
    optim_defaults: ClassVar[OptimDefaults] = OPTIM_DEFAULTS

    kind: Literal["naive"] = "naive"
    """Head kind."""
    feature: Feature = "projected"
    """projected = image features in the space shared with text; pooled = the wider ones before it;
    multimodal = the joint encoder's of image and caption (blip); text = the captions' own."""
    scaling: RowScaling = "standard"
    """standard = each column to mean 0 and deviation 1 over the training rows; l2 = each row to
    norm 1, times the root of the width; none = as stored."""
    hidden: PositiveInt | None = None
    """Hidden units, 1 or more; unset = as many as the vector is wide."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden units dropped in training, 0 to below 1."""

    def arrays(self) -> tuple[str, ...]:
        """The array that `feature` names."""
        return (ARRAYS[self.feature],)

    def wants_statistics(self) -> bool:
        """True for `scaling=standard`."""
        return self.scaling == "standard"

    def build(self, spec: FeatureSpec) -> "Naive":
        """The classifier; its loss is the one that `spec` brings."""
        width = spec.width(ARRAYS[self.feature])
        return Naive(
            RowScale(width, self.scaling, spec.mean, spec.std),
            Mlp(width, spec.num_classes, self.hidden, self.dropout),
            spec.criterion,
        )


class Naive(Head):
    """A two-layer classifier on scaled vectors."""

    def __init__(self, scale: RowScale, classifier: Mlp, criterion: Loss | None = None) -> None:
        """A classifier of D-wide rows.

        Args:
            scale: what rows go through first.
            classifier: D → C.
            criterion: the loss on logits; unset = the head only predicts.
        """
        super().__init__()
        self.scale, self.classifier, self.criterion = scale, classifier, criterion

    def forward(self, features: Tensor) -> Tensor:
        """(B, C) logits from (B, D) features as stored; see `Head.forward`."""
        logits: Tensor = self.classifier(self.scale(features))
        return logits

    def loss(self, features: Features, targets: Tensor, progress: float) -> dict[str, Tensor]:
        """The chosen loss of the logits."""
        assert self.criterion is not None, "built without a loss"
        return {"loss": self.criterion(self(*features), targets)}

    def trained_state(self, candidate: str = "") -> Mapping[str, Tensor]:
        """Weights, and the statistics that scale the rows."""
        return {**super().trained_state(), **self.scale.state_dict(prefix="scale.")}
