"""What a frozen encoder must offer: identity, sizes, and features of images and text.

Adding a backbone family is one new file in this folder: subclass `BackboneConfig` and `Backbone`.
Opening one never reaches for random weights or the network unless the options say so by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from featcache.backbones.prompt_tower import PromptTower
from featcache.backbones.trainable import TrainableTowers
from featcache.config import Config
from featcache.errors import BackboneError
from featcache.identity import BackboneIdentity, Multimodal, Precision, PreprocessIdentity

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Torch's name of each arithmetic."""


@dataclass(frozen=True)
class PixelSpec:
    """The pixels a tower was trained on.

    Attributes:
        size: height and width in pixels.
        mean, std: per-channel, in units of 0..1.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" (then centre crop), "squash" or "longest" (then padding).
        fill_color: padding grey level 0..255.
        crop_pct: the resize goes to `size / crop_pct`, rounded down, and the centre is cut out.
        convert_first: whether an image becomes RGB before the resize instead of after it.
        on_white: whether transparent parts then become white instead of what lies below them.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    crop_pct: float = 1.0
    convert_first: bool = False
    on_white: bool = False

    @classmethod
    def of(cls, record: PreprocessIdentity) -> Self:
        """The pixels that a cache was made from."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: getattr(record, name) for name in names})

    def record(self, mode: Literal["fast", "scaled", "reference"]) -> PreprocessIdentity:
        """These pixels, as a cache's identity holds them."""
        return PreprocessIdentity(**asdict(self), mode=mode)


class PixelInput:
    """Turns batches of pixels into what a tower takes."""

    def __init__(self, spec: PixelSpec, device: torch.device, precision: Precision) -> None:
        self._device, self._dtype = device, DTYPES[precision]
        self._mean = torch.tensor(spec.mean, device=device)[:, None, None]
        self._std = torch.tensor(spec.std, device=device)[:, None, None]

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) normalised pixels on the device, in the tower's arithmetic.

        Args:
            pixels: (B, 3, H, W), uint8 in 0..255 or float32 already normalised; any device.
        """
        x = pixels.to(self._device, non_blocking=True)
        if x.dtype == torch.uint8:
            x = x.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        # One memory layout, so that equal pixels give equal bytes.
        return x.to(self._dtype).contiguous()


@dataclass(frozen=True)
class BackboneSpec:
    """Sizes of a backbone's features, known once it is open.

    Attributes:
        identity: what goes into a cache's fingerprint.
        pixels: what the image tower expects.
        projected_dim: P, width of image and text features after the projection; 0 if there is none.
        pooled_dim: D, width of the pooled image feature before the projection; 0 if there is none.
        token_grid: rows and columns of patch tokens, or None if the tower has none.
        token_dim: width of a patch token, or None.
        num_layers: number of blocks that tokens can be taken from; 0 if none.
        logit_scale: multiplier of image-text cosines that the backbone was trained with; 1 if it
            knows no text.
        logit_bias: what is added to the multiplied cosines, for backbones trained by a sigmoid loss
            (SigLIP); 0 for all others.
        has_text: whether `encode_text` works.
        num_prefix_tokens: tokens before the patches in a block's sequence (class token, registers).
        can_finish: whether the last blocks can be run on their own; see `Backbone.tail`.
        joint: tokens and width of the states of an encoder over image and text together, or None.
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
    num_prefix_tokens: int = 0
    can_finish: bool = False
    joint: tuple[int, int] | None = None
    logit_bias: float = 0.0

    def require(self, request: "FeatureRequest", text: bool = False) -> None:
        """Checks that the backbone offers what is asked for.

        Raises:
            BackboneError: naming the feature, and what there is instead.
        """
        name = self.identity.name
        if text and not self.has_text:
            raise BackboneError(f"{name} has no text tower; set features.text false")
        if request.projected and not self.projected_dim:
            raise BackboneError(
                f"{name} has no projection into a space shared with text; set features.projected "
                "false and features.pooled true"
            )
        if request.pooled and not self.pooled_dim:
            raise BackboneError(
                f"{name} has no pooled feature before its projection; set features.pooled false"
            )
        if request.joint and self.joint is None:
            raise BackboneError(
                f"{name} has no joint encoder of image and text; set features.multimodal none and "
                "features.itm false, or take backbone.kind blip"
            )
        if not request.tokens:
            return
        if self.token_grid is None:
            raise BackboneError(f"{name} has no patch tokens; set features.tokens none")
        if request.before_last:
            self.require_tail(request.before_last)
            return
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

    def require_tail(self, num_blocks: int) -> None:
        """Checks that the last `num_blocks` blocks can be run on their own.

        Raises:
            BackboneError: if they cannot, or there are fewer.
        """
        name = self.identity.name
        if not self.can_finish:
            raise BackboneError(
                f"{name} is no plain vision transformer, its last blocks cannot be run on their "
                "own; features.tokens before_last needs one, take all or grid:K; so does adapter "
                "last_blocks, take lora or full"
            )
        if not 1 <= num_blocks <= self.num_layers:
            raise BackboneError(
                f"before_last:{num_blocks} does not exist in {name}; expected before_last:1 to "
                f"before_last:{self.num_layers}"
            )


