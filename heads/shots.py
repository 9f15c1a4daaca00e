"""Few-shot rows of a cache: K training rows a class, and few to decide by."""

from dataclasses import replace

import numpy as np

from featcache.datasets.shots import few_shot_rows
from featcache.reader import Cache
from heads.parts import Part, Parts


def few_shot_parts(cache: Cache, parts: Parts, *, shots: int, val_shots: int, seed: int) -> Parts:
    """`parts` with `shots` training rows and min(`shots`, `val_shots`) validation rows a class.

    Rows are drawn by a hash of their id, as `--dataset.shots` draws them: those for fewer shots are
    among those for more. A class with fewer rows gives all it has. Validation rows come out of the
    validation rows there were, and test rows stay.

    Args:
        cache: that the parts are of.
        parts: as chosen without shots.
        shots: training rows a class, 1 or more.
        val_shots: most validation rows a class, 1 or more.
        seed: of the draw.
    """
    val_name = f"{parts.val.name}, {min(shots, val_shots)} a class"
    return replace(
        parts,
        train=_drawn(cache, parts.train, shots, seed, parts.train.name),
        val=_drawn(cache, parts.val, min(shots, val_shots), seed, val_name),
    )


def _drawn(cache: Cache, part: Part, shots: int, seed: int, name: str) -> Part:
    if part.targets.ndim == 1:
        labels = np.ones(len(part), np.int64)
        values = part.targets.astype(np.int32)
    else:
        labels = part.targets.sum(1, dtype=np.int64)
        values = part.targets.nonzero()[1].astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(labels)])
    ids = cache.ids
    kept = few_shot_rows([ids[int(row)] for row in part.rows], offsets, values, shots, seed)
    mask = np.zeros(len(part), bool)
    mask[kept] = True
    return part.subset(mask, name)
