"""Chunk files of a Zarr v3 array: where they lie, how they are written and checked.

An uncompressed whole-row chunk is the rows' bytes; the crc32c codec adds 4 bytes at the end. So a
chunk can be written with one `write`, checked without decoding, and read by mapping the file.
"""

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import numpy.typing as npt

from featcache.config import canonical_json
from featcache.errors import CacheCorruptError, CacheError
from featcache.identity import fingerprint

CHECKSUM_BYTES = 4
PARTIAL = ".partial"
SEAL = "featcache_checksum"
"""Attribute of every `zarr.json`: hash over its place in the store and everything else in it."""

Content = bytes | npt.NDArray[np.uint8]

_FIXED_DTYPES = ("bool", "int8", "uint8", "uint64", "int32", "int64", "float16", "float32")


class Remote(Protocol):
    """The object store that an array's files are kept in, and mirrored from; see `Mirror`."""

    def where(self, key: str) -> str:
        """An object's address, for messages."""

    def read(self, key: str) -> bytes:
        """An object; FileNotFoundError if there is none."""

    def put(self, key: str, *parts: Content) -> None:
        """Hands an object over for upload."""

    def present(self, files: "ArrayFiles", chunks: Sequence[int]) -> list[int]:
        """Those of the chunks that are kept."""

    def keep_document(self, name: str, raw: bytes) -> None:
        """Puts an array's `zarr.json` on the local disk too."""

    def fetch(self, files: "ArrayFiles", chunks: Sequence[int], verify: bool) -> None:
        """Brings chunk files to the local disk that are not there yet, or differ."""


