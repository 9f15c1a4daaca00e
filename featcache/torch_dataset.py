"""A cache's split as a map-style torch Dataset, for code that wants a DataLoader.

Heads do not need it: slicing batches by row numbers is several times faster than collating items.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from featcache.reader import Cache, open_cache


class FeatureDataset(Dataset[dict[str, Any]]):
    """Valid rows of a split, one dict an item; picklable, workers open the cache by themselves.

    Items have "row" (int, row number in the cache), "features" (tensor, as stored) and, unless the
    set is unlabelled, "target": int64 class index (-1 = unlabelled row) or (C,) float32 multi-hot.
    """

    def __init__(self, cache: Cache, name: str, split: str) -> None:
        """Checks the array and lists the rows.

        Args:
            cache: the cache.
            name: array with one row an image, e.g. `image/projected`.
            split: split name.
        """
        # Workers read a store's cache from its mirror: obstore does not survive a fork.
        self.path: Path = cache.store.folder.resolve()
        self.name = name
        self.rows = cache.rows(split)
        self._identity = cache.identity
        self._complete = cache.complete
        self._cache: Cache | None = cache
        cache.row_array(name)
        if cache.task != "unlabelled":
            _ = cache.label_lists

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several items by one read; DataLoader prefers this over `__getitem__`."""
        cache = self._open()
        rows = self.rows[list(indices)]
        features = torch.from_numpy(cache.array(self.name).take(rows))
        items: list[dict[str, Any]] = [
            {"row": row, "features": vector}
            for row, vector in zip(rows.tolist(), features, strict=True)
        ]
        if cache.task != "unlabelled":
            if cache.task == "single_label":
                targets = torch.from_numpy(cache.labels(rows))
            else:
                targets = torch.from_numpy(cache.multi_hot(rows)).float()
            for item, target in zip(items, targets, strict=True):
                item["target"] = target
        return items

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}

    def _open(self) -> Cache:
        if self._cache is None:  # verified by the process that made this dataset
            self._cache = open_cache(
                self.path,
                expect=self._identity,
                verify=False,
                allow_incomplete=not self._complete,
            )
        return self._cache
