"""What a dataset must offer: a `kind`, its options, and a manifest.

Adding a dataset is one new file in this folder: subclass `DatasetConfig`, give `kind` a Literal
type and a default, and implement `manifest`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from featcache.config import Config
from featcache.datasets.shots import few_shot_rows
from featcache.errors import DatasetError
from featcache.manifest import Manifest


class DatasetConfig(Config):
    """Options that every dataset shares."""

    kind: str
    """Dataset kind."""
    limit: PositiveInt | None = None
    """Keep only this many images of each split (after `shots`), at even steps over it, so that sets
    that lie sorted by class keep all classes if they can; unset = all."""
    shots: PositiveInt | None = None
    """Keep only this many training images of each class, usually 1, 2, 4, 8 or 16; val and test
    stay whole. Multi-label sets keep few images that together show every class this often. Unset =
    all."""
    shots_seed: NonNegativeInt = 0
    """Seed of the draw by `shots`, 0 or larger; unused without it."""

    def open(self) -> Manifest:
        """The dataset as a checked manifest, cut to `shots` and `limit`.

        Raises:
            DatasetError: one line with what was found, what was expected and what to do.
        """
        manifest = self.manifest()
        if self.shots is not None:
            manifest = few_shot(manifest, self.shots, self.shots_seed)
        return manifest if self.limit is None else manifest.limited(self.limit)

    @abstractmethod
    def manifest(self) -> Manifest:
        """The whole dataset as a checked manifest."""


def require_some_image(
    root: Path,
    paths: Sequence[str],
    advice: str = "set dataset.root to the folder that these paths start from",
) -> None:
    """Checks a few paths, so that a wrong root is noticed at once.

    Single missing images are extraction's to report; looking for millions would take minutes.

    Args:
        root: where the paths start.
        paths: the images'; none at all are for others to notice.
        advice: what to do, for the message.

    Raises:
        DatasetError: if none of the first images is there.
    """
    if paths and not any((root / path).exists() for path in paths[:20]):
        raise DatasetError(
            f"{root}: none of the first {min(20, len(paths))} images exists, e.g. {paths[0]}; "
            + advice
        )


def few_shot(manifest: Manifest, shots: int, seed: int) -> Manifest:
    """The manifest with `shots` training rows a class, drawn by `seed`; other splits stay whole.

    Raises:
        DatasetError: if no training row has a label.
    """
    start, stop = manifest.split_ranges.get("train", (0, 0))
    offsets = manifest.label_offsets[start : stop + 1]
    if offsets[-1] == offsets[0]:
        raise DatasetError(
            f"{manifest.root}: shots {shots} needs labelled training images, the {manifest.kind} "
            "dataset has none; leave dataset.shots unset"
        )
    drawn = few_shot_rows(
        manifest.rows.column("id").slice(start, stop - start).to_pylist(),
        offsets - offsets[0],
        manifest.label_values[offsets[0] : offsets[-1]],
        shots,
        seed,
    )
    others = np.concatenate([np.arange(start), np.arange(stop, len(manifest))])
    return manifest.only(np.sort(np.concatenate([drawn + start, others])))
