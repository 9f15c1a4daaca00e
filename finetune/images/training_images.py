"""Varied images for training: the quick way where the options allow it, the full one otherwise.

Quick: whole images are decoded as squares a little larger than the tower takes them, kept in memory
if they fit, and a batch is cropped and mirrored on the device in one sampling. Full: every crop is
cut out of its image in full resolution, with colours varied, as torchvision does it. Which way it
is follows from the options alone (`AugmentationConfig.on_device`), never from memory or device.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.base import PixelSpec
from featcache.storage import Where
from finetune.images.augmentation import AugmentationConfig, Key, crop_squares, square_views
from finetune.images.loading import Images, LoadingConfig

MARGIN = 1.125
"""Side of the squares that are kept, over the side that the tower takes: room for crops."""


@dataclass(frozen=True)
class VariedBatch:
    """A batch before it goes to the device.

    Attributes:
        which: (B,) int64 rows.
        pixels: (B, 3, H, W) uint8 on the CPU; larger than the tower takes them if there are views.
        views: (B, 2, 3) float32 crops and flips still to be made; None = they are made.
    """

    which: npt.NDArray[np.int64]
    pixels: Tensor
    views: Tensor | None

    def __len__(self) -> int:
        return len(self.which)

    def chunks(self, count: int) -> list["VariedBatch"]:
        """The rows in `count` pieces, as equal as possible."""
        views = [None] * count if self.views is None else self.views.tensor_split(count)
        parts = zip(
            np.array_split(self.which, count), self.pixels.tensor_split(count), views, strict=True
        )
        return [VariedBatch(*part) for part in parts]


class TrainingImages:
    """Images of a list of files, varied anew in every epoch.

    Attributes:
        images: where their pixels come from; counts the unreadable ones and the time waited.
        on_device: whether crops are made on the device.
    """

    def __init__(
        self,
        root: Where,
        paths: Sequence[str],
        spec: PixelSpec,
        augmentation: AugmentationConfig,
        loading: LoadingConfig,
        device: torch.device,
    ) -> None:
        """Starts the workers.

        Args:
            root: folder or address that `paths` start from.
            paths: N images.
            spec: pixels that the tower takes.
            augmentation: how they are varied.
            loading: how they are decoded.
            device: where the tower is.
        """
        self._spec, self._augmentation, self._device = spec, augmentation, device
        self.on_device = augmentation.on_device
        kept = spec
        if self.on_device and augmentation.crops:
            height, width = spec.size
            kept = replace(spec, size=(math.ceil(height * MARGIN), math.ceil(width * MARGIN)))
        self.images = Images(
            root,
            paths,
            kept,
            None if self.on_device else augmentation,
            loading,
            loading.workers_for(device),
            pinned=device.type == "cuda",
            plain=loading.decode if self.on_device else "fast",
        )

    def __len__(self) -> int:
        return len(self.images)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers."""
        self.images.close()

    def stream(
        self,
        plan: Iterable[npt.NDArray[np.int64]],
        key: Key,
        spares: npt.NDArray[np.int64] | None = None,
    ) -> Iterator[VariedBatch]:
        """The batches of a plan, decoded ahead; see `Images.stream`.

        Args:
            plan: row indices of one batch after the other.
            key: seed and epoch that, with its row, fix how an image is varied.
            spares: sorted rows that may take the place of unreadable ones; None = these are left
                out.
        """
        batches = self.images.stream(plan, None if self.on_device else key, spares)
        return self._varied(batches, key)

    def inputs(self, batch: VariedBatch) -> Tensor:
        """(B, 3, H, W) float32 normalised on the device."""
        pixels = batch.pixels.to(self._device, non_blocking=True)
        if batch.views is not None:
            views = batch.views.to(self._device, non_blocking=True)
            pixels = crop_squares(pixels, views, self._spec.size)
        return normalize(pixels, self._spec.mean, self._spec.std)

    def _varied(
        self, batches: Iterator[tuple[Tensor, npt.NDArray[np.int64]]], key: Key
    ) -> Iterator[VariedBatch]:
        options = self._augmentation
        for pixels, which in batches:
            views = None
            if self.on_device and (options.crops or options.flip):
                views = torch.from_numpy(square_views(options, key, which))
            yield VariedBatch(which, pixels, views)


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) float32 normalised, from pixels in 0..255."""
    shift, scale = _constants(tuple(mean), tuple(std), pixels.device)
    return (pixels.float() - shift) / scale


@cache
def _constants(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Made once: a copy to the device in every step would let the CPU wait for it."""
    shift = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255.0
    scale = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255.0
    return shift, scale
