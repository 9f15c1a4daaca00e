"""Image and caption vectors of a cache, joined by image: batches of pairs, and how well they match.

Shapes: n images with captions, m captions, P width of the features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from featcache.class_text import ensemble
from featcache.datasets.splitting import stratified
from featcache.errors import CacheError, ConfigError
from featcache.reader import Cache
from finetune.contrastive.validation import retrieval_recall, zero_shot_top1
from heads.data import FeatureTable

IntArray = npt.NDArray[np.int64]

RECALL_AT = (1, 5, 10)

_ROWS_AT_A_TIME = 8192


@dataclass(frozen=True)
class PairRows:
    """Rows of a cache that have captions.

    Attributes:
        name: split they come from.
        rows: (n,) ascending row numbers.
    """

    name: str
    rows: IntArray

    def __len__(self) -> int:
        return len(self.rows)


class PairFeatures:
    """Vectors of images and of all their captions, on a device where they fit.

    Attributes:
        offsets: (n+1,) start of each image's captions.
        num_views: views of each image in the cache.
    """

    def __init__(self, cache: Cache, rows: IntArray, device: torch.device) -> None:
        """Reads them once; see `heads.data.FeatureTable`.

        Args:
            cache: with `image/projected` and `text/projected`.
            rows: (n,) of images with captions.
            device: where batches go.

        Raises:
            CacheError: if a row holds NaN or infinity.
        """
        starts = cache.caption_offsets[rows]
        counts = cache.caption_counts[rows]
        self.offsets: IntArray = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        within = np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], counts)
        self.caption_rows: IntArray = np.repeat(starts, counts) + within
        self._images = FeatureTable(cache.array("image/projected"), rows, device)
        self._texts = FeatureTable(cache.array("text/projected"), self.caption_rows, device)
        self.num_views = self._images.num_views

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(B, P) image and (B, P) caption features of distinct images, one caption each.

        Caption and view of an image are drawn anew in each epoch. Batches are always full: the rows
        left over, others in each epoch, wait for the next one.

        Args:
            batch_size: B, at most n.
            seed: decides everything, with `epoch`.
            epoch: pass over the images.
        """
        random = np.random.default_rng([seed, epoch])
        order = random.permutation(len(self))
        drawn = random.random(len(self))
        views = random.integers(self.num_views, size=len(self)) if self.num_views > 1 else None
        counts = np.diff(self.offsets)
        captions = self.offsets[:-1] + np.minimum(np.floor(drawn * counts), counts - 1)
        captions = captions.astype(np.int64)
        for start in range(0, len(self) - batch_size + 1, batch_size):
            which = order[start : start + batch_size]
            view = None if views is None else torch.from_numpy(views[which])
            images = self._images.batch(torch.from_numpy(which), view)
            yield images, self._texts.batch(torch.from_numpy(captions[which]))

    def images(self, through: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, D) float32 unit features of the plain view behind a head."""
        return _unit(self._images, through)

    def texts(self, through: Callable[[Tensor], Tensor], which: IntArray) -> Tensor:
        """(k, D) float32 unit features of chosen captions behind a head.

        Args:
            through: (k, P) to (k, D).
            which: (k,) positions among the m captions.
        """
        parts = [
            F.normalize(through(self._texts.batch(torch.from_numpy(part))), dim=-1)
            for part in np.array_split(which, max(1, -(-len(which) // _ROWS_AT_A_TIME)))
        ]
        return torch.cat(parts)


class PairMeasure:
    """A split that is only looked at: recall both ways, and zero-shot accuracy where it has labels.

    Attributes:
        name: split.
    """

    def __init__(
        self, cache: Cache, part: PairRows, device: torch.device, prompts: Tensor | None
    ) -> None:
        """Reads the split's features.

        Args:
            cache: where they are.
            part: rows.
            device: where things are computed.
            prompts: (T, C, P) float32 class text features; None = no zero-shot.
        """
        self.name = part.name
        self._features = PairFeatures(cache, part.rows, device)
        captions = cache.captions[1]
        texts = [captions[row] for row in self._features.caption_rows.tolist()]
        _, self._first, self._text_ids = np.unique(texts, return_index=True, return_inverse=True)
        self._prompts = None if prompts is None else prompts.to(device)
        self._labels = None if prompts is None else cache.labels(part.rows)
        if self._labels is not None and not (self._labels >= 0).any():
            self._labels = None

    @torch.inference_mode()
    def __call__(
        self, image_head: Callable[[Tensor], Tensor], text_head: Callable[[Tensor], Tensor]
    ) -> dict[str, float]:
        """Shares in 0..1: recalls, their mean (`mean_recall`), and `zero_shot_top1`.

        Args:
            image_head: (k, P) image features to (k, D).
            text_head: (k, P) text features to (k, D).
        """
        images = self._features.images(image_head)
        texts = self._features.texts(text_head, self._first)
        found = retrieval_recall(images, texts, self._features.offsets, self._text_ids, RECALL_AT)
        values = {"mean_recall": sum(found.values()) / len(found), **found}
        if self._labels is not None:
            assert self._prompts is not None
            classes = ensemble(torch.stack([text_head(one) for one in self._prompts]))
            values["zero_shot_top1"] = zero_shot_top1(images, classes, self._labels)
        return values


def choose_pairs(
    cache: Cache, train_split: str, val_split: str | None, val_fraction: float, seed: int
) -> tuple[PairRows, PairRows, PairRows | None]:
    """The rows with captions that train, decide, and are only reported.

    Args:
        cache: with captions.
        train_split: trained on.
        val_split: decides; None = `val` if the cache has one, otherwise carved out of the former.
        val_fraction: share that carving takes, by the images' ids.
        seed: of the carving.

    Returns:
        Rows of train, val, and test (None without a split of that name).

    Raises:
        CacheError: if the cache lacks vectors, or rows with captions.
        ConfigError: if there is no such split, or one has two roles.
    """
    for name, option in (("image/projected", "projected"), ("text/projected", "text")):
        if not cache.has(name):
            raise CacheError(
                f"{cache.path}: holds {', '.join(cache.feature_names())}, not {name}; extract a "
                f"dataset with captions by a backbone that reads text, with --features.{option}"
            )
    names: Sequence[str] = cache.split_names
    if val_split is None and "val" in names and train_split != "val":
        val_split = "val"
    if val_split == train_split:
        raise ConfigError(f"train_split and val_split are both {train_split!r}; choose another")

    def part(split: str) -> PairRows:
        rows = cache.rows(split)
        return PairRows(split, rows[cache.caption_counts[rows] > 0])

    train = part(train_split)
    if val_split is not None:
        val = part(val_split)
    else:
        ids = [cache.ids[row] for row in train.rows.tolist()]
        same = np.zeros(len(train), np.int64)
        held = np.asarray(stratified(ids, same, val_fraction, 0.0, seed)) == "val"
        train, val = PairRows(train_split, train.rows[~held]), PairRows("val", train.rows[held])
    for one in (train, val):
        if len(one) < 2:
            raise CacheError(
                f"{cache.path}: {len(one)} images with captions in {one.name}, at least 2 are "
                "needed; choose other splits, or extract a dataset with captions"
            )
    test = part("test") if "test" in names and "test" not in (train_split, val_split) else None
    return train, val, test if test is not None and len(test) > 1 else None


def _unit(table: FeatureTable, through: Callable[[Tensor], Tensor]) -> Tensor:
    parts = [
        F.normalize(through(table.slice(start, start + _ROWS_AT_A_TIME)), dim=-1)
        for start in range(0, len(table), _ROWS_AT_A_TIME)
    ]
    return torch.cat(parts)
