"""iNaturalist: rows, classes and paths against a plain reader, and one line for each mistake."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from featcache.datasets.inaturalist import InaturalistConfig
from featcache.datasets.inaturalist_layout import PROBES, probe_rows
from featcache.errors import DatasetError
from featcache.manifest import Manifest
from featcache.prompts import choose, format_prompts

GENERA = ("Alpha", "Beta", "Gamma", "Delta")


def category(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "id": number,
        "name": f"{GENERA[number % 4]} betus{number}",
        "common_name": "" if number % 3 else f"Blue One {number}",
        "supercategory": "Insects",
        "kingdom": "Animalia",
        "phylum": "Arthropoda",
        "class": "Insecta",
        "order": "Lepidoptera",
        "family": f"{GENERA[number % 2]}idae",
        "genus": GENERA[number % 4],
        "specific_epithet": f"betus{number}",
        "image_dir_name": f"{number:05d}_Animalia_x",
        **fields,
    }


CATEGORIES = [category(number) for number in (40, 2, 7, 1000, 3)]
"""Ids with gaps, not in order."""


def split_json(
    split: str, num_images: int, first_id: int, seed: int, folder: str | None = None
) -> dict[str, Any]:
    """Annotations of one split, in another order than the images."""
    draw = random.Random(seed)
    images, annotations = [], []
    for number in range(first_id, first_id + num_images):
        chosen = draw.choice(CATEGORIES)
        name = f"{folder or split}/{chosen['image_dir_name']}/{number}.jpg"
        images.append({"id": number, "file_name": name, "width": 5, "height": 4})
        annotations.append({"id": number, "image_id": number, "category_id": chosen["id"]})
    draw.shuffle(images)
    draw.shuffle(annotations)
    return {"info": {}, "images": images, "annotations": annotations, "categories": CATEGORIES}


Source = dict[str, dict[str, Any]]
Make = Callable[..., tuple[Path, Source]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(train=30, val=8, …)`: a data set's folder, and the contents of its JSON files."""

    def write(
        below: str = "2021", names: str = "{}2021.json", short: bool = False, **counts: int
    ) -> tuple[Path, Source]:
        root = tmp_path / "inat"
        root.mkdir(exist_ok=True)
        source: Source = {}
        first = 100
        for split, count in (counts or {"train": 30, "val": 8}).items():
            source[split] = split_json(split, count, first, seed=first)
            first += count
            (root / names.format(split)).write_text(json.dumps(source[split]))
            for image in source[split]["images"]:
                name = image["file_name"].removeprefix(f"{split}/" if short else "")
                (root / below / name).parent.mkdir(parents=True, exist_ok=True)
                (root / below / name).touch()
        return root, source

    return write


def rows_of(manifest: Manifest) -> dict[str, tuple[str, str, list[str]]]:
    names = manifest.classes["name"].tolist()
    return {
        row["id"]: (row["split"], row["path"], [names[label] for label in row["labels"]])
        for row in manifest.rows.to_pylist()
    }


def expected_rows(source: Source, prefix: str) -> dict[str, tuple[str, str, list[str]]]:
    """What a reader of dictionaries makes of the JSON files."""
    latin = {one["id"]: one["name"] for one in CATEGORIES}
    rows = {}
    for split, data in source.items():
        classes: dict[int, list[str]] = {}
        for one in data.get("annotations", []):
            classes[one["image_id"]] = [latin[one["category_id"]]]
        for image in data["images"]:
            path = prefix + image["file_name"]
            rows[str(image["id"])] = (split, path, classes.get(image["id"], []))
    return rows


def one_line(error: pytest.ExceptionInfo[DatasetError], *parts: object) -> str:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text
    return text


def write_split(root: Path, data: dict[str, Any], name: str = "train2021.json") -> None:
    (root / name).write_text(json.dumps(data))


def test_rows_are_those_of_a_plain_reader(make: Make) -> None:
    root, source = make(train=50, val=20, test=5)
    manifest = InaturalistConfig(root=root).open()
    assert rows_of(manifest) == expected_rows(source, "2021/")
    assert manifest.task == "single_label"
    order = [str(one["id"]) for split in source.values() for one in split["images"]]
    assert manifest.ids == order, "JSON order within a split"
    counts = [0] * 5
    ranks = sorted(one["id"] for one in CATEGORIES)
    for one in source["train"]["annotations"]:
        counts[ranks.index(one["category_id"])] += 1
    assert manifest.classes["count"].tolist() == counts


def test_class_index_is_the_rank_of_the_category_id(make: Make) -> None:
    root, _ = make()
    classes = InaturalistConfig(root=root).open().classes
    assert classes["category_id"].tolist() == ["2", "3", "7", "40", "1000"]
    assert classes["name"].tolist() == [
        "Gamma betus2",
        "Delta betus3",
        "Delta betus7",
        "Alpha betus40",
        "Alpha betus1000",
    ]


