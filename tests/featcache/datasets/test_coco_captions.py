"""COCO captions from small files: several captions an image, optional classes, mistakes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from featcache.datasets.coco_captions import CocoCaptionsConfig
from featcache.errors import DatasetError
from finetune.contrastive.pairs import pairs_of

CATEGORIES = [
    {"id": 18, "name": "dog", "supercategory": "animal"},
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 10, "name": "traffic light", "supercategory": "outdoor"},
]


def images(*ids: int) -> list[dict[str, Any]]:
    return [{"license": 3, "file_name": f"{n:012d}.jpg", "height": 4, "id": n} for n in ids]


def captions(*pairs: tuple[int, str]) -> list[dict[str, Any]]:
    return [{"image_id": i, "id": 100 + n, "caption": c} for n, (i, c) in enumerate(pairs)]


def objects(*pairs: tuple[int, int]) -> list[dict[str, Any]]:
    return [
        {"segmentation": [[1.5, 2]], "image_id": i, "category_id": c, "iscrowd": n % 2, "id": n}
        for n, (i, c) in enumerate(pairs)
    ]


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., CocoCaptionsConfig]:
    """`coco(**options)`: three training and one validation image."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017/000000000009.jpg").write_bytes(b"")
    write(
        tmp_path,
        "captions_train2017",
        images=images(9, 25, 30),
        annotations=captions(
            (30, "A plate of food.\n"),
            (9, "  two dogs"),
            (30, "food, again"),
            (9, "two dogs"),
            (9, " "),
            (30, "A plate\nof café"),
        ),
    )
    write(
        tmp_path,
        "captions_val2017",
        annotations=captions((7, "a car")),
        info={"year": 2017},
        images=images(7),
    )
    found = objects((30, 18), (9, 1), (30, 18), (30, 1))
    write(tmp_path, "instances_train2017", annotations=found, categories=CATEGORIES)
    write(tmp_path, "instances_val2017", annotations=[], categories=CATEGORIES, images=images(7))
    return lambda **options: CocoCaptionsConfig(root=tmp_path, **options)


MakeCoco = Callable[..., CocoCaptionsConfig]


def write(root: Path, name: str, **content: Any) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / f"annotations/{name}.json").write_text(json.dumps(content))


def test_captions_are_joined_by_image(coco: MakeCoco) -> None:
    manifest = coco().open()
    assert manifest.task == "unlabelled"
    assert manifest.rows.select(["id", "split", "captions"]).to_pylist() == [
        {
            "id": "train2017/000000000009.jpg",
            "split": "train",
            "captions": ["two dogs", "two dogs"],
        },
        {"id": "train2017/000000000025.jpg", "split": "train", "captions": []},
        {
            "id": "train2017/000000000030.jpg",
            "split": "train",
            "captions": ["A plate of food.", "food, again", "A plate\nof café"],
        },
        {"id": "val2017/000000000007.jpg", "split": "val", "captions": ["a car"]},
    ]
    assert manifest.paths == manifest.ids


def test_many_captions_keep_their_order(coco: MakeCoco, tmp_path: Path) -> None:
    pairs = [((9, 25, 30)[n * 7 % 3], f"caption {n}") for n in range(300)]
    write(tmp_path, "captions_train2017", images=images(9, 25, 30), annotations=captions(*pairs))
    found = coco(splits=("train",)).open().rows.column("captions").to_pylist()
    assert found == [[text for image, text in pairs if image == i] for i in (9, 25, 30)]


def test_images_without_captions_can_be_dropped(coco: MakeCoco) -> None:
    whole, dropped = coco().open(), coco(uncaptioned="drop").open()
    assert set(whole.ids) - set(dropped.ids) == {"train2017/000000000025.jpg"}
    assert dropped.caption_values == whole.caption_values
    assert dropped.identity != whole.identity
    pairs = pairs_of(whole, "train")
    assert pairs.num_without == 1


def test_classes_are_in_category_id_order_each_once_an_image(coco: MakeCoco) -> None:
    manifest = coco(instances=True).open()
    assert manifest.task == "multi_label"
    table = manifest.classes
    assert table["name"].tolist() == ["person", "traffic light", "dog"]
    assert table["category_id"].tolist() == ["1", "10", "18"]
    assert table["supercategory"].tolist() == ["person", "outdoor", "animal"]
    assert table["count"].tolist() == [2, 0, 1]
    assert manifest.rows.column("labels").to_pylist() == [[0], [], [0, 2], []]


def test_one_split_and_other_years(coco: MakeCoco, tmp_path: Path) -> None:
    assert set(coco(splits=("train",)).open().splits) == {"train"}
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014/000000000007.jpg").write_bytes(b"")
    write(tmp_path, "captions_val2014", images=images(7), annotations=captions((7, "x")))
    manifest = coco(splits=("val",), year="2014").open()
    assert manifest.ids == ["val2014/000000000007.jpg"]
    with pytest.raises(ValidationError, match="splits"):
        coco(splits=())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("captions_val2017", {"images": images(7)}, "no array 'annotations'; expected COCO's own"),
        ("captions_val2017", {"images": [], "annotations": []}, "lists no images"),
        (
            "captions_train2017",
            {"images": images(9, 9), "annotations": []},
            "the image with id 9 is listed twice",
        ),
        (
            "captions_train2017",
            {
                "images": [*images(9), {"id": 10, "file_name": "000000000009.jpg"}],
                "annotations": [],
            },
            "file_name '000000000009.jpg' is listed twice",
        ),
        (
            "captions_train2017",
            {"images": images(9), "annotations": captions((9, "a"), (77, "b"), (78, "c"))},
            "2 annotations are of images that are not listed, the first of image_id 77",
        ),
        (
            "captions_train2017",
            {"images": images(9), "annotations": [{"image_id": 9}]},
            "caption",
        ),
        (
            "captions_train2017",
            {"images": images(5), "annotations": []},
            r"none of the first 2 images exists, e\.g\. train2017/000000000005",
        ),
        (
            "instances_train2017",
            {"annotations": objects((9, 2)), "categories": CATEGORIES},
            "category_id 2 is not among its categories",
        ),
        (
            "instances_val2017",
            {"annotations": [], "categories": CATEGORIES[1:]},
            "instances_val2017.json: other categories than in instances_train2017.json",
        ),
        (
            "instances_val2017",
            {"annotations": [], "categories": [{"id": 1}]},
            "expected categories",
        ),
        ("instances_val2017", {"annotations": [], "categories": []}, "no categories"),
    ],
)
def test_mistakes_are_one_line(
    coco: MakeCoco, tmp_path: Path, name: str, content: dict[str, Any], message: str
) -> None:
    write(tmp_path, name, **content)
    with pytest.raises(DatasetError, match=message) as error:
        coco(instances=name.startswith("instances")).open()
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_missing_files_are_named(coco: MakeCoco, tmp_path: Path) -> None:
    (tmp_path / "annotations/captions_val2017.json").unlink()
    with pytest.raises(DatasetError, match=r"captions_val2017\.json: no such file"):
        coco().open()
