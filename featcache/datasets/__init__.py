"""Datasets by `kind`: one file each; see `base` for what a dataset must offer."""

from typing import TYPE_CHECKING

from featcache.config import one_of, union_of
from featcache.datasets.base import DatasetConfig

DATASETS = one_of(__name__, __path__, DatasetConfig)
"""Config class of every dataset by kind."""

if TYPE_CHECKING:
    AnyDataset = DatasetConfig
else:
    AnyDataset = union_of(DATASETS, default="folder")

__all__ = ["DATASETS", "AnyDataset", "DatasetConfig"]