def test_metadata_is_lower_case_and_makes_prompts(make: Make) -> None:
    root, _ = make()
    classes = InaturalistConfig(root=root).open().classes
    row = classes.set_index("category_id").loc["3"].to_dict()
    assert {**row, "count": 0} == {
        "name": "Delta betus3",
        "scientific_name": "delta betus3",
        "common_name": "blue one 3",
        "species": "delta betus3",
        "genus": "delta",
        "family": "betaidae",
        "order": "lepidoptera",
        "class": "insecta",
        "phylum": "arthropoda",
        "kingdom": "animalia",
        "supercategory": "insects",
        "count": 0,
    }
    assert choose("inaturalist", list(classes.columns)) == "biology"
    (texts,) = format_prompts(classes, ["{common_name}, {order}"])
    assert texts[:2] == ["gamma betus2, lepidoptera", "blue one 3, lepidoptera"]


@pytest.mark.parametrize("names", ["{}2021.json", "{}_2021.json", "{}.json"])
def test_names_of_the_annotation_files(make: Make, names: str) -> None:
    root, source = make(names=names)
    assert rows_of(InaturalistConfig(root=root).open()) == expected_rows(source, "2021/")


def test_the_year_goes_before_the_plain_name(make: Make) -> None:
    root, source = make()
    (root / "train.json").write_text("not even JSON")
    assert len(InaturalistConfig(root=root).open()) == 38
    given = InaturalistConfig(root=root, train_json=root / "val2021.json", splits=("train",))
    assert set(given.open().ids) == {str(one["id"]) for one in source["val"]["images"]}


@pytest.mark.parametrize(
    ("below", "short", "prefix"),
    [("2021", False, "2021/"), ("2021", True, "2021/"), ("", False, ""), ("", True, "")],
)
@pytest.mark.parametrize("check_files", [False, True])
def test_the_four_places_of_an_image(
    make: Make, below: str, short: bool, prefix: str, check_files: bool
) -> None:
    root, source = make(below=below, short=short)
    manifest = InaturalistConfig(root=root, check_files=check_files).open()
    assert all((root / path).is_file() for path in manifest.paths)
    wanted = expected_rows(source, prefix)
    for name, (split, path, labels) in wanted.items():
        place = path.replace(f"{prefix}{split}/", prefix) if short else path
        wanted[name] = split, place, labels
    assert rows_of(manifest) == wanted


def test_the_first_place_wins(make: Make) -> None:
    root, source = make(below="")
    first = source["train"]["images"][0]["file_name"]
    (root / "2021" / first).parent.mkdir(parents=True)
    (root / "2021" / first).touch()
    # The first image is looked for, so the two places are noticed and every image is looked up.
    paths = dict(zip((m := InaturalistConfig(root=root).open()).ids, m.paths, strict=True))
    for image in source["train"]["images"]:
        name = image["file_name"]
        assert paths[str(image["id"])] == (f"2021/{name}" if name == first else name)


