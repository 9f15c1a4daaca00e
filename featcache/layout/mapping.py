"""Chunk files of an array mapped one behind the other: one ndarray over the whole array, no copy.

Address space is reserved first, then each file is mapped at its place in it. A file's checksum lies
in a page of its own behind the data (chunks are whole pages) and the next file's mapping covers it.
"""

import ctypes
import errno
import mmap
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.errors import MappingError, UserError
from featcache.layout.chunks import ArrayFiles, require

MAX_FILES = 32_000
"""Half of Linux's default limit on mappings of a process (vm.max_map_count)."""

_PROT_NONE = 0
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


def can_map(files: ArrayFiles) -> bool:
    """Whether `map_array` can map an array: raw whole-page chunks, all files in place."""
    if not files.raw or files.num_chunks == 0 or files.num_chunks > MAX_FILES:
        return False
    if os.name != "posix":
        return False
    return files.num_chunks == 1 or files.data_bytes % mmap.ALLOCATIONGRANULARITY == 0


def map_array(files: ArrayFiles) -> npt.NDArray[Any]:
    """A read-only array over all chunk files; the mapping goes when the last view of it goes.

    Raises:
        CacheCorruptError: if a file is missing or of the wrong size.
        MappingError: if this process has too many mappings.
        OSError: if the kernel refuses a mapping for another reason.
    """
    assert can_map(files), f"{files.folder} cannot be mapped as one"
    return map_chunks(files, range(files.num_chunks))[: files.shape[0]]


def map_chunks(files: ArrayFiles, chunks: range) -> npt.NDArray[Any]:
    """A read-only array over consecutive chunk files, the last one's filling included.

    Holds no file open, unlike `np.memmap`: a thousand chunks would reach the usual limit.

    Raises:
        CacheCorruptError, MappingError, OSError: see `map_array`.
    """
    assert files.dtype is not None
    length = files.data_bytes * len(chunks)
    libc = _libc()
    base = libc.mmap(None, length, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if base == _MAP_FAILED:
        raise _error(files)
    try:
        for place, chunk in enumerate(chunks):
            _map_file(libc, base + place * files.data_bytes, files, chunk)
    except (OSError, UserError):
        libc.munmap(base, length)
        raise
    memory = (ctypes.c_char * length).from_address(base)
    weakref.finalize(memory, libc.munmap, base, length).atexit = False
    values = np.frombuffer(memoryview(memory).cast("B").toreadonly(), files.dtype)
    return values.reshape(-1, *files.shape[1:])


def _map_file(libc: Any, address: int, files: ArrayFiles, chunk: int) -> None:
    require(files.size_problem(chunk))  # touching a page behind a file's end kills the process
    descriptor = os.open(files.file(chunk), os.O_RDONLY)
    try:
        flags = mmap.MAP_SHARED | _MAP_FIXED
        mapped = libc.mmap(address, files.data_bytes, mmap.PROT_READ, flags, descriptor, 0)
        if mapped != address:
            raise _error(files)
    finally:
        os.close(descriptor)


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


def _error(files: ArrayFiles) -> Exception:
    code = ctypes.get_errno()
    if code == errno.ENOMEM:
        return MappingError(
            f"{files.folder}: cannot be mapped, this process has too many mapped files or too "
            "little address space; open fewer caches at a time, or raise vm.max_map_count "
            "(sysctl) and `ulimit -v`"
        )
    return OSError(code, os.strerror(code), str(files.folder))
