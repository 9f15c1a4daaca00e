"""Pairs, batches of a constant size, captions drawn once an epoch, crops and flips."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from featcache.backbones.base import PixelSpec
from featcache.errors import DatasetError, UnreadableImagesError
from featcache.manifest import Manifest
from finetune.data import (
    Batch,
    ImagesConfig,
    ImageStore,
    Pairs,
    ahead,
    augment,
    batches,
    normalize,
    pairs_of,
    pixel_statistics,
)

SPEC = PixelSpec((8, 8), (0.5,) * 3, (0.5,) * 3)


def _manifest(root: Path, captions: list[list[str]] | None, split: str = "train") -> Manifest:
    count = 10 if captions is None else len(captions)
    for row in range(count):
        Image.new("RGB", (8, 8), (20 * row, 0, 0)).save(root / f"{row}.png")
    return Manifest.build(
        kind="toy",
        root=root,
        ids=[str(row) for row in range(count)],
        paths=[f"{row}.png" for row in range(count)],
        splits=[split] * count,
        labels=[[row % 2] for row in range(count)],
        classes=pd.DataFrame({"name": ["even", "odd"]}),
        task="single_label",
        captions=captions,
    )


def _store(pairs: Pairs, **options: float) -> ImageStore:
    return ImageStore(pairs.root, pairs.paths, SPEC, "fast", ImagesConfig(num_readers=2, **options))


def _rows(batch: Batch) -> list[int]:
    """Which of the toy images a batch holds, read off their red channel."""
    return [int(value) // 20 for value in batch.pixels[:, 0, 0, 0]]


def test_pairs_join_captions_and_labels_by_row(tmp_path: Path) -> None:
    pairs = pairs_of(_manifest(tmp_path, [["x", "y"], [], ["y"], ["z", "x", "w"]]), "train")
    assert pairs.rows.tolist() == [0, 2, 3]
    assert pairs.num_without == 1
    assert pairs.paths == ["0.png", "2.png", "3.png"]
    assert pairs.labels.tolist() == [0, 0, 1]
    offsets, ids = pairs.captions_of(np.array([2, 0]))
    assert offsets.tolist() == [0, 3, 5]
    assert [pairs.texts[i] for i in ids] == ["z", "x", "w", "x", "y"]
    assert sorted(pairs.texts) == ["w", "x", "y", "z"]


def test_a_dataset_without_captions_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no captions in its split 'train'") as error:
        pairs_of(_manifest(tmp_path, None), "train")
    assert "\n" not in str(error.value)


def test_an_unknown_split_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no split 'val'; the dataset has train"):
        pairs_of(_manifest(tmp_path, [["x"]] * 3), "val")


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_f31_every_batch_has_the_same_number_of_negatives(tmp_path: Path, budget: float) -> None:
    pairs = pairs_of(_manifest(tmp_path, [[str(row)] for row in range(10)]), "train")
    store = _store(pairs, ram_budget_gib=budget)
    assert store.in_memory == (budget > 0)
    stream = batches(pairs, store, 4, seed=0)
    seen = [next(stream) for _ in range(6)]
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


def test_batches_depend_on_the_seed_only(tmp_path: Path) -> None:
    pairs = pairs_of(_manifest(tmp_path, [["a", "b", "c"]] * 10), "train")

    def drawn(seed: int, budget: float) -> list[tuple[list[int], list[int]]]:
        stream = ahead(batches(pairs, _store(pairs, ram_budget_gib=budget), 5, seed))
        return [(_rows(b), b.caption_ids.tolist()) for b in (next(stream) for _ in range(4))]

    assert drawn(1, 1.0) == drawn(1, 0.0)
    assert drawn(1, 1.0) != drawn(2, 1.0)


def test_one_caption_an_image_and_epoch_all_of_them_in_time(tmp_path: Path) -> None:
    pairs = pairs_of(_manifest(tmp_path, [["a", "b", "c"]] * 4), "train")
    stream = batches(pairs, _store(pairs), 4, seed=0)
    drawn = np.concatenate([next(stream).caption_ids for _ in range(30)])
    shares = np.bincount(drawn, minlength=3) / len(drawn)
    assert shares.min() > 0.2


@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_unreadable_images_are_listed_and_replaced(tmp_path: Path, budget: float) -> None:
    pairs = pairs_of(_manifest(tmp_path, [[str(row)] for row in range(10)]), "train")
    (tmp_path / "3.png").write_bytes(b"nonsense")
    (tmp_path / "5.png").unlink()
    store = _store(pairs, ram_budget_gib=budget, max_unreadable=0.2)
    stream = batches(pairs, store, 4, seed=0)
    for _ in range(2):
        first, second = next(stream), next(stream)
        assert sorted(_rows(first) + _rows(second)) == [0, 1, 2, 4, 6, 7, 8, 9]
    assert set(store.problems) == {"3.png", "5.png"}


def test_too_many_unreadable_images_end_the_run(tmp_path: Path) -> None:
    pairs = pairs_of(_manifest(tmp_path, [["x"]] * 10), "train")
    (tmp_path / "3.png").write_bytes(b"nonsense")
    with pytest.raises(UnreadableImagesError, match=r"1 images .* at most 0 of 10 .*3\.png"):
        _store(pairs, max_unreadable=0.05)
    for row in range(8):
        (tmp_path / f"{row}.png").write_bytes(b"nonsense")
    store = _store(pairs, max_unreadable=0.9)
    with pytest.raises(UnreadableImagesError, match="only 2 of 10 images"):
        next(batches(pairs, store, 4, seed=0))


def test_augment_without_crop_and_flip_is_the_resize_itself() -> None:
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    random = np.random.default_rng(0)
    same = augment(pixels, (8, 8), 1.0, flip=False, random=random)
    torch.testing.assert_close(same, pixels.float(), atol=1e-3, rtol=0)
    flipped = augment(pixels, (8, 8), 1.0, flip=True, random=random)
    kinds = set()
    for one, source in zip(flipped, pixels.float(), strict=True):
        if torch.allclose(one, source, atol=1e-3):
            kinds.add("plain")
        else:
            torch.testing.assert_close(one, source.flip(-1), atol=1e-3, rtol=0)
            kinds.add("mirrored")
    assert "mirrored" in kinds


def test_augment_crops_inside_the_image_at_the_stated_area() -> None:
    ramp = torch.arange(64.0).view(1, 1, 1, 64).expand(200, 3, 64, 64)
    out = augment(ramp, (32, 32), 0.25, flip=False, random=np.random.default_rng(0))
    assert out.shape == (200, 3, 32, 32)
    # Pixel centres lie half a step inside the crop, so its width is 32/31 of their distance.
    widths = (out[:, 0, 0, -1] - out[:, 0, 0, 0]) * 32 / 31
    assert 31 < widths.min() < 36  # half of the side = a quarter of the area
    assert 60 < widths.max() <= 64.5
    assert out.min() >= 0
    assert out.max() <= 63
    steps = out[:, 0, 0, 1:] - out[:, 0, 0, :-1]
    torch.testing.assert_close(steps[:, 1:-1], steps[:, 1:2].expand(-1, 29), atol=2e-3, rtol=0)


def test_normalisation_and_statistics(tmp_path: Path) -> None:
    pairs = pairs_of(_manifest(tmp_path, [["x"]] * 10), "train")
    mean, std = pixel_statistics(_store(pairs), seed=0)
    red = np.arange(10) * 20 / 255
    assert mean == pytest.approx((red.mean(), 0, 0), abs=1e-5)
    assert std[0] == pytest.approx(np.repeat(red, 64).std(ddof=1), abs=1e-5)
    pixels = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    out = normalize(pixels, (0.5, 0.25, 0.0), (0.5, 0.5, 1.0))
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([1.0, 1.5, 1.0]))