def test_layouts_may_differ_between_splits(make: Make) -> None:
    root, source = make(train=5)
    (root / "val.json").write_text(json.dumps(data := split_json("val", 4, 900, 1)))
    for image in data["images"]:
        (root / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        (root / image["file_name"]).touch()
    paths = InaturalistConfig(root=root).open().paths
    assert paths == [
        *("2021/" + one["file_name"] for one in source["train"]["images"]),
        *(one["file_name"] for one in data["images"]),
    ]


def test_missing_images_stay_rows_unless_all_are_looked_for(make: Make) -> None:
    root, source = make(train=3 * PROBES)
    lost = [one["file_name"] for one in source["train"]["images"]][::5]
    for name in lost:
        (root / "2021" / name).unlink()
    assert rows_of(InaturalistConfig(root=root).open()) == expected_rows(source, "2021/")
    with pytest.raises(DatasetError, match=f"{len(lost)} of the {3 * PROBES} images") as error:
        InaturalistConfig(root=root, check_files=True).open()
    one_line(error, root, "2021/" + lost[0])


def test_a_download_that_has_hardly_begun_is_no_wrong_root(make: Make) -> None:
    root, source = make(train=5 * PROBES)
    present = probe_rows(5 * PROBES)[3] + 1  # not among the images that are looked for first
    for row, image in enumerate(source["train"]["images"]):
        if row != present:
            (root / "2021" / image["file_name"]).unlink()
    assert rows_of(InaturalistConfig(root=root).open()) == expected_rows(source, "2021/")


def test_a_wrong_root_is_one_line(make: Make, tmp_path: Path) -> None:
    root, _ = make()
    (root / "2021").rename(root / "2018")
    with pytest.raises(DatasetError, match="none of the 30 images of train") as error:
        InaturalistConfig(root=root).open()
    one_line(error, root, "dataset.version")
    with pytest.raises(DatasetError, match=r"found none of train2018\.json, .*dataset\.version"):
        InaturalistConfig(root=tmp_path, version="2018").open()
    with pytest.raises(DatasetError, match="no such folder"):
        InaturalistConfig(root=tmp_path / "nothing").open()


def test_probes_are_spread_and_hold_both_ends() -> None:
    assert probe_rows(1) == [0]
    assert probe_rows(4) == [0, 1, 2, 3]
    rows = probe_rows(2_686_843)
    assert (rows[0], rows[-1], len(rows)) == (0, 2_686_842, PROBES)
    assert rows == sorted(rows)


def test_2018_with_its_own_folder_and_names(tmp_path: Path) -> None:
    data = {
        "images": [
            {"id": 1, "file_name": "train_val2018/Aves/2761/ab.jpg"},
            {"id": 2, "file_name": "train_val2018/Aves/12/cd.jpg"},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 2761},
            {"id": 2, "image_id": 2, "category_id": 12},
        ],
        "categories": [{"id": 2761, "name": "2761"}, {"id": 12, "name": "12"}],
    }
    for image in data["images"]:
        file = tmp_path / "2018" / str(image["file_name"])
        file.parent.mkdir(parents=True)
        file.touch()
    write_split(tmp_path, data, "train2018.json")
    # YAML reads the year as a number.
    config = InaturalistConfig.model_validate({"root": tmp_path, "version": 2018})
    hidden = config.open().classes
    assert list(hidden.columns) == ["name", "scientific_name", "species", "category_id", "count"]
    assert choose("inaturalist", list(hidden.columns)) != "biology"
    # categories.json has the real names; some fields may be missing.
    named = [{"id": 12, "name": "Avis una", "order": "Passeriformes"}, {"id": 2761, "name": "Avis"}]
    (tmp_path / "categories.json").write_text(json.dumps(named))
    manifest = config.open()
    assert manifest.classes["name"].tolist() == ["Avis una", "Avis"]
    assert manifest.classes["order"].tolist() == ["passeriformes", ""]
    assert rows_of(manifest)["1"][2] == ["Avis"]
    assert manifest.paths == [f"2018/{one['file_name']}" for one in data["images"]]


def test_subset_is_numbered_anew_and_its_metadata_with_it(make: Make) -> None:
    root, source = make(train=60, val=20, test=5)
    whole = InaturalistConfig(root=root).open()
    config = InaturalistConfig(root=root, category_ids=(1000, 2, 40), subset_name="three")
    part = config.open()
    assert part.classes["category_id"].tolist() == ["2", "40", "1000"]
    kept = whole.classes["category_id"].isin(["2", "40", "1000"])
    assert part.classes.to_dict("list") == whole.classes[kept].to_dict("list")
    wanted = {
        name: row
        for name, row in rows_of(whole).items()
        if row[2] and row[2][0] in part.classes["name"].tolist()
    }
    assert rows_of(part) == wanted
    assert 0 < len(wanted) < 85
    assert part.identity.classes != whole.identity.classes
    assert config.record()["subset_name"] == "three"
    assert source["test"]["images"][0]["file_name"] not in part.paths


def test_only_one_class_keeps_the_class_list(make: Make) -> None:
    root, _ = make(train=60, val=20)
    whole = InaturalistConfig(root=root).open()
    part = InaturalistConfig(root=root, only_class_id=40).open()
    assert part.identity.classes == whole.identity.classes
    assert set(part.label_values.tolist()) == {3}
    assert rows_of(part) == {n: r for n, r in rows_of(whole).items() if r[2] == ["Alpha betus40"]}
    both = InaturalistConfig(root=root, category_ids=(40, 7), only_class_id=40).open()
    assert (both.num_classes, set(both.label_values.tolist())) == (2, {1})


def test_subset_mistakes(make: Make) -> None:
    root, _ = make()
    with pytest.raises(DatasetError, match="no category has the id 5") as error:
        InaturalistConfig(root=root, category_ids=(2, 5)).open()
    one_line(error, root)
    with pytest.raises(ValidationError, match="only_class_id 3 is not among category_ids"):
        InaturalistConfig(root=root, category_ids=(2,), only_class_id=3)
    with pytest.raises(ValidationError, match="category_ids is empty"):
        InaturalistConfig(root=root, category_ids=())


