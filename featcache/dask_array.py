"""A cache's array as a lazy dask array."""

from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt

from featcache.layout.feature_array import FeatureArray
from featcache.reader import Cache, open_cache


def dask_array(cache: Cache, name: str) -> Any:
    """All rows of an array, one block a shard; rows without features are NaN."""
    array = cache.array(name)
    rows = int(cache.attributes.get("shard_rows", array.chunk_rows))
    from_array: Any = da.from_array
    return from_array(
        _LazyArray(cache, name),
        chunks=(rows, *array.shape[1:]),
        name=f"featcache-{cache.fingerprint}-{name}",
        meta=np.empty((0,) * len(array.shape), array.dtype),
    )


class _LazyArray:
    """What dask sees of an array: only the path travels, the worker opens it."""

    def __init__(self, cache: Cache, name: str) -> None:
        array = cache.array(name)
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, len(array.shape)
        self._path, self._name = cache.path.resolve(), name
        self._complete = cache.complete
        self._array: FeatureArray | None = array

    def __getitem__(self, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        if self._array is None:
            cache = open_cache(self._path, verify=False, allow_incomplete=not self._complete)
            self._array = cache.array(self._name)
        return self._array.read(index[0])[(slice(None), *index[1:])]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}