@dataclass(frozen=True)
class ArrayFiles:
    """An array's metadata and the names of its chunk files.

    Attributes:
        folder: the array's folder on this disk, holding `zarr.json` and `c/`.
        shape: (rows, ...).
        dtype: little-endian type; None for strings.
        chunk_rows: rows of a chunk; the last chunk is filled up.
        checksummed: whether chunk files end with a crc32c.
        raw: whether a chunk file is the rows' bytes (and the crc32c) and nothing else.
        attributes: the array's own attributes.
        name: the array's name in its group.
        remote: the store that keeps the files, of which `folder` is a mirror; None = this disk.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    chunk_rows: int
    checksummed: bool
    raw: bool
    attributes: Mapping[str, Any]
    name: str = ""
    remote: Remote | None = None

    @classmethod
    def open(cls, root: Path, name: str, remote: Remote | None = None) -> "ArrayFiles":
        """The array `name` of the store at `root`, or of the store that `root` mirrors.

        Raises:
            CacheError: if there is no such array.
            CacheCorruptError: if its metadata are damaged.
        """
        document = read_document(root, name, remote)
        if remote is not None:
            remote.keep_document(name, sealed(name, document))
        return cls.described(root, name, document, remote)

    @classmethod
    def described(
        cls, root: Path, name: str, document: Mapping[str, Any], remote: Remote | None = None
    ) -> "ArrayFiles":
        """The array that a `zarr.json` describes; see `open`."""
        folder = root / name
        if document.get("node_type") != "array":
            place = folder if remote is None else remote.where(name)
            raise CacheError(f"{place}: expected an array, found a {document.get('node_type')}")
        shape = tuple(document["shape"])
        chunk_shape = tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
        codecs = [codec["name"] for codec in document["codecs"]]
        big = any(c.get("configuration", {}).get("endian") == "big" for c in document["codecs"])
        known = document["data_type"] in _FIXED_DTYPES
        return cls(
            folder=folder,
            shape=shape,
            dtype=np.dtype(document["data_type"]) if known else None,
            chunk_rows=chunk_shape[0],
            checksummed=codecs[-1] == "crc32c",
            raw=known
            and not big
            and codecs in (["bytes"], ["bytes", "crc32c"])
            and chunk_shape[1:] == shape[1:]
            and document["chunk_key_encoding"]
            in ({"name": "default"}, {"name": "default", "configuration": {"separator": "/"}}),
            attributes={k: v for k, v in document["attributes"].items() if k != SEAL},
            name=name,
            remote=remote,
        )

    @property
    def num_chunks(self) -> int:
        """Number of chunk files of the whole array."""
        return 0 if 0 in self.shape else -(-self.shape[0] // self.chunk_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        assert self.dtype is not None
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize

    @property
    def data_bytes(self) -> int:
        """Bytes of a chunk without its checksum; the last chunk is as long as the others."""
        return self.row_bytes * self.chunk_rows

    def file(self, chunk: int) -> Path:
        """Chunk file number `chunk`; of an array in a store it is there after `fetch`."""
        return self.folder.joinpath("c", str(chunk), *["0"] * (len(self.shape) - 1))

    def key(self, chunk: int) -> str:
        """Key of a chunk in the group."""
        return "/".join([self.name, "c", str(chunk), *["0"] * (len(self.shape) - 1)])

    def where(self, chunk: int) -> str:
        """Where a chunk is kept, for messages."""
        return str(self.file(chunk)) if self.remote is None else self.remote.where(self.key(chunk))

    def present(self, chunks: Sequence[int] | None = None) -> list[int]:
        """Numbers of the chunks that are kept, of those given or of all."""
        chunks = range(self.num_chunks) if chunks is None else chunks
        if self.remote is not None:
            return self.remote.present(self, chunks)
        return [chunk for chunk in chunks if self.file(chunk).is_file()]

    def fetch(self, chunks: Sequence[int] | None = None, verify: bool = True) -> None:
        """Brings chunk files to this disk; nothing to do where they are kept on it.

        Args:
            chunks: numbers; None = all.
            verify: whether the checksums of files that are here already are verified.

        Raises:
            CacheCorruptError: naming an object that is missing or damaged.
        """
        if self.remote is not None:
            self.remote.fetch(self, range(self.num_chunks) if chunks is None else chunks, verify)

    def chunks_of(self, start: int, stop: int) -> range:
        """Numbers of the chunks that hold the rows [start, stop)."""
        return range(start // self.chunk_rows, -(-stop // self.chunk_rows))

    def write(self, start: int, data: npt.NDArray[Any], fill: object) -> None:
        """Writes whole chunks: each file is complete on disk, or not there at all.

        Args:
            start: first row, a multiple of `chunk_rows`.
            data: (n, ...) rows; ends at a chunk boundary or at the end of the array.
            fill: what the last chunk is filled up with.
        """
        stop = start + len(data)
        assert self.raw, f"{self.folder} is not made of raw chunks"
        assert self.dtype is not None
        if data.dtype != self.dtype or data.shape[1:] != self.shape[1:]:
            raise ValueError(
                f"{self.folder}: rows of {data.dtype}{data.shape[1:]}, "
                f"expected {self.dtype}{self.shape[1:]}"
            )
        at_end = stop == self.shape[0]
        if start % self.chunk_rows or not (at_end or stop % self.chunk_rows == 0) or start >= stop:
            raise ValueError(
                f"{self.folder}: rows {start}..{stop} are not whole chunks of {self.chunk_rows} "
                f"rows of an array of {self.shape[0]}"
            )
        data = np.ascontiguousarray(data)
        for chunk in self.chunks_of(start, stop):
            first = chunk * self.chunk_rows - start
            block = data[first : first + self.chunk_rows]
            if len(block) < self.chunk_rows:
                padded = np.full((self.chunk_rows, *self.shape[1:]), fill, self.dtype)
                padded[: len(block)] = block
                block = padded
            self.write_content(chunk, block.reshape(-1).view(np.uint8))

    def write_content(self, chunk: int, content: Content) -> None:
        """Writes a chunk's encoded bytes; to a store, they are handed over for upload."""
        if self.remote is None:
            write_chunk(self.file(chunk), content, self.checksummed)
        elif self.checksummed:
            self.remote.put(self.key(chunk), content, checksum(content))
        else:
            self.remote.put(self.key(chunk), content)

    def kept_problem(self, chunk: int) -> str | None:
        """What is wrong with a chunk where it is kept, its name first; None if nothing is."""
        if self.remote is None:
            return self.problem(chunk)
        try:
            return self.content_problem(chunk, self.remote.read(self.key(chunk)))
        except FileNotFoundError:
            return f"{self.where(chunk)}: missing"

    def content_problem(self, chunk: int, content: bytes) -> str | None:
        """What is wrong with a whole chunk file's bytes; None if nothing is."""
        problem = self._wrong_size(self.where(chunk), len(content))
        if problem is not None or not self.checksummed:
            return problem
        if (
            checksum(np.frombuffer(content, np.uint8)[:-CHECKSUM_BYTES])
            == content[-CHECKSUM_BYTES:]
        ):
            return None
        return f"{self.where(chunk)}: checksum does not match the bytes"

    def problem(self, chunk: int, content: npt.NDArray[np.uint8] | None = None) -> str | None:
        """What is wrong with a chunk file on this disk, its name first; None if nothing is.

        Args:
            chunk: number of the chunk.
            content: the file's bytes without the checksum where they are mapped already.
        """
        file = self.file(chunk)
        problem = self.size_problem(chunk)
        if problem is not None or not self.checksummed:
            return problem
        with file.open("rb") as stream:
            if content is None:
                content = np.memmap(stream, np.uint8, mode="r")[:-CHECKSUM_BYTES]
            stream.seek(-CHECKSUM_BYTES, os.SEEK_END)
            stored = int.from_bytes(stream.read(), "little")
        if google_crc32c.value(content) == stored:
            return None
        return f"{file}: checksum does not match the bytes"

    def size_problem(self, chunk: int) -> str | None:
        """What is wrong with a chunk file as far as its size tells; None if nothing is."""
        file = self.file(chunk)
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            return f"{file}: missing"
        return self._wrong_size(str(file), size)

    def _wrong_size(self, file: str, size: int) -> str | None:
        extra = CHECKSUM_BYTES if self.checksummed else 0
        if self.raw and size != self.data_bytes + extra:
            return f"{file}: {size} bytes, expected {self.data_bytes + extra}"
        # A string chunk starts with the number of its strings.
        return f"{file}: {size} bytes, cut off" if size < extra + 4 and not self.raw else None

    def read_ahead(self, chunk: int) -> None:
        """Tells the kernel that a chunk will be read next."""
        known = hasattr(os, "posix_fadvise")  # not on macOS
        if known and chunk < self.num_chunks and self.file(chunk).is_file():
            with self.file(chunk).open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def require(problem: str | None) -> None:
    """Turns a problem into an error.

    Raises:
        CacheCorruptError: with what can be done about it.
    """
    if problem is not None:
        raise CacheCorruptError(f"{problem}; restore the file from a copy, or extract anew")


