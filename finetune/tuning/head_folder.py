"""The head of a fine-tuned backbone as a run folder of heads, which predicts and evaluates."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from featcache.backbones.base import Backbone
from featcache.batches import Rows
from featcache.identity import FeatureIdentity, Identity
from featcache.layout.feature_array import ComputedArray, checked_rows
from featcache.manifest import Task, class_hash
from finetune.tuning.examples import Material
from heads.data import FeatureTables, HeadArrays

FOLDER = "head"
"""Name in the result folder."""


@dataclass(frozen=True)
class EncodedDataset:
    """A dataset seen by an adapted backbone, as a cache of it would state it.

    Attributes:
        path: folder of the adapted backbone.
        material: the rows.
        backbone: the adapted encoder, as extraction opens it.
    """

    path: Path
    material: Material
    backbone: Backbone

    @property
    def feature(self) -> str:
        """Name of the array that a head on this backbone reads."""
        return "projected" if self.backbone.spec.projected_dim else "pooled"

    @cached_property
    def identity(self) -> Identity:
        """What a cache would be: features kept in float32."""
        spec = self.backbone.spec
        return Identity(
            dataset=self.material.identity,
            backbone=spec.identity,
            preprocess=spec.pixels.record("fast"),
            precision="fp32",
            features=FeatureIdentity(
                projected=self.feature == "projected",
                pooled=self.feature == "pooled",
                tokens="none",
                token_layer=-1,
                text=False,
                storage_dtype="float32",
                num_views=1,
                view_seed=0,
                view_scale=1.0,
            ),
        )

    @property
    def fingerprint(self) -> str:
        """Hash over `identity`."""
        return self.identity.fingerprint()

    @property
    def attributes(self) -> Mapping[str, Any]:
        """What a cache's attributes would say."""
        return {
            "backbone": {"kind": "adapted", "model": str(self.path.resolve()), "base_model": ""},
            "dataset": dict(self.material.dataset),
            "root": self.material.root,
            "pixels": self.identity.preprocess.record(),
            "logit_scale": self.backbone.spec.logit_scale,
        }

    @property
    def task(self) -> Task:
        """How the labels are to be read."""
        return self.material.task

    @property
    def classes(self) -> pd.DataFrame:
        """Class table."""
        return self.material.classes

    @property
    def class_hash(self) -> str:
        """Hash over the class names."""
        return class_hash([str(name) for name in self.classes["name"]])


class HeldFeatures(ComputedArray):
    """Features in memory, read like an array of a cache; see `FeatureArray`.

    Attributes:
        values: (n, P) float32.
    """

    def __init__(self, name: str, values: Tensor) -> None:
        """Copies nothing."""
        self.values = values.numpy()
        self.name, self.num_views = name, 1
        self.shape, self.dtype = self.values.shape, self.values.dtype
        self.view, self.blocks = None, None

    def take(
        self, rows: Rows, out: npt.NDArray[Any] | None = None, view: int | None = None
    ) -> npt.NDArray[Any]:
        """Rows in any order; see `FeatureArray.read`."""
        rows = checked_rows(rows, len(self), self.name)
        out = self._output(out, (len(rows), *self.shape[1:]))
        return np.take(self.values, rows, axis=0, out=out)


def tables(name: str, features: Tensor, device: torch.device) -> FeatureTables:
    """(n, P) features as heads read them, under an array's name."""
    held = HeadArrays({name: HeldFeatures(name, features)}, None)
    return FeatureTables(held, np.arange(len(features), dtype=np.int64), device)
