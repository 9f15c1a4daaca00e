"""Pairs of a split, crops and flips, pixel statistics."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from featcache.backbones.base import PixelSpec
from featcache.errors import DatasetError
from featcache.manifest import Manifest
from finetune.data import (
    ImagesConfig,
    ImageStore,
    Pairs,
    draw_views,
    normalize,
    pairs_of,
    pixel_statistics,
    view,
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


def test_a_view_without_crop_and_flip_is_the_resize_itself() -> None:
    pixels = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    random = np.random.default_rng(0)
    same = view(pixels, draw_views(3, 1.0, False, random), (8, 8))
    torch.testing.assert_close(same, pixels.float(), atol=1e-3, rtol=0)
    flipped = view(pixels, draw_views(3, 1.0, True, random), (8, 8))
    kinds = set()
    for one, source in zip(flipped, pixels.float(), strict=True):
        if torch.allclose(one, source, atol=1e-3):
            kinds.add("plain")
        else:
            torch.testing.assert_close(one, source.flip(-1), atol=1e-3, rtol=0)
            kinds.add("mirrored")
    assert "mirrored" in kinds


def test_views_crop_inside_the_image_at_the_stated_area() -> None:
    ramp = torch.arange(64.0).view(1, 1, 1, 64).expand(200, 3, 64, 64)
    out = view(ramp, draw_views(200, 0.25, False, np.random.default_rng(0)), (32, 32))
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
