"""The converted tree, read by torchvision: the same images under the same class numbers."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import INaturalist

from featcache.convert import ConvertConfig, run
from featcache.datasets.inaturalist import InaturalistConfig
from featcache.errors import DatasetError, UnreadableImagesError

TAXA = ("kingdom", "phylum", "class", "order", "family", "genus")


def make(root: Path, version: str, with_folders: bool = True) -> dict[str, dict[str, Any]]:
    """A set of six species whose supercategories are out of order; 24 train, 6 val images."""
    categories = []
    for number in range(6):
        taxa = {taxon: f"{taxon.title()} {number % 3}" for taxon in TAXA}
        entry = {"id": 2 * number, "name": f"Genus spec{number}", **taxa}
        entry["supercategory"] = ("Plants", "Birds", "Ray-finned Fishes")[number % 3]
        if with_folders:
            pieces = [text.replace(" ", "") for text in taxa.values()]
            entry["image_dir_name"] = "_".join([f"{2 * number:05d}", *pieces, f"spec{number}"])
        categories.append(entry)
    made = {}
    for split, count, first in (("train", 24, 0), ("val", 6, 24)):
        images = []
        for number in range(first, first + count):
            folder = (
                f"{split}/x{number % 6}" if version == "2021" else f"train_val2018/x{number % 6}"
            )
            images.append({"id": number, "file_name": f"{folder}/{number}.jpg"})
            file = root / version / str(images[-1]["file_name"])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(str(number))
        pairs = [{"image_id": one["id"], "category_id": 2 * (one["id"] % 6)} for one in images]
        made[split] = {"images": images, "annotations": pairs, "categories": categories}
        (root / f"{split}{version}.json").write_text(json.dumps(made[split]))
    return made


def seen_by_torchvision(out: Path, version: str) -> dict[str, int]:
    """Class number by the content of each image file."""
    found = INaturalist(out, version=version, loader=lambda path: Path(path).read_text())
    return dict(found[row] for row in range(len(found)))


@pytest.mark.parametrize("mode", ["link", "hard_link", "copy"])
def test_2021_as_torchvision_reads_it(tmp_path: Path, mode: str) -> None:
    source = tmp_path / "inat"
    made = make(source, "2021")
    config = ConvertConfig.model_validate({"data_root": source, "mode": mode})
    out = run(config)
    assert out == source / "torchvision"
    manifest = InaturalistConfig(root=source).open()
    ours = dict(zip(manifest.ids, manifest.label_values.tolist(), strict=True))
    assert seen_by_torchvision(out, "2021_train") | seen_by_torchvision(out, "2021_valid") == ours
    assert len(seen_by_torchvision(out, "2021_valid")) == len(made["val"]["images"])
    file = next((out / "2021_train").glob("*/7.jpg"))
    assert file.is_symlink() == (mode == "link")
    assert (file.stat().st_ino == (source / "2021/train/x1/7.jpg").stat().st_ino) == (
        mode != "copy"
    )
    if mode == "link":
        assert not os.path.isabs(os.readlink(file)), "the two folders can be moved together"


def test_2018_as_torchvision_reads_it(tmp_path: Path) -> None:
    source = tmp_path / "inat"
    make(source, "2018", with_folders=False)
    out = run(ConvertConfig(data_root=source, version="2018", out=tmp_path / "there"))
    manifest = InaturalistConfig(root=source, version="2018").open()
    ours = dict(zip(manifest.ids, manifest.label_values.tolist(), strict=True))
    assert seen_by_torchvision(out, "2018") == ours
    assert sorted(os.listdir(out / "2018")) == ["Birds", "Plants", "Ray-finned Fishes"]


def test_folders_are_made_up_where_the_source_names_none(tmp_path: Path) -> None:
    make(tmp_path, "2021", with_folders=False)
    out = run(ConvertConfig(data_root=tmp_path))
    assert len(seen_by_torchvision(out, "2021_train")) == 24
    names = sorted(os.listdir(out / "2021_train"))
    assert names[1] == "00001_Kingdom-1_Phylum-1_Class-1_Order-1_Family-1_Genus-1_spec1"


def test_goes_on_after_missing_images(tmp_path: Path) -> None:
    make(tmp_path, "2021")
    lost = tmp_path / "2021/train/x1/7.jpg"
    lost.unlink()
    with pytest.raises(UnreadableImagesError, match=r"1 images are not there, e\.g\. .*7\.jpg"):
        run(ConvertConfig(data_root=tmp_path))
    assert len(seen_by_torchvision(tmp_path / "torchvision", "2021_train")) == 23
    stamp = next((tmp_path / "torchvision/2021_train").glob("*/8.jpg")).lstat().st_mtime_ns
    lost.write_text("7")
    out = run(ConvertConfig(data_root=tmp_path))
    assert seen_by_torchvision(out, "2021_train")["7"] == 1
    assert next((out / "2021_train").glob("*/8.jpg")).lstat().st_mtime_ns == stamp
    assert not [name for _, _, names in os.walk(out) for name in names if name.startswith(".")]


def test_two_images_for_one_place_are_refused(tmp_path: Path) -> None:
    made = make(tmp_path, "2021")
    made["train"]["images"][6]["file_name"] = "train/other/0.jpg"
    (tmp_path / "train2021.json").write_text(json.dumps(made["train"]))
    with pytest.raises(DatasetError, match=r"0\.jpg is the name of two images of class 0"):
        run(ConvertConfig(data_root=tmp_path))
    assert not (tmp_path / "torchvision").exists()
