"""One text vector an image, out of caption features that have a row a caption."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.batches import Rows
from featcache.layout.feature_array import ComputedArray, FeatureArray, checked_rows

_BLOCK_BYTES = 32 << 20
"""Float32 captions that are averaged at a time."""


def unit_rows(features: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """(..., D) float32 of length 1 along the last axis; zeros stay zeros, NaN stays NaN."""
    plain = np.asarray(features, np.float32)
    lengths = np.linalg.norm(plain, axis=-1, keepdims=True)
    return np.asarray(plain / np.maximum(lengths, 1e-6), np.float32)


class CaptionMeans(ComputedArray):
    """The mean of each image's captions, each brought to length 1; see `FeatureArray`.

    The mean of several is shorter than 1 the more they disagree; an image without a caption has
    zeros.

    Attributes:
        name: that of the caption features, `text/projected`.
        shape: (N, P), a row an image.
        dtype: float32.
        captions: (M, P) features, a row a caption.
        offsets: (N+1,) int64; image i has the captions offsets[i]..offsets[i+1].
    """

    def __init__(self, captions: FeatureArray, offsets: npt.NDArray[np.int64]) -> None:
        """Nothing is read yet."""
        self.captions, self.offsets = captions, offsets
        self.name, self.num_views = captions.name, 1
        self.shape = (len(offsets) - 1, *captions.shape[1:])
        self.dtype = np.dtype(np.float32)
        self.view, self.blocks = None, None

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk file of the caption features."""
        return self.captions.chunk_rows

    def take(
        self, rows: Rows, out: npt.NDArray[Any] | None = None, view: int | None = None
    ) -> npt.NDArray[Any]:
        """The means of rows in any order; see `FeatureArray.read`."""
        rows = checked_rows(rows, len(self), self.name)
        out = self._output(out, (len(rows), *self.shape[1:]))
        counts = self.offsets[rows + 1] - self.offsets[rows]
        for part in self._blocks_of(counts):
            own = counts[part]
            captioned = np.flatnonzero(own)
            starts = np.cumsum(own) - own
            index = np.arange(int(own.sum())) + np.repeat(self.offsets[rows[part]] - starts, own)
            out[part] = 0
            if len(captioned):
                # Only rows with a caption: reduceat gives an empty range its first element.
                vectors = unit_rows(self.captions.take(index))
                sums = np.add.reduceat(vectors, starts[captioned], axis=0)
                out[part][captioned] = sums / own[captioned, None].astype(np.float32)
        return out

    def _blocks_of(self, counts: npt.NDArray[np.int64]) -> Iterator[slice]:
        """Ranges of rows whose captions together fit a block, at least one row each."""
        limit = max(1, _BLOCK_BYTES // max(1, self.row_bytes))
        ends, start = np.cumsum(counts), 0
        while start < len(counts):
            before = int(ends[start - 1]) if start else 0
            stop = int(np.searchsorted(ends, before + limit, side="right"))
            stop = min(max(stop, start + 1), start + limit)
            yield slice(start, stop)
            start = stop
