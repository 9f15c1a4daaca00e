"""Image-caption pairs of a split, and the caption that an epoch draws for each image."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featcache.errors import DatasetError
from featcache.manifest import Manifest
from featcache.storage import Where


@dataclass(frozen=True)
class Pairs:
    """The rows of one split that have a caption.

    Attributes:
        rows: (n,) int64 manifest rows.
        root: folder that `paths` start from.
        paths: n images, as `featcache.image_bytes.read_bytes` takes them.
        labels: (n,) int64 class of a single-label set, -1 = none.
        caption_offsets: (n+1,) int64 start of each row's captions in `caption_ids`.
        caption_ids: (m,) int64 captions as indices into `texts`.
        texts: U distinct captions, in order of first use.
        num_without: rows of the split that have no caption and were left out.
    """

    rows: npt.NDArray[np.int64]
    root: Where
    paths: list[str]
    labels: npt.NDArray[np.int64]
    caption_offsets: npt.NDArray[np.int64]
    caption_ids: npt.NDArray[np.int64]
    texts: list[str]
    num_without: int

    def __len__(self) -> int:
        return len(self.rows)

    def captions_of(
        self, which: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(k+1,) offsets and the caption ids of k of the rows, `which` being indices into them."""
        starts, counts = self.caption_offsets[which], np.diff(self.caption_offsets)[which]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return offsets, self.caption_ids[positions]


def pairs_of(manifest: Manifest, split: str) -> Pairs:
    """The image-caption pairs of a split.

    Raises:
        DatasetError: if the split does not exist or none of its rows has a caption.
    """
    in_split = np.flatnonzero(np.asarray(manifest.splits, dtype=object) == split)
    if len(in_split) == 0:
        known = ", ".join(dict.fromkeys(manifest.splits))
        raise DatasetError(f"{manifest.root}: no split {split!r}; the dataset has {known}")
    counts = np.diff(manifest.caption_offsets)[in_split]
    rows = in_split[counts > 0]
    if len(rows) == 0:
        raise DatasetError(
            f"{manifest.root}: the {manifest.kind} dataset has no captions in its split {split!r}; "
            "contrastive pretraining needs image-caption pairs, choose a dataset with captions"
        )
    counts = counts[counts > 0]
    starts = manifest.caption_offsets[rows]
    number: dict[str, int] = {}
    ids = [
        number.setdefault(manifest.caption_values[position], len(number))
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        for position in range(start, start + count)
    ]
    labels = np.full(len(rows), -1, np.int64)
    if manifest.task == "single_label":
        labeled = np.diff(manifest.label_offsets)[rows] > 0
        labels[labeled] = manifest.label_values[manifest.label_offsets[rows[labeled]]]
    return Pairs(
        rows=rows,
        root=manifest.root,
        paths=[manifest.paths[row] for row in rows.tolist()],
        labels=labels,
        caption_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        caption_ids=np.asarray(ids, dtype=np.int64),
        texts=list(number),
        num_without=len(in_split) - len(rows),
    )


def draw_captions(pairs: Pairs, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """(n,) one caption an image, uniformly among its own, as indices into `Pairs.texts`."""
    counts = np.diff(pairs.caption_offsets)
    drawn = np.floor(random.random(len(pairs)) * counts).astype(np.int64)
    ids: npt.NDArray[np.int64] = pairs.caption_ids[pairs.caption_offsets[:-1] + drawn]
    return ids
