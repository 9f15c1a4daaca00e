"""Rows as numbers: hashes of ids, paths, labels and captions that two datasets are compared by.

Eight bytes a row and column instead of Python strings, so that millions of rows fit. Hashes are
XXH3-64; two rows count as the same only if id, path and version mark all agree, or the content.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from featcache.layout.tables import read_strings
from featcache.manifest import Manifest
from featcache.store import Store

Keys = npt.NDArray[np.uint64]

_MIX = np.uint64(0x9E3779B97F4A7C15)
"""Odd, of evenly spread bits: the golden ratio's fraction, as in splitmix64."""


@dataclass(frozen=True)
class RowKeys:
    """Hashes of N rows, in row order.

    Attributes:
        ids, paths: (N,) uint64 of the strings.
        splits: (N,) uint64 of the split's name.
        labels: (N,) uint64 over the set of class names, not their numbers; 0 = none.
        captions: (N,) uint64 over all captions in order; 0 = none.
        first_captions: (N,) uint64 of the first caption; 0 = none.
        texts: (M,) uint64 of every caption.
        checks: (M,) uint64, another hash of every caption.
        class_names: C names in index order.
    """

    ids: Keys
    paths: Keys
    splits: Keys
    labels: Keys
    captions: Keys
    first_captions: Keys
    texts: Keys
    checks: Keys
    class_names: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> "RowKeys":
        """Of a dataset as it is now, a block of rows at a time."""
        names = [str(name) for name in manifest.classes["name"]]
        class_keys = _hashes(names)
        columns: dict[str, list[Keys]] = {name: [] for name in _COLUMNS}
        for block in manifest.blocks():
            texts = pc.list_flatten(block.rows.column("captions"))
            keys, checks = _column_hashes(texts), _column_hashes(texts, seed=1)
            offsets = block.caption_offsets
            found = {
                "ids": _column_hashes(block.rows.column("id")),
                "paths": _column_hashes(block.rows.column("path")),
                "splits": _column_hashes(block.rows.column("split")),
                "labels": _sums(_spread(class_keys[block.label_values]), block.label_offsets),
                "captions": _ordered(keys, offsets),
                "first_captions": _firsts(keys, offsets),
                "texts": keys,
                "checks": checks,
            }
            for name, values in found.items():
                columns[name].append(values)
        return cls(**{n: _joined(parts) for n, parts in columns.items()}, class_names=names)

    @classmethod
    def of_store(cls, store: Store) -> "RowKeys":
        """Of a cache, from its tables.

        Raises:
            CacheCorruptError: naming a damaged file.
        """
        names = [text for part in read_strings(store.files("classes/name")) for text in part]
        splits = np.zeros(int(store.attributes["num_rows"]), np.uint64)
        for name, (start, stop) in store.attributes["splits"].items():
            splits[start:stop] = xxhash.xxh3_64_intdigest(name.encode())
        label_offsets = store.read("rows/label_offsets")
        labels = _spread(_hashes(names)[store.read("rows/label_values")])
        texts, checks = _table_hashes(store, "rows/caption_values", 0, 1)
        offsets = store.read("text/offsets")
        return cls(
            ids=_table_hashes(store, "rows/id", 0)[0],
            paths=_table_hashes(store, "rows/path", 0)[0],
            splits=splits,
            labels=_sums(labels, label_offsets),
            captions=_ordered(texts, offsets),
            first_captions=_firsts(texts, offsets),
            texts=texts,
            checks=checks,
            class_names=names,
        )


_COLUMNS = tuple(name for name in RowKeys.__annotations__ if name != "class_names")


class Index:
    """Where a key occurs in an array of keys, for many keys at once.

    Of equal keys the first one is found.
    """

    def __init__(self, keys: Keys, positions: npt.NDArray[np.int64] | None = None) -> None:
        """`keys` (n,), found as `positions` (n,), or as 0..n-1."""
        order = np.argsort(keys, kind="stable")
        self._keys = keys[order]
        self._positions = order if positions is None else positions[order]

    def find(self, wanted: Keys) -> npt.NDArray[np.int64]:
        """(n,) position of each key; -1 = not there."""
        if not len(self._keys):
            return np.full(len(wanted), -1, np.int64)
        place = np.searchsorted(self._keys, wanted)
        place[place == len(self._keys)] = 0
        return np.where(self._keys[place] == wanted, self._positions[place], -1)


def mixed(first: Keys, second: Keys) -> Keys:
    """(n,) one key for each pair of keys."""
    result: Keys = _spread(first + _MIX * second)
    return result


def _table_hashes(store: Store, name: str, *seeds: int) -> list[Keys]:
    """(n,) XXH3-64 of the strings of a table, for each seed."""
    found: list[list[Keys]] = [[np.zeros(0, np.uint64)] for _ in seeds]
    for part in read_strings(store.files(name)):
        column = pa.array(part, pa.large_string())
        for keys, seed in zip(found, seeds, strict=True):
            keys.append(_column_hashes(column, seed))
    return [np.concatenate(keys) for keys in found]


def _hashes(names: list[str]) -> Keys:
    return np.fromiter(
        (xxhash.xxh3_64_intdigest(name.encode()) for name in names), np.uint64, len(names)
    )


def _column_hashes(column: pa.Array | pa.ChunkedArray, seed: int = 0) -> Keys:
    """(n,) XXH3-64 of the strings of an Arrow column, without making Python strings of them."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    found = [np.zeros(0, np.uint64)]
    for chunk in chunks:
        if not len(chunk):
            continue
        chunk = chunk.cast(pa.large_string())  # its rows begin elsewhere if that made a copy
        _, starts, data = chunk.buffers()
        offsets = np.frombuffer(starts, np.int64)[chunk.offset :][: len(chunk) + 1].tolist()
        view = memoryview(data or b"")
        digest = xxhash.xxh3_64_intdigest
        keys = (digest(view[a:b], seed) for a, b in pairwise(offsets))
        found.append(np.fromiter(keys, np.uint64, len(chunk)))
    return np.concatenate(found)


def _spread(keys: Keys) -> Keys:
    """Every bit of a key into every bit of the result: splitmix64's last steps."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(keys ^ (keys >> np.uint64(31)), np.uint64)


def _sums(values: Keys, offsets: npt.NDArray[np.int64]) -> Keys:
    """(n,) sums over each row's values: the same for any order; 0 for a row without."""
    totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
    return np.asarray(totals[offsets[1:]] - totals[offsets[:-1]], np.uint64)


def _ordered(keys: Keys, offsets: npt.NDArray[np.int64]) -> Keys:
    """(n,) a key over each row's keys in their order; 0 for a row without."""
    within = np.arange(len(keys)) - np.repeat(offsets[:-1], np.diff(offsets))
    return _sums(mixed(keys, (within + 1).astype(np.uint64)), offsets)


def _firsts(keys: Keys, offsets: npt.NDArray[np.int64]) -> Keys:
    """(n,) each row's first key; 0 for a row without."""
    found = np.zeros(len(offsets) - 1, np.uint64)
    some = offsets[1:] > offsets[:-1]
    found[some] = keys[offsets[:-1][some]]
    return found


def _joined(parts: list[Keys]) -> Keys:
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)
