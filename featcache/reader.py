"""Features, labels and ids out of a cache, at the speed of memory.

`open_cache` checks what the cache holds and that it is whole; an array's checksums are verified
once, on its first use. After that a read is a copy out of the page cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from featcache.batches import RAM_BUDGET_BYTES, Rows, plan_batches
from featcache.caption_means import CaptionMeans
from featcache.errors import CacheError, ConfigError
from featcache.identity import Identity, require_equal
from featcache.layout.feature_array import FeatureArray
from featcache.layout.quantize import SCALE
from featcache.layout.quantized_array import QuantizedArray
from featcache.layout.string_table import strings_of
from featcache.manifest import Task
from featcache.storage import Where
from featcache.store import Store

if TYPE_CHECKING:
    from featcache.torch_dataset import FeatureDataset


def open_cache(
    path: Where,
    expect: Identity | None = None,
    verify: bool = True,
    allow_incomplete: bool = False,
) -> "Cache":
    """A cache for reading.

    Args:
        path: the cache's folder, or `s3://bucket/prefix`.
        expect: what the caller wants it to hold; None = anything.
        verify: whether an array's checksums are verified on its first use.
        allow_incomplete: whether a cache with missing shards may be read; `rows` then only gives
            rows of shards that are done.

    Raises:
        CacheError: no cache there, another format, or shards are missing.
        CacheMismatchError: naming the first field that differs from `expect`.
        CacheCorruptError: naming a damaged file.
    """
    store = Store.open(path)
    if expect is not None:
        require_equal(store.identity, expect, str(path))
    if not store.complete and not allow_incomplete:
        missing, total = len(store.pending()), len(store.shards())
        if not missing:
            raise CacheError(
                f"{path}: all shards are done, but the extraction did not end well; run it again "
                "with the same options, it says why (too many unreadable images, for one)"
            )
        raise CacheError(
            f"{path}: {missing} of {total} shards are missing; run the extraction again with the "
            f"same options (python -m featcache.extract --cache {path} ...), it resumes"
        )
    return Cache(store, verify)


class Cache:
    """A cache opened for reading; see `open_cache`.

    Attributes:
        path: its folder.
        attributes: the group's attributes (backbone, dataset, logit_scale, ...).
        identity: what it holds; `fingerprint` is the hash over that.
        num_rows: N.
        task: how the labels are to be read.
        complete: whether all shards are done.
        history: the states it had before its dataset changed, oldest first; see docs/growing.md.
    """

    def __init__(self, store: Store, verify: bool = True) -> None:
        """See `open_cache`."""
        self.path = store.path
        self.attributes: Mapping[str, Any] = store.attributes
        self.identity = store.identity
        self.fingerprint: str = store.attributes["fingerprint"]
        self.num_rows: int = store.attributes["num_rows"]
        self.task: Task = store.attributes["task"]
        self.class_hash: str = store.attributes["class_hash"]
        self.complete = store.complete
        self.history: list[dict[str, Any]] = list(store.attributes.get("history", []))
        self.store = store
        self._verify = verify
        self._features: dict[str, FeatureArray] = {}

    @property
    def parts(self) -> list["Cache"]:
        """The caches whose features stand side by side here: this one; see `featcache.join`."""
        return [self]

    @property
    def split_names(self) -> list[str]:
        """Names of the splits in storage order."""
        return list(self.attributes["splits"])

    @cached_property
    def splits(self) -> list[str]:
        """The N split names, in row order."""
        return [
            name
            for name, (start, stop) in self.attributes["splits"].items()
            for _ in range(stop - start)
        ]

    @cached_property
    def ids(self) -> Sequence[str]:
        """The N row ids, in row order."""
        return self._strings("rows/id")

    @cached_property
    def paths(self) -> Sequence[str]:
        """The N image paths relative to the dataset's root, in row order."""
        return self._strings("rows/path")

    @cached_property
    def captions(self) -> tuple[npt.NDArray[np.int64], Sequence[str]]:
        """(N+1,) offsets and the M captions; row i has captions offsets[i]..offsets[i+1]."""
        return self.caption_offsets, self._strings("rows/caption_values")

    @cached_property
    def caption_offsets(self) -> npt.NDArray[np.int64]:
        """(N+1,) row i has captions offsets[i]..offsets[i+1]."""
        return self._numbers("text/offsets")

    @cached_property
    def caption_counts(self) -> npt.NDArray[np.int64]:
        """(N,) captions of each row."""
        return np.diff(self.caption_offsets)

    def caption_means(self) -> FeatureArray:
        """(N, P) float32 mean of each row's caption features, each of length 1; zeros without.

        Raises:
            CacheError: if the cache does not hold `text/projected`.
        """
        return CaptionMeans(self.array("text/projected"), self.caption_offsets)

    @cached_property
    def classes(self) -> pd.DataFrame:
        """Class table: name, count (training images), then metadata; C rows in index order."""
        columns: dict[str, Any] = {
            "name": self._strings("classes/name"),
            "count": self._numbers("classes/count"),
        }
        for column in self.attributes["class_columns"]:
            columns[column] = self._strings(f"classes/{column}")
        return pd.DataFrame(columns)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.store.files("classes/count").shape[0]

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,) rows that hold features: readable images of shards that are done."""
        return self.array("rows/valid").read()

    @cached_property
    def done(self) -> npt.NDArray[np.bool_]:
        """(N,) rows of image shards that are done."""
        return self._done_rows("image", self.num_rows)

    def has(self, name: str) -> bool:
        """Whether the cache holds an array."""
        return self.store.has(name)

    def feature_names(self, prefix: str = "") -> list[str]:
        """Names of the feature arrays that start with `prefix`, e.g. `image/`.

        Scales of an int8 array are part of that array, and not named.
        """
        named = self.attributes["arrays"]
        names = [*named["image"], *named["text"]]
        return [
            name
            for name in names
            if name.startswith(prefix)
            and not name.startswith("rows/")
            and name.removesuffix(SCALE) not in {*names} - {name}
        ]

    def array(self, name: str) -> FeatureArray:
        """An array such as `image/projected`, verified on first use.

        Int8 tokens are read as the float32 numbers they stand for; the array's `codes` and `scales`
        are what is stored.

        Raises:
            CacheError: if the cache does not hold it; the message lists those it holds.
            CacheCorruptError: naming the first damaged file.
        """
        if name not in self._features:
            if not self.has(name):
                raise CacheError(
                    f"{self.path}: no array {name!r}; it holds {', '.join(self.feature_names())}; "
                    "extract that feature too, or choose one of these"
                )
            done, views = None, 1
            kind = next((k for k in ("image", "text") if name in self.attributes["arrays"][k]), "")
            if kind and not self.complete:
                num = self.num_rows if kind == "image" else self.attributes["num_captions"]
                done = self._done_rows(kind, num)
            if name.startswith("image/"):
                views = self.identity.features.num_views
            quantized = self.store.files(name).dtype == np.int8
            opened = QuantizedArray if quantized else FeatureArray
            self._features[name] = opened(self.store, name, self._verify, views, done)
        return self._features[name]

    def rows(self, split: str) -> Rows:
        """Row numbers of a split's valid rows, ascending.

        Raises:
            ConfigError: if there is no such split.
        """
        if split not in self.attributes["splits"]:
            raise ConfigError(
                f"{self.path}: no split {split!r}; it has {', '.join(self.split_names)}"
            )
        start, stop = self.attributes["splits"][split]
        rows: Rows = np.flatnonzero(self.valid[start:stop]).astype(np.int64) + start
        return rows

    def row_array(self, name: str) -> FeatureArray:
        """An array with one row an image.

        Raises:
            ConfigError: if it has other rows (captions, classes).
        """
        array = self.array(name)
        if len(array) != self.num_rows:
            raise ConfigError(
                f"{self.path}: {name} has {len(array)} rows, not one for each of the "
                f"{self.num_rows} images; choose an image/... array"
            )
        return array

    def batches(
        self,
        name: str,
        split: str,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        ram_budget_bytes: int = RAM_BUDGET_BYTES,
    ) -> Iterator[tuple[Rows, npt.NDArray[Any]]]:
        """One pass over a split's valid rows, every row exactly once.

        Args:
            name: array with one row an image.
            split: split name.
            batch_size: rows of a batch; the last one may have fewer.
            shuffle: a new order for each (seed, epoch); exactly uniform while the split's features
                fit the budget, otherwise chunks in random order, mixed in windows of the budget.
            seed: decides the order, with `epoch`.
            epoch: pass over the split.
            ram_budget_bytes: features that may be needed in memory at a time.

        Yields:
            (n,) row numbers in the cache and their (n, ...) features, as stored (int8: float32).
        """
        array = self.row_array(name)
        rows = self.rows(split)
        plan = plan_batches(
            rows,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
            chunk_rows=array.chunk_rows,
            window_rows=max(1, ram_budget_bytes // array.row_bytes),
        )
        for batch in plan:
            yield batch, array.take(batch)

    def dataset(self, name: str, split: str) -> "FeatureDataset":
        """A split's valid rows as a map-style torch Dataset of dicts."""
        from featcache.torch_dataset import FeatureDataset

        return FeatureDataset(self, name, split)

    def dask(self, name: str) -> Any:
        """A lazy dask array over all rows, one block a shard; invalid rows are NaN."""
        from featcache.dask_array import dask_array

        return dask_array(self, name)

    def to_numpy(self, folder: str | Path) -> Path:
        """Writes every feature array as .npy, rows as parquet; see `featcache.export`."""
        from featcache.export import to_numpy

        return to_numpy(self, folder)

    def to_parquet(self, file: str | Path) -> Path:
        """Writes rows with their image features as one parquet file; see `featcache.export`."""
        from featcache.export import to_parquet

        return to_parquet(self, file)

    def labels(self, rows: Rows) -> npt.NDArray[np.int64]:
        """(n,) class index of each row; -1 = unlabelled.

        Raises:
            ConfigError: if rows can have several labels.
        """
        if self.task == "multi_label":
            raise ConfigError(f"{self.path}: a multi-label cache has no single label a row")
        offsets, values = self.label_lists
        starts = offsets[rows]
        labels = np.full(len(rows), -1, np.int64)
        labelled = offsets[np.asarray(rows) + 1] > starts
        labels[labelled] = values[starts[labelled]]
        return labels

    def multi_hot(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """(n, C) uint8: 1 where a row has the class."""
        offsets, values = self.label_lists
        starts = offsets[rows]
        counts = offsets[np.asarray(rows) + 1] - starts
        row = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        hot = np.zeros((len(rows), self.num_classes), np.uint8)
        hot[row, values[np.repeat(starts, counts) + within]] = 1
        return hot

    @cached_property
    def label_lists(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """(N+1,) offsets and all class indices; row i has labels offsets[i]..offsets[i+1]."""
        return self._numbers("rows/label_offsets"), self._numbers("rows/label_values")

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        return self.array(name).read()

    def _strings(self, name: str) -> Sequence[str]:
        return strings_of(self.store, name)

    def _done_rows(self, kind: Any, num_rows: int) -> npt.NDArray[np.bool_]:
        if self.complete:
            return np.ones(num_rows, np.bool_)
        done = np.zeros(num_rows, np.bool_)
        reports = self.store.reports(kind)
        for shard in self.store.shards(kind):
            if shard.index in reports:
                done[shard.start : shard.stop] = True
        return done


__all__ = ["Cache", "FeatureArray", "Rows", "open_cache"]
