"""How a dataset differs from the rows that a cache holds: counts that people read."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from featcache.growing.donors import Donor
from featcache.growing.row_keys import Index, Keys, RowKeys


@dataclass(frozen=True)
class Changes:
    """What became of a cache's rows.

    Attributes:
        gained: rows of an id, and of an image, that the cache does not hold.
        lost: rows of the cache whose id and image the dataset does not hold any more.
        moved: the same image at another path, in another split or under another id.
        relabelled: rows of the same id with other classes, by name.
        recaptioned: rows of the same id with other captions.
        changed: rows of the same id with another image.
        new_classes, removed_classes: names.
    """

    gained: int
    lost: int
    moved: int
    relabelled: int
    recaptioned: int
    changed: int
    new_classes: list[str]
    removed_classes: list[str]

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return describe(self.record())


def describe(record: Mapping[str, Any]) -> str:
    """Changes as a line, e.g. `200 gained, 3 lost`."""
    parts = [
        f"{record[name]} {name}"
        for name in ("gained", "lost", "moved", "relabelled", "recaptioned", "changed")
        if record.get(name)
    ]
    for name in ("new_classes", "removed_classes"):
        number = len(record.get(name, ()))
        if number:
            kind = name.removesuffix("_classes")
            parts.append(f"{number} {kind} class" if number == 1 else f"{number} {kind} classes")
    return ", ".join(parts) or "no image, label or caption differs"


def since(history: Sequence[Mapping[str, Any]], fingerprint: str) -> str | None:
    """What became of a cache after an earlier state of it; None if it never was in that state.

    Args:
        history: the cache's attribute of that name.
        fingerprint: of the earlier state.
    """
    states = [entry["fingerprint"] for entry in history]
    if fingerprint not in states:
        return None
    first = len(states) - 1 - states[::-1].index(fingerprint)
    steps = [describe(entry["changed"]) for entry in history[first:]]
    return f"it had {history[first]['num_rows']} rows then; since: {'; then '.join(steps)}"


def compare(old: Donor, keys: RowKeys, content: Keys) -> Changes:
    """Counts the differences.

    Args:
        old: the cache.
        keys: the dataset's rows now.
        content: (N,) hash of each file now; 0 where it cannot be read.
    """
    place = old.index.find(keys.ids)
    here = np.flatnonzero(place >= 0)
    there = place[here]
    gone = np.ones(len(old.keys), np.bool_)
    gone[there] = False
    before, after = old.content[there], content[here]
    changed = (before != after) & (before != 0) & (after != 0)
    moved = (old.keys.paths[there] != keys.paths[here]) | (
        old.keys.splits[there] != keys.splits[here]
    )
    renamed = _shared(old.content[gone], content[place < 0])
    return Changes(
        gained=int((place < 0).sum()) - renamed,
        lost=int(gone.sum()) - renamed,
        moved=int(moved.sum()) + renamed,
        relabelled=int((old.keys.labels[there] != keys.labels[here]).sum()),
        recaptioned=int((old.keys.captions[there] != keys.captions[here]).sum()),
        changed=int(changed.sum()),
        new_classes=sorted(set(keys.class_names) - set(old.keys.class_names)),
        removed_classes=sorted(set(old.keys.class_names) - set(keys.class_names)),
    )


def num_lost_images(old: Donor, content: Keys) -> tuple[int, int]:
    """Valid images of a cache that a dataset has no longer, and all its valid images.

    Args:
        old: the cache.
        content: (N,) hash of each file now; 0 where it cannot be read.
    """
    held = old.content[old.valid]
    missing = Index(content[content != 0]).find(held) < 0
    return int(missing.sum()), len(held)


def _shared(first: Keys, second: Keys) -> int:
    """Images that lie on both sides, each as often as on the side with fewer."""
    keys_a, counts_a = np.unique(first[first != 0], return_counts=True)
    keys_b, counts_b = np.unique(second[second != 0], return_counts=True)
    _, at_a, at_b = np.intersect1d(keys_a, keys_b, assume_unique=True, return_indices=True)
    return int(np.minimum(counts_a[at_a], counts_b[at_b]).sum())
