"""Where the inputs of fine-tuning come from: pixels of a dataset, or what a cache holds of it.

A source gives augmented inputs in training and plain ones for measuring, and says how an input
becomes a feature with gradients. Rows are counted in the parts (`heads.parts.Part`) it was opened
for.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.base import Backbone, FeatureRequest, PixelSpec
from featcache.backbones.trainable import TrainableTowers
from featcache.manifest import Manifest
from finetune.images.augmentation import AugmentationConfig
from finetune.images.loading import Images, LoadingConfig
from finetune.images.training_images import TrainingImages
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
        self, plan: Sequence[IntArray], seed: int, epoch: int, spares: IntArray | None = None
    ) -> Iterator[tuple[Tensor, IntArray]]:
        """Inputs of training rows, varied by (seed, epoch), on the device.

        Args:
            plan: positions in the training part, one array a batch.
            seed: of the whole training.
            epoch: from 0.
            spares: ascending positions of which one takes the place of an unreadable image; None =
                any.

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
            device: where inputs go.
        """
        self._towers, self._device, self._rows = towers, device, train.rows
        root, paths = manifest.root, manifest.paths
        self._varied = TrainingImages(root, paths, spec, augmentation, loading, device)
        # Measured on the pixels that extraction makes; where crops are made of whole images, the
        # same workers make them.
        self._exact, self._waited = self._varied.images, 0.0
        if self._varied.on_device:
            workers, pinned = loading.workers_for(device), device.type == "cuda"
            self._exact = Images(root, paths, spec, None, loading, workers, pinned)

    @property
    def waited(self) -> float:
        """See `Source.waited`."""
        return self._waited

    @property
    def problems(self) -> dict[str, str]:
        """See `Source.problems`."""
        return {**self._exact.problems, **self._varied.images.problems}

    def augmented(
        self, plan: Sequence[IntArray], seed: int, epoch: int, spares: IntArray | None = None
    ) -> Iterator[tuple[Tensor, IntArray]]:
        """Varied pixels, every batch whole; see `Source.augmented`."""
        rows = [self._rows[which] for which in plan]
        others = self._rows if spares is None else self._rows[spares]
        before = self._varied.images.waited
        for batch in self._varied.stream(rows, (seed, epoch), others):
            self._waited += self._varied.images.waited - before
            where = np.searchsorted(self._rows, batch.which).astype(np.int64)
            yield self._varied.inputs(batch), where
            before = self._varied.images.waited

    def plain(self, part: Part, batch_size: int) -> Iterator[tuple[Tensor, IntArray]]:
        """Pixels as extraction makes them; see `Source.plain`."""
        bounds = range(0, len(part), batch_size)
        for pixels, which in self._exact.stream([part.rows[i : i + batch_size] for i in bounds]):
            if len(which):
                where = np.searchsorted(part.rows, which).astype(np.int64)
                yield pixels.to(self._device, non_blocking=True), where

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
