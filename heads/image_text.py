"""Images and texts in the space that they share, through one backbone, without a cache."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.base import Backbone, BackboneConfig, FeatureRequest, PixelSpec
from featcache.errors import BackboneError
from featcache.images import PixelMode, Views
from featcache.pipeline import BatchReader, ImageSource
from featcache.precision import PrecisionChoice, Sample, open_checked
from featcache.row_block import RowBlock
from featcache.storage import Where

MIN_COSINE = 0.999
"""Smallest cosine between features of a fast precision and of fp32, on the first images."""
_BATCH = {"cpu": 32, "cuda": 256}
_SAMPLE_IMAGES = 8
_PROJECTED = FeatureRequest()


@dataclass(frozen=True)
class EncodedImages:
    """Features of the next images of a list.

    Attributes:
        stop: images looked at so far.
        rows: (n,) int64 positions of the readable ones in the list.
        features: (n, P) float32 on the backbone's device, not normalised.
        reasons: why the others cannot be read, by position.
    """

    stop: int
    rows: npt.NDArray[np.int64]
    features: Tensor
    reasons: dict[int, str]


class ImageEncoder:
    """Reads image files ahead in threads and runs them through a backbone."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        mode: PixelMode = "fast",
        spec: PixelSpec | None = None,
        batch_size: int | None = None,
        num_readers: int | Literal["auto"] = "auto",
    ) -> None:
        """Nothing is read yet.

        Args:
            backbone: with a projection into the space of its texts.
            mode: how images are decoded and resized.
            spec: pixels, if other than the backbone's own: those that a cache was made from.
            batch_size: images at a time; None = 32 on a CPU, 256 on a GPU.
            num_readers: decoding threads; auto = one per processor this process may use.

        Raises:
            BackboneError: if the backbone has no text tower.
        """
        require_text(backbone)
        self.backbone, self.mode = backbone, mode
        own = len(os.sched_getaffinity(0))
        self.num_readers = own if num_readers == "auto" else num_readers
        self.spec = backbone.spec.pixels if spec is None else spec
        self.batch_size = batch_size or _BATCH[backbone.device.type]

    @torch.inference_mode()
    def batches(self, root: Where, paths: Sequence[str]) -> Iterator[EncodedImages]:
        """Features of the images in order, a batch at a time.

        Args:
            root: folder or address that the paths start from.
            paths: as `featcache.image_bytes.read_bytes` takes them.
        """
        transform = self.backbone.reference_transform() if self.mode == "reference" else None
        source = ImageSource(root, self.spec, self.mode, Views(), transform)
        reader = BatchReader(source, self.batch_size, self.num_readers)
        for batch in reader.batches(RowBlock.of(list(paths), list(paths))):
            kept = np.flatnonzero(batch.valid)
            pixels = batch.pixels[: batch.stop - batch.start, 0]
            encoded = self.backbone.encode_image(pixels, _PROJECTED)["projected"]
            rows = (batch.start + kept).astype(np.int64)
            yield EncodedImages(batch.stop, rows, encoded[kept], dict(batch.reasons))


def open_image_text(
    config: BackboneConfig,
    device: torch.device,
    choice: PrecisionChoice,
    root: Where,
    paths: Sequence[str],
    mode: PixelMode = "fast",
) -> tuple[Backbone, str]:
    """The backbone in the arithmetic that `choice` leads to, and a line that says which.

    Args:
        config: the backbone.
        device: where it runs.
        choice: `auto`, or a fixed arithmetic; a fast one is compared with float32 on real images.
        root: folder or address that the paths start from.
        paths: images that will be encoded.
        mode: how they are decoded and resized.

    Raises:
        BackboneError: if it cannot be opened, has no text tower, or the arithmetic is too coarse.
    """
    if config.image_only:
        raise BackboneError(
            f"backbone.kind {config.kind} reads no text, and zero-shot compares images with texts; "
            "take open_clip, blip, or an adapted folder of those"
        )

    def samples(backbone: Backbone) -> Iterator[Sample]:
        require_text(backbone)
        transform = backbone.reference_transform() if mode == "reference" else None
        source = ImageSource(root, backbone.spec.pixels, mode, Views(), transform)
        first = list(paths[:1024])
        for batch in BatchReader(source, _SAMPLE_IMAGES, 1).batches(RowBlock.of(first, first)):
            positions = np.flatnonzero(batch.valid).tolist()
            if positions:
                yield Sample(batch.pixels[:, 0], positions)

    backbone, _, line = open_checked(config, device, choice, _PROJECTED, MIN_COSINE, samples)
    require_text(backbone)
    return backbone, line


def require_text(backbone: Backbone) -> None:
    """Checks that images and texts share a space.

    Raises:
        BackboneError: if the backbone has no text tower, or no projection.
    """
    if not (backbone.spec.has_text and backbone.spec.projected_dim):
        raise BackboneError(
            f"{backbone.spec.identity.name} reads no text, and zero-shot compares images with "
            "texts; take a CLIP or BLIP"
        )
