"""WordNet-id folders: class order against torchvision's, names, and one line for each mistake."""

from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import ImageFolder

from featcache.datasets.wordnet_folder import WordnetFolderConfig
from featcache.errors import DatasetError
from featcache.manifest import Manifest
from featcache.prompts import choose, format_prompts

MAP = (
    "n03126707 4 crane\r\nn02012849 3 crane\r\n\r\n"
    "n01440764 2 tench\r\nn02119789 1 kit_fox\r\nn03710637 7 maillot"
)
IDS = ["n01440764", "n02012849", "n02119789", "n03126707", "n03710637"]


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """train of all five classes but the last, val of three; a map file."""
    folder = tmp_path / "imagenet"
    touch(folder, *(f"train/{one}/{one}_{i}.JPEG" for one in IDS[3::-1] for i in range(3)))
    touch(folder, *(f"val/{one}/ILSVRC2012_val_{i}.JPEG" for i, one in enumerate(IDS[:3])))
    (folder / "map_clsloc.txt").write_bytes(MAP.encode())
    return folder


def rows_of(manifest: Manifest) -> dict[str, str]:
    """WordNet id by path, "" for unlabelled."""
    ids = manifest.classes["wordnet_id"].tolist()
    return {
        row["path"]: "".join(ids[label] for label in row["labels"])
        for row in manifest.rows.to_pylist()
    }


