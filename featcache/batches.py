"""Which rows go into which batch: plain arithmetic on row numbers, without any array."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

RAM_BUDGET_BYTES = 8 << 30
"""Features that may be visited in any order at once. A fixed number, not a share of this machine's
memory, so that the order of rows depends on the seed alone."""


def plan_batches(
    rows: Rows,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    epoch: int = 0,
    chunk_rows: int = 1,
    window_rows: int | None = None,
) -> Iterator[Rows]:
    """Batches of row numbers, every row exactly once; all but the last are full.

    Args:
        rows: (n,) row numbers.
        batch_size: rows of a batch.
        shuffle: False = in the order of `rows`.
        seed: together with `epoch` decides the order.
        epoch: pass over the rows.
        chunk_rows: rows of a chunk file.
        window_rows: None = every order of `rows` is equally likely. Otherwise whole chunks are
            drawn in random order until they hold this many rows, and only those are mixed, so that
            no more than that has to be in memory at a time.
    """
    if not shuffle:
        yield from _cut(rows, batch_size)
        return
    random = np.random.default_rng([seed, epoch])
    if window_rows is None or window_rows >= len(rows):
        yield from _cut(random.permutation(rows), batch_size)
        return
    left = rows[:0]
    for window in _windows(rows, chunk_rows, window_rows, random):
        pool = np.concatenate([left, random.permutation(window)])
        full = len(pool) // batch_size * batch_size
        yield from _cut(pool[:full], batch_size)
        left = pool[full:]
    yield from _cut(left, batch_size)


def _cut(rows: Rows, batch_size: int) -> Iterator[Rows]:
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def _windows(
    rows: Rows, chunk_rows: int, window_rows: int, random: np.random.Generator
) -> Iterator[Rows]:
    """Rows of randomly drawn chunks, at least one chunk at a time."""
    order = np.argsort(rows // chunk_rows, kind="stable")
    numbers, starts = np.unique(rows[order] // chunk_rows, return_index=True)
    groups = np.split(rows[order], starts[1:])
    chosen: list[Rows] = []
    for number in random.permutation(len(numbers)):
        group = groups[number]
        if chosen and sum(map(len, chosen)) + len(group) > window_rows:
            yield np.concatenate(chosen)
            chosen = []
        chosen.append(group)
    if chosen:
        yield np.concatenate(chosen)
