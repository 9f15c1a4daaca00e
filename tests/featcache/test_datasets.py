"""Folder, table and digits: the rows they promise, and one line for each mistake in the data."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from featcache.datasets import DATASETS
from featcache.datasets.digits import DigitsConfig
from featcache.datasets.folder import FolderConfig
from featcache.datasets.splitting import rarest_label, stratified
from featcache.datasets.table import TableConfig
from featcache.errors import DatasetError
from featcache.manifest import Manifest


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def labels_of(manifest: Manifest) -> dict[str, list[str]]:
    names = manifest.classes["name"].tolist()
    return {
        row["id"]: [names[label] for label in row["labels"]] for row in manifest.rows.to_pylist()
    }


def one_line(error: pytest.ExceptionInfo[DatasetError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# --- splitting ---------------------------------------------------------------------------------


def test_split_meets_its_shares_in_every_class_and_does_not_depend_on_row_order() -> None:
    ids = [f"row{number}" for number in range(700)]
    strata = np.arange(700) % 7
    splits = stratified(ids, strata, 0.1, 0.2, seed=3)
    for stratum in range(7):
        counts = Counter(s for s, c in zip(splits, strata, strict=True) if c == stratum)
        assert counts == {"train": 70, "val": 10, "test": 20}
    order = np.random.default_rng(0).permutation(700)
    again = stratified([ids[row] for row in order], strata[order], 0.1, 0.2, seed=3)
    assert again == [splits[row] for row in order]
    assert stratified(ids, strata, 0.1, 0.2, seed=4) != splits


def test_split_of_tiny_classes_meets_the_shares_over_all_and_keeps_train() -> None:
    strata = np.repeat(np.arange(100), 3)
    splits = np.asarray(stratified([str(n) for n in range(300)], strata, 0.1, 0.1, seed=0))
    assert abs(np.sum(splits == "val") - 30) <= 1
    assert abs(np.sum(splits == "test") - 30) <= 1
    assert set(strata[splits == "train"].tolist()) == set(range(100))
    singles = stratified([str(n) for n in range(50)], np.arange(50), 0.4, 0.4, seed=0)
    assert set(singles) == {"train"}


def test_rarest_label_is_the_stratum_of_a_multi_label_row() -> None:
    rows = [[0], [0, 1], [0, 2, 1], [], [0]]
    offsets = np.cumsum([0, *map(len, rows)])
    values = np.asarray([label for row in rows for label in row], np.int32)
    assert rarest_label(offsets, values).tolist() == [0, 1, 2, -1, 0]


def test_fractions_must_leave_a_training_set(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"val_fraction 0\.5 and test_fraction 0\.5"):
        FolderConfig(root=tmp_path, val_fraction=0.5, test_fraction=0.5)


# --- folder ------------------------------------------------------------------------------------


def test_folder_with_splits(image_folder: Path) -> None:
    manifest = FolderConfig(root=image_folder).open()
    assert manifest.classes["name"].tolist() == ["cat", "dog"]
    assert manifest.classes["count"].tolist() == [5, 5]
    assert manifest.splits == ["train"] * 10 + ["val"] * 4
    assert manifest.ids[0] == "train/cat/00.jpg"
    assert labels_of(manifest)["val/dog/11.jpg"] == ["dog"]


def test_folder_knows_other_words_for_splits(tmp_path: Path) -> None:
    touch(tmp_path, "Training/a/1.jpg", "validation/a/2.jpg", "testing/a/3.jpg")
    assert FolderConfig(root=tmp_path).open().splits == ["train", "val", "test"]
    touch(tmp_path, "valid/a/4.jpg")
    with pytest.raises(DatasetError, match="both mean val") as error:
        FolderConfig(root=tmp_path).open()
    one_line(error)


def test_folder_without_splits_is_split_here(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{name}/{number:02d}.png" for name in "ba" for number in range(20)))
    manifest = FolderConfig(root=tmp_path, val_fraction=0.1, test_fraction=0.25).open()
    assert Counter(manifest.splits) == {"train": 26, "val": 4, "test": 10}
    assert manifest.classes["name"].tolist() == ["a", "b"]
    assert manifest.classes["count"].tolist() == [13, 13]
    again = FolderConfig(root=tmp_path, val_fraction=0.1, test_fraction=0.25).open()
    assert again.identity == manifest.identity
    other = FolderConfig(root=tmp_path, val_fraction=0.1, test_fraction=0.25, seed=1).open()
    assert other.identity != manifest.identity


def test_folder_reads_only_images_and_follows_links(tmp_path: Path) -> None:
    root = tmp_path / "set"
    touch(root, "a/1.JPG", "a/deep/2.jpeg", "a/notes.txt", "a/.hidden.jpg", ".git/x.jpg")
    touch(root, "empty/readme.md", "README.md", "__MACOSX/a/3.jpg")
    touch(tmp_path, "elsewhere/4.webp")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    manifest = FolderConfig(root=root).open()
    assert labels_of(manifest) == {
        "a/1.JPG": ["a"],
        "a/deep/2.jpeg": ["a"],
        "a/gone.png": ["a"],  # reported as unreadable when extracted, not lost here
        "b/4.webp": ["b"],
    }
    assert set(FolderConfig(root=root, extensions=(".jpeg",)).open().ids) == {"a/deep/2.jpeg"}


def test_folder_of_bare_images_is_unlabelled(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg")
    manifest = FolderConfig(root=tmp_path).open()
    assert (manifest.task, manifest.num_classes) == ("unlabelled", 0)
    assert labels_of(manifest) == {"1.jpg": [], "2.jpg": []}


def test_a_class_may_be_called_like_a_split(tmp_path: Path) -> None:
    touch(tmp_path, "test/1.jpg", "exam/2.jpg")
    assert FolderConfig(root=tmp_path).open().classes["name"].tolist() == ["exam", "test"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ((), "found no images"),
        (("a/x.txt",), "found no images"),
        (("train/a/1.jpg", "test/b/2.jpg", "test/c/3.jpg"), "class 'b' and 1 more of test"),
        (("a/1.jpg", "2.jpg"), "1 images .2.jpg, .... lie beside"),
        (("train/a/1.jpg", "val/a/2.jpg", "extra/a/3.jpg"), "extra/ with images stands beside"),
        (("train/a/1.jpg", "val/2.jpg"), "one split has class directories"),
    ],
)
def test_folder_mistakes(tmp_path: Path, paths: tuple[str, ...], message: str) -> None:
    touch(tmp_path, *paths)
    with pytest.raises(DatasetError, match=message) as error:
        FolderConfig(root=tmp_path).open()
    assert str(tmp_path) in one_line(error)


def test_folder_root_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such folder"):
        FolderConfig(root=tmp_path / "nothing").open()


def test_folder_names_that_are_not_utf8(tmp_path: Path) -> None:
    touch(tmp_path, "a/ok.jpg")
    try:
        Path(str(tmp_path / "a") + "/bad\udcff.jpg").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(DatasetError, match="not UTF-8") as error:
        FolderConfig(root=tmp_path).open()
    one_line(error)


def test_a_class_without_training_images_stays_if_train_has_its_directory(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.jpg", "train/b/none.txt", "test/b/2.jpg")
    manifest = FolderConfig(root=tmp_path).open()
    assert manifest.classes["count"].tolist() == [1, 0]


# --- table -------------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., TableConfig]:
    """`table(text, **options)`: config of a CSV beside the images 1.jpg … 9.jpg."""
    touch(tmp_path, *(f"{number}.jpg" for number in range(1, 10)))

    def make(text: str, **options: object) -> TableConfig:
        (tmp_path / "set.csv").write_bytes(text.encode())
        return TableConfig.model_validate({"file": tmp_path / "set.csv", **options})

    return make


MakeTable = Callable[..., TableConfig]


def test_csv_in_awkward_shape(table: MakeTable) -> None:
    text = '\ufeffpath,label,split,caption\r\n1.jpg,b,Train,"a ""big"", red\r\nthing"\r\n'
    text += "\r\n2.jpg, a ,validation,\r\n3.jpg,,test,plain"
    manifest = table(text).open()
    assert manifest.splits == ["train", "val", "test"]
    assert labels_of(manifest) == {"1.jpg": ["b"], "2.jpg": ["a"], "3.jpg": []}
    assert manifest.rows.column("captions").to_pylist() == [
        ['a "big", red\r\nthing'],
        [],
        ["plain"],
    ]
    assert manifest.task == "single_label"


def test_numbers_are_sorted_by_value_and_names_by_letter(table: MakeTable) -> None:
    numbers = table("path,label\n1.jpg,10\n2.jpg,9\n3.jpg,1\n").open()
    assert numbers.classes["name"].tolist() == ["1", "9", "10"]
    names = table("path,label\n1.jpg,10\n2.jpg,9\n3.jpg,x\n").open()
    assert names.classes["name"].tolist() == ["10", "9", "x"]


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        ("dog big-cat", {}),
        ("dog;big-cat", {}),
        ("dog | big-cat", {}),
        ('"dog, big-cat"', {}),
        ('"[""dog"", ""big-cat""]"', {}),
        ("dog/big-cat", {"label_separator": "/"}),
    ],
)
def test_several_labels_in_a_cell(table: MakeTable, cell: str, options: dict[str, str]) -> None:
    manifest = table(f"path,labels\n1.jpg,{cell}\n2.jpg,dog\n3.jpg,\n", **options).open()
    assert manifest.task == "multi_label"
    assert manifest.classes["name"].tolist() == ["big-cat", "dog"]
    assert sorted(labels_of(manifest)["1.jpg"]) == ["big-cat", "dog"]
    assert labels_of(manifest)["3.jpg"] == []


def test_class_file_gives_order_and_metadata(table: MakeTable, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("zebra\r\n\r\ntraffic light\r\nant")
    manifest = table(
        "path,label\n1.jpg,2\n2.jpg,0\n3.jpg,traffic light\n", classes=tmp_path / "names.txt"
    ).open()
    assert manifest.classes["name"].tolist() == ["zebra", "traffic light", "ant"]
    assert labels_of(manifest) == {
        "1.jpg": ["ant"],
        "2.jpg": ["zebra"],
        "3.jpg": ["traffic light"],
    }
    (tmp_path / "names.csv").write_text("name,genus\nb,Big\na,Small\n")
    manifest = table("path,label\n1.jpg,a\n", classes=tmp_path / "names.csv").open()
    assert manifest.classes["genus"].tolist() == ["Big", "Small"]


def test_repeated_rows_are_captions_if_asked(table: MakeTable) -> None:
    text = "image,text\n1.jpg,one\n2.jpg,two\n1.jpg,three\n"
    columns = {"path_column": "image", "caption_columns": ("text",)}
    manifest = table(text, repeated_rows="captions", **columns).open()
    captions = dict(zip(manifest.ids, manifest.rows.column("captions").to_pylist(), strict=True))
    assert captions == {"1.jpg": ["one", "three"], "2.jpg": ["two"]}
    assert manifest.task == "unlabelled"
    with pytest.raises(DatasetError, match=r"line 4: path '1.jpg' was already on line 2"):
        table(text, **columns).open()


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("[]", []),
        ("[ ]", []),
        ("null", []),
        ("[null]", []),
        ('[null, "one"]', ["one"]),
        ('["one", null, "two"]', ["one", "two"]),
        ("[sic] a dog", ["[sic] a dog"]),
        ("[null and void]", ["[null and void]"]),
        ("null set", ["null set"]),
    ],
)
def test_captions_as_json(table: MakeTable, cell: str, captions: list[str]) -> None:
    quoted = cell.replace('"', '""')
    manifest = table(f'path,captions\n1.jpg,"{quoted}"\n').open()
    assert manifest.rows.column("captions").to_pylist() == [captions]


def test_parquet_with_lists(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.jpg")
    pq.write_table(
        pa.table(
            {
                "path": ["1.jpg", "2.jpg"],
                "id": [7, 8],
                "labels": [[3, 11], [3]],
                "captions": [["one", "two"], None],
                "split": ["train", "test"],
            }
        ),
        tmp_path / "set.parquet",
    )
    manifest = TableConfig(file=tmp_path / "set.parquet").open()
    assert labels_of(manifest) == {"7": ["3", "11"], "8": ["3"]}
    assert manifest.rows.column("captions").to_pylist() == [["one", "two"], []]
    assert manifest.classes["count"].tolist() == [1, 1]


def test_absolute_paths_below_the_root(table: MakeTable, tmp_path: Path) -> None:
    assert table(f"path\n{tmp_path / '1.jpg'}\n").open().paths == ["1.jpg"]
    with pytest.raises(DatasetError, match=r"line 2: .* is outside"):
        table("path\n/somewhere/1.jpg\n").open()


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("file,label\n1.jpg,a\n", {}, "no column 'path'; found file, label; set dataset.path_col"),
        ("path,label\n1.jpg,a\n2.jpg,b,c\n", {}, "line 3: found 3 fields, expected 2"),
        ('path,label\n1.jpg,"a\n2.jpg,b\n', {}, "line 2: malformed quotes"),
        ("path,label\n1.jpg,a\n,b\n", {}, "line 3: the image's path is empty"),
        ("path,id\n1.jpg,x\n2.jpg,x\n", {}, "line 3: id 'x' was already on line 2"),
        ("path,label,labels\n1.jpg,a,a\n", {}, "both a column 'label' and a column 'labels'"),
        ("path,labels\n1.jpg,a;b\n2.jpg,a|b\n", {}, "set dataset.label_separator"),
        ("path,labels\n1.jpg,a a\n", {}, "line 2: a label occurs twice"),
        ("path,split\n1.jpg,\n", {}, "line 2: column 'split' is empty"),
        ('path,captions\n1.jpg,"[""x]"\n', {}, "line 2: .* no JSON list"),
        ("path,path\n1.jpg,a\n", {}, "occurs twice in the header"),
        ("path\n", {}, "a header but no rows"),
        ("", {}, "empty"),
        ("path\nx.jpg\n", {}, "none of the first 1 images exists"),
        ("path,label\n1.jpg,c\n", {"classes": "names.txt"}, "line 2: label 'c' is not in"),
        ("path,label\n1.jpg,2\n", {"classes": "names.txt"}, "line 2: label '2' is not in"),
        ("path,label\n1.jpg,a\n", {"classes": "twice.txt"}, "class 'a' is listed twice"),
        ("path,label\n1.jpg,a\n", {"classes": "missing.txt"}, "no such file"),
        ("path,label\n1.jpg,a\n", {"split_column": "fold"}, "no column 'fold'"),
    ],
)
def test_table_mistakes(
    table: MakeTable, tmp_path: Path, text: str, options: dict[str, str], message: str
) -> None:
    (tmp_path / "names.txt").write_text("a\nb\n")
    (tmp_path / "twice.txt").write_text("a\na\n")
    if "classes" in options:
        options = {"classes": str(tmp_path / options["classes"])}
    with pytest.raises(DatasetError, match=message) as error:
        table(text, **options).open()
    assert str(tmp_path) in one_line(error)


def test_table_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"path\n\xff\xfe.jpg\n")
    with pytest.raises(DatasetError, match="not UTF-8"):
        TableConfig(file=tmp_path / "a.csv").open()
    (tmp_path / "a.parquet").write_bytes(b"no")
    with pytest.raises(DatasetError, match="not Parquet") as error:
        TableConfig(file=tmp_path / "a.parquet").open()
    one_line(error)
    with pytest.raises(DatasetError, match="no such file"):
        TableConfig(file=tmp_path / "b.csv").open()


# --- digits ------------------------------------------------------------------------------------


def test_digits_are_written_once(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    config = DigitsConfig(root=tmp_path, size=8)
    manifest = config.open()
    assert len(manifest) == 1797
    assert Counter(manifest.splits)["test"] == 180
    assert manifest.classes["name"].tolist()[7] == "seven"
    scans = load_digits()
    for row in (0, 900, 1796):
        number = int(manifest.ids[row])
        assert manifest.label_values[row] == scans.target[number]
        with Image.open(manifest.root / manifest.paths[row]) as image:
            ink = 255 - np.asarray(image)[:, :, 0].astype(int)
        np.testing.assert_allclose(ink * 16 / 255, scans.images[number], atol=0.05)
    stamp = (manifest.root / manifest.paths[0]).stat().st_mtime_ns
    assert config.open().identity == manifest.identity
    assert (manifest.root / manifest.paths[0]).stat().st_mtime_ns == stamp
    assert [entry.name for entry in tmp_path.iterdir()] == ["8px"]
    bigger = DigitsConfig(root=tmp_path, size=20, limit=5).open()
    with Image.open(bigger.root / bigger.paths[0]) as image:
        assert image.size == (20, 20)
    assert DigitsConfig(root=tmp_path, size=20).open().identity != manifest.identity


# --- all ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(DATASETS))
def test_every_option_has_help(kind: str) -> None:
    for name, field in DATASETS[kind].model_fields.items():
        assert field.description, f"{kind}.{name}"


def test_limit_keeps_rows_of_all_classes_of_each_split(image_folder: Path) -> None:
    manifest = FolderConfig(root=image_folder, limit=3).open()
    assert Counter(manifest.splits) == {"train": 3, "val": 3}
    for split in ("train", "val"):
        start, stop = manifest.split_ranges[split]
        assert set(manifest.label_values[start:stop].tolist()) == {0, 1}
    assert json.loads(json.dumps(FolderConfig(root=image_folder).record()))["kind"] == "folder"
