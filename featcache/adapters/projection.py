"""Small heads behind both projections of a frozen dual encoder: they change what is compared.

They read nothing but finished features, so they train on a cache of vectors alone.

Shapes: n rows, P width of the backbone's features, H hidden width, D width of the new features.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from featcache.adapters.base import Adapter, AdapterConfig
from featcache.backbones.base import Backbone, FeatureRequest
from featcache.backbones.trainable import TrainableTowers
from featcache.errors import BackboneError
from featcache.identity import Precision

HeadKind = Literal["residual", "linear", "mlp", "none"]


class ProjectionConfig(AdapterConfig):
    """Train heads on cached image and caption features, no tower."""

    trains_on: ClassVar[Literal["pixels", "tokens", "features"]] = "features"

    kind: Literal["projection"] = "projection"
    """Adapter kind."""
    image: HeadKind = "residual"
    """Head on image features: residual = the feature plus what two layers make of it, nothing at
    first; linear = a matrix, the identity at first; mlp = two layers; none = as they are."""
    text: HeadKind = "residual"
    """The same on text features."""
    dim: PositiveInt | None = None
    """Width D of the new features; unset = the backbone's P. residual and none keep P."""
    hidden: PositiveInt | None = None
    """Width H between the two layers of residual and mlp; unset = 2 P."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of hidden values set to zero in training, 0..1."""

    @model_validator(mode="after")
    def _one_width(self) -> "ProjectionConfig":
        if self.image == self.text == "none":
            raise ValueError("image none and text none leave nothing to train; choose a head")
        return self

    def attach(self, towers: TrainableTowers) -> "Projection":
        """Fresh heads, and a copy of the logit scale; see `AdapterConfig.attach`."""
        return Projection(towers, self)


class Head(nn.Module):
    """One side's head; see `ProjectionConfig`.

    A feature's length passes through residual and linear ones: at first, features stay as they are.
    """

    def __init__(self, kind: HeadKind, width: int, hidden: int, dim: int, dropout: float) -> None:
        """Draws the weights.

        Args:
            kind: of the head.
            width: P.
            hidden: H.
            dim: D.
            dropout: of hidden values.
        """
        super().__init__()
        self.kind = kind
        if kind == "linear":
            self.matrix = nn.Linear(width, dim, bias=False)
            nn.init.eye_(self.matrix.weight) if dim == width else nn.init.orthogonal_(
                self.matrix.weight
            )
        elif kind != "none":
            self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, dim, bias=False)
            self.dropout = nn.Dropout(dropout)
            if kind == "residual":
                nn.init.zeros_(self.second.weight)

    def forward(self, features: Tensor) -> Tensor:
        """(n, D) features from (n, P) ones, not normalised."""
        if self.kind == "none":
            return features
        if self.kind == "linear":
            changed: Tensor = self.matrix(features)
            return changed
        # Hidden units see directions: lengths differ between backbones by orders of magnitude.
        length = features.norm(dim=-1, keepdim=True)
        hidden = self.dropout(F.gelu(self.first(features / length.clamp(min=1e-12))))
        made: Tensor = self.second(hidden)
        return features + length * made if self.kind == "residual" else made


