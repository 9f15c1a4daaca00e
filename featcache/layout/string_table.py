"""The strings of a long table as a sequence, of which a few chunks are in memory at a time."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import overload

from featcache.layout.chunks import ArrayFiles
from featcache.layout.tables import read_string_chunk
from featcache.store import Store

_CHUNKS_IN_MEMORY = 16


def strings_of(store: Store, name: str) -> Sequence[str]:
    """The strings of a table: a list if it is short, otherwise a `StringTable`.

    Raises:
        CacheError: if there is no such table, or the cache was updated since it was opened.
        CacheCorruptError: naming a damaged file.
    """
    table = StringTable(store, name)
    return table if table.files.num_chunks > _CHUNKS_IN_MEMORY else list(table)


class StringTable(Sequence[str]):
    """The N strings of a table.

    Rows in ascending order are read at full speed; rows in random order of a table of more than
    about a million decode a chunk each.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.files: ArrayFiles = store.files(name)
        self._store = store
        self._chunk: Callable[[int], list[str]] = lru_cache(_CHUNKS_IN_MEMORY)(self._read)

    def _read(self, chunk: int) -> list[str]:
        with self._store.unchanged():
            return read_string_chunk(self.files, chunk)

    def __len__(self) -> int:
        return self.files.shape[0]

    @overload
    def __getitem__(self, row: int) -> str: ...

    @overload
    def __getitem__(self, row: slice) -> list[str]: ...

    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        place = row + len(self) if row < 0 else row
        if not 0 <= place < len(self):
            raise IndexError(f"row {row} of a table of {len(self)}")
        chunk, inside = divmod(int(place), self.files.chunk_rows)
        return self._chunk(chunk)[inside]

    def __iter__(self) -> Iterator[str]:
        for chunk in range(self.files.num_chunks):
            yield from self._read(chunk)
