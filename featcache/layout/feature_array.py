"""One array of a cache: rows out of mapped files, without decoding."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.batches import Rows
from featcache.errors import ConfigError, MappingError
from featcache.layout.chunks import ArrayFiles, require
from featcache.layout.mapping import MAX_FILES, can_map, map_array, map_chunks
from featcache.store import Store

_COPY_THREADS = min(4, os.cpu_count() or 1)
_BYTES_PER_THREAD = 16 << 20
"""Below this, starting a thread costs more than it copies meanwhile."""


class FeatureArray:
    """One array of a cache: rows as ndarrays, without decoding.

    Attributes:
        name: array in the cache, e.g. `image/projected`.
        shape: (rows, ...); with a view axis (rows, V, ...).
        dtype: type on disk.
        num_views: V; 1 = no view axis.
        view: read-only array over the files, no copy; None where files cannot be mapped as one.
        blocks: where there is no `view`, one read-only array a chunk (None = not done), or None
            for layouts that only zarr reads.
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
        self.view: npt.NDArray[Any] | None = None
        self.blocks: list[npt.NDArray[Any] | None] | None = None
        with store.unchanged():  # files are mapped by name, one after the other
            files.fetch(np.flatnonzero(present).tolist(), verify)
            try:
                self._map(present)
            except MappingError as error:
                if not present.all():  # zarr would read what half-written shards left
                    raise
                print(f"{error}; it is read through zarr, which is slower", file=sys.stderr)
            if verify and files.remote is None:  # what was fetched was verified on the way
                self._verify(present)

    def _map(self, present: npt.NDArray[np.bool_]) -> None:
        """Maps the files: as one, chunk by chunk, or not at all where only zarr can read them.

        Raises:
            MappingError: if there are too many mappings; then all of these are given back.
        """
        files = self._files
        if present.all() and can_map(files):
            self.view = map_array(files)
        elif files.raw and files.num_chunks <= MAX_FILES:
            self.blocks = [
                map_chunks(files, range(chunk, chunk + 1)) if here else None
                for chunk, here in enumerate(present)
            ]

    def _verify(self, present: npt.NDArray[np.bool_]) -> None:
        """Checks the chunks' checksums through the mapping, which fills its page table too.

        One thread: the crc runs as fast as memory is read (measured: 13 GB/s with one, no more
        with two).
        """
        files = self._files
        for chunk in np.flatnonzero(present).tolist():
            files.read_ahead(chunk + 1)
            require(files.problem(chunk, self._mapped_bytes(chunk)))

    def _mapped_bytes(self, chunk: int) -> npt.NDArray[np.uint8] | None:
        """The bytes of a chunk; None where they are not mapped as a whole."""
        size = self._files.chunk_rows
        if self.view is not None and (chunk + 1) * size <= len(self):
            return self.view[chunk * size : (chunk + 1) * size].reshape(-1).view(np.uint8)
        return None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk file."""
        return self._files.chunk_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, all its views."""
        return self._files.row_bytes

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
        rows = checked_rows(rows, len(self), self.name)
        one_view = view is not None and self.num_views > 1
        shape = (len(rows), *self.shape[2 if one_view else 1 :])
        out = self._output(out, shape)
        if self.view is not None:
            _take(self.view, rows, out, view if one_view else None)
        elif self.blocks is not None:
            chunks = rows // self._files.chunk_rows
            order = np.argsort(chunks, kind="stable")
            bounds = np.searchsorted(chunks[order], np.arange(len(self.blocks) + 1))
            for chunk in np.unique(chunks):
                where = order[bounds[chunk] : bounds[chunk + 1]]
                block = self.blocks[chunk]
                if block is None:
                    out[where] = np.nan if self.dtype.kind == "f" else 0
                    continue
                part = np.empty((len(where), *shape[1:]), self.dtype)
                inside = rows[where] - chunk * self._files.chunk_rows
                _take(block, inside, part, view if one_view else None)
                out[where] = part
        else:
            with self._store.unchanged():
                values = self._store.zarr_array(self.name).oindex[rows]
            out[...] = values[:, view] if one_view else values
        return out

    def _read_range(self, start: int, stop: int, out: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        out = self._output(out, (stop - start, *self.shape[1:]))
        if self.view is not None:
            _copy(self.view[start:stop], out)
        elif self.blocks is not None:
            size = self._files.chunk_rows
            for chunk in self._files.chunks_of(start, stop) if stop > start else ():
                first, last = max(start, chunk * size), min(stop, (chunk + 1) * size)
                block = self.blocks[chunk]
                if block is None:
                    out[first - start : last - start] = np.nan if self.dtype.kind == "f" else 0
                else:
                    inside = block[first - chunk * size : last - chunk * size]
                    np.copyto(out[first - start : last - start], inside)
        else:
            with self._store.unchanged():
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


class ComputedArray(FeatureArray):
    """Rows that are made from other arrays when they are read; members write `take`.

    Attributes:
        view, blocks: None; what lies in the files is not what is read.
    """

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is read, all its views."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    def read(
        self,
        rows: slice | Rows | None = None,
        out: npt.NDArray[Any] | None = None,
        view: int | None = None,
    ) -> npt.NDArray[Any]:
        """A copy of rows; see `FeatureArray.read`."""
        if view is not None and not 0 <= view < self.num_views:
            raise IndexError(f"{self.name}: view {view} of {self.num_views}")
        if rows is None:
            rows = slice(None)
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)), dtype=np.int64)
        return self.take(rows, out, view)


def checked_rows(rows: Rows, length: int, name: str) -> Rows:
    """Row numbers as int64, all of them inside an array of that length.

    Raises:
        IndexError: naming the array and its rows.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= length):
        raise IndexError(f"{name}: rows lie outside 0..{length - 1}")
    return rows


def _copy(source: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
    """Copies `source` into `out`, a big one in parts by several threads.

    One thread does not fill the memory's bandwidth, least of all into new pages, which the kernel
    has to clear first.
    """
    threads = min(_COPY_THREADS, source.nbytes // _BYTES_PER_THREAD)
    if threads < 2:
        np.copyto(out, source)
        return
    bounds = np.linspace(0, len(source), threads + 1).astype(np.int64).tolist()
    with ThreadPoolExecutor(threads) as executor:
        parts = [
            executor.submit(np.copyto, out[first:last], source[first:last])
            for first, last in pairwise(bounds)
        ]
        for part in parts:
            part.result()


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
