"""Random separable features for every head, and what the training job would tell it about them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from featcache.backbones.prompt_tower import ClipPromptTower, PromptTower
from featcache.caption_tokens import CAPTION_TOKENS
from featcache.manifest import Task
from heads.base import FeatureSpec, HeadConfig
from heads.data import FeatureTables, HeadArrays
from heads.fitting import Material
from heads.losses.base import ClassStatistics
from heads.metrics import average_precision
from heads.models import HEADS
from heads.parts import Part, class_counts, cooccurrence
from heads.specification import build_loss

DIM, NUM_TOKENS, TEXT_TOKENS = 512, 16, 77
CPU = torch.device("cpu")
MULTI_LABEL = ("boost", "ensemble", "gat", "lmpt", "lmpt_token", "ml_decoder", "one_vs_rest")
MULTI_LABEL += ("router", "two_step")
"""Kinds that are measured with several labels a row: what they were made for."""
FEWER_ROWS = {
    "knn": 4,
    "lmpt_token": 25,
    "logistic_regression": 10,
    "ml_decoder": 100,
    "tip_adapter": 10,
}
"""Kinds measured on so many times fewer rows: what they do with one takes long."""


def val_rows(num_rows: int) -> int:
    """Rows that decide, beside so many that train."""
    return min(4096, max(num_rows // 4, 256))


@dataclass
class MadeArray:
    """Rows in memory, with the face of `FeatureArray` that tables look at."""

    name: str
    data: npt.NDArray[Any]
    num_views: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.data.shape

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape[1:])) * self.data.itemsize

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """A copy of rows."""
        return self.data[rows]

    take = read


@dataclass(frozen=True)
class Problem:
    """A head's config, the material it trains on, and what `build` is told."""

    config: HeadConfig
    material: Material
    spec: FeatureSpec
    task: Task


def config_of(kind: str) -> HeadConfig:
    """The head with its defaults; those made of other runs get one untrained naive head each."""
    member = {
        "run": "made",
        "kind": "naive",
        "options": {},
        "arrays": {"image/projected": DIM},
        "logit_scale": 100.0,
        "weights": "made",
    }
    options: dict[str, Any] = {
        "boost": {"base": "made", "member": member},
        "average": {"runs": ["made", "made"], "members": [member, member]},
    }.get(kind, {})
    return HEADS[kind].model_validate(options)


def make_problem(kind: str, num_rows: int, num_classes: int | None = None) -> Problem:
    """Features, labels and statistics for one kind of head.

    Args:
        kind: of the head.
        num_rows: N that train; see `val_rows` for those that decide.
        num_classes: C; unset = 100 with one label a row, 20 with several.
    """
    config = config_of(kind).with_optim(None, None)
    task: Task = "multi_label" if kind in MULTI_LABEL else "single_label"
    count = num_classes or (20 if task == "multi_label" else 100)
    rng = np.random.default_rng(0)
    centres = unit(rng, count)
    total = num_rows + val_rows(num_rows)
    if task == "single_label":
        targets: npt.NDArray[Any] = rng.integers(0, count, total)
    else:
        targets = (rng.random((total, count)) < 0.15).astype(np.uint8)
    names = [*config.arrays(), *config.training_arrays()]
    arrays = {name: MadeArray(name, rows_of(name, rng, targets, centres)) for name in names}
    opened = HeadArrays(arrays, None)  # type: ignore[arg-type]
    train = Part("train", np.arange(num_rows), targets[:num_rows])
    val = Part("val", np.arange(num_rows, total), targets[num_rows:])
    table = FeatureTables(opened, train.rows, CPU)
    val_table = FeatureTables(opened.only(config.arrays()), val.rows, CPU)
    counts = class_counts(train, count)
    mean, std = table.statistics() if config.wants_statistics() else (None, None)
    spec = FeatureSpec(
        feature_dim=DIM,
        num_classes=count,
        task=task,
        class_counts=counts,
        classes=pd.DataFrame({"name": [f"thing {i}" for i in range(count)], "count": counts}),
        prompts=torch.from_numpy(centres + 0.5 * unit(rng, 2 * count).reshape(2, count, DIM)),
        logit_scale=100.0,
        mean=mean,
        std=std,
        feature_dims=table.feature_dims,
        num_rows=num_rows,
        criterion=build_loss(config, None, task, ClassStatistics(counts, num_rows)),
        cooccurrence=cooccurrence(train, count) if config.wants_cooccurrence() else None,
        text_tower=text_tower,
        support=lambda: (table.slice(0, num_rows), train.target_tensor(CPU)),
    )
    return Problem(config, Material(table, train, val_table, val), spec, task)


def unit(rng: np.random.Generator, count: int) -> npt.NDArray[np.float32]:
    """(count, D) random directions."""
    rows = rng.standard_normal((count, DIM), np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def rows_of(
    name: str, rng: np.random.Generator, targets: npt.NDArray[Any], centres: npt.NDArray[np.float32]
) -> npt.NDArray[Any]:
    """One array of the cache: each row the sum of its classes' directions, in noise."""
    count = len(targets)
    if name == CAPTION_TOKENS:
        ids = np.zeros((count, TEXT_TOKENS), np.int32)
        ids[:, :12] = rng.integers(1000, 40_000, (count, 12))
        ids[:, 0], ids[:, 11] = 49_407, 49_408
        return ids
    if name.endswith("_mask"):
        return np.arange(NUM_TOKENS) < rng.integers(NUM_TOKENS // 2, NUM_TOKENS + 1, (count, 1))
    if name in ("image/tokens", "image/multimodal"):
        data = np.empty((count, NUM_TOKENS, DIM), np.float16)
        for row in range(count):
            tokens = 3 / DIM**0.5 * rng.standard_normal((NUM_TOKENS, DIM), np.float32)
            labels = targets[row].nonzero()[0]
            np.add.at(tokens, rng.integers(0, NUM_TOKENS, len(labels)), centres[labels])
            data[row] = tokens
        return data
    data = np.empty((count, DIM), np.float16)
    for start in range(0, count, 8192):  # float32 of all rows is not needed at once
        wanted = targets[start : start + 8192]
        signal = centres[wanted] if wanted.ndim == 1 else wanted.astype(np.float32) @ centres
        spread = (5 if wanted.ndim == 1 else 11) / DIM**0.5
        data[start : start + 8192] = signal + spread * rng.standard_normal(signal.shape, np.float32)
    return data


def text_tower() -> PromptTower:
    """A text tower of ViT-B-32's shape with random weights."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from open_clip.tokenizer import SimpleTokenizer

    vision = CLIPVisionCfg(layers=1, width=64, head_width=64)
    with torch.random.fork_rng():
        model = CLIP(DIM, vision, CLIPTextCfg()).eval().requires_grad_(False)
    return ClipPromptTower(model, SimpleTokenizer(), CPU)


def held_out(problem: Problem, logits: Tensor) -> float:
    """Top-1 or mAP of the rows that decide, 0..1."""
    targets = problem.material.val_part.targets
    if targets.ndim == 1:
        return float((logits.argmax(1).numpy() == targets).mean())
    return float(average_precision(logits.float().numpy(), targets).mean())


def scaled(features: Tensor) -> Tensor:
    """Rows of norm √D, as the routers of both sides read them."""
    return F.normalize(features, dim=-1) * features.shape[-1] ** 0.5
