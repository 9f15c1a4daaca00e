"""New image files as a trained head wants them: encoded as the caches it was trained on were."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones import BACKBONES
from featcache.backbones.base import Backbone, FeatureRequest, PixelSpec
from featcache.caption_means import unit_rows
from featcache.errors import BackboneError, CacheMismatchError, ConfigError
from featcache.identity import Identity, differences
from featcache.images import Views
from featcache.layout.quantize import as_stored
from featcache.pipeline import BatchReader, ImageSource
from featcache.row_block import RowBlock
from heads.run_folder import LoadedRun, Member

IMAGE_BATCH = 32
"""Images encoded at a time."""


@dataclass(frozen=True)
class Encoded:
    """Features of some files.

    Attributes:
        stop: files looked at so far.
        rows: (n,) positions of the readable ones in the list of files.
        features: (n, ...) float32, as the training cache would have held them.
        reasons: why the others cannot be read, by position.
    """

    stop: int
    rows: list[int]
    features: Tensor
    reasons: dict[int, str]


def encode_files(
    run: LoadedRun, root: Path, files: Sequence[str], device: torch.device, num_readers: int
) -> Iterator[Encoded]:
    """Features of image files, a batch at a time.

    A head on joined caches gets every backbone's features, side by side: each backbone reads the
    files by itself, since each wants other pixels.

    Args:
        run: trained head.
        root: folder that `files` start from.
        files: relative paths.
        device: where to encode, and where the features go.
        num_readers: decoding threads of each backbone.

    Raises:
        BackboneError: if a backbone's weights cannot be opened.
        CacheMismatchError: if they are not those that the head was trained with.
    """
    (array, *more) = run.features
    if more:
        raise ConfigError(
            f"images: the head in {run.path} reads {', '.join(run.features)}, which image files "
            "alone do not give; extract a cache of them and give --cache"
        )
    name = array.removeprefix("image/")
    members = run.members
    encoders = [
        _encode(one, open_backbone(run, one, device), name, root, files, num_readers)
        for one in members
    ]
    for batches in zip(*encoders, strict=True):
        stop = batches[0][0]
        reasons = {row: reason for _, _, _, bad in batches for row, reason in bad.items()}
        rows = [row for row in batches[0][1].tolist() if row not in reasons]
        parts = [features[np.isin(held, rows)] for _, held, features, _ in batches]
        if len(parts) > 1:
            parts = [unit_rows(part) for part in parts]
        features = torch.from_numpy(np.concatenate(parts, axis=-1))
        yield Encoded(stop, rows, features.float().to(device), reasons)


def open_backbone(run: LoadedRun, member: Member, device: torch.device) -> Backbone:
    """The encoder of a cache that a head was trained on, from the run folder alone.

    Raises:
        BackboneError: if this installation does not know it, or its weights cannot be opened.
        CacheMismatchError: if other weights lie there now.
    """
    record = member.backbone
    if record["kind"] not in BACKBONES:
        raise BackboneError(
            f"{run.path}: trained with backbone kind {record['kind']!r}, this installation has "
            f"{', '.join(BACKBONES)}; install the extra that brings it"
        )
    config = BACKBONES[record["kind"]].model_validate(record)
    backbone = config.open(str(device), member.identity.precision)
    expected = member.identity.backbone.record()
    for name, have, want in differences(backbone.spec.identity.record(), expected):
        raise CacheMismatchError(
            f"{run.path}: backbone.{name} differs: trained with {want!r}, the opened backbone has "
            f"{have!r}; put the original weights back, or train a new head"
        )
    return backbone


def feature_request(name: str, identity: Identity) -> FeatureRequest:
    """The one feature that a head reads, as the cache was extracted.

    Args:
        name: projected, pooled or tokens.
        identity: of the cache.

    Raises:
        ConfigError: for features that image files alone do not give.
    """
    if name.startswith("multimodal"):
        raise ConfigError(
            "images: the head reads features of images together with their captions, and image "
            "files have none; extract a cache of them with captions and give --cache"
        )
    features = identity.features
    return FeatureRequest(
        projected=name == "projected",
        pooled=name == "pooled",
        tokens=name == "tokens",
        token_pool=features.token_pool,
        token_layer=features.token_layer,
        before_last=features.before_last,
    )


@torch.inference_mode()
def _encode(
    member: Member,
    backbone: Backbone,
    name: str,
    root: Path,
    files: Sequence[str],
    num_readers: int,
) -> Iterator[tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float32], dict[int, str]]]:
    """Files looked at, positions and features of the readable ones, reasons of the others."""
    pixels = member.identity.preprocess
    transform = backbone.reference_transform() if pixels.mode == "reference" else None
    source = ImageSource(root, PixelSpec.of(pixels), pixels.mode, Views(), transform)
    request = feature_request(name, member.identity)
    dtype = member.identity.features.dtype_of(name)
    reader = BatchReader(source, IMAGE_BATCH, num_readers)
    for batch in reader.batches(RowBlock.of(list(files), list(files))):
        encoded = backbone.encode_image(batch.pixels[:, 0], request)[name]
        reasons = dict(batch.reasons)
        rows = np.asarray(
            [row for row in range(batch.start, batch.stop) if row not in reasons], np.int64
        )
        index = torch.from_numpy(rows - batch.start).to(encoded.device)
        # Through the storage type: the head sees what the cache would have held.
        yield batch.stop, rows, as_stored(encoded[index].cpu().numpy(), dtype), reasons
