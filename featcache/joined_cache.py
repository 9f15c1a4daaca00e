"""Several caches of one dataset read as one: rows joined by id, features side by side."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd

from featcache.batches import Rows
from featcache.caption_means import unit_rows
from featcache.errors import CacheError, ConfigError
from featcache.identity import fingerprint
from featcache.layout.feature_array import ComputedArray, FeatureArray, checked_rows
from featcache.reader import Cache

VECTORS = ("image/projected", "image/pooled", "image/multimodal_pooled")
"""Arrays that can stand side by side: one vector a row."""

_BLOCK_BYTES = 32 << 20
"""Bytes of a member's rows that are normalised at a time."""


class JoinedArray(ComputedArray):
    """Rows of one array of each member, joined by row numbers; see `FeatureArray`.

    Attributes:
        name: name that the joined cache knows it by.
        shape: (N, [V,] sum of the members' widths), or the one member's.
        dtype: float32, or the one member's.
        num_views: V if all members have the same augmented views, otherwise 1: the plain view.
        members: the arrays that are read.
        view, blocks: None; what lies in the files is not what is read.
    """

    def __init__(
        self,
        name: str,
        members: Sequence[tuple[FeatureArray, Rows]],
        same_views: bool = False,
    ) -> None:
        """Nothing is read yet.

        Args:
            name: name in the joined cache.
            members: an array, and (N,) its row of each joined row; one alone is read as it is,
                several have their rows brought to length 1 first.
            same_views: whether view v of a row shows the same pixels in all members.
        """
        self.members = [array for array, _ in members]
        self._rows = [rows for _, rows in members]
        first = self.members[0]
        keep = same_views or len(members) == 1
        self.name = name
        self.num_views = first.num_views if keep else 1
        self.view, self.blocks = None, None
        views = (self.num_views,) if self.num_views > 1 else ()
        if len(members) == 1:
            tail, self.dtype = first.shape[1 + len(views) :], first.dtype
        else:
            tail, self.dtype = (sum(one.shape[-1] for one in self.members),), np.dtype("float32")
        self.shape = (len(self._rows[0]), *views, *tail)

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk file of the first member."""
        return self.members[0].chunk_rows

    def take(
        self, rows: Rows, out: npt.NDArray[Any] | None = None, view: int | None = None
    ) -> npt.NDArray[Any]:
        """A copy of rows in any order; see `FeatureArray.read`."""
        rows = checked_rows(rows, len(self), self.name)
        one_view = view is not None and self.num_views > 1
        out = self._output(out, (len(rows), *self.shape[2 if one_view else 1 :]))
        # Where members have views that do not match, only the plain one is joined.
        wanted = view if self.num_views > 1 else 0
        if len(self.members) == 1:
            return self.members[0].take(self._rows[0][rows], out, wanted)
        step = max(1, _BLOCK_BYTES // max(1, self.row_bytes))
        first = 0
        for array, numbers in zip(self.members, self._rows, strict=True):
            last = first + array.shape[-1]
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                out[part, ..., first:last] = unit_rows(array.take(numbers[rows[part]], view=wanted))
            first = last
        return out


class JoinedCache(Cache):
    """Rows that all members hold, with the first one's order, splits, labels and classes.

    `image/projected` and `image/pooled` are the members' arrays side by side, each row of each
    member brought to length 1; `<alias>:image/...` is one member's array as it is stored. A row is
    valid if it is in all members.

    Attributes:
        members: the caches by alias; the first one leads.
        member_rows: by alias, (N,) the member's row of each joined row.
        left_out: by alias, rows of the member that are not in all others.
    """

    def __init__(
        self, members: Mapping[str, Cache], member_rows: Mapping[str, Rows], verify: bool = True
    ) -> None:
        """See `featcache.join.open_joined`."""
        lead = next(iter(members.values()))
        super().__init__(lead.store, verify)
        self.members, self.member_rows = dict(members), dict(member_rows)
        self.lead, self._kept = lead, next(iter(member_rows.values()))
        self.num_rows = len(self._kept)
        self.left_out = {name: one.num_rows - self.num_rows for name, one in members.items()}
        self.fingerprint = fingerprint([one.fingerprint for one in members.values()])
        self.history = []
        self.attributes = {**lead.attributes, "num_rows": self.num_rows, "splits": self._ranges()}

    @property
    def parts(self) -> list[Cache]:
        """The members, in the order of their features."""
        return list(self.members.values())

    def describe(self) -> str:
        """What was joined, and how many rows were left out, in a line."""
        lost = ", ".join(f"{num:,} of {name}" for name, num in self.left_out.items() if num)
        out = f"; left out, not in all of them: {lost}" if lost else ""
        return f"joined by id: {' + '.join(self.members)}, {self.num_rows:,} common rows{out}"

    def records(self) -> list[dict[str, Any]]:
        """Alias, path, fingerprint, identity and backbone of each member, as plain JSON values."""
        return [
            {
                "alias": alias,
                "path": str(one.path),
                "fingerprint": one.fingerprint,
                "identity": one.identity.record(),
                "backbone": one.attributes["backbone"],
            }
            for alias, one in self.members.items()
        ]

    def has(self, name: str) -> bool:
        """Whether an array can be read: of one member by alias, or of all members side by side."""
        alias, _, own = name.rpartition(":")
        if alias:
            return alias in self.members and self.members[alias].has(own)
        return name in VECTORS and all(one.has(name) for one in self.parts)

    def feature_names(self, prefix: str = "") -> list[str]:
        """Names that start with `prefix`: joined arrays first, then `<alias>:image/...`."""
        names = [name for name in VECTORS if self.has(name)]
        names += [
            f"{alias}:{name}"
            for alias, one in self.members.items()
            for name in one.feature_names("image/")
        ]
        return [name for name in names if name.rpartition(":")[2].startswith(prefix)]

    def array(self, name: str) -> FeatureArray:
        """A joined or a member's array; see the class.

        Raises:
            CacheError: if it is not there, with those that are.
            CacheCorruptError: naming the first damaged file.
        """
        if not self.has(name):
            raise CacheError(
                f"{' + '.join(self.members)}: no array {name!r} in the join; it holds "
                f"{', '.join(self.feature_names())}"
            )
        if name not in self._features:
            alias, _, own = name.rpartition(":")
            chosen = [alias] if alias else list(self.members)
            arrays = [(self.members[key].array(own), self.member_rows[key]) for key in chosen]
            features = [self.members[key].identity.features for key in chosen]
            views = {(f.num_views, f.view_seed, f.view_scale) for f in features}
            self._features[name] = JoinedArray(name, arrays, same_views=len(views) == 1)
        return self._features[name]

    @cached_property
    def ids(self) -> list[str]:
        """The N row ids, in row order."""
        ids = self.lead.ids
        return [ids[row] for row in self._kept.tolist()]

    @cached_property
    def paths(self) -> list[str]:
        """The N image paths of the first member, in row order."""
        paths = self.lead.paths
        return [paths[row] for row in self._kept.tolist()]

    @cached_property
    def captions(self) -> tuple[npt.NDArray[np.int64], list[str]]:
        """(N+1,) offsets and captions of the first member; see `Cache.captions`."""
        offsets, texts = self.lead.captions
        new, places = ragged(offsets, np.arange(len(texts)), self._kept)
        return new, [texts[index] for index in places.tolist()]

    @cached_property
    def caption_offsets(self) -> npt.NDArray[np.int64]:
        """(N+1,) offsets of the first member's captions; see `Cache.captions`."""
        counts = self.lead.caption_counts[self._kept]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def caption_counts(self) -> npt.NDArray[np.int64]:
        """(N,) captions of each row in the member that has fewest of it."""
        counts = [
            one.caption_counts[self.member_rows[alias]] for alias, one in self.members.items()
        ]
        return np.asarray(np.minimum.reduce(counts), np.int64)

    def caption_means(self) -> FeatureArray:
        """(N, sum of P) the members' means side by side, each of length 1; see `Cache`.

        Raises:
            CacheError: if a member has no caption features.
        """
        means = [
            (one.caption_means(), self.member_rows[alias]) for alias, one in self.members.items()
        ]
        return JoinedArray("text/projected", means)

    @cached_property
    def label_lists(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        """(N+1,) offsets and all class indices; see `Cache.label_lists`."""
        return ragged(*self.lead.label_lists, self._kept)

    @cached_property
    def classes(self) -> pd.DataFrame:
        """The first member's class table; `count` covers its own training rows."""
        return self.lead.classes

    @cached_property
    def valid(self) -> npt.NDArray[np.bool_]:
        """(N,) rows that all members hold features of."""
        both = [one.valid[self.member_rows[alias]] for alias, one in self.members.items()]
        return np.asarray(np.logical_and.reduce(both), np.bool_)

    @cached_property
    def done(self) -> npt.NDArray[np.bool_]:
        """(N,) all true: only complete caches are joined."""
        return np.ones(self.num_rows, np.bool_)

    def dataset(self, name: str, split: str) -> NoReturn:
        """Refused: a worker process would have to open all members again."""
        self._refuse("a torch Dataset")

    def dask(self, name: str) -> NoReturn:
        """Refused; see `dataset`."""
        self._refuse("a dask array")

    def to_numpy(self, folder: object) -> NoReturn:
        """Refused: each member can be exported by itself."""
        self._refuse("an export")

    def to_parquet(self, file: object) -> NoReturn:
        """Refused; see `to_numpy`."""
        self._refuse("an export")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{' + '.join(self.members)}: joined caches have no {what}; use batches() or "
            "array(...).read(), or each cache by itself"
        )

    def _ranges(self) -> dict[str, list[int]]:
        """Row range of each split that has rows; the kept rows ascend, so splits stay ranges."""
        ranges = {}
        for name, bounds in self.lead.attributes["splits"].items():
            start, stop = (int(np.searchsorted(self._kept, bound)) for bound in bounds)
            if stop > start:
                ranges[name] = [start, stop]
        return ranges


def ragged(
    offsets: npt.NDArray[np.int64], values: npt.NDArray[Any], rows: Rows
) -> tuple[npt.NDArray[np.int64], npt.NDArray[Any]]:
    """Offsets and values of some rows of a ragged array."""
    counts = offsets[rows + 1] - offsets[rows]
    new = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    index = np.arange(new[-1]) + np.repeat(offsets[rows] - new[:-1], counts)
    return new, values[index]
