"""Caches whose rows a new cache takes over, and how it finds them."""

import threading
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import CacheCorruptError
from featcache.growing.row_keys import Index, Keys, RowKeys
from featcache.layout.cache_plan import Shard, ShardKind
from featcache.layout.chunks import ArrayFiles
from featcache.layout.mapping import map_chunks
from featcache.reader import Cache
from featcache.store import Store

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Donor:
    """A cache, complete or not, whose finished rows can be copied.

    Attributes:
        store: the cache.
        done: (N,) rows of finished shards.
        valid: (N,) rows that hold features.
        content: (N,) uint64 XXH3-64 of each image file; 0 = unreadable or not done.
        stamp: (N,) uint64 version mark of each image file; 0 = unknown.
    """

    def __init__(self, store: Store) -> None:
        """Reads the small per-row arrays; `keys` are made when they are first asked for."""
        self.store = store
        cache = Cache(store)
        self.done: BoolArray = cache.done
        self.valid: BoolArray = cache.valid & self.done
        self.content: Keys = np.where(self.valid, cache.array("rows/content").read(), 0)
        self.stamp: Keys = np.zeros(cache.num_rows, np.uint64)
        if cache.has("rows/stamp"):  # caches of before it was kept have their files read once more
            self.stamp = np.where(self.done, cache.array("rows/stamp").read(), 0)
        self.captions_done: BoolArray = np.zeros(store.attributes["num_captions"], np.bool_)
        reports = store.reports("text")
        for shard in store.shards("text"):
            self.captions_done[shard.start : shard.stop] = shard.index in reports
        self._intact: dict[tuple[str, int], bool] = {}

    @cached_property
    def keys(self) -> RowKeys:
        """Hashes of its rows."""
        return RowKeys.of_store(self.store)

    @cached_property
    def index(self) -> Index:
        """Its rows by id."""
        return Index(self.keys.ids)

    @cached_property
    def reasons(self) -> dict[int, str]:
        """Why the rows that are done and not valid cannot be read."""
        return {
            item["row"]: item.get("reason", "unreadable")
            for report in self.store.reports("image").values()
            for item in report.get("invalid", ())
        }

    def forget_keys(self) -> None:
        """Frees the hashes, which only comparing needs; they are made again if asked for."""
        self.__dict__.pop("keys", None)
        self.__dict__.pop("index", None)

    def take(self, name: str, rows: IntArray) -> npt.NDArray[Any]:
        """(n, ...) rows of an array, in any order, straight from the chunk files."""
        files = self.store.files(name)
        out = np.empty((len(rows), *files.shape[1:]), files.dtype)
        chunks = rows // files.chunk_rows
        wanted = np.unique(chunks).tolist()
        files.fetch(wanted, verify=False)
        for chunk in wanted:
            here = np.flatnonzero(chunks == chunk)
            block = map_chunks(files, range(chunk, chunk + 1))
            out[here] = block[rows[here] - chunk * files.chunk_rows]
        return out

    def intact(self, kind: ShardKind, rows: IntArray) -> BoolArray:
        """(n,) whether the chunk files that hold the rows' features are there and undamaged.

        Each file's checksum is verified once.
        """
        result = np.ones(len(rows), np.bool_)
        if not len(rows):
            return result
        for name in self.store.attributes["arrays"][kind]:
            files = self.store.files(name)
            chunks = rows // files.chunk_rows
            wanted = np.unique(chunks).tolist()
            if files.remote is not None:
                with suppress(CacheCorruptError):  # which one it is, is found below
                    files.fetch([chunk for chunk in wanted if (name, chunk) not in self._intact])
            for chunk in wanted:
                key = name, chunk
                if key not in self._intact:
                    problem = _problem(files, chunk)
                    self._intact[key] = problem is None
                    if problem is not None:
                        print(f"{problem}; its rows are encoded again", flush=True)
                if not self._intact[key]:
                    result[chunks == chunk] = False
        return result


class Written(Donor):
    """The cache under way as a donor of its own: later shards repeat rows of earlier ones.

    It knows nothing at first, and reads each shard once, when a row of it is wanted.
    """

    def __init__(self, store: Store) -> None:
        """Reads nothing."""
        self.store = store
        num_rows = store.attributes["num_rows"]
        self.done: BoolArray = np.zeros(num_rows, np.bool_)
        self.valid: BoolArray = np.zeros(num_rows, np.bool_)
        self.content: Keys = np.zeros(num_rows, np.uint64)
        self.stamp: Keys = np.zeros(num_rows, np.uint64)
        self.captions_done: BoolArray = np.zeros(store.attributes["num_captions"], np.bool_)
        self._intact: dict[tuple[str, int], bool] = {}
        self._lock = threading.RLock()  # shards may be written by several threads

    def learn(self, kind: ShardKind, rows: IntArray) -> None:
        """Looks which of the shards that hold `rows` are done by now.

        Raises:
            CacheCorruptError: naming a file of a done shard that is missing.
        """
        with self._lock:
            known = self.done if kind == "image" else self.captions_done
            wanted = np.unique(rows[~known[rows]])
            ranges = np.asarray(self.store.attributes["shards"][kind], np.int64).reshape(-1, 2)
            for index in np.unique(np.searchsorted(ranges[:, 1], wanted, "right")).tolist():
                if not any(self.store.each_report(kind, only=index)):
                    continue
                start, stop = ranges[index].tolist()
                if kind == "image":
                    here = np.arange(start, stop)
                    self.valid[start:stop] = self.take("rows/valid", here)
                    content = self.take("rows/content", here)
                    self.content[start:stop] = np.where(self.valid[start:stop], content, 0)
                known[start:stop] = True

    def forget(self, shard: Shard) -> None:
        """Forgets a shard that is about to be written again."""
        rows = slice(shard.start, shard.stop)
        with self._lock:
            if shard.kind == "image":
                self.done[rows] = self.valid[rows] = False
                self.content[rows] = 0
            else:
                self.captions_done[rows] = False
            for name in self.store.attributes["arrays"][shard.kind]:
                for chunk in self.store.files(name).chunks_of(shard.start, shard.stop):
                    self._intact.pop((name, chunk), None)


def _problem(files: ArrayFiles, chunk: int) -> str | None:
    """What is wrong with a chunk file; one in a store is fetched."""
    try:
        files.fetch([chunk])
    except CacheCorruptError as error:
        return str(error)
    return files.problem(chunk)
