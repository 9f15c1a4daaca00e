"""An int8 array of a cache with its scales: rows as the float32 numbers they stand for."""

from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.batches import Rows
from featcache.layout.feature_array import ComputedArray, FeatureArray, checked_rows
from featcache.layout.quantize import SCALE, dequantize
from featcache.store import Store

_BLOCK_BYTES = 32 << 20
"""Float32 rows that are made from codes at a time."""


class QuantizedArray(ComputedArray):
    """One int8 array of a cache; reads give float32, as every user of features wants it.

    Attributes:
        name, shape, num_views: see `FeatureArray`.
        dtype: float32, the type of what is read.
        codes: the int8 array as it is stored.
        scales: the array of scales, one for each token; value = code * scale.
        view, blocks: None; what lies in the files is not what is read.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        verify: bool = True,
        num_views: int = 1,
        done: npt.NDArray[np.bool_] | None = None,
    ) -> None:
        """Opens both arrays; see `FeatureArray`."""
        self.codes = FeatureArray(store, name, verify, num_views, done)
        self.scales = FeatureArray(store, name + SCALE, verify, num_views, done)
        self.name = name
        self.shape = self.codes.shape
        self.dtype = np.dtype(np.float32)
        self.num_views = num_views
        self.view = None
        self.blocks = None

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk file of the codes."""
        return self.codes.chunk_rows

    def take(
        self, rows: Rows, out: npt.NDArray[Any] | None = None, view: int | None = None
    ) -> npt.NDArray[Any]:
        """A float32 copy of rows in any order; see `FeatureArray.read`."""
        rows = checked_rows(rows, len(self), self.name)
        one_view = view is not None and self.num_views > 1
        out = self._output(out, (len(rows), *self.shape[2 if one_view else 1 :]))
        size = max(1, _BLOCK_BYTES // max(1, self.row_bytes))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            codes = self._part(self.codes, rows[part], view)
            dequantize(codes, self._part(self.scales, rows[part], view), out[part])
        return out

    @staticmethod
    def _part(array: FeatureArray, rows: Rows, view: int | None) -> npt.NDArray[Any]:
        """Consecutive rows by a range, which needs no list of positions."""
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return array.read(slice(int(rows[0]), int(rows[-1]) + 1), view=view)
        return array.read(rows, view=view)
