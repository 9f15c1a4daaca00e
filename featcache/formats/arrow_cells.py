"""Cells of Arrow stream files, such as Hugging Face `datasets` writes: mapped, read one by one."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

_OPEN_FILES = 64
"""Files that stay mapped; rows are read in file order, so few are needed at a time."""


def open_arrow(file: Path) -> pa.Table:
    """All rows of an Arrow stream file, mapped: only what is looked at is read from disk.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is no whole Arrow stream.
    """
    status = file.stat()
    return _mapped(str(file), status.st_size, status.st_mtime_ns)


def read_cell(file: Path, row: int, column: str) -> bytes:
    """An encoded image: the content of a binary cell, or of the field `bytes` of a struct cell.

    Raises:
        OSError: if there is no such file.
        ValueError: the reason why there is no image, in a few words.
    """
    table = open_arrow(file)
    if column not in table.column_names:
        raise ValueError(f"the file has no column {column}")
    if row >= table.num_rows:
        raise ValueError(f"the file has only {table.num_rows} rows")
    value: Any = table.column(column)[row].as_py()
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ValueError("the cell holds no image")
    return value


@lru_cache(_OPEN_FILES)
def _mapped(file: str, size: int, changed: int) -> pa.Table:
    """See `open_arrow`; size and time of change are there to open a changed file anew."""
    try:
        table = pa.ipc.open_stream(pa.memory_map(file)).read_all()
        # Arrow trusts offsets: damaged ones would end the process. This reads no image bytes.
        table.validate(full=True)
        return table
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a whole Arrow stream ({str(error).splitlines()[0]})") from None
