"""Features, labels and ids out of a cache, at the speed of memory.

`open_cache` checks what the cache holds and that it is whole; an array's checksums are verified
once, on its first use. After that a read is a copy out of the page cache.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from featcache.chunks import ArrayFiles
from featcache.errors import CacheError, ConfigError
from featcache.identity import Identity, require_equal
from featcache.manifest import Task
from featcache.mapping import can_map, map_array
from featcache.store import Store

Rows = npt.NDArray[np.int64]


def open_cache(
    path: str | Path,
    expect: Identity | None = None,
    verify: bool = True,
    allow_incomplete: bool = False,
) -> "Cache":
    """A cache for reading.

    Args:
        path: the cache's folder.
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
        raise CacheError(
            f"{path}: {missing} of {total} shards are missing; run the extraction again with the "
            f"same options (python -m featcache.extract --cache {path} ...), it resumes"
        )
    return Cache(store, verify)


class FeatureArray:
    """One array of a cache: rows as ndarrays, without decoding.

    Attributes:
        name: array in the cache, e.g. `image/projected`.
        shape: (rows, ...); with a view axis (rows, V, ...).
        dtype: type on disk.
        num_views: V; 1 = no view axis.
        view: read-only array over the files, no copy; None where files cannot be mapped as one.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        verify: bool = True,
        num_views: int = 1,
        done: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Opens an array.

        Args:
            store: the cache.
            name: array.
            verify: whether the chunks' checksums are checked now.
            num_views: V.
            done: (rows,) rows whose chunks count; the others read as NaN. None = all.
        """
        files = store.files(name)
        if files.dtype is None:
            raise ConfigError(f"{files.folder}: holds strings, not features")
        self.name = name
        self.shape = files.shape
        self.dtype = files.dtype
        self.num_views = num_views
        self._files = files
        self._store = store
        present = _present_chunks(files, done)
        if verify:
            for chunk in np.flatnonzero(present):
                files.require(range(int(chunk), int(chunk) + 1))
        self.view = map_array(files) if present.all() and can_map(files) else None
        self._blocks: list[npt.NDArray[Any] | None] | None = None
        if self.view is None and files.raw:
            self._blocks = [
                _map_chunk(files, chunk) if here else None for chunk, here in enumerate(present)
            ]

    def __len__(self) -> int:
        return self.shape[0]

    def read(
        self,
        rows: slice | Rows | None = None,
        out: npt.NDArray[Any] | None = None,
        view: int | None = None,
    ) -> npt.NDArray[Any]:
        """A copy of rows, in one allocation.

        Args:
            rows: all (None), a slice with step 1, or row numbers in any order, repeats allowed.
            out: C-contiguous array to fill instead of a new one.
            view: one view, 0 = the plain one; None = all, with their axis if V > 1.

        Returns:
            (n, ...) of the array's dtype.

        Raises:
            IndexError: if a row lies outside the array.
        """
        if rows is None:
            rows = slice(None)
        if view is not None and not 0 <= view < self.num_views:
            raise IndexError(f"{self.name}: view {view} of {self.num_views}")
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1 and (view is None or self.num_views == 1):
                return self._read_range(start, max(start, stop), out)
            rows = np.arange(start, stop, step, dtype=np.int64)
        return self.take(rows, out, view)

    def take(
        self, rows: Rows, out: npt.NDArray[Any] | None = None, view: int | None = None
    ) -> npt.NDArray[Any]:
        """A copy of rows in any order; see `read`."""
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"{self.name}: rows lie outside 0..{len(self) - 1}")
        one_view = view is not None and self.num_views > 1
        shape = (len(rows), *self.shape[2 if one_view else 1 :])
        out = self._output(out, shape)
        if self.view is not None:
            _take(self.view, rows, out, view if one_view else None)
        elif self._blocks is not None:
            chunks = rows // self._files.chunk_rows
            order = np.argsort(chunks, kind="stable")
            bounds = np.searchsorted(chunks[order], np.arange(len(self._blocks) + 1))
            for chunk in np.unique(chunks):
                where = order[bounds[chunk] : bounds[chunk + 1]]
                block = self._blocks[chunk]
                if block is None:
                    out[where] = np.nan if self.dtype.kind == "f" else 0
                    continue
                part = np.empty((len(where), *shape[1:]), self.dtype)
                inside = rows[where] - chunk * self._files.chunk_rows
                _take(block, inside, part, view if one_view else None)
                out[where] = part
        else:
            values = self._store.zarr_array(self.name).oindex[rows]
            out[...] = values[:, view] if one_view else values
        return out

    def _read_range(self, start: int, stop: int, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        out = self._output(out, (stop - start, *self.shape[1:]))
        if self.view is not None:
            np.copyto(out, self.view[start:stop])
        elif self._blocks is not None:
            size = self._files.chunk_rows
            for chunk in self._files.chunks_of(start, stop) if stop > start else ():
                first, last = max(start, chunk * size), min(stop, (chunk + 1) * size)
                block = self._blocks[chunk]
                if block is None:
                    out[first - start : last - start] = np.nan if self.dtype.kind == "f" else 0
                else:
                    inside = block[first - chunk * size : last - chunk * size]
                    np.copyto(out[first - start : last - start], inside)
        else:
            out[...] = self._store.zarr_array(self.name)[start:stop]
        return out

    def _output(self, out: npt.NDArray[Any] | None, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        if out is None:
            return np.empty(shape, self.dtype)
        if out.shape != shape or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"{self.name}: out is {out.dtype}{out.shape}, expected contiguous "
                f"{self.dtype}{shape}"
            )
        return out


class Cache:
    """A cache opened for reading; see `open_cache`.

    Attributes:
        path: its folder.
        attributes: the group's attributes (backbone, dataset, logit_scale, ...).
        identity: what it holds; `fingerprint` is the hash over that.
        num_rows: N.
        task: how the labels are to be read.
        complete: whether all shards are done.
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
        self.store = store
        self._verify = verify
        self._features: dict[str, FeatureArray] = {}

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
    def ids(self) -> list[str]:
        """The N row ids, in row order."""
        return self._strings("rows/id")

    @cached_property
    def paths(self) -> list[str]:
        """The N image paths relative to the dataset's root, in row order."""
        return self._strings("rows/path")

    @cached_property
    def captions(self) -> tuple[npt.NDArray[np.int64], list[str]]:
        """(N+1,) offsets and the M captions; row i has captions offsets[i]..offsets[i+1]."""
        return self._numbers("text/offsets"), self._strings("rows/caption_values")

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
        return self.array("rows/valid").read() & self._done

    @cached_property
    def _done(self) -> npt.NDArray[np.bool_]:
        """(N,) rows of image shards that are done."""
        return self._done_rows("image", self.num_rows)

    def has(self, name: str) -> bool:
        """Whether the cache holds an array."""
        return self.store.has(name)

    def array(self, name: str) -> FeatureArray:
        """An array such as `image/projected`, verified on first use.

        Raises:
            CacheError: if the cache does not hold it; the message lists those it holds.
            CacheCorruptError: naming the first damaged file.
        """
        if name not in self._features:
            if not self.has(name):
                known = [*self.attributes["arrays"]["image"], *self.attributes["arrays"]["text"]]
                raise CacheError(
                    f"{self.path}: no array {name!r}; it holds {', '.join(known)}; extract that "
                    "feature too, or choose one of these"
                )
            done, views = None, 1
            kind = next((k for k in ("image", "text") if name in self.attributes["arrays"][k]), "")
            if kind and not self.complete:
                num = self.num_rows if kind == "image" else self.attributes["num_captions"]
                done = self._done_rows(kind, num)
            if name.startswith("image/"):
                views = self.identity.features.num_views
            self._features[name] = FeatureArray(self.store, name, self._verify, views, done)
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

    def labels(self, rows: Rows) -> npt.NDArray[np.int64]:
        """(n,) class index of each row; -1 = unlabelled.

        Raises:
            ConfigError: if rows can have several labels.
        """
        if self.task == "multi_label":
            raise ConfigError(f"{self.path}: a multi-label cache has no single label a row")
        offsets, values = self._labels
        starts = offsets[rows]
        labels = np.full(len(rows), -1, np.int64)
        labelled = offsets[np.asarray(rows) + 1] > starts
        labels[labelled] = values[starts[labelled]]
        return labels

    def multi_hot(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """(n, C) uint8: 1 where a row has the class."""
        offsets, values = self._labels
        starts = offsets[rows]
        counts = offsets[np.asarray(rows) + 1] - starts
        row = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        hot = np.zeros((len(rows), self.num_classes), np.uint8)
        hot[row, values[np.repeat(starts, counts) + within]] = 1
        return hot

    @cached_property
    def _labels(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        return self._numbers("rows/label_offsets"), self._numbers("rows/label_values")

    def _numbers(self, name: str) -> npt.NDArray[Any]:
        return self.array(name).read()

    def _strings(self, name: str) -> list[str]:
        return [str(text) for text in self.store.read(name)]

    def _done_rows(self, kind: Any, num_rows: int) -> npt.NDArray[np.bool_]:
        if self.complete:
            return np.ones(num_rows, np.bool_)
        done = np.zeros(num_rows, np.bool_)
        reports = self.store.reports(kind)
        for shard in self.store.shards(kind):
            if shard.index in reports:
                done[shard.start : shard.stop] = True
        return done


def _take(source: npt.NDArray[Any], rows: Rows, out: npt.NDArray[Any], view: int | None) -> None:
    """Copies rows (of one view) of `source` into `out`."""
    if view is not None:
        rows = rows * source.shape[1] + view
        source = source.reshape(-1, *source.shape[2:])
    # The rows were checked: mode="raise" would buffer the whole output.
    np.take(source, rows, axis=0, out=out, mode="clip")


def _present_chunks(files: ArrayFiles, done: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.bool_]:
    """(chunks,) chunks of which every row is done."""
    if done is None:
        return np.ones(files.num_chunks, np.bool_)
    starts = np.arange(files.num_chunks) * files.chunk_rows
    return np.asarray([done[start : start + files.chunk_rows].all() for start in starts], np.bool_)


def _map_chunk(files: ArrayFiles, chunk: int) -> npt.NDArray[Any]:
    shape = (files.chunk_rows, *files.shape[1:])
    assert files.dtype is not None
    return np.memmap(files.file(chunk), files.dtype, mode="r", shape=shape)


__all__ = ["Cache", "FeatureArray", "Rows", "open_cache"]
