"""A few training rows a class: seeded, and independent of row order.

Rows are ranked by a hash over seed and id, as in `splitting`, so the same images are drawn when the
dataset is read in another order.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

IntArray = npt.NDArray[np.int64]


def ranks(ids: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    """(N,) pseudo-random rank of each row, a function of its id and the seed alone."""
    prefix = f"{seed}:"
    return np.fromiter(
        (xxhash.xxh3_64_intdigest((prefix + text).encode()) for text in ids), np.uint64, len(ids)
    )


def few_shot_rows(
    ids: Sequence[str], offsets: IntArray, values: npt.NDArray[np.int32], shots: int, seed: int
) -> IntArray:
    """Ascending rows that show every class `shots` times, or as often as there are rows with it.

    With at most one label a row these are exactly `shots` rows a class, and those for fewer shots
    are among those for more. With several labels a row brings its frequent classes along, so they
    are seen more often: classes are served from the rarest to the most frequent, each taking the
    next rows that have it until it has enough, and rows that all their classes can spare are given
    back. Rows without a label are not kept.

    Args:
        ids: N unique row ids.
        offsets: (N+1,) start of each row's labels in `values`.
        values: class indices, one row's after the other.
        shots: wanted rows a class, at least 1.
        seed: seed of the ranking.
    """
    num_labels = np.diff(offsets)
    rank = ranks(ids, seed)
    rows = np.repeat(np.arange(len(ids)), num_labels)
    order = np.lexsort((rank[rows], values))  # by class, inside a class by rank
    rows, classes = rows[order], values[order]
    starts = np.flatnonzero(np.concatenate([[True], classes[1:] != classes[:-1]]))
    counts = np.diff(np.concatenate([starts, [len(classes)]]))
    if num_labels.max(initial=0) <= 1:
        within = np.arange(len(rows)) - np.repeat(starts, counts)
        return np.sort(rows[within < shots]).astype(np.int64)
    return _serve(
        {int(classes[s]): rows[s : s + n] for s, n in zip(starts, counts, strict=True)},
        [values[offsets[row] : offsets[row + 1]] for row in range(len(ids))],
        shots,
    )


def _serve(
    members: dict[int, IntArray], labels: Sequence[npt.NDArray[np.int32]], shots: int
) -> IntArray:
    """See `few_shot_rows`.

    Args:
        members: rows of each class, by rank.
        labels: each row's classes.
        shots: wanted rows a class.
    """
    have = dict.fromkeys(members, 0)
    chosen: dict[int, None] = {}  # keeps the order of choice
    for name in sorted(members, key=lambda name: (len(members[name]), name)):
        for row in members[name].tolist():
            if have[name] >= shots:
                break
            if row not in chosen:
                chosen[row] = None
                for label in labels[row].tolist():
                    have[label] += 1
    for row in list(chosen):  # later rows may have made earlier ones needless
        if all(have[label] > shots for label in labels[row].tolist()):
            del chosen[row]
            for label in labels[row].tolist():
                have[label] -= 1
    return np.sort(np.fromiter(chosen, np.int64, len(chosen)))
