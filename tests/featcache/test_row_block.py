"""Blocks of rows equal the whole table cut in pieces, and hashes do not see the cuts."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import xxhash

from featcache.identity import ListHash, hash_strings
from featcache.manifest import Manifest, RowHashes
from featcache.row_block import RowBlock

CAPTIONS = [["one", "two"], [], ["drei"], ["é"], [], ["", "six"], []]


@pytest.fixture
def manifest() -> Manifest:
    return Manifest.build(
        kind="table",
        root=Path("images"),
        ids=[f"id {row}" for row in range(7)],
        paths=[f"{row}.jpg" for row in range(7)],
        splits=["train"] * 4 + ["val"] * 3,
        labels=[[row % 2] if row != 2 else [] for row in range(7)],
        classes=pd.DataFrame({"name": ["even", "odd"]}),
        task="single_label",
        captions=CAPTIONS,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_blocks_put_together_are_the_whole(manifest: Manifest, size: int) -> None:
    blocks = list(manifest.blocks(size))
    assert [block.start for block in blocks] == list(range(0, 7, size))
    assert [name for block in blocks for name in block.ids] == manifest.ids
    assert [path for block in blocks for path in block.paths] == manifest.paths
    assert [split for block in blocks for split in block.splits] == manifest.splits
    rows = [
        block.captions[block.caption_offsets[row] : block.caption_offsets[row + 1]]
        for block in blocks
        for row in range(len(block))
    ]
    assert rows == CAPTIONS
    labels = np.concatenate([block.label_values for block in blocks])
    np.testing.assert_array_equal(labels, manifest.label_values)
    for block in blocks:
        last = block.caption_start + len(block.captions)
        assert manifest.captions(block.caption_start, last) == block.captions


def test_an_empty_block_at_the_end_is_legal(manifest: Manifest) -> None:
    block = manifest.block(7, 7)
    assert (len(block), block.ids, block.captions, block.caption_start) == (0, [], [], 6)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_hashes_do_not_depend_on_the_blocks(manifest: Manifest, size: int) -> None:
    hashes = RowHashes()
    for block in manifest.blocks(size):
        hashes.update(block)
    assert hashes.identity("table", "single_label", ["even", "odd"]) == manifest.identity


def test_the_hash_of_strings_is_as_documented() -> None:
    strings = ["a", "", "日本", "x" * 100]
    raw = [text.encode() for text in strings]
    lengths = b"".join(len(item).to_bytes(8, "little") for item in raw)
    parts = xxhash.xxh3_128_digest(lengths) + xxhash.xxh3_128_digest(b"".join(raw))
    expected = xxhash.xxh3_128_hexdigest(parts)
    assert hash_strings(strings) == expected
    digest = ListHash()
    array = pa.array(["not this", *strings, "nor this"])
    digest.update_strings(array.slice(1, 1))
    digest.update_strings(pa.chunked_array([array.slice(2, 0), array.slice(2, 3)]))
    assert digest.hexdigest() == expected


def test_rows_of_no_dataset() -> None:
    block = RowBlock.of(["a", "b"], ["a.jpg", "b.jpg"], [["x"], ["y", "z"]])
    assert (block.start, block.stop, block.paths) == (0, 2, ["a.jpg", "b.jpg"])
    assert block.caption_offsets.tolist() == [0, 1, 3]
    assert RowBlock.of([], []).captions == []
