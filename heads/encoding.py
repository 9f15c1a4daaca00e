"""New images as a trained head wants them: encoded as the caches it was trained on were."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from featcache.adapter_folder import is_adapter
from featcache.backbones import BACKBONES
from featcache.backbones.base import Backbone, FeatureRequest, PixelSpec
from featcache.caption_means import unit_rows
from featcache.errors import BackboneError, CacheMismatchError
from featcache.identity import Identity, Multimodal, differences
from featcache.images import Views
from featcache.layout.quantize import as_stored
from featcache.pipeline import Batch, BatchReader, ImageSource
from featcache.row_block import RowBlock
from featcache.text_input import TextPolicy, open_policy
from heads.base import Features
from heads.data import TEXT, reads_captions
from heads.run_folder import LoadedRun, Member

IMAGE_BATCH = 32
"""Images encoded at a time."""

NO_CAPTION = "no caption, and the head reads nothing else"
"""Why a row cannot be scored that has an image alone."""

Captions = Mapping[str, Sequence[str]]
"""Captions by file; a file that is not in it has none."""

_Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Encoded:
    """Features of some files.

    Attributes:
        stop: files looked at so far.
        rows: (n,) positions of the readable ones in the list of files.
        features: n rows of each array that the head reads, as the training cache would have held
            them; zeros, and False in masks, where a file has no caption.
        reasons: why the others cannot be read, by position.
    """

    stop: int
    rows: list[int]
    features: Features
    reasons: dict[int, str]


def encode_files(
    run: LoadedRun,
    root: Path,
    files: Sequence[str],
    device: torch.device,
    num_readers: int,
    captions: Captions | None = None,
) -> Iterator[Encoded]:
    """Features of image files and their captions, a batch at a time.

    A head on joined caches gets every backbone's features, side by side: each backbone reads the
    files by itself, since each wants other pixels.

    Args:
        run: trained head.
        root: folder that `files` start from.
        files: relative paths.
        device: where to encode, and where the features go.
        num_readers: decoding threads of each backbone.
        captions: of the files; None = none has any.

    Raises:
        BackboneError: if a backbone's weights cannot be opened.
        CacheMismatchError: if they, or the text policy, are not those that the head was trained
            with.
    """
    encoders = []
    for member in run.members:
        backbone = open_backbone(run, member, device)
        encoder = _Encoder(member.identity, backbone, _policy(run, member), list(run.features))
        encoders.append(encoder.batches(root, files, num_readers, captions or {}))
    for batches in zip(*encoders, strict=True):
        reasons = {row: reason for one in batches for row, reason in one.reasons.items()}
        rows = [row for row in batches[0].rows if row not in reasons]
        features = []
        for name in run.features:
            parts = [one.arrays[name][np.isin(one.rows, rows)] for one in batches]
            if len(parts) > 1:
                parts = [unit_rows(part) for part in parts]
            whole = torch.from_numpy(np.concatenate(parts, axis=-1)).to(device)
            features.append(whole if whole.dtype == torch.bool else whole.float())
        yield Encoded(batches[0].stop, rows, tuple(features), reasons)


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
    around = run.path.resolve().parent
    if record["kind"] == "adapted" and not Path(record["model"]).exists() and is_adapter(around):
        record = {**record, "model": str(around)}  # both have moved; weights are compared below
    config = BACKBONES[record["kind"]].model_validate(record)
    backbone = config.open(str(device), member.identity.precision)
    expected = member.identity.backbone.record()
    for name, have, want in differences(backbone.spec.identity.record(), expected):
        raise CacheMismatchError(
            f"{run.path}: backbone.{name} differs: trained with {want!r}, the opened backbone has "
            f"{have!r}; put the original weights back, or train a new head"
        )
    return backbone


def feature_request(names: Sequence[str], identity: Identity) -> FeatureRequest:
    """The image features that a head reads, as the cache was extracted.

    Args:
        names: of the arrays.
        identity: of the cache.
    """
    features = identity.features
    joint: Multimodal = "none"
    if "image/multimodal_pooled" in names:
        joint = "pooled"
    if "image/multimodal" in names or "image/multimodal_mask" in names:
        joint = "states"
    return FeatureRequest(
        projected="image/projected" in names,
        pooled="image/pooled" in names,
        tokens="image/tokens" in names,
        token_pool=features.token_pool,
        token_layer=features.token_layer,
        before_last=features.before_last,
        multimodal=joint,
    )


def _policy(run: LoadedRun, member: Member) -> TextPolicy | None:
    """How captions became text when the head was trained; None for heads that read none.

    Raises:
        CacheMismatchError: if it is a function that was edited since.
    """
    if not any(map(reads_captions, run.features)):
        return None
    recorded = member.identity.features.text_policy
    policy = open_policy(recorded.partition("#")[0])
    if policy.name != recorded:
        raise CacheMismatchError(
            f"{run.path}: features.text_policy differs: trained with {recorded!r}, the file that "
            f"defines it is another one now ({policy.name!r}); put it back, or train a new head"
        )
    return policy


@dataclass(frozen=True)
class _Part:
    """What one backbone makes of a batch: positions of readable files, and rows of each array."""

    stop: int
    rows: npt.NDArray[np.int64]
    arrays: _Arrays
    reasons: dict[int, str]


class _Encoder:
    """One backbone, and the arrays that are read of it."""

    def __init__(
        self, identity: Identity, backbone: Backbone, policy: TextPolicy | None, names: list[str]
    ) -> None:
        self.identity, self.backbone, self.policy, self.names = identity, backbone, policy, names
        self.request = feature_request(names, identity)
        self.needs_caption = all(map(reads_captions, names))

    @torch.inference_mode()
    def batches(
        self, root: Path, files: Sequence[str], num_readers: int, captions: Captions
    ) -> Iterator[_Part]:
        """What the files and their captions come to, in order."""
        pixels = self.identity.preprocess
        transform = self.backbone.reference_transform() if pixels.mode == "reference" else None
        source = ImageSource(root, PixelSpec.of(pixels), pixels.mode, Views(), transform)
        reader = BatchReader(source, IMAGE_BATCH, num_readers)
        for batch in reader.batches(RowBlock.of(list(files), list(files))):
            reasons = dict(batch.reasons)
            texts = [list(captions.get(file, ())) for file in files[batch.start : batch.stop]]
            if self.needs_caption:
                empty = [batch.start + place for place, own in enumerate(texts) if not own]
                reasons = dict.fromkeys(empty, NO_CAPTION) | reasons
            rows = [row for row in range(batch.start, batch.stop) if row not in reasons]
            kept = np.asarray([row - batch.start for row in rows], np.int64)
            arrays = self._images(batch, kept, texts)
            if TEXT in self.names:
                arrays[TEXT] = self._texts([texts[place] for place in kept])
            yield _Part(batch.stop, np.asarray(rows, np.int64), arrays, reasons)

    def _images(
        self, batch: Batch, kept: npt.NDArray[np.int64], texts: Sequence[Sequence[str]]
    ) -> _Arrays:
        """Rows of each image array, through the storage type: as the cache would have held them."""
        wanted = [name for name in self.names if name.startswith("image/")]
        if not wanted:
            return {}
        images, first = batch.pixels[:, 0], None
        if self.request.joint:
            assert self.policy is not None
            captions = [own[0] if own else "" for own in texts]
            first = self.policy(captions) + [""] * (len(images) - len(captions))
        encoded = self.backbone.encode_image(images, self.request, first)
        found: _Arrays = {}
        without = np.asarray([not texts[place] for place in kept], np.bool_)
        for name in wanted:
            feature = name.removeprefix("image/")
            values = encoded[feature].cpu().numpy()[kept]
            if values.dtype != np.bool_:
                values = as_stored(values, self.identity.features.dtype_of(feature))
            if reads_captions(name):
                values[without] = 0
            found[name] = values
        return found

    def _texts(self, texts: Sequence[Sequence[str]]) -> npt.NDArray[np.float32]:
        """(n, P) mean of each row's unit caption features, zeros without a caption."""
        means = np.zeros((len(texts), self.backbone.spec.projected_dim), np.float32)
        flat = [caption for own in texts for caption in own]
        if not flat:
            return means
        assert self.policy is not None
        dtype = self.identity.features.dtype_of("projected")
        stored = as_stored(self.backbone.encode_text(self.policy(flat)).cpu().numpy(), dtype)
        owner = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
        np.add.at(means, owner, unit_rows(stored))
        counts = np.bincount(owner, minlength=len(texts))
        return np.asarray(means / np.maximum(counts, 1)[:, None], np.float32)