def test_homonyms_get_distinct_names(make: Make) -> None:
    root, _ = make()
    same = [
        category(2, name="Alpha beta", kingdom="Plantae"),
        category(3, name="Alpha beta"),
        category(7, name="Gamma gamma"),
        category(40, name="Gamma gamma"),
        category(1000),
    ]
    (root / "categories.json").write_text(json.dumps(same))
    classes = InaturalistConfig(root=root).open().classes
    assert classes["name"].tolist()[:4] == [
        "Alpha beta (Plantae)",
        "Alpha beta (Animalia)",
        "Gamma gamma (Betaidae)",
        "Gamma gamma (Alphaidae)",
    ]
    assert classes["scientific_name"].tolist()[:2] == ["alpha beta", "alpha beta"]
    same[3] = {**same[2], "id": 40}
    (root / "categories.json").write_text(json.dumps(same))
    names = InaturalistConfig(root=root).open().classes["name"].tolist()
    assert names[2:4] == ["Gamma gamma (category 7)", "Gamma gamma (category 40)"]


def test_test_may_go_without_annotations(make: Make) -> None:
    root, source = make(train=10, test=4)
    del source["test"]["annotations"]
    (root / "test2021.json").unlink()
    write_split(root, source["test"], "public_test.json")
    manifest = InaturalistConfig(root=root).open()
    assert rows_of(manifest) == expected_rows(source, "2021/")
    assert [len(labels) for _, _, labels in rows_of(manifest).values()] == [1] * 10 + [0] * 4
    assert InaturalistConfig(root=root, splits=("train",)).open().splits == ["train"] * 10


def test_an_image_id_in_two_splits(make: Make) -> None:
    root, source = make(train=10)
    data = split_json("val", 4, 108, 5)
    for image in data["images"]:
        (root / "2021" / image["file_name"]).parent.mkdir(parents=True, exist_ok=True)
        (root / "2021" / image["file_name"]).touch()
    write_split(root, data, "val2021.json")
    with pytest.raises(
        DatasetError, match="image id 108 and 1 more are also in train2021"
    ) as error:
        InaturalistConfig(root=root).open()
    one_line(error, "--dataset.ids file_name")
    manifest = InaturalistConfig(root=root, ids="file_name").open()
    files = [one["file_name"] for part in (source["train"], data) for one in part["images"]]
    assert manifest.ids == files


def drop_images(data: dict[str, Any]) -> None:
    data["images"] = []


def repeat_image(data: dict[str, Any]) -> None:
    data["images"].append({**data["images"][0], "file_name": "train/other.jpg"})


def lose_image(data: dict[str, Any]) -> None:
    data["annotations"][0]["image_id"] = 7


def unknown_category(data: dict[str, Any]) -> None:
    data["annotations"][3]["category_id"] = 4


def two_categories(data: dict[str, Any]) -> None:
    one = data["annotations"][0]
    data["annotations"].append({**one, "category_id": 2 if one["category_id"] != 2 else 3})


def no_annotations(data: dict[str, Any]) -> None:
    del data["annotations"]


def no_categories(data: dict[str, Any]) -> None:
    del data["categories"]


def repeat_category(data: dict[str, Any]) -> None:
    data["categories"] = [*CATEGORIES, category(7)]


def nameless_category(data: dict[str, Any]) -> None:
    data["categories"] = [*CATEGORIES, {"id": 9, "name": " "}]


def wordy_category(data: dict[str, Any]) -> None:
    data["categories"] = [*CATEGORIES, {"id": "9", "name": "x"}]


def empty_name(data: dict[str, Any]) -> None:
    data["images"][1]["file_name"] = ""


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_images, "no 'images'"),
        (repeat_image, "image id [0-9]+ is listed twice"),
        (lose_image, "1 annotations are of images that are not listed, e.g. image id 7"),
        (unknown_category, "category id 4 is not among the 5 categories"),
        (two_categories, "has two annotations of different categories"),
        (no_annotations, "no 'annotations'; train needs them"),
        (no_categories, r"no categories\.json and no 'categories' in train2021\.json"),
        (repeat_category, "category id 7 is listed twice"),
        (nameless_category, "category 5 is .*expected an object with a whole-numbered id"),
        (wordy_category, "category 5 is .*expected an object with a whole-numbered id"),
        (empty_name, "an image has an empty file_name"),
    ],
)
def test_mistakes(make: Make, spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    root, source = make(train=20)
    data = {**source["train"], "categories": list(CATEGORIES)}
    spoil(data)
    write_split(root, data)
    with pytest.raises(DatasetError, match=message) as error:
        InaturalistConfig(root=root).open()
    one_line(error, root)


def test_a_repeated_annotation_that_says_the_same_is_no_mistake(make: Make) -> None:
    root, source = make(train=20)
    source["train"]["annotations"] *= 2
    write_split(root, source["train"])
    assert rows_of(InaturalistConfig(root=root).open()) == expected_rows(source, "2021/")


def test_shots_and_limit(make: Make) -> None:
    root, _ = make(train=60, val=20)
    manifest = InaturalistConfig(root=root, shots=2).open()
    assert manifest.classes["count"].tolist() == [2] * 5
    assert len(InaturalistConfig(root=root, limit=3).open()) == 6
