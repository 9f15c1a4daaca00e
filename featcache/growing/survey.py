"""Which rows of a dataset are known already: plain arithmetic over hashes, before any encoding.

A row whose id, path and version mark are those of a donor's row is taken over unread. Any other
file is read and hashed, and looked up by its content. Of equal new files one is encoded.
"""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from featcache.growing.donors import Donor, IntArray
from featcache.growing.row_keys import Index, Keys, RowKeys, mixed
from featcache.image_bytes import read_many, stamp
from featcache.manifest import Manifest

ENCODE = -1
"""In place of a donor: the row is to be encoded."""
FOLLOW = -2
"""In place of a donor: the same as an earlier row of the new cache."""

_STAMPS_PER_TASK = 512
_FILES_PER_TASK = 8
_SAY_SECONDS = 10.0


@dataclass(frozen=True)
class Reuse:
    """Where rows come from.

    Attributes:
        donor: (N,) int16 number of a donor, `ENCODE` or `FOLLOW`.
        source: (N,) row of that donor; row of the new cache for `FOLLOW`; -1 for `ENCODE`.
    """

    donor: npt.NDArray[np.int16]
    source: IntArray

    @property
    def num_new(self) -> int:
        """Rows to be encoded."""
        return int((self.donor == ENCODE).sum())


@dataclass(frozen=True)
class Survey:
    """What is known of a dataset's rows.

    Attributes:
        images: where the N rows come from.
        texts: where the M captions come from.
        stamp: (N,) uint64 version mark of each file now.
        content: (N,) uint64 hash of each file's bytes; 0 where it cannot be read.
        num_read: files that were read.
    """

    images: Reuse
    texts: Reuse
    stamp: Keys
    content: Keys
    num_read: int


def survey(
    manifest: Manifest,
    keys: RowKeys,
    donors: Sequence[Donor],
    *,
    num_threads: int,
    by_id: bool = False,
    by_caption: bool = False,
    retry_invalid: bool = False,
) -> Survey:
    """Looks at every file's version mark, reads those that may be new, and finds all in the donors.

    Args:
        manifest: the dataset.
        keys: its rows' hashes.
        donors: caches to copy from; of equal rows the first donor's first one is taken.
        num_threads: threads that ask the file system and read.
        by_id: whether a row's features depend on its id (augmented views).
        by_caption: whether they depend on its first caption (joint image-text features).
        retry_invalid: whether rows that could not be read are tried again.
    """
    stamps = _stamps(manifest, max(num_threads, 2))
    donor, source = _known(keys, donors, stamps, by_caption, retry_invalid)
    content = np.zeros(len(keys), np.uint64)
    for number, each in enumerate(donors):
        mine = donor == number
        content[mine] = each.content[source[mine]]
    unread = np.flatnonzero(donor == ENCODE)
    content[unread] = _contents(manifest, unread, max(num_threads, 2))
    wanted = unread[content[unread] != 0]
    salt = _salt(keys.ids, keys.first_captions, by_id, by_caption)
    _look_up(donor, source, wanted, _salted(content, salt), donors, by_id, by_caption)
    texts = _texts(keys, donors)
    return Survey(Reuse(donor, source), texts, stamps, content, len(unread))


def _known(
    keys: RowKeys,
    donors: Sequence[Donor],
    stamps: Keys,
    by_caption: bool,
    retry_invalid: bool,
) -> tuple[npt.NDArray[np.int16], IntArray]:
    """Rows that a donor holds under the same id, path and version mark."""
    donor = np.full(len(keys), ENCODE, np.int16)
    source = np.full(len(keys), -1, np.int64)
    for number, each in enumerate(donors):
        place = each.index.find(keys.ids)
        there = np.maximum(place, 0)
        same = (place >= 0) & (donor == ENCODE) & (stamps != 0)
        same &= each.done[there] & (each.stamp[there] == stamps)
        same &= each.keys.paths[there] == keys.paths
        if by_caption:
            same &= each.keys.first_captions[there] == keys.first_captions
        if retry_invalid:
            same &= each.valid[there]
        donor[same] = number
        source[same] = place[same]
    return donor, source