@dataclass(frozen=True)
class FeatureRequest:
    """Which image features one pass has to return.

    Attributes:
        projected, pooled: see `BackboneSpec`.
        tokens: whether patch tokens are wanted.
        token_pool: average-pool the token grid to this many rows and columns; None = all tokens.
        token_layer: block whose output is taken, from 1; -1 = the last.
        before_last: if not 0, "tokens" are instead the whole sequence that enters the last
            `before_last` blocks: prefix tokens first, then all patches.
        multimodal: what is wanted of the joint encoder of image and text: "none", "pooled" (its
            first token) or "states" (all tokens, their mask, and the first one by itself).
        itm: whether its matching logits are wanted.
    """

    projected: bool = True
    pooled: bool = False
    tokens: bool = False
    token_pool: int | None = None
    token_layer: int = -1
    before_last: int = 0
    multimodal: Multimodal = "none"
    itm: bool = False

    @property
    def joint(self) -> bool:
        """Whether the joint encoder has to run."""
        return self.multimodal != "none" or self.itm


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
    def encode_image(
        self, pixels: Tensor, request: FeatureRequest, texts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Image features of a batch, not normalised.

        Args:
            pixels: (B, 3, H, W), either uint8 in 0..255 (normalised here), or float32 already
                normalised by `spec.pixels` (what `reference_transform` returns); any device.
            request: which features.
            texts: B texts, one an image; needed by the joint encoder only.

        Returns:
            float32 tensors on `device`: "projected" (B, P), "pooled" (B, D), "tokens" (B, L, W),
            "multimodal" (B, T, W), "multimodal_mask" (B, T) bool, "multimodal_pooled" (B, W) and
            "itm" (B, 2; no match, match), those asked for.
        """

    def tail(self, num_blocks: int) -> nn.Module:
        """The last blocks, final norm, pooling and projection as a module of their own.

        Its `forward` takes the (B, L, W) sequence that enters those blocks, in the backbone's own
        arithmetic, and returns (B, P) projected features, or (B, D) pooled ones of a backbone
        without a projection. Weights are the backbone's own and frozen: `copy.deepcopy` the module
        to train it.

        Args:
            num_blocks: number of blocks from the end, 1..`spec.num_layers`.

        Raises:
            BackboneError: if the backbone cannot be cut there.
        """
        self.spec.require_tail(num_blocks)
        raise NotImplementedError(f"{type(self).__name__} says can_finish and has no tail")

    @abstractmethod
    def move(self, device: str | torch.device, precision: Precision) -> None:
        """Puts the towers elsewhere, or into another arithmetic, in place."""

    def trainable(self) -> TrainableTowers:
        """The same towers, opened for gradients; they share the weights, which must be float32.

        Raises:
            BackboneError: if this kind cannot be trained here.
        """
        raise BackboneError(
            f"{self.spec.identity.name}: backbones of kind {self.spec.identity.kind} cannot be "
            "trained; take open_clip, timm or blip"
        )

    def save(self, folder: Path) -> None:
        """Writes the model into a folder as its own library opens it, in the present precision.

        Here the same kind opens it as `local-dir:FOLDER`.

        Args:
            folder: existing and empty.

        Raises:
            BackboneError: if this kind cannot be written.
        """
        raise BackboneError(
            f"{self.spec.identity.name}: backbones of kind {self.spec.identity.kind} cannot be "
            "written; only open_clip, timm and blip can"
        )

    def finish_from(self, tokens: Tensor, num_blocks: int) -> Tensor:
        """(B, P) float32 features on `device` from cached `before_last:num_blocks` tokens.

        Args:
            tokens: (B, L, W) of any float type, on any device.
            num_blocks: number of blocks still to run.

        Raises:
            BackboneError: see `tail`.
        """
        tail = self.tail(num_blocks)
        with torch.inference_mode():
            x = tokens.to(self.device, DTYPES[self.precision])
            features: Tensor = tail(x).to(torch.float32)
        return features.clone()  # outside: an ordinary tensor

    def prompt_tower(self) -> PromptTower:
        """The text tower on its own, for prompts that are learned at its token embeddings.

        Raises:
            BackboneError: if there is none, or none that takes token embeddings.
        """
        raise BackboneError(
            f"{self.spec.identity.name}: prompts cannot be learned inside a text tower of "
            f"{self.spec.identity.kind}; take head lmpt, or a backbone of open_clip or blip"
        )

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

    @property
    def default_text_policy(self) -> str:
        """How captions enter the text tower unless `features.text_policy` says otherwise."""
        return "raw"

    @property
    def image_only(self) -> bool:
        """True without a text tower, and so without a projection into a shared space."""
        return False

    @abstractmethod
    def open(self, device: str = "cpu", precision: Precision = "fp32") -> Backbone:
        """The backbone with its weights loaded, in evaluation mode, gradients off.

        Raises:
            BackboneError: unknown name, missing weights, or options that contradict each other.
        """
