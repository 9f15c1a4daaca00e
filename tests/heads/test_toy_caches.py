"""The tests' own caches are such as extraction writes."""

from collections.abc import Callable
from pathlib import Path

from featcache.info import describe
from featcache.reader import open_cache


def test_unreadable_rows_are_reported_as_by_extraction(make_single: Callable[..., Path]) -> None:
    found = describe(open_cache(make_single(invalid=[3, 7])))
    assert [(item["row"], item["id"]) for item in found["invalid"]] == [(3, "r3"), (7, "r7")]
    assert found["invalid_reasons"] == {"missing": 2}
