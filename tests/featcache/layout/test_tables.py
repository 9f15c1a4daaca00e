"""Tables written piece by piece are those written at once, and zarr reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from featcache.errors import CacheCorruptError
from featcache.layout.chunks import ArrayFiles
from featcache.layout.string_table import StringTable, strings_of
from featcache.layout.tables import (
    TableWriter,
    group_document,
    read_strings,
    write_array,
    write_document,
)
from featcache.store import Store

STRINGS = ["one", "", "drei", "日本", "x" * 300, "six", "seven"]


def everything(root: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(root)): file.read_bytes()
        for file in sorted(root.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 50])
def test_pieces_do_not_matter(tmp_path: Path, piece: int, chunk_rows: int) -> None:
    numbers = np.arange(14, dtype=np.int32).reshape(7, 2)
    write_array(tmp_path / "whole", "a/s", np.array(STRINGS, object), chunk_rows, None)
    write_array(tmp_path / "whole", "a/n", numbers, chunk_rows, None)
    with (
        TableWriter(tmp_path / "parts", "a/s", "string", chunk_rows) as strings,
        TableWriter(tmp_path / "parts", "a/n", "int32", chunk_rows) as rows,
    ):
        for start in range(0, 7, piece):
            strings.add(STRINGS[start : start + piece])
            rows.add(numbers[start : start + piece])
    assert everything(tmp_path / "parts") == everything(tmp_path / "whole")
    write_document(tmp_path / "parts", "", group_document({}))
    group = zarr.open_group(tmp_path / "parts", mode="r")
    assert group["a/s"][:].tolist() == STRINGS
    np.testing.assert_array_equal(group["a/n"][:], numbers)
    files = ArrayFiles.open(tmp_path / "parts", "a/s")
    assert [text for part in read_strings(files) for text in part] == STRINGS


def test_an_empty_table_and_an_error(tmp_path: Path) -> None:
    with TableWriter(tmp_path, "empty", "int64"):
        pass
    assert ArrayFiles.open(tmp_path, "empty").shape == (0,)
    with pytest.raises(ValueError, match="oak"), TableWriter(tmp_path, "broken", "int32") as table:
        table.add(["oak"])
    assert not (tmp_path / "broken").exists()


def test_damage_in_a_table_is_named(tmp_path: Path) -> None:
    write_array(tmp_path, "s", np.array(STRINGS, object), 3, None)
    file = tmp_path / "s/c/1"
    raw = bytearray(file.read_bytes())
    raw[9] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CacheCorruptError, match=r"s/c/1: checksum does not match"):
        list(read_strings(ArrayFiles.open(tmp_path, "s")))


def test_a_long_table_is_a_sequence_read_in_parts(written: Callable[..., Any]) -> None:
    made = written(num_rows=50)
    store = Store.open(made.path)
    assert strings_of(store, "rows/id") == made.plan.manifest.ids  # one chunk: a list
    names = [f"é{row}" for row in range(50)]
    write_array(made.path, "rows/long", np.array(names, object), 2, None)
    table = strings_of(store, "rows/long")
    assert isinstance(table, StringTable)
    assert list(table) == names
    assert [table[row] for row in range(-50, 50)] == names * 2
    assert table[3:48:7] == names[3:48:7]
    assert table[45:99] == names[45:]
    assert table.index("é40") == 40
    with pytest.raises(IndexError, match="row 50 of a table of 50"):
        table[50]