def one_line(error: pytest.ExceptionInfo[DatasetError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_order_is_torchvisions(root: Path) -> None:
    manifest = WordnetFolderConfig(root=root).open()
    theirs = ImageFolder(root / "train")
    train = manifest.splits.count("train")
    found = zip(manifest.paths[:train], manifest.label_values[:train].tolist(), strict=True)
    assert [(str(root / path), label) for path, label in found] == theirs.samples
    assert manifest.classes["wordnet_id"].tolist() == theirs.classes
    assert rows_of(manifest)["val/n02012849/ILSVRC2012_val_1.JPEG"] == "n02012849"


def test_classes_that_are_called_alike_get_distinct_names(root: Path) -> None:
    manifest = WordnetFolderConfig(root=root).open()
    assert manifest.classes["name"].tolist() == [
        "tench",
        "crane bird",
        "kit fox",
        "construction crane",
    ]
    assert choose(manifest.kind, list(manifest.classes.columns)).startswith("imagenet")
    assert format_prompts(manifest.classes, ["a {name}."])[0][2] == "a kit fox."
    text = "n01440764 1 newt\nn02012849 2 newt\nn02119789 3 kit_fox\nn03126707 4 newt\n"
    (root / "map_clsloc.txt").write_text(text)
    assert WordnetFolderConfig(root=root).open().classes["name"].tolist() == [
        "newt (n01440764)",
        "crane bird",
        "kit fox",
        "construction crane",
    ]


def test_a_name_does_not_depend_on_which_classes_are_there(root: Path, tmp_path: Path) -> None:
    touch(tmp_path, "a/n02012849/1.jpg")
    config = WordnetFolderConfig(root=tmp_path / "a", names=root / "map_clsloc.txt")
    manifest = config.open()
    assert manifest.classes["name"].tolist() == ["crane bird"]
    assert manifest.splits == ["test"]
    whole = WordnetFolderConfig(
        root=tmp_path / "a", names=root / "map_clsloc.txt", all_classes=True, split_name="val"
    ).open()
    assert whole.classes["wordnet_id"].tolist() == IDS
    assert (whole.label_values.tolist(), whole.splits) == ([1], ["val"])


def test_synset_mapping_keeps_synonyms(root: Path) -> None:
    (root / "map_clsloc.txt").unlink()
    text = "n01440764 tench, Tinca tinca\nn02012849 crane\nn02119789 kit fox, Vulpes macrotis\n"
    (root / "LOC_synset_mapping.txt").write_text(text + "n03126707 crane\n")
    classes = WordnetFolderConfig(root=root).open().classes
    assert classes["name"].tolist() == ["tench", "crane bird", "kit fox", "construction crane"]
    assert classes["synonyms"].tolist()[2] == "kit fox, Vulpes macrotis"


def test_without_names_the_ids_are_the_names(root: Path) -> None:
    (root / "map_clsloc.txt").unlink()
    assert WordnetFolderConfig(root=root).open().classes["name"].tolist() == IDS[:4]
    with pytest.raises(DatasetError, match="all_classes needs a name file"):
        WordnetFolderConfig(root=root, all_classes=True).open()


@pytest.mark.parametrize(("numbers", "which"), [("rank", IDS), ("file", None)])
def test_numbers_as_directories(
    tmp_path: Path, root: Path, numbers: Any, which: list[str] | None
) -> None:
    by_file = {1: "n02119789", 2: "n01440764", 3: "n02012849", 4: "n03126707"}
    folder = tmp_path / "v2"
    touch(folder, *(f"{number}/x{number}.jpeg" for number in (3, 1, 2, 4)))
    config = WordnetFolderConfig(root=folder, names=root / "map_clsloc.txt", numbers=numbers)
    found = rows_of(config.open())
    wanted = by_file if which is None else dict(enumerate(which))
    assert found == {f"{n}/x{n}.jpeg": wanted[n] for n in (1, 2, 3, 4)}


def test_a_flat_val_with_its_list(root: Path) -> None:
    for file in list((root / "val").rglob("*.JPEG")):
        file.rename(root / "val" / file.name)
        file.parent.rmdir()
    with pytest.raises(DatasetError, match=r"outside class directories; .*dataset\.val_labels"):
        WordnetFolderConfig(root=root).open()
    wanted = {f"val/ILSVRC2012_val_{i}.JPEG": one for i, one in enumerate(IDS[:3])}
    (root / "truth.txt").write_text("2\n3\n1\n")
    config = WordnetFolderConfig(root=root, val_labels=root / "truth.txt", numbers="file")
    assert wanted.items() <= rows_of(config.open()).items()
    lines = [f"ILSVRC2012_val_{i},{one} 85 1 413 272 " for i, one in enumerate(IDS[:3])]
    (root / "truth.txt").write_text("\n".join(["ImageId,PredictionString", *reversed(lines)]))
    config = WordnetFolderConfig(root=root, val_labels=root / "truth.txt")
    assert wanted.items() <= rows_of(config.open()).items()
    (root / "truth.txt").write_text("\n".join(["ImageId,PredictionString", *lines[1:]]))
    with pytest.raises(DatasetError, match=r"no class for ILSVRC2012_val_0\.JPEG and 0 more"):
        config.open()
    (root / "truth.txt").write_text("2\n3\n")
    with pytest.raises(DatasetError, match="2 labels for 3 images of val"):
        config.open()


def test_a_flat_test_is_unlabelled(root: Path) -> None:
    touch(root, "test/a.JPEG", "test/b.JPEG")
    assert rows_of(WordnetFolderConfig(root=root).open())["test/a.JPEG"] == ""


@pytest.mark.parametrize(
    ("paths", "names", "message"),
    [
        (["dogs/1.jpg"], MAP, "dogs: expected a WordNet id"),
        (["n09999999/1.jpg"], MAP, r"n09999999: .*names\.txt does not list it"),
        (["n01440764/1.jpg", "2.jpg"], MAP, r"images \(2\.jpg, …\) outside class directories"),
        (["17/1.jpg"], MAP, r"17: number 17 is none of the 5 of .*names\.txt \(0 to 4\)"),
        (["n01440764/1.txt"], MAP, "found no images"),
        (["n01440764/1.jpg"], "tench n01440764", r"line 1: found 'tench n01440764'; expected n02"),
        (["n01440764/1.jpg"], "\n\nn01440764", "line 3: found 'n01440764'"),
        (["n01440764/1.jpg"], "n01440764 1 a\nn01440764 2 b", "line 2: n01440764 is listed twice"),
        (["n01440764/1.jpg"], "n01440764 1 a\nn01440765 1 b", "line 2: number 1 is given twice"),
        (["n01440764/1.jpg"], "", "empty; expected lines"),
    ],
)
def test_mistakes(tmp_path: Path, paths: list[str], names: str, message: str) -> None:
    touch(tmp_path / "set", *paths)
    (tmp_path / "names.txt").write_text(names)
    with pytest.raises(DatasetError, match=message) as error:
        WordnetFolderConfig(root=tmp_path / "set", names=tmp_path / "names.txt").open()
    assert str(tmp_path) in one_line(error)


def test_numbers_need_a_name_file(tmp_path: Path) -> None:
    touch(tmp_path, "7/1.jpg")
    with pytest.raises(DatasetError, match="a number says no class without a name file"):
        WordnetFolderConfig(root=tmp_path).open()
    with pytest.raises(DatasetError, match="no such folder"):
        WordnetFolderConfig(root=tmp_path / "none").open()
