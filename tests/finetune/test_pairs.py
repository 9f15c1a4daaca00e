"""Image-caption pairs of a split."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from featcache.errors import DatasetError
from featcache.manifest import Manifest
from finetune.contrastive.pairs import pairs_of


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
