"""Batches of a constant size and distinct images, the same for any number of processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.backbones.base import PixelSpec
from featcache.errors import UnreadableImagesError
from finetune.data import ImagesConfig, ImageStore, Pairs
from finetune.pair_stream import Batch, PairStream
from heads.distributed import Group

SPEC = PixelSpec((8, 8), (0.5,) * 3, (0.5,) * 3)
CPU = torch.device("cpu")


def _pairs(root: Path, captions: list[list[str]]) -> Pairs:
    """One grey picture a row; its first red value tells the row."""
    for row in range(len(captions)):
        Image.new("RGB", (8, 8), (20 * row, 0, 0)).save(root / f"{row}.png")
    texts = sorted({text for own in captions for text in own})
    count = len(captions)
    return Pairs(
        rows=np.arange(count),
        root=root,
        paths=[f"{row}.png" for row in range(count)],
        labels=np.full(count, -1),
        caption_offsets=np.cumsum([0, *map(len, captions)]),
        caption_ids=np.array([texts.index(text) for own in captions for text in own]),
        texts=texts,
        num_without=0,
    )


def _store(pairs: Pairs, **options: float) -> ImageStore:
    return ImageStore(pairs.root, pairs.paths, SPEC, "fast", ImagesConfig(num_readers=2, **options))


def _stream(
    pairs: Pairs,
    store: ImageStore,
    num_steps: int,
    *,
    first: int = 0,
    rank: int = 0,
    size: int = 1,
    seed: int = 0,
    batch_size: int = 4,
) -> list[Batch]:
    stream = PairStream(
        pairs,
        store,
        batch_size=batch_size,
        min_area=0.5,
        flip=True,
        seed=seed,
        group=Group(rank, size, CPU),
        first_step=first,
        num_steps=num_steps,
    )
    return list(stream)


def _rows(batch: Batch) -> list[int]:
    return [int(value) // 20 for value in batch.pixels[:, 0, 0, 0]]


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_f31_every_batch_has_the_same_number_of_negatives(tmp_path: Path, budget: float) -> None:
    pairs = _pairs(tmp_path, [[str(row)] for row in range(10)])
    store = _store(pairs, ram_budget_gib=budget)
    assert store.in_memory == (budget > 0)
    seen = _stream(pairs, store, 6)
    assert [batch.epoch for batch in seen] == [0, 0, 1, 1, 2, 2]
    for batch in seen:
        assert batch.pixels.shape == (4, 3, 8, 8)
        assert len(set(_rows(batch))) == 4  # distinct images
        assert [int(pairs.texts[i]) for i in batch.caption_ids] == _rows(batch)
    for first, second in ((0, 1), (2, 3), (4, 5)):
        assert not set(_rows(seen[first])) & set(_rows(seen[second]))
    assert _rows(seen[0]) != _rows(seen[2])
    left_out = [set(range(10)) - {*_rows(seen[e]), *_rows(seen[e + 1])} for e in (0, 2, 4)]
    assert left_out[0] != left_out[1] or left_out[1] != left_out[2]


def _same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.pixels, other.pixels)
        and torch.equal(one.views, other.views)
        and one.caption_ids.tolist() == other.caption_ids.tolist()
    )


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_a_stream_may_begin_anywhere(tmp_path: Path, budget: float) -> None:
    pairs = _pairs(tmp_path, [["a", "b", "c"]] * 10)
    store = _store(pairs, ram_budget_gib=budget)
    whole = _stream(pairs, store, 7)
    for first in (1, 2, 5):
        rest = _stream(pairs, store, 7, first=first)
        assert all(_same(a, b) for a, b in zip(rest, whole[first:], strict=True)), first
    assert not _same(whole[0], _stream(pairs, store, 1, seed=1)[0])


def test_processes_share_the_batches_of_one(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, [["a", "b", "c"]] * 10)
    store = _store(pairs)
    alone = _stream(pairs, store, 6)
    shares = [_stream(pairs, store, 6, rank=rank, size=2) for rank in range(2)]
    for batch, left, right in zip(alone, *shares, strict=True):
        assert torch.equal(batch.pixels, torch.cat([left.pixels, right.pixels]))
        assert torch.equal(batch.views, torch.cat([left.views, right.views]))
        assert batch.caption_ids.tolist() == [*left.caption_ids, *right.caption_ids]


def test_one_caption_an_image_and_epoch_all_of_them_in_time(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, [["a", "b", "c"]] * 4)
    drawn = np.concatenate([b.caption_ids for b in _stream(pairs, _store(pairs), 30)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert shares.min() > 0.2


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_f07_unreadable_images_are_listed_and_replaced(
    tmp_path: Path, budget: float, size: int
) -> None:
    pairs = _pairs(tmp_path, [[str(row)] for row in range(10)])
    (tmp_path / "3.png").write_bytes(b"nonsense")
    (tmp_path / "5.png").unlink()
    found = []
    for rank in range(size):
        store = _store(pairs, ram_budget_gib=budget, max_unreadable=0.2)
        found.append(_stream(pairs, store, 20, rank=rank, size=size))
        assert set(store.problems) == {"3.png", "5.png"}
    for shares in zip(*found, strict=True):
        rows = [row for batch in shares for row in _rows(batch)]
        assert len(set(rows)) == 4
        assert not {3, 5} & set(rows)
        captions = [int(pairs.texts[i]) for batch in shares for i in batch.caption_ids]
        assert captions == rows


def test_too_many_unreadable_images_end_the_run(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, [["x"]] * 10)
    (tmp_path / "3.png").write_bytes(b"nonsense")
    with pytest.raises(UnreadableImagesError, match=r"1 images .* at most 0 of 10 .*3\.png"):
        _store(pairs, max_unreadable=0.05)
    for row in range(8):
        (tmp_path / f"{row}.png").write_bytes(b"nonsense")
    store = _store(pairs, max_unreadable=0.9)
    with pytest.raises(UnreadableImagesError, match="fewer images than the batch of 4"):
        _stream(pairs, store, 1)


def test_chunks_are_the_rows_in_order(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, [[str(row)] for row in range(10)])
    (batch,) = _stream(pairs, _store(pairs), 1, batch_size=10)
    chunks = batch.chunks(3)
    assert [len(chunk) for chunk in chunks] == [4, 3, 3]
    assert torch.equal(torch.cat([chunk.pixels for chunk in chunks]), batch.pixels)
    assert torch.equal(torch.cat([chunk.views for chunk in chunks]), batch.views)
    assert [i for chunk in chunks for i in chunk.caption_ids] == batch.caption_ids.tolist()
