"""Hashes of a table's strings, whatever Arrow keeps them in."""

import pyarrow as pa
import pytest
import xxhash

from featcache.growing.row_keys import _column_hashes

TEXTS = ["", "a", "öl", "ccc", "", "dddd", "e" * 300]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
@pytest.mark.parametrize(("start", "stop"), [(0, 7), (2, 7), (3, 5), (6, 7), (4, 4)])
def test_a_slice_has_the_hashes_of_its_own_strings(
    kind: pa.DataType, start: int, stop: int
) -> None:
    column = pa.array(TEXTS, pa.string()).cast(kind).slice(start, stop - start)
    expected = [xxhash.xxh3_64_intdigest(text.encode(), 5) for text in TEXTS[start:stop]]
    assert _column_hashes(column, 5).tolist() == expected
    assert _column_hashes(pa.chunked_array([column, column]), 5).tolist() == expected * 2