def checksum(content: Content) -> bytes:
    """The crc32c that stands behind a chunk's bytes."""
    return int(google_crc32c.value(content)).to_bytes(CHECKSUM_BYTES, "little")


def write_chunk(file: Path, content: Content, checksummed: bool) -> None:
    """Writes one chunk file atomically, with its crc32c behind it when `checksummed`."""
    parts = [content]
    if checksummed:
        parts.append(checksum(content))
    make_folder(file.parent)
    write_file(file, *parts)


def write_file(file: Path, *parts: Content) -> None:
    """Writes a file so that after a crash either the old or the whole new one is there.

    Raises:
        CacheError: if the disk is full or refuses the write.
    """
    partial = file.with_name(f"{file.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            for part in parts:
                stream.write(part if isinstance(part, bytes) else part.data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        raise CacheError(
            f"{file}: {error.strerror}; what is written stays, the same command resumes"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def link_file(source: Path, target: Path) -> None:
    """Puts a file under a second name, as atomically as `write_file` writes one.

    No bytes are written where the file system knows hard links; elsewhere the file is copied. Chunk
    files are never changed in place, so the two names never come to differ by surprise.

    Raises:
        CacheError: if the disk is full or refuses.
    """
    make_folder(target.parent)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        os.link(source, partial)
        partial.replace(target)
        sync_folder(target.parent)
    except OSError:  # another file system, no links, or too many of them
        write_file(target, source.read_bytes())
    finally:
        partial.unlink(missing_ok=True)  # renaming one name of a file to another leaves both


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents so that they survive a power cut.

    Raises:
        CacheError: if a file is in the way, or the disk refuses.
    """
    wanted, missing = folder, []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir(exist_ok=True)
            sync_folder(new.parent)
        except FileExistsError:
            raise CacheError(f"{wanted}: {new} is a file; choose another path") from None
        except OSError as error:
            raise CacheError(
                f"{wanted}: cannot make the folder {new} ({error.strerror})"
            ) from error


def sync_folder(folder: Path) -> None:
    """Puts a folder's entries on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(name: str, document: Mapping[str, Any]) -> bytes:
    """A `zarr.json` as bytes, with the hash over its place and content among its attributes."""
    attributes = {k: v for k, v in document.get("attributes", {}).items() if k != SEAL}
    bare = {**document, "attributes": attributes}
    attributes = {**attributes, SEAL: fingerprint([name, bare])}
    return json.dumps(
        {**bare, "attributes": attributes}, indent=2, ensure_ascii=False, allow_nan=False
    ).encode()


def read_sealed(root: Path, name: str) -> dict[str, Any]:
    """The `zarr.json` of a group or array, its seal checked.

    Raises:
        CacheError: if there is none.
        CacheCorruptError: if a single byte differs from what was written.
    """
    file = root / name / "zarr.json"
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise _no_array(file.parent) from None
    return unsealed(raw, name, file)


def read_document(root: Path, name: str, remote: Remote | None) -> dict[str, Any]:
    """The `zarr.json` of a group or array from where it is kept; see `read_sealed`."""
    if remote is None:
        return read_sealed(root, name)
    key = f"{name}/zarr.json".strip("/")
    try:
        raw = remote.read(key)
    except FileNotFoundError:
        raise _no_array(remote.where(name)) from None
    return unsealed(raw, name, remote.where(key))


def _no_array(folder: object) -> CacheError:
    return CacheError(f"{folder}: no such array in this cache (no zarr.json)")


def unsealed(raw: bytes, name: str, file: object) -> dict[str, Any]:
    """The `zarr.json` that `sealed` made; `file` is its place, for the message.

    Raises:
        CacheCorruptError: if a single byte differs from what was written.
    """
    try:
        document = json.loads(raw)
        canonical_json(document)
        intact = isinstance(document, dict) and sealed(name, document) == raw
    except (ValueError, AttributeError, TypeError):
        intact = False
    if not intact:
        raise CacheCorruptError(
            f"{file}: changed since it was written; restore it from a copy or extract anew"
        )
    return dict(document)