def _look_up(
    donor: npt.NDArray[np.int16],
    source: IntArray,
    wanted: IntArray,
    salted: Keys,
    donors: Sequence[Donor],
    by_id: bool,
    by_caption: bool,
) -> None:
    """Fills in rows whose content a donor holds, then those that repeat an earlier new row."""
    for number, each in enumerate(donors):
        rows = np.flatnonzero(each.valid)
        firsts = each.keys.first_captions if by_caption else each.content
        salt = _salt(each.keys.ids, firsts, by_id, by_caption)
        index = Index(_salted(each.content, salt)[rows], rows)
        place = index.find(salted[wanted])
        found = place >= 0
        donor[wanted[found]] = number
        source[wanted[found]] = place[found]
        wanted = wanted[~found]
    _, first, group = np.unique(salted[wanted], return_index=True, return_inverse=True)
    leaders = wanted[first][group]
    follows = leaders != wanted
    donor[wanted[follows]] = FOLLOW
    source[wanted[follows]] = leaders[follows]


def _texts(keys: RowKeys, donors: Sequence[Donor]) -> Reuse:
    """Where captions come from, by their text; both hashes have to agree."""
    donor = np.full(len(keys.texts), ENCODE, np.int16)
    source = np.full(len(keys.texts), -1, np.int64)
    wanted = np.arange(len(keys.texts))
    for number, each in enumerate(donors):
        rows = np.flatnonzero(each.captions_done)
        place = Index(each.keys.texts[rows], rows).find(keys.texts[wanted])
        found = place >= 0
        found[found] = each.keys.checks[place[found]] == keys.checks[wanted[found]]
        donor[wanted[found]] = number
        source[wanted[found]] = place[found]
        wanted = wanted[~found]
    _, first, group = np.unique(keys.texts[wanted], return_index=True, return_inverse=True)
    leaders = wanted[first][group]
    follows = (leaders != wanted) & (keys.checks[leaders] == keys.checks[wanted])
    donor[wanted[follows]] = FOLLOW
    source[wanted[follows]] = leaders[follows]
    return Reuse(donor, source)


def _salt(ids: Keys, first_captions: Keys, by_id: bool, by_caption: bool) -> Keys | None:
    """What features depend on beside the file's content; None = nothing."""
    if by_id:
        return mixed(ids, first_captions) if by_caption else ids
    return first_captions if by_caption else None


def _salted(content: Keys, salt: Keys | None) -> Keys:
    return content if salt is None else mixed(content, salt)


def _stamps(manifest: Manifest, num_threads: int) -> Keys:
    """(N,) version marks of all rows' files."""
    found = np.zeros(len(manifest), np.uint64)
    root = manifest.root

    def look(start: int, paths: Sequence[str]) -> None:
        found[start : start + len(paths)] = [stamp(root, path) for path in paths]

    with ThreadPoolExecutor(num_threads, thread_name_prefix="stamps") as executor:
        for block in manifest.blocks():
            paths = block.paths
            starts = range(0, len(paths), _STAMPS_PER_TASK)
            work = [
                executor.submit(look, block.start + at, paths[at : at + _STAMPS_PER_TASK])
                for at in starts
            ]
            for future in work:
                future.result()
    return found


def _contents(manifest: Manifest, rows: IntArray, num_threads: int) -> Keys:
    """(n,) XXH3-64 of some rows' files; 0 where one cannot be read."""
    found = np.zeros(len(rows), np.uint64)
    root = manifest.root
    say = _Saying(len(rows))

    def read(start: int, paths: Sequence[str]) -> int:
        for place, data in enumerate(read_many(root, paths), start):
            if isinstance(data, bytes):  # extraction meets what cannot be read again
                found[place] = xxhash.xxh3_64_intdigest(data)
        return len(paths)

    with ThreadPoolExecutor(num_threads, thread_name_prefix="hashes") as executor:
        for block in manifest.blocks():
            first, last = np.searchsorted(rows, [block.start, block.stop]).tolist()
            if first == last:
                continue
            paths = [block.paths[row - block.start] for row in rows[first:last].tolist()]
            work = [
                executor.submit(read, first + at, paths[at : at + _FILES_PER_TASK])
                for at in range(0, len(paths), _FILES_PER_TASK)
            ]
            for future in work:
                say(future.result())
    return found


class _Saying:
    """A line every ten seconds while many files are hashed."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._said = total, 0, time.monotonic()

    def __call__(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        if now - self._said > _SAY_SECONDS:
            self._said = now
            print(f"compared {self._done} of {self._total} files by content", flush=True)


__all__ = ["ENCODE", "FOLLOW", "Reuse", "Survey", "survey"]
