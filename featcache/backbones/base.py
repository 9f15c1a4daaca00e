"""What a frozen encoder must offer: identity, sizes, and features of images and text.

Adding a backbone family is one new file in this folder: subclass `BackboneConfig` and `Backbone`.
Opening one never reaches for random weights or the network unless the options say so by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from featcache.config import Config
from featcache.errors import BackboneError
from featcache.identity import BackboneIdentity, Precision


@dataclass(frozen=True)
class PixelSpec:
    """The pixels a tower was trained on.

    Attributes:
        size: height and width in pixels.
        mean, std: per-channel, in units of 0..1.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" (then centre crop), "squash" or "longest" (then padding).
        fill_color: padding grey level 0..255.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0


@dataclass(frozen=True)
class BackboneSpec:
    """Sizes of a backbone's features, known once it is open.

    Attributes:
        identity: what goes into a cache's fingerprint.
        pixels: what the image tower expects.
        projected_dim: P, width of image and text features after the projection.
        pooled_dim: D, width of the pooled image feature before the projection; 0 if there is none.
        token_grid: rows and columns of patch tokens, or None if the tower has none.
        token_dim: width of a patch token, or None.
        num_layers: number of blocks that tokens can be taken from; 0 if none.
        logit_scale: multiplier of image-text cosines that the backbone was trained with.
        has_text: whether `encode_text` works.
    """

    identity: BackboneIdentity
    pixels: PixelSpec
    projected_dim: int
    pooled_dim: int
    token_grid: tuple[int, int] | None
    token_dim: int | None
    num_layers: int
    logit_scale: float
    has_text: bool

    def require(self, request: "FeatureRequest", text: bool = False) -> None:
        """Checks that the backbone offers what is asked for.

        Raises:
            BackboneError: naming the feature, and what there is instead.
        """
        name = self.identity.name
        if text and not self.has_text:
            raise BackboneError(f"{name} has no text tower; set features.text false")
        if request.pooled and not self.pooled_dim:
            raise BackboneError(
                f"{name} has no pooled feature before its projection; set features.pooled false"
            )
        if not request.tokens:
            return
        if self.token_grid is None:
            raise BackboneError(f"{name} has no patch tokens; set features.tokens none")
        if request.token_layer != -1 and not 1 <= request.token_layer <= self.num_layers:
            raise BackboneError(
                f"features.token_layer {request.token_layer} does not exist in {name}; expected "
                f"1..{self.num_layers}, or -1 for the last"
            )
        if request.token_pool is not None and request.token_pool > min(self.token_grid):
            rows, columns = self.token_grid
            raise BackboneError(
                f"features.tokens grid:{request.token_pool} is finer than the {rows}x{columns} "
                f"patches of {name}"
            )


@dataclass(frozen=True)
class FeatureRequest:
    """Which image features one pass has to return.

    Attributes:
        projected, pooled: see `BackboneSpec`.
        tokens: whether patch tokens are wanted.
        token_pool: average-pool the token grid to this many rows and columns; None = all tokens.
        token_layer: block whose output is taken, from 1; -1 = the last.
    """

    projected: bool = True
    pooled: bool = False
    tokens: bool = False
    token_pool: int | None = None
    token_layer: int = -1


class Backbone(ABC):
    """A frozen dual encoder in evaluation mode.

    Attributes:
        spec: sizes and identity.
        device: where the towers live.
        precision: arithmetic of weights and activations.
    """

    spec: BackboneSpec
    device: torch.device
    precision: Precision

    @abstractmethod
    def encode_image(self, pixels: Tensor, request: FeatureRequest) -> dict[str, Tensor]:
        """Image features of a batch, not normalised.

        Args:
            pixels: (B, 3, H, W), either uint8 in 0..255 (normalised here), or float32 already
                normalised by `spec.pixels` (what `reference_transform` returns); any device.
            request: which features.

        Returns:
            float32 tensors on `device`: "projected" (B, P), "pooled" (B, D), "tokens" (B, L, W),
            those asked for.
        """

    @abstractmethod
    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """(n, P) float32 text features on `device`, not normalised; long texts keep EOT.

        Raises:
            BackboneError: if the backbone has no text tower.
        """

    @abstractmethod
    def reference_transform(self) -> Callable[[Any], Tensor]:
        """The source library's own transform: PIL image to (3, H, W) float32, normalised."""


class BackboneConfig(Config):
    """Options that every backbone shares."""

    kind: str
    """Backbone kind."""

    @abstractmethod
    def open(self, device: str = "cpu", precision: Precision = "fp32") -> Backbone:
        """The backbone with its weights loaded, in evaluation mode, gradients off.

        Raises:
            BackboneError: unknown name, missing weights, or options that contradict each other.
        """
