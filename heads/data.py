"""Rows, targets and features of a cache, cut for training: no loaders, only index arrays."""

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.errors import CacheError, ConfigError
from featcache.joined_cache import JoinedCache
from featcache.layout.quantized_array import QuantizedArray
from featcache.reader import Cache, FeatureArray
from heads.base import HeadConfig

IntArray = npt.NDArray[np.int64]

CARVE = "carve"
"""Name of the validation split that is carved out of the training split."""

_SCAN_ROWS = 65_536
_SCAN_VALUES = 1 << 28
"""Most numbers looked at together: 1 GiB of float32, which tokens reach with far fewer rows."""
_FLAGS = {
    "projected": "--features.projected",
    "pooled": "--features.pooled",
    "multimodal_pooled": "--features.multimodal pooled",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """Labelled valid rows of a cache.

    Attributes:
        name: split they come from.
        rows: (n,) int64 ascending row numbers.
        targets: (n,) int64 class indices, or (n, C) uint8 multi-hot.
    """

    name: str
    rows: IntArray
    targets: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, mask: npt.NDArray[np.bool_], name: str) -> "Part":
        """The rows where `mask` is true."""
        return Part(name, self.rows[mask], self.targets[mask])


@dataclass(frozen=True)
class Parts:
    """What is trained on, what decides, and what is only reported (None: nothing labelled)."""

    train: Part
    val: Part
    test: Part | None


def require_labels(cache: Cache) -> None:
    """Checks that there is something to learn.

    Raises:
        CacheError: without classes or labels.
    """
    if cache.task == "unlabelled" or cache.num_classes == 0:
        raise CacheError(
            f"{cache.path}: holds {cache.num_classes} classes and is {cache.task}; heads need "
            "labels, so extract a labelled dataset"
        )


def labelled_part(cache: Cache, split: str) -> Part:
    """The valid labelled rows of a split; a single-label row without a label is left out.

    Raises:
        ConfigError: if the cache has no such split.
    """
    rows = cache.rows(split)
    if cache.task == "multi_label":
        return Part(split, rows, cache.multi_hot(rows))
    labels = cache.labels(rows)
    return Part(split, rows[labels >= 0], labels[labels >= 0])


def has_labels(part: Part) -> bool:
    """Whether any row has a label; a test list without labels reads as rows without positives."""
    return len(part) > 0 and (part.targets.ndim == 1 or bool(part.targets.any()))


def choose_parts(
    cache: Cache,
    *,
    train_split: str,
    val_split: str | None,
    val_fraction: float,
    test_split: str | None,
    select_on: Literal["val", "test"],
    seed: int,
) -> Parts:
    """The rows to train on, to decide by, and to report.

    Args:
        cache: labelled.
        train_split: split to train on.
        val_split: split that decides; `CARVE` = carve it out of the training split; None = `val` if
            the cache has one, otherwise carve.
        val_fraction: share of each class's training rows that carving takes, 0..1.
        test_split: split that is reported; None = `test` if the cache has one.
        select_on: `test` decides by the test split and trains on all training rows.
        seed: of the carving.

    Raises:
        ConfigError: unknown split, or one split in two roles.
        CacheError: no labelled row to train on or to decide by.
    """
    names = cache.split_names
    if val_split is None:
        val_split = "val" if "val" in names and "val" not in (train_split, test_split) else CARVE
    asked_test = test_split is not None
    if test_split is None and "test" in names and "test" not in (train_split, val_split):
        test_split = "test"
    roles = {"train_split": train_split, "val_split": val_split, "test_split": test_split}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if roles[f"{one}_split"] == roles[f"{other}_split"]:
            raise ConfigError(
                f"{one}_split and {other}_split are both {roles[f'{one}_split']!r}; rows that were "
                "trained or decided on cannot be reported, choose different splits"
            )
    train = labelled_part(cache, train_split)
    _require_rows(train, cache)
    test = None if test_split is None else labelled_part(cache, test_split)
    if test is not None and (asked_test or select_on == "test"):
        _require_rows(test, cache)
    if test is not None and not has_labels(test):
        test = None
    if select_on == "test":
        if test is None:
            raise ConfigError("select_on=test, but the cache has no labelled test split")
        logger.warning(
            "select_on=test: the split %r decides and is reported, so its figures are optimistic; "
            "use this only to compare with figures published that way",
            test.name,
        )
        return Parts(train, test, test)
    if val_split != CARVE:
        val = labelled_part(cache, val_split)
        _require_rows(val, cache)
        return Parts(train, val, test)
    held_out = carve(train.targets, cache.num_classes, val_fraction, seed)
    if not held_out.any():
        raise CacheError(
            f"{cache.path}: no class of split {train_split!r} has two rows, so no validation rows "
            "can be carved out of it; name another split as val_split"
        )
    return Parts(
        train.subset(~held_out, train_split),
        train.subset(held_out, f"{train_split} (held out)"),
        test,
    )


