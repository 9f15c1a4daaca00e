"""Where the inputs of fine-tuning come from: pixels of a dataset, or what a cache holds of it.

A source gives augmented inputs in training and plain ones for measuring, and says how an input
becomes a feature with gradients. Rows are counted in the parts (`heads.parts.Part`) it was opened
for.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.base import Backbone, FeatureRequest, PixelSpec
from featcache.backbones.trainable import TrainableTowers
from featcache.manifest import Manifest
from finetune.data import ImagesConfig, ImageStore, augment, normalize
from heads.parts import Part

IntArray = npt.NDArray[np.int64]

MARGIN = 1.125
"""Side of the training pixels that are kept, over the side that the tower takes: room for crops."""


class Source(Protocol):
    """Inputs of training and measuring.

    Attributes:
        waited: seconds that training has waited for inputs so far.
    """

    waited: float

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
        options: ImagesConfig,
        device: torch.device,
    ) -> None:
        """Decodes the training images if they fit into memory.

        Args:
            towers: encode them.
            spec: pixels that the towers take.
            manifest: rows of all parts.
            train: rows trained on.
            options: reading and augmentation.
            device: where inputs go.
        """
        self._towers, self._spec, self._manifest = towers, spec, manifest
        self._options, self._device = options, device
        self._plain: dict[str, ImageStore] = {}
        kept = (math.ceil(spec.size[0] * MARGIN), math.ceil(spec.size[1] * MARGIN))
        room = PixelSpec(kept, spec.mean, spec.std, spec.interpolation)
        paths = [manifest.paths[row] for row in train.rows.tolist()]
        self._train = ImageStore(manifest.root, paths, room, "scaled", options)
        self.waited = 0.0

    @property
    def problems(self) -> dict[str, str]:
        """See `Source.problems`."""
        stores = [self._train, *self._plain.values()]
        return {path: reason for store in stores for path, reason in store.problems.items()}

    def augmented(
        self, plan: Sequence[IntArray], seed: int, epoch: int
    ) -> Iterator[tuple[Tensor, IntArray]]:
        """Random crops and flips; see `Source.augmented`."""
        options = self._options
        for number, which in enumerate(plan):
            before = time.perf_counter()
            pixels, kept = self._train.take(which)
            random = np.random.default_rng([seed, epoch, number])
            varied = augment(
                pixels.to(self._device), self._spec.size, options.min_area, options.flip, random
            )
            inputs = normalize(varied, self._spec.mean, self._spec.std)
            self.waited += time.perf_counter() - before
            yield inputs, kept

    def plain(self, part: Part, batch_size: int) -> Iterator[tuple[Tensor, IntArray]]:
        """Pixels as extraction makes them; see `Source.plain`."""
        if part.name not in self._plain:
            paths = [self._manifest.paths[row] for row in part.rows.tolist()]
            root, options = self._manifest.root, self._options
            self._plain[part.name] = ImageStore(root, paths, self._spec, "fast", options)
        for start in range(0, len(part), batch_size):
            which = np.arange(start, min(start + batch_size, len(part)), dtype=np.int64)
            pixels, kept = self._plain[part.name].take(which)
            if len(kept):
                yield pixels.to(self._device), kept

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
        for store in [self._train, *self._plain.values()]:
            store.close()
