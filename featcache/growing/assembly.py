"""Shards put together from rows that other caches hold, and from newly encoded ones.

Whole chunk files whose rows did not move are linked. All other known rows are copied; the rest is
encoded in dense batches, whatever lies between them. What a shard becomes depends on the donors and
on nothing else, so an update that was killed ends with the same bytes as one that was not.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.backbones.base import Backbone
from featcache.errors import CacheError
from featcache.extract_config import ExtractConfig
from featcache.extraction import Extraction, invalid_rows
from featcache.growing.donors import BoolArray, Donor, IntArray, Written
from featcache.growing.row_keys import Keys
from featcache.growing.survey import ENCODE, FOLLOW, Reuse, Survey
from featcache.image_bytes import read_bytes
from featcache.layout.cache_plan import human_bytes
from featcache.layout.chunks import PARTIAL, make_folder
from featcache.manifest import Manifest
from featcache.mirror import PARALLEL
from featcache.pipeline import ShardWriter, Timings
from featcache.row_block import RowBlock
from featcache.storage import locate
from featcache.store import Shard, ShardKind, Store

_BLOCK_BYTES = 32 << 20
"""Copied at a time."""


class Assembly(Extraction):
    """An extraction that takes over what its donors hold; see `Extraction`.

    Attributes:
        donors: caches to copy from.
        survey: where each row and caption comes from.
    """

    def __init__(
        self,
        config: ExtractConfig,
        manifest: Manifest,
        backbone: Backbone,
        store: Store,
        batch_size: int,
        resources: Any,
        donors: Sequence[Donor],
        survey: Survey,
    ) -> None:
        super().__init__(config, manifest, backbone, store, batch_size, resources)
        self.donors = donors
        self.survey = survey
        self._written = Written(store)

    @property
    def _num_copied(self) -> int:
        return len(self.manifest) - self.survey.images.num_new

    def _totals(self, kind: ShardKind) -> tuple[int, int]:
        donor = self._reuse(kind).donor
        pending = [donor[s.start : s.stop] for s in self._pending if s.kind == kind]
        return max(1, sum(int((part == ENCODE).sum()) for part in pending)), 0

    def _reuse(self, kind: ShardKind) -> Reuse:
        return self.survey.images if kind == "image" else self.survey.texts

    def _extract_images(self, shard: Shard) -> tuple[Timings, list[dict[str, Any]]]:
        timings = Timings()
        block = self.manifest.block(shard.start, shard.stop)
        content = self.survey.content[shard.start : shard.stop].copy()
        self._written.forget(shard)
        parts = _Parts(self.store, shard, self._reuse("image"), self.donors, self._written, content)
        valid, reasons = parts.known_readable()
        new = RowBlock(0, block.rows.take(parts.new))
        with ShardWriter(self.store, shard) as writer:
            parts.link()
            for batch in self._reader().batches(new) if len(new) else ():
                places = parts.new[batch.start : batch.stop]
                broken = {int(parts.new[row]): why for row, why in batch.reasons.items()}
                for place in np.flatnonzero(content[places] != batch.content).tolist():
                    self._require_unchanged(block, int(places[place]), parts, broken)
                for place, reason in broken.items():
                    for row in (place, *parts.followers(place)):
                        reasons[row], valid[row] = reason, False
                content[places] = batch.content
                timings.write_seconds = writer.seconds
                # Dense batches have no fixed places, so the last one need not be padded.
                stored = self._encode_batch(batch, places + shard.start, timings, padded=False)
                parts.put(writer, places, stored)
            parts.finish(writer)
            marks = {
                "rows/content": np.where(valid, content, 0),
                "rows/stamp": self.survey.stamp[shard.start : shard.stop],
            }
            writer.put(shard.start, {**marks, "rows/valid": valid})
        timings.write_seconds = writer.seconds
        return timings, invalid_rows(block, reasons)

    def _extract_text(self, shard: Shard) -> tuple[Timings, list[dict[str, Any]]]:
        timings = Timings()
        self._written.forget(shard)
        parts = _Parts(self.store, shard, self._reuse("text"), self.donors, self._written)
        captions = self.manifest.captions(shard.start, shard.stop) if len(parts.new) else []
        with ShardWriter(self.store, shard) as writer:
            parts.link()
            for start in range(0, len(parts.new), self.batch_size):
                places = parts.new[start : start + self.batch_size]
                texts = [captions[place] for place in places.tolist()]
                stored = self._encode_texts(texts, places + shard.start, timings)
                parts.put(writer, places, stored)
            parts.finish(writer)
        timings.write_seconds = writer.seconds
        return timings, []

    def _require_unchanged(
        self, block: RowBlock, place: int, parts: "_Parts", broken: Mapping[int, str]
    ) -> None:
        """Checks that a file whose features stand for others' too is still what was compared.

        Raises:
            CacheError: naming it.
        """
        if not len(parts.followers(place)):
            return
        path = block.paths[place]
        if place in broken:  # it has no content then: look whether its bytes are the same
            with contextlib.suppress(ValueError):
                data = read_bytes(self.manifest.root, path)
                if xxhash.xxh3_64_intdigest(data) == self.survey.content[block.start + place]:
                    return
        raise CacheError(
            f"{path}: changed while the cache was updated; what is done is kept, the same command "
            "resumes"
        )


class _Parts:
    """The rows of one shard: which are linked, copied, encoded, and in which order they go out.

    Places count from the shard's first row.
    """

    def __init__(
        self,
        store: Store,
        shard: Shard,
        reuse: Reuse,
        donors: Sequence[Donor],
        written: Written,
        content: Keys | None = None,
    ) -> None:
        """Decides everything; writes nothing.

        Args:
            store: the cache that is written.
            shard: its rows.
            reuse: where all rows come from.
            donors: caches that `reuse` counts.
            written: what earlier shards of `store` hold.
            content: (n,) what the shard's files hold, to check rows of earlier shards by.
        """
        self.store = store
        self.shard = shard
        self.donors = donors
        self.num_rows = shard.stop - shard.start
        self.donor = reuse.donor[shard.start : shard.stop].copy()
        self.source = reuse.source[shard.start : shard.stop].copy()
        arrays = store.attributes["arrays"][shard.kind]
        self.names = [name for name in arrays if not name.startswith("rows/")]
        self._written = written
        self._doubt_earlier(content)
        self._linked = {name: self._linkable(name) for name in self.names}
        self._doubt_damaged()
        self.new = np.flatnonzero(self.donor == ENCODE)
        # Places that later places of this shard repeat, and those that do.
        self._following = np.flatnonzero((self.donor == FOLLOW) & (self.source >= shard.start))
        self._leaders = np.unique(self.source[self._following]) - shard.start
        self._kept: dict[str, npt.NDArray[Any]] = {}
        self._gone_out = 0

    def known_readable(self) -> tuple[BoolArray, dict[int, str]]:
        """(n,) rows that hold features as far as it is known, and why others do not, by place."""
        valid = np.ones(self.num_rows, np.bool_)
        reasons: dict[int, str] = {}
        for number, donor in enumerate(self.donors):
            mine = np.flatnonzero(self.donor == number)
            valid[mine] = donor.valid[self.source[mine]]
            for place in mine[~valid[mine]].tolist():
                reasons[place] = donor.reasons.get(int(self.source[place]), "unreadable")
        return valid, reasons

    def followers(self, place: int) -> list[int]:
        """Places of this shard that repeat `place`."""
        same = self.source[self._following] == place + self.shard.start
        found: list[int] = self._following[same].tolist()
        return found

    def link(self) -> None:
        """Links the chunk files whose rows all sit in one chunk file of a donor."""
        todo = []
        for name, chunks in self._linked.items():
            files = self.store.files(name)
            for chunk, (number, source) in chunks.items():
                donor = self.donors[number].store
                if donor.path != self.store.path:
                    todo.append((donor.path, donor.files(name).key(source), files.key(chunk)))
        target = locate(self.store.path)
        # A store copies by itself, and one copy after the other would wait for its answers.
        with ThreadPoolExecutor(1 if self.store.mirror is None else PARALLEL) as pool:
            for _ in pool.map(lambda one: locate(one[0]).copy(one[1], target, one[2]), todo):
                pass  # raises the first error

    def put(
        self, writer: ShardWriter, places: IntArray, stored: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Takes newly encoded rows, and writes them with everything before the last of them."""
        for name, values in stored.items():
            keep = np.flatnonzero(np.isin(places, self._leaders))
            if len(keep):
                kept = self._keeping(name, values)
                kept[np.searchsorted(self._leaders, places[keep])] = values[keep]
        self._go_out(writer, int(places[-1]) + 1, places, stored)

    def finish(self, writer: ShardWriter) -> None:
        """Writes the rows behind the last new one."""
        self._go_out(writer, self.num_rows, np.zeros(0, np.int64), {})

    def _doubt_earlier(self, content: Keys | None) -> None:
        """Has rows encoded again that were to repeat one of an earlier shard, but cannot.

        That shard may not be done (shards may be extracted in any order), or its file may have
        changed since it was compared.
        """
        follows = np.flatnonzero((self.donor == FOLLOW) & (self.source < self.shard.start))
        if not len(follows):
            return
        self._written.learn(self.shard.kind, self.source[follows])
        if content is None:
            good = self._written.captions_done[self.source[follows]]
        else:
            found = self._written.content[self.source[follows]]
            good = (found == content[follows]) & (found != 0)
        rows = self.source[follows[good]]
        good[good] = self._written.intact(self.shard.kind, rows)
        bad = follows[~good]
        self.donor[bad], self.source[bad] = ENCODE, -1

    def _linkable(self, name: str) -> dict[int, tuple[int, int]]:
        """Chunks that a donor holds as they are: chunk -> (donor, its chunk)."""
        found: dict[int, tuple[int, int]] = {}
        files = self.store.files(name)
        for chunk in files.chunks_of(self.shard.start, self.shard.stop):
            first = chunk * files.chunk_rows
            rows = slice(first - self.shard.start, first - self.shard.start + files.chunk_rows)
            donor, source = self.donor[rows], self.source[rows]
            number, start = int(donor[0]), int(source[0])
            if number < 0 or (donor != number).any():
                continue
            if (source != np.arange(start, start + len(source))).any():
                continue
            old = self.donors[number].store.files(name)
            same = (old.chunk_rows, old.dtype, old.shape[1:], old.checksummed) == (
                files.chunk_rows,
                files.dtype,
                files.shape[1:],
                files.checksummed,
            )
            # The last chunk is filled up: it can only be taken where it ends the same way.
            whole = len(source) == files.chunk_rows or start + len(source) == old.shape[0]
            if not same or not whole or start % old.chunk_rows:
                continue
            if old.remote is not None or old.size_problem(start // old.chunk_rows) is None:
                found[chunk] = number, start // old.chunk_rows
        return found

    def _doubt_damaged(self) -> None:
        """Has rows encoded again whose donor's chunk files are damaged.

        Linked files are not read, so not verified either: they are as they were.
        """
        doubtful = True
        while doubtful:  # a row that is encoded again parts links, and more has to be copied
            linked = np.logical_and.reduce([self._linked_places(name) for name in self.names])
            doubtful = False
            for number, donor in enumerate(self.donors):
                mine = np.flatnonzero((self.donor == number) & ~linked)
                bad = mine[~donor.intact(self.shard.kind, self.source[mine])]
                self.donor[bad], self.source[bad] = ENCODE, -1
                doubtful |= len(bad) > 0
            if doubtful:
                self._linked = {name: self._linkable(name) for name in self.names}

    def _linked_places(self, name: str) -> BoolArray:
        linked = np.zeros(self.num_rows, np.bool_)
        size = self.store.files(name).chunk_rows
        for chunk in self._linked[name]:
            first = chunk * size - self.shard.start
            linked[first : first + size] = True
        return linked

    def _keeping(self, name: str, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Rows that others repeat, on disk: there may be many of them, and tokens are big."""
        if name not in self._kept:
            shape = (len(self._leaders), *like.shape[1:])
            self._kept[name] = _scratch(self.store.folder, shape, like.dtype)
        return self._kept[name]

    def _go_out(
        self,
        writer: ShardWriter,
        stop: int,
        places: IntArray,
        stored: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        """Hands the places up to `stop` to the writer, but for those in linked chunks."""
        for name in self.names:
            files = self.store.files(name)
            most = max(1, _BLOCK_BYTES // max(1, files.row_bytes))
            for first, last in self._runs(name, self._gone_out, stop, most):
                out = np.empty((last - first, *files.shape[1:]), files.dtype)
                inside = (places >= first) & (places < last)
                if inside.any():
                    out[places[inside] - first] = stored[name][inside]
                self._copy(name, first, out)
                writer.put(self.shard.start + first, {name: out})
        self._gone_out = stop

    def _copy(self, name: str, start: int, out: npt.NDArray[Any]) -> None:
        """Fills in the rows of `out`, from place `start`, that are known."""
        donor = self.donor[start : start + len(out)]
        source = self.source[start : start + len(out)]
        for number, each in enumerate(self.donors):
            mine = np.flatnonzero(donor == number)
            if len(mine):
                out[mine] = each.take(name, source[mine])
        follows = np.flatnonzero(donor == FOLLOW)
        within = source[follows] >= self.shard.start
        if within.any():
            kept = np.searchsorted(self._leaders, source[follows[within]] - self.shard.start)
            out[follows[within]] = self._kept[name][kept]
        if not within.all():
            out[follows[~within]] = self._written.take(name, source[follows[~within]])

    def _runs(self, name: str, first: int, stop: int, most: int) -> Iterator[tuple[int, int]]:
        """Places [first, stop) outside linked chunks, in pieces of at most `most`."""
        linked = self._linked_places(name)[first:stop]
        edges = np.flatnonzero(np.diff(np.concatenate([[True], linked, [True]]).astype(np.int8)))
        for start, end in edges.reshape(-1, 2).tolist():
            for piece in range(start, end, most):
                yield first + piece, first + min(piece + most, end)


def _scratch(folder: Path, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """An array in a file without a name, on the disk of `folder`; gone when the array goes.

    Not in the system's temporary folder, which may be small or made of memory.

    Raises:
        CacheError: if the disk is full.
    """
    make_folder(folder)
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        # Where it has a name for a moment, the next writer knows it for a half-written file.
        with tempfile.TemporaryFile(suffix=PARTIAL, dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # room that is missing later kills the process
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        raise CacheError(
            f"{folder}: {error.strerror} (for {human_bytes(num_bytes)} of rows that others "
            "repeat); what is written stays, the same command resumes"
        ) from error