def carve(
    targets: npt.NDArray[Any], num_classes: int, fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """(n,) mask of the rows to hold out: about `fraction` of each class, drawn by `seed`.

    Every class with at least two rows keeps at least one and gives at least one, as far as the
    other labels of its rows allow.

    Args:
        targets: (n,) class indices or (n, C) multi-hot.
        num_classes: C.
        fraction: 0..1.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    num_rows = len(targets)
    if targets.ndim == 1:
        counts = np.bincount(targets, minlength=num_classes)
        wanted = _wanted(counts, fraction)
        order = np.lexsort((rng.random(num_rows), targets))
        start = np.cumsum(counts) - counts
        rank = np.empty(num_rows, np.int64)
        rank[order] = np.arange(num_rows) - np.repeat(start, counts)
        result: npt.NDArray[np.bool_] = rank < wanted[targets]
        return result
    counts = targets.sum(0, dtype=np.int64)
    wanted = _wanted(counts, fraction)
    left, taken = counts.copy(), np.zeros(num_classes, np.int64)
    mask = np.zeros(num_rows, bool)
    keys = rng.random(num_rows)
    for c in np.argsort(counts, kind="stable"):
        rows = np.flatnonzero((targets[:, c] > 0) & ~mask)
        for row in rows[np.argsort(keys[rows])]:
            if taken[c] >= wanted[c]:
                break
            labels = np.flatnonzero(targets[row])
            if (left[labels] < 2).any():
                continue  # the last training row of another class
            mask[row] = True
            left[labels] -= 1
            taken[labels] += 1
    empty = ~targets.any(1)
    mask[empty] = keys[empty] < fraction
    return mask


def class_counts(part: Part, num_classes: int) -> IntArray:
    """(C,) rows with each class."""
    if part.targets.ndim == 1:
        return np.bincount(part.targets, minlength=num_classes).astype(np.int64)
    counts: IntArray = part.targets.sum(0, dtype=np.int64)
    return counts


def feature_array(cache: Cache, head: HeadConfig) -> FeatureArray:
    """The array that a head reads.

    Raises:
        CacheError: if the cache was extracted without it.
    """
    (name,) = head.arrays()
    if not cache.has(name):
        held = ", ".join(cache.feature_names("image/"))
        flag = _FLAGS.get(name.removeprefix("image/"), "--features.tokens")
        advice = f"extract it with {flag}, or choose another head or feature"
        if name == "image/projected" and cache.attributes.get("projected_dim") == 0:
            advice = (
                "its backbone reads no text and has no projection, so choose a head on pooled "
                "features (--head linear --head.feature pooled)"
            )
        if isinstance(cache, JoinedCache):
            lacking = [alias for alias, one in cache.members.items() if not one.has(name)]
            advice = f"it is not in {', '.join(lacking)}; choose another head or feature"
        raise CacheError(
            f"{cache.path}: head {head.kind} reads {name}, the cache holds {held}; {advice}"
        )
    return cache.array(name)


class FeatureTable:
    """Features of chosen rows, cut into float32 batches on a device.

    They are held on the device if they fit into half of its free memory, otherwise in host memory
    if they fit into half of that, otherwise every batch is read from the cache's mapped files. Int8
    tokens are held as such, with their scales; a batch of them becomes float32 on the device.

    Attributes:
        held: "device", "memory" or "files".
        data: (n, ...) what is held, as it is stored; None for "files".
        scales: (n, ...) of int8 tokens, else None.
        num_views: V; 1 = no view axis.
    """

    def __init__(self, array: FeatureArray, rows: IntArray, device: torch.device) -> None:
        """Reads the rows once.

        Args:
            array: (N, D), (N, L, D), or with a view axis behind N.
            rows: (n,) row numbers.
            device: where batches go.

        Raises:
            CacheError: if a row holds NaN or infinity.
        """
        self.array, self.rows, self.device = array, rows, device
        self.num_views = array.num_views
        stored = [array.codes, array.scales] if isinstance(array, QuantizedArray) else [array]
        total = len(rows) * sum(part.row_bytes for part in stored)
        fits = total <= _free_memory(torch.device("cpu")) // 2
        self.data: Tensor | None = None
        self.scales: Tensor | None = None
        self.held: Literal["device", "memory", "files"] = "files"
        if fits:
            held = [torch.from_numpy(part.read(rows)) for part in stored]
            self.held = "memory"
            self._require_finite(held[-1])  # a token of NaN has the scale NaN
            if device.type != "cpu" and total <= _free_memory(device) // 2:
                held = [part.to(device) for part in held]
            if device.type == held[0].device.type:
                self.held = "device"
            self.data = held[0]
            self.scales = held[1] if len(held) > 1 else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def feature_dim(self) -> int:
        """Length of the last axis."""
        return self.array.shape[-1]

    def batch(self, index: Tensor, views: Tensor | None = None) -> Tensor:
        """(b, ...) float32 features on the device.

        Args:
            index: (b,) int64 positions among the chosen rows, on the CPU or the device.
            views: (b,) int64 view of each row; None = the plain view 0.
        """
        if self.data is None:
            read = torch.from_numpy(self.array.take(self.rows[index.cpu().numpy()]))
            self._require_finite(read)
            return self._one_view(read, views).to(self.device).float()
        index = index.to(self.data.device)
        part = self._one_view(self.data.index_select(0, index), views).to(self.device).float()
        if self.scales is not None:
            scales = self._one_view(self.scales.index_select(0, index), views)
            part.mul_(scales.to(self.device)[..., None])
        return part

    def _one_view(self, part: Tensor, views: Tensor | None) -> Tensor:
        """The view of each row that `views` names, or the plain one."""
        if self.num_views == 1:
            return part
        if views is None:
            return part[:, 0]
        own = torch.arange(len(part), device=part.device)
        return part[own, views.to(part.device)]

    def slice(self, start: int, stop: int) -> Tensor:
        """(stop − start, ...) float32 plain features of consecutive rows."""
        if self.data is None or self.scales is not None:
            return self.batch(torch.arange(start, min(stop, len(self))))
        return self._one_view(self.data[start:stop], None).to(self.device).float()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(D,) float32 mean and standard deviation of each column, over rows (and tokens)."""
        total = torch.zeros(self.feature_dim, dtype=torch.float64, device=self.device)
        squares, count, shift = torch.zeros_like(total), 0, None
        row_values = int(np.prod(self.array.shape[1:])) // self.num_views
        step = max(1, min(_SCAN_ROWS, _SCAN_VALUES // row_values))
        for start in range(0, len(self), step):
            part = self.slice(start, start + step).flatten(0, -2)
            if shift is None:
                shift = part.mean(0)  # near the mean, or squares would cancel
            part = part - shift
            total += part.sum(0, dtype=torch.float64)
            squares += part.square_().sum(0, dtype=torch.float64)
            count += len(part)
        assert shift is not None, "no rows"
        mean = total / count
        variance = (squares / count - mean.square()).clamp_(min=0)
        return (mean + shift).float(), variance.sqrt_().float()

    def _require_finite(self, data: Tensor) -> None:
        for start in range(0, len(data), _SCAN_ROWS):
            part = data[start : start + _SCAN_ROWS]
            # One reduction: a sum is finite exactly if no element is NaN or infinite (float32 holds
            # the sum of float16s; for float32 it may overflow, and then the elements decide).
            if torch.isfinite(part.sum(dtype=torch.float32)):
                continue
            good = torch.isfinite(part.flatten(1)).all(1)
            if not good.all():
                row = int(self.rows[start + int((~good).nonzero()[0])])
                if self.array.name.startswith("image/multimodal"):
                    raise CacheError(
                        f"{self.array.name}: row {row} of the cache has no caption, so the joint "
                        "encoder has no features of it; caption all images (python -m "
                        "featcache.caption) and extract again, or choose another head.feature"
                    )
                raise CacheError(
                    f"{self.array.name}: row {row} of the cache is valid but holds NaN or "
                    "infinity; extract again with --features.storage_dtype float32"
                )


def _wanted(counts: IntArray, fraction: float) -> IntArray:
    share = np.rint(fraction * counts).astype(np.int64)
    return np.where(counts > 1, np.clip(share, 1, np.maximum(counts - 1, 1)), 0)


def _require_rows(part: Part, cache: Cache) -> None:
    if not has_labels(part):
        raise CacheError(
            f"{cache.path}: split {part.name!r} has no valid labelled row; choose another split, "
            "or extract again with labels"
        )


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
