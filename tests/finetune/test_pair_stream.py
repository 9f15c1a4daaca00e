"""Batches of a constant size and distinct images, the same for any number of processes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.backbones.base import PixelSpec
from featcache.errors import UnreadableImagesError
from finetune.contrastive.pair_stream import Batch, PairStream
from finetune.contrastive.pairs import Pairs
from finetune.images.augmentation import AugmentationConfig
from finetune.images.loading import LoadingConfig
from finetune.images.training_images import TrainingImages
from heads.distributed import Group

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


def _images(pairs: Pairs, **options: float) -> TrainingImages:
    loading = LoadingConfig(num_readers=2, **options)
    # Kept squares are one and an eighth times as large: as large as the pictures.
    spec = PixelSpec((7, 7), (0.5,) * 3, (0.5,) * 3)
    return TrainingImages(pairs.root, pairs.paths, spec, AugmentationConfig(), loading, CPU)


def _stream(
    pairs: Pairs,
    num_steps: int,
    *,
    first: int = 0,
    rank: int = 0,
    size: int = 1,
    seed: int = 0,
    batch_size: int = 4,
    **options: float,
) -> tuple[list[Batch], dict[str, str]]:
    """The batches, and the images found unreadable."""
    with _images(pairs, **options) as images:
        stream = PairStream(
            pairs,
            images,
            batch_size=batch_size,
            seed=seed,
            group=Group(rank, size, CPU),
            first_step=first,
            num_steps=num_steps,
        )
        return list(stream), images.images.problems


def _rows(batch: Batch) -> list[int]:
    return [int(value) // 20 for value in batch.images.pixels[:, 0, 0, 0]]


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_f31_every_batch_has_the_same_number_of_negatives(tmp_path: Path, budget: float) -> None:
    pairs = _pairs(tmp_path, [[str(row)] for row in range(10)])
    seen, _ = _stream(pairs, 6, ram_budget_gib=budget)
    assert [batch.epoch for batch in seen] == [0, 0, 1, 1, 2, 2]
    for batch in seen:
        assert batch.images.pixels.shape == (4, 3, 8, 8)
        assert len(set(_rows(batch))) == 4  # distinct images
        assert [int(pairs.texts[i]) for i in batch.caption_ids] == _rows(batch)
    for first, second in ((0, 1), (2, 3), (4, 5)):
        assert not set(_rows(seen[first])) & set(_rows(seen[second]))
    assert _rows(seen[0]) != _rows(seen[2])
    left_out = [set(range(10)) - {*_rows(seen[e]), *_rows(seen[e + 1])} for e in (0, 2, 4)]
    assert left_out[0] != left_out[1] or left_out[1] != left_out[2]


def _same(one: Batch, *others: Batch) -> bool:
    """Whether a batch is the others one after the other."""
    views = [batch.images.views for batch in (one, *others)]
    assert all(view is not None for view in views)
    return (
        torch.equal(one.images.pixels, torch.cat([other.images.pixels for other in others]))
        and torch.equal(views[0], torch.cat(views[1:]))
        and one.caption_ids.tolist() == [i for other in others for i in other.caption_ids]
    )


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_a_stream_may_begin_anywhere(tmp_path: Path, budget: float) -> None:
    pairs = _pairs(tmp_path, [["a", "b", "c"]] * 10)
    whole, _ = _stream(pairs, 7, ram_budget_gib=budget)
    for first in (1, 2, 5, 7):
        rest, _ = _stream(pairs, 7, first=first, ram_budget_gib=budget)
        assert all(_same(a, b) for a, b in zip(rest, whole[first:], strict=True)), first
    assert not _same(whole[0], _stream(pairs, 1, seed=1)[0][0])


def test_processes_share_the_batches_of_one(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, [["a", "b", "c"]] * 10)
    alone, _ = _stream(pairs, 6)
    shares = [_stream(pairs, 6, rank=rank, size=2)[0] for rank in range(2)]
    for batch, left, right in zip(alone, *shares, strict=True):
        assert _same(batch, left, right)


def test_one_caption_an_image_and_epoch_all_of_them_in_time(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, [["a", "b", "c"]] * 4)
    drawn = np.concatenate([batch.caption_ids for batch in _stream(pairs, 30)[0]])
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
        batches, problems = _stream(
            pairs, 20, rank=rank, size=size, ram_budget_gib=budget, max_unreadable=0.2
        )
        found.append(batches)
        assert set(problems) == {"3.png", "5.png"}
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
        _stream(pairs, 20, max_unreadable=0.05)
    for row in range(8):
        (tmp_path / f"{row}.png").write_bytes(b"nonsense")
    with pytest.raises(UnreadableImagesError, match="fewer images than the batch of 4"):
        _stream(pairs, 1, max_unreadable=0.9)


def test_chunks_are_the_rows_in_order(tmp_path: Path) -> None:
    pairs = _pairs(tmp_path, [[str(row)] for row in range(10)])
    (batch,) = _stream(pairs, 1, batch_size=10)[0]
    chunks = batch.chunks(3)
    assert [len(chunk) for chunk in chunks] == [4, 3, 3]
    assert _same(batch, *chunks)
