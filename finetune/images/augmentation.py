"""How training images are varied: what is drawn for an image depends on (seed, epoch, row) only.

Crop and flip are drawn here, before an image is decoded, so that a photograph is decoded no larger
than its crop needs. Colours are left to torchvision's own transforms.
"""

import contextlib
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor

from featcache.config import Config
from featcache.images import Box

Key = tuple[int, int]
"""Seed and epoch, which fix the variation of every row."""

_ATTEMPTS = 10
_LEAST_ON_DEVICE = 0.5


class AugmentationConfig(Config):
    """Random variation of training images; the defaults only crop and mirror.

    CLIP-LoRA's own is `min_area` 0.08 and `max_aspect` 1.3333.
    """

    min_area: float = Field(default=0.7, gt=0.0, le=1.0)
    """Smallest share of an image's area that a random crop keeps, (0, 1]; 1 = no crops: the plain
    resize and centre crop."""
    max_area: float = Field(default=1.0, gt=0.0, le=1.0)
    """Largest share of an image's area that a random crop keeps, (0, 1]."""
    max_aspect: float = Field(default=1.0, ge=1.0)
    """Largest width over height of a crop, and of height over width, >= 1; 1 = square crops of the
    square that the tower sees, made on the device; torchvision's crops have 1.3333."""
    flip: bool = True
    """Mirror half of the images; switch off where left and right mean something."""
    brightness: NonNegativeFloat = 0.0
    """Colour jitter: brightness is multiplied by 1 ± this, >= 0."""
    contrast: NonNegativeFloat = 0.0
    """Colour jitter: contrast is multiplied by 1 ± this, >= 0."""
    saturation: NonNegativeFloat = 0.0
    """Colour jitter: saturation is multiplied by 1 ± this, >= 0."""
    hue: float = Field(default=0.0, ge=0.0, le=0.5)
    """Colour jitter: hue is shifted by ± this share of the colour circle, 0..0.5."""
    grayscale: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of images that lose their colours, 0..1."""
    policy: Literal["none", "trivial", "random"] = "none"
    """TrivialAugment (one random operation at random strength), RandAugment, or neither."""
    num_ops: int = Field(default=2, ge=1)
    """RandAugment: operations one after the other, >= 1."""
    magnitude: int = Field(default=9, ge=0, le=30)
    """RandAugment: strength, 0..30."""
    erasing: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of images of which a random rectangle is filled with the mean colour, 0..1."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area is {self.min_area}, more than max_area {self.max_area}")
        return self

    @property
    def crops(self) -> bool:
        """Whether crops are random; otherwise an image is resized and its centre cut out."""
        return self.min_area < 1.0

    @property
    def on_device(self) -> bool:
        """Whether batches of decoded squares can be cropped and mirrored on the device.

        Smaller crops are cut out of the whole image instead, in its full resolution.
        """
        return self.max_aspect == 1.0 and self.min_area >= _LEAST_ON_DEVICE and not self.colours

    @property
    def colours(self) -> bool:
        """Whether `vary_colours` changes anything."""
        return self != self.model_copy(update=_NO_COLOURS)


_NO_COLOURS: dict[str, Any] = {
    **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "grayscale", "erasing"), 0.0),
    "policy": "none",
}


class Variation:
    """Draws for one image after another; the same for the same (seed, epoch, row)."""

    def __init__(self, config: AugmentationConfig, mean: tuple[float, ...]) -> None:
        """Holds the options.

        Args:
            config: what is varied.
            mean: per-channel, in units of 0..1; erased rectangles get it.
        """
        self.config = config
        self._mean = mean

    def box_and_flip(
        self, key: tuple[int, int, int], height: int, width: int
    ) -> tuple[Box | None, bool]:
        """The crop of an image and whether it is mirrored.

        As torchvision's RandomResizedCrop: area uniform, aspect ratio log-uniform, ten attempts to
        fit it into the image, then the largest centred crop of a legal aspect ratio.

        Args:
            key: seed, epoch, row.
            height: of the image, pixels.
            width: of the image, pixels.

        Returns:
            the box, None = all of the image in its plain view; and the flip.
        """
        config, random = self.config, np.random.default_rng([*key, 0])
        flip = config.flip and bool(random.random() < 0.5)
        if not config.crops:
            return None, flip
        limit = math.log(config.max_aspect)
        for area, ratio, down, right in random.random((_ATTEMPTS, 4)).tolist():
            target = height * width * (config.min_area + (config.max_area - config.min_area) * area)
            aspect = math.exp(limit * (2 * ratio - 1))
            rows, columns = round(math.sqrt(target / aspect)), round(math.sqrt(target * aspect))
            if 0 < rows <= height and 0 < columns <= width:
                top, left = int(down * (height - rows + 1)), int(right * (width - columns + 1))
                return (top, left, rows, columns), flip
        rows, columns = height, width
        if width > height * config.max_aspect:
            columns = round(height * config.max_aspect)
        elif height > width * config.max_aspect:
            rows = round(width * config.max_aspect)
        return ((height - rows) // 2, (width - columns) // 2, rows, columns), flip

    def vary_colours(self, key: tuple[int, int, int], pixels: Tensor) -> Tensor:
        """(3, H, W) uint8 with other colours, from (3, H, W) uint8.

        Borrows torch's global random generator of the CPU and gives it back as it was, so nothing
        else may draw from it meanwhile.

        Args:
            key: seed, epoch, row.
            pixels: cropped and resized.
        """
        if self._transform is None:
            return pixels
        word = np.random.SeedSequence([*key, 1]).generate_state(1, np.uint64)[0]
        with _borrowed_generator(int(word)):
            varied: Tensor = self._transform(pixels)
        return varied

    @cached_property
    def _transform(self) -> Any:
        config = self.config
        if not config.colours:
            return None
        # Imported late: it takes longer than all else here, and many runs never need it.
        from torchvision.transforms import v2

        parts: list[Any] = []
        if config.policy == "trivial":
            parts.append(v2.TrivialAugmentWide())
        elif config.policy == "random":
            parts.append(v2.RandAugment(config.num_ops, config.magnitude))
        strengths = (config.brightness, config.contrast, config.saturation, config.hue)
        if any(strengths):
            parts.append(v2.ColorJitter(*strengths))
        if config.grayscale:
            parts.append(v2.RandomGrayscale(config.grayscale))
        if config.erasing:
            grey = [round(255 * channel) for channel in self._mean]
            parts.append(v2.RandomErasing(config.erasing, value=grey))
        return v2.Compose(parts)


def square_views(
    config: AugmentationConfig, key: Key, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Square crops and flips of many images, as maps from the result's places to the image's.

    The area is uniform in the config's bounds, the place uniform inside of the image.

    Args:
        config: crop and flip; `max_aspect` is taken as 1.
        key: seed and epoch.
        rows: (n,) what else the draws depend on.

    Returns:
        (n, 2, 3) float32 of `torch.nn.functional.affine_grid`.
    """
    area, down, right, mirror = _uniform(key, rows, 4)
    side = np.sqrt(config.min_area + (config.max_area - config.min_area) * area)
    if not config.crops:
        side[:] = 1.0
    views = np.zeros((len(rows), 2, 3), np.float32)
    views[:, 0, 0] = side * np.where((mirror < 0.5) & config.flip, -1.0, 1.0)
    views[:, 1, 1] = side
    views[:, 0, 2], views[:, 1, 2] = (1.0 - side) * (2 * right - 1), (1.0 - side) * (2 * down - 1)
    return views


def crop_squares(pixels: Tensor, views: Tensor, size: tuple[int, int]) -> Tensor:
    """Crops of a whole batch, resized bilinearly, as one sampling.

    Args:
        pixels: (B, 3, H, W) uint8 or float, any device.
        views: (B, 2, 3) float32 of `square_views`, same device.
        size: height and width of the result, pixels.

    Returns:
        (B, 3, *size) float32 in the units of `pixels`.
    """
    grid = F.affine_grid(views, [len(pixels), 3, *size], align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)


def _uniform(key: Key, rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.float64]:
    """(count, n) numbers in [0, 1) from (seed, epoch, row) alone.

    SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): its
    n-th output is a mix of a state plus n steps, so all of them come at once.
    """
    start = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        number = (
            rows.astype(np.uint64) * np.uint64(count)
            + np.arange(1, count + 1, dtype=np.uint64)[:, None]
        )
        value = start + number * np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        value ^= value >> np.uint64(31)
    result: npt.NDArray[np.float64] = (value >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return result


@contextlib.contextmanager
def _borrowed_generator(seed: int) -> Iterator[None]:
    """Torch's generator of the CPU alone: `torch.manual_seed` would reach for the GPU's as well."""
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)
