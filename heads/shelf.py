"""Features of a cache that several trainings read one after the other."""

from collections import OrderedDict
from typing import Any

import torch

from heads.data import FeatureTables, HeadArrays
from heads.parts import IntArray

_HELD_TABLES = 6
"""Tables kept in memory: training, validation and test rows of two sets of arrays."""


class Shelf:
    """Reads tables of features, and keeps those used last: most trainings read the same rows."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[Any, ...], FeatureTables] = OrderedDict()

    def __call__(self, arrays: HeadArrays, rows: IntArray, device: torch.device) -> FeatureTables:
        """See `FeatureTables`; the arrays must be of one and the same cache each time."""
        key = (tuple(arrays.arrays), rows.tobytes(), str(device))
        if key not in self._held:
            while len(self._held) >= _HELD_TABLES:
                self._held.popitem(last=False)
            self._held[key] = FeatureTables(arrays, rows, device)
        self._held.move_to_end(key)
        return self._held[key]