class Projection(Adapter):
    """Heads behind the towers, and the logit scale that goes with them.

    The towers themselves are untouched: `TrainableTowers.encode_image` still gives the backbone's
    own features, `image` and `text` turn those into new ones.

    Reference: Gao et al., CLIP-Adapter: Better Vision-Language Models with Feature Adapters, IJCV
    2024, equations 3-6, for the residual form. Departures: trained contrastively on captions, the
    second layer starts at zero instead of being mixed in by a constant ratio, and GELU.

    Attributes:
        image: (n, P) image features to (n, D).
        text: (n, P) text features to (n, D).
        logit_scale: () natural logarithm of the multiplier of cosines.
        logit_bias: () what is added to them; sigmoid losses train it.
        dim: D.
    """

    mergeable: ClassVar[bool] = False

    def __init__(self, towers: TrainableTowers, config: ProjectionConfig) -> None:
        """See `ProjectionConfig`.

        Raises:
            BackboneError: if the backbone reads no text, or the widths do not fit together.
        """
        super().__init__(towers)
        scale = getattr(towers.model, "logit_scale", None)
        if not isinstance(scale, Tensor):
            raise BackboneError(
                f"{towers.name}: it has no image and text features that are compared, so there is "
                "nothing to project; take a backbone of open_clip"
            )
        width = towers.feature_dim
        dim = config.dim or width
        for side, kind in (("image", config.image), ("text", config.text)):
            if kind in ("residual", "none") and dim != width:
                raise BackboneError(
                    f"adapter.{side} {kind} keeps the width {width} of {towers.name}, adapter.dim "
                    f"is {dim}; leave adapter.dim unset, or set adapter.{side} linear or mlp"
                )
        hidden = config.hidden or 2 * width
        self.image = Head(config.image, width, hidden, dim, config.dropout)
        self.text = Head(config.text, width, hidden, dim, config.dropout)
        self.logit_scale = nn.Parameter(scale.detach().reshape(-1)[0].float().clone())
        bias = getattr(towers.model, "logit_bias", None)
        self.logit_bias = nn.Parameter(torch.zeros(()))
        if isinstance(bias, Tensor):
            self.logit_bias.data.copy_(bias.detach().reshape(-1)[0])
        self.dim = dim

    def state(self) -> dict[str, Tensor]:
        """Weights of both heads, scale and bias."""
        return dict(self.named_parameters())

    def fold(self) -> None:
        """Freezes the heads. They stay behind the projections, which a tower ends with."""
        self.requires_grad_(False).eval()

    def finish(self, backbone: Backbone) -> Backbone:
        """The backbone with the heads behind it."""
        return ProjectedBackbone(backbone, self)


class ProjectedBackbone(Backbone):
    """A dual encoder whose image and text features go through a head each, in float32.

    Other features (pooled, tokens, joint ones) are the backbone's own.

    Attributes:
        model: the backbone's model.
    """

    def __init__(self, base: Backbone, heads: Projection) -> None:
        """Takes the backbone over.

        Args:
            base: what computes features.
            heads: what changes them.
        """
        self._base, self._heads = base, heads
        self.device, self.precision = base.device, base.precision
        self.spec = replace(
            base.spec,
            projected_dim=heads.dim,
            logit_scale=heads.logit_scale.detach().exp().item(),
            logit_bias=heads.logit_bias.detach().item(),
        )
        self.model: Any = getattr(base, "model", None)

    def project_image(self, features: Tensor) -> Tensor:
        """(n, D) float32 image features on `device` from the (n, P) ones of the base."""
        return self._through(self._heads.image, features)

    def project_text(self, features: Tensor) -> Tensor:
        """(n, D) float32 text features on `device` from the (n, P) ones of the base."""
        return self._through(self._heads.text, features)

    def encode_image(
        self, pixels: Tensor, request: FeatureRequest, texts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Image features of a batch; see `Backbone.encode_image`."""
        features = self._base.encode_image(pixels, request, texts)
        if "projected" in features:
            features["projected"] = self.project_image(features["projected"])
        return features

    def tail(self, num_blocks: int) -> nn.Module:
        """The base's last blocks with the image head behind; see `Backbone.tail`."""
        return nn.Sequential(self._base.tail(num_blocks), _InFloat(self._heads.image))

    def move(self, device: str | torch.device, precision: Precision) -> None:
        """Puts the towers elsewhere; the heads stay float32. See `Backbone.move`."""
        self._base.move(device, precision)
        self._heads.to(self._base.device)
        self.device, self.precision = self._base.device, self._base.precision

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32 text features on `device`; see `Backbone.encode_text`."""
        return self.project_text(self._base.encode_text(texts))

    def reference_transform(self) -> Callable[[Any], Tensor]:
        """The source library's own transform; see `Backbone.reference_transform`."""
        return self._base.reference_transform()

    def _through(self, head: nn.Module, features: Tensor) -> Tensor:
        with torch.inference_mode():
            changed: Tensor = head(features.to(self.device, torch.float32))
        return changed.clone()  # outside: an ordinary tensor


class _InFloat(nn.Module):
    """A module behind others that compute in half precision."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        changed: Tensor = self.module(x.float())
        return changed
