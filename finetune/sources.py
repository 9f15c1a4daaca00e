"""Where the inputs of fine-tuning come from: pixels of a dataset, or what a cache holds of it.

A source gives augmented inputs in training and plain ones for measuring, and says how an input
becomes a feature with gradients. Rows are counted in the parts (`heads.parts.Part`) it was opened
for.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.base import Backbone, FeatureRequest, PixelSpec
from featcache.backbones.trainable import TrainableTowers
from featcache.manifest import Manifest
from finetune.augmentation import AugmentationConfig
from finetune.loading import Images, LoadingConfig
from heads.parts import Part

IntArray = npt.NDArray[np.int64]


class Source(Protocol):
    """Inputs of training and measuring."""

    @property
    def waited(self) -> float:
        """Seconds that training has waited for inputs so far."""

    @property
    def problems(self) -> dict[str, str]:
        """Path to reason, of every image found unreadable so far."""

    def augmented(
        self, plan: Sequence[IntArray], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, IntArray]]:
        """Inputs of training rows, varied by (seed, epoch), on the device.

        Args:
            plan: positions in the training part, one array a batch.
            seed: of the whole training.
            epoch: from 0.

        Yields:
            Inputs of the readable rows of a batch, and their positions.
        """

    def plain(self, part: Part, batch_size: int) -> Iterator[tuple[Tensor, IntArray]]:
        """Inputs of all readable rows of a part, in order, and their positions in it."""

    def encode(self, inputs: Tensor) -> Tensor:
        """(B, P) features with gradients."""

    def encode_finished(self, backbone: Backbone, inputs: Tensor) -> Tensor:
        """(B, P) float32 features by the backbone as extraction opens it."""

    def close(self) -> None:
        """Ends threads and processes."""


class PixelSource:
    """Images of a dataset; see `Source`."""

    def __init__(
        self,
        towers: TrainableTowers,
        spec: PixelSpec,
        manifest: Manifest,
        train: Part,
        augmentation: AugmentationConfig,
        loading: LoadingConfig,
        ram_budget_gib: float,
        device: torch.device,
    ) -> None:
        """Starts the decoding workers.

        Args:
            towers: encode the images.
            spec: pixels that the towers take.
            manifest: rows of all parts.
            train: rows trained on.
            augmentation: how their images are varied.
            loading: how images are decoded.
            ram_budget_gib: plain pixels of parts that are measured are kept up to this size, GiB.
            device: where inputs go.
        """
        self._towers, self._device, self._rows = towers, device, train.rows
        self._size = spec.size
        self._room = int(ram_budget_gib * 2**30)
        self._held: dict[str, tuple[Tensor, IntArray]] = {}
        workers, pinned = loading.workers_for(device), device.type == "cuda"
        root, paths = manifest.root, manifest.paths
        self._varied = Images(root, paths, spec, augmentation, loading, workers, pinned)
        # Measured on the pixels that extraction makes.
        exact = loading.model_copy(update={"decode": "fast"})
        self._exact = Images(root, paths, spec, None, exact, workers, pinned)

    @property
    def waited(self) -> float:
        """See `Source.waited`."""
        return self._varied.waited

    @property
    def problems(self) -> dict[str, str]:
        """See `Source.problems`."""
        return {**self._exact.problems, **self._varied.problems}

    def augmented(
        self, plan: Sequence[IntArray], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, IntArray]]:
        """Varied pixels, every batch whole; see `Source.augmented`."""
        rows = [self._rows[which] for which in plan]
        stream = self._varied.stream(rows, (seed, epoch), spares=self._rows)
        for pixels, which in stream:
            where = np.searchsorted(self._rows, which).astype(np.int64)
            yield pixels.to(self._device, non_blocking=True), where

    def plain(self, part: Part, batch_size: int) -> Iterator[tuple[Tensor, IntArray]]:
        """Pixels as extraction makes them; see `Source.plain`."""
        if part.name in self._held:
            yield from self._from_memory(part.name, batch_size)
            return
        size = len(part) * 3 * math.prod(self._size)
        kept: list[tuple[Tensor, IntArray]] = []
        bounds = range(0, len(part), batch_size)
        for pixels, which in self._exact.stream([part.rows[i : i + batch_size] for i in bounds]):
            where = np.searchsorted(part.rows, which).astype(np.int64)
            if size <= self._room:
                kept.append((pixels, where))
            if len(where):
                yield pixels.to(self._device, non_blocking=True), where
        if kept:
            self._room -= size
            self._held[part.name] = (
                torch.cat([pixels for pixels, _ in kept]),
                np.concatenate([where for _, where in kept]),
            )

    def _from_memory(self, name: str, batch_size: int) -> Iterator[tuple[Tensor, IntArray]]:
        held, where = self._held[name]
        for start in range(0, len(where), batch_size):
            span = slice(start, start + batch_size)
            yield held[span].to(self._device, non_blocking=True), where[span]

    def encode(self, inputs: Tensor) -> Tensor:
        """See `Source.encode`."""
        return self._towers.encode_image(inputs)

    def encode_finished(self, backbone: Backbone, inputs: Tensor) -> Tensor:
        """See `Source.encode_finished`."""
        projected = backbone.spec.projected_dim > 0
        request = FeatureRequest(projected=projected, pooled=not projected)
        return backbone.encode_image(inputs, request)["projected" if projected else "pooled"]

    def close(self) -> None:
        """See `Source.close`."""
        self._varied.close()
        self._exact.close()
