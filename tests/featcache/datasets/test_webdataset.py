"""WebDataset tars: the samples that the webdataset package yields, streamed, local and on S3."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from featcache.backbones.open_clip import OpenClipConfig
from featcache.datasets.patterns import expand
from featcache.datasets.webdataset import WebDatasetConfig
from featcache.errors import ConfigError, DatasetError
from featcache.extract import ExtractConfig, run
from featcache.formats.tar_walk import TarFile
from featcache.image_bytes import read_bytes, read_many, stamp
from featcache.manifest import Manifest
from featcache.reader import open_cache
from featcache.storage import locate
from featcache.store import verify
from featcache.streamed import StreamedManifest

Open = Callable[..., Manifest]


def write_tar(path: Path, files: Mapping[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first: int, count: int, classes: int = 3) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {}
    for number in range(first, first + count):
        files[f"{number:04d}.jpg"] = f"image {number}"
        files[f"{number:04d}.cls"] = str(number % classes)
        for each in range(number % 3):
            files[f"{number:04d}.txt" if not each else f"{number:04d}.more"] = f"text {number}"
    return files


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """Opens a WebDataset whose index is in the test's folder."""

    def open_(**options: Any) -> Manifest:
        return WebDatasetConfig(index=tmp_path / "index", **options).open()

    return open_


def test_samples_are_those_of_the_webdataset_package(tmp_path: Path, opened: Open) -> None:
    theirs = pytest.importorskip("webdataset.tariterators")
    files = {
        "dir/0001.JPG": b"one",
        "dir/0001.cls": "3\r\n",
        "dir/0001.txt": "a caption\r\n",
        "dir.with.dots/0002.seg.png": b"mask",
        "dir.with.dots/0002.png": b"two",
        "dir.with.dots/0002.cls": "7",
        "__meta__/info.json": "{}",
        "__index__": "x",
        "README": "no dot",
        ".hidden": "dot first",
        "x.a.b.jpg": b"other extension",
        "x.jpeg": b"three",
        "x.txt": "é 日本\n",
        "y/0001.webp": b"four",
        "empty.jpg": b"",
    }
    path = write_tar(tmp_path / "a b.tar", files)
    manifest = opened(train=str(path))
    extensions = ("jpg", "jpeg", "png", "webp")
    with path.open("rb") as stream:
        members = [{**item, "__url__": ""} for item in theirs.tar_file_iterator(stream)]
    expected = list(theirs.group_by_keys(members))
    assert manifest.ids == [f"a b.tar/{sample['__key__']}" for sample in expected]
    for row, sample in enumerate(expected):
        image = next(sample[name] for name in extensions if name in sample)
        assert read_bytes(manifest.root, manifest.paths[row]) == image
        captions = manifest.captions(*manifest.caption_offsets[row : row + 2].tolist())
        assert captions == [sample[name].decode().strip() for name in ("txt",) if name in sample]
        labels = manifest.label_values[slice(*manifest.label_offsets[row : row + 2])]
        names = [manifest.classes["name"][label] for label in labels]
        assert names == [sample[name].decode().strip() for name in ("cls",) if name in sample]
    assert len(expected) == 5


@pytest.mark.parametrize(
    "text", ["a-{000..012}.tar", "{9..11}", "{b,c}/{0..2}.tar", "plain", "{3..1}", "x{07..10}y"]
)
def test_braces_as_braceexpand_has_them(text: str) -> None:
    braceexpand = pytest.importorskip("braceexpand")
    assert expand(text) == list(braceexpand.braceexpand(text))
    assert expand(f"{text}::z") == [*expand(text), "z"]


def test_streamed_rows_equal_the_table_of_all_rows(tmp_path: Path, opened: Open) -> None:
    for number, (first, count) in enumerate([(0, 5), (5, 0), (5, 1), (6, 7)]):
        write_tar(tmp_path / f"t-{number}.tar", samples(first, count))
    write_tar(tmp_path / "v.tar", samples(90, 4))
    manifest = opened(train=f"{tmp_path}/t-{{0..3}}.tar", val=f"{tmp_path}/v.tar")
    whole = Manifest.build(
        kind="webdataset",
        root=tmp_path,
        ids=manifest.ids,
        paths=manifest.paths,
        splits=["train"] * 13 + ["val"] * 4,
        labels=[[int(name[-4:]) % 3] for name in manifest.ids],
        classes=manifest.classes[["name"]],
        task="single_label",
        captions=[[f"text {int(name[-4:])}"] * bool(int(name[-4:]) % 3) for name in manifest.ids],
    )
    assert manifest.identity == whole.identity
    assert manifest.split_ranges == whole.split_ranges
    assert manifest.classes["count"].tolist() == whole.classes["count"].tolist()
    assert (len(manifest), manifest.num_captions) == (17, whole.num_captions)
    for start in range(18):
        for stop in range(start, 18):
            block, other = manifest.block(start, stop), whole.block(start, stop)
            assert block.rows.equals(other.rows)
            assert block.caption_start == other.caption_start
    for start in range(whole.num_captions + 1):
        assert manifest.captions(start, 9) == whole.captions(start, 9)
    assert [block.ids for block in manifest.blocks(4)] == [b.ids for b in whole.blocks(4)]
    for limit in (1, 5, 6, 99):
        starts = whole.split_ranges.values()
        first = whole.only(np.concatenate([np.arange(a, min(a + limit, b)) for a, b in starts]))
        assert manifest.limited(limit).identity == first.identity
        found = opened(train=f"{tmp_path}/t-{{0..3}}.tar", val=f"{tmp_path}/v.tar", limit=limit)
        assert found.split_ranges == first.split_ranges
        assert found.ids == first.ids


def test_a_limit_walks_no_further_tar(tmp_path: Path, opened: Open) -> None:
    write_tar(tmp_path / "0.tar", samples(0, 5))
    for number in range(1, 9):
        (tmp_path / f"{number}.tar").write_bytes(b"broken")
    assert len(opened(train=f"{tmp_path}/{{0..8}}.tar", limit=3, index_threads=1)) == 3
    with pytest.raises(DatasetError, match=r"1.tar: is cut off behind its beginning"):
        opened(train=f"{tmp_path}/{{0..8}}.tar", index_threads=1)


def test_a_tar_is_walked_once_until_it_changes(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(tmp_path / "0.tar", samples(0, 5))
    write_tar(tmp_path / "1.tar", samples(5, 5))
    first = opened(train=f"{tmp_path}/*.tar")
    walked: list[str] = []
    walk = TarFile.members

    def members(self: TarFile) -> Any:
        walked.append(self.where[-5:])
        return walk(self)

    monkeypatch.setattr(TarFile, "members", members)
    assert opened(train=f"{tmp_path}/*.tar").identity == first.identity
    assert walked == []
    before = stamp(tmp_path, first.paths[7])
    write_tar(tmp_path / "1.tar", samples(5, 6))
    assert len(opened(train=f"{tmp_path}/*.tar")) == 11
    assert walked == ["1.tar"]
    assert before not in (0, stamp(tmp_path, first.paths[7]))
    opened(train=f"{tmp_path}/*.tar", caption="none")  # another rule, another table
    assert walked == ["1.tar", "0.tar", "1.tar"] or sorted(walked[1:]) == ["0.tar", "1.tar"]
    for file in (tmp_path / "index").rglob("*.arrow"):  # a torn table is made anew
        file.write_bytes(file.read_bytes()[:99])
    manifest = opened(train=f"{tmp_path}/*.tar")
    assert len(manifest) == 11
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(DatasetError, match=r"the index of 0.tar is damaged or was deleted"):
        manifest.block(0, 1)


def test_labels_and_captions_from_json(tmp_path: Path, opened: Open) -> None:
    texts: list[Any] = [
        {"tags": ["b", "a"], "info": {"captions": ["one", " two\r\nlines ", ""]}},
        {"tags": [], "info": {}},
        {"tags": None, "info": {"captions": "three"}},
        {"tags": ["c"], "info": None},
    ]
    files: dict[str, bytes | str] = {}
    for number, text in enumerate(texts):
        files[f"{number}.jpg"] = b"x"
        files[f"{number}.json"] = json.dumps(text)
    path = write_tar(tmp_path / "x.tar", files)
    manifest = opened(train=str(path), label="json:tags", caption="json:info.captions")
    assert manifest.task == "multi_label"
    assert manifest.classes["name"].tolist() == ["a", "b", "c"]
    assert manifest.classes["count"].tolist() == [1, 1, 1]
    assert manifest.label_values.tolist() == [1, 0, 2]
    assert manifest.label_offsets.tolist() == [0, 2, 2, 2, 3]
    assert manifest.caption_values == ["one", "two\nlines", "three"]
    assert manifest.caption_offsets.tolist() == [0, 2, 2, 3, 3]
    unlabelled = opened(train=str(path), label="none", caption="none")
    assert (unlabelled.task, unlabelled.num_classes, unlabelled.num_captions) == (
        "unlabelled",
        0,
        0,
    )


def test_class_order_is_by_value_by_name_or_by_list(tmp_path: Path, opened: Open) -> None:
    def labels(*names: str, **options: Any) -> tuple[list[str], list[int]]:
        files: dict[str, bytes | str] = {}
        for number, name in enumerate(names):
            files |= {f"{number}.jpg": b"x", f"{number}.cls": name}
        write_tar(tmp_path / "x.tar", files)
        manifest = opened(train=f"{tmp_path}/x.tar", **options)
        return manifest.classes["name"].tolist(), manifest.label_values.tolist()

    assert labels("10", "9\r\n", "007") == (["7", "9", "10"], [2, 1, 0])
    assert labels("oak", "elm", "oak") == (["elm", "oak"], [1, 0, 1])
    listed = tmp_path / "classes.txt"
    listed.write_text("oak\nash\nelm\n")
    assert labels("elm", "oak", classes=listed) == (["oak", "ash", "elm"], [2, 0])
    assert labels("2", "0", classes=listed) == (["oak", "ash", "elm"], [2, 0])
    with pytest.raises(DatasetError, match=r"x.tar: label '3' is not in .*classes.txt"):
        labels("3", classes=listed)


def test_minus_one_is_no_class(tmp_path: Path, opened: Open) -> None:
    train = write_tar(tmp_path / "t.tar", samples(0, 3))
    test = write_tar(
        tmp_path / "v.tar",
        {"a.jpg": b"1", "a.cls": "-1", "b.jpg": b"2", "b.cls": " -1\r\n", "c.jpg": b"3"},
    )
    manifest = opened(train=str(train), test=str(test))
    assert manifest.classes["name"].tolist() == ["0", "1", "2"]
    assert np.diff(manifest.label_offsets).tolist() == [1, 1, 1, 0, 0, 0]
    alone = opened(test=str(test))
    assert (alone.task, len(alone.classes)) == ("unlabelled", 0)
    files: dict[str, bytes | str] = {}
    for number, label in enumerate([-1, 4, "-1"]):
        files |= {f"{number}.jpg": b"x", f"{number}.json": json.dumps({"l": label})}
    field = opened(train=str(write_tar(tmp_path / "j.tar", files)), label="json:l")
    assert field.classes["name"].tolist() == ["4"]
    assert np.diff(field.label_offsets).tolist() == [0, 1, 0]


def test_a_field_that_no_sample_has_is_named(tmp_path: Path, opened: Open) -> None:
    path = write_tar(tmp_path / "x.tar", {"a.jpg": b"", "a.json": '{"tags": ["oak"]}'})
    with pytest.raises(DatasetError, match=r"field 'tag' in a \.json; check dataset\.label"):
        opened(train=str(path), label="json:tag")
    with pytest.raises(DatasetError, match=r"field 'text' in a \.json; check dataset\.caption"):
        opened(train=str(path), label="json:tags", caption="json:text")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": "no image", "a.cls": "1"}, "sample a has no image: it has txt, cls, expected"),
        ({"a.jpg": b"1", "b.jpg": b"2", "a.cls": "1"}, "sample a occurs twice"),
        ({"a.jpg": b"1", "a.JPG": b"2"}, "sample a has two files jpg"),
        ({"a.jpg": b"1", "a.cls": b"\xff\xfe"}, "member a.cls is not UTF-8"),
        ({}, "no sample in 1 tars"),
        ({"a.jpg": b"1", "a.json": "{"}, "sample a: its json cannot be read"),
        ({"a.jpg": b"1", "a.json": "[1]"}, "sample a: its json has no field l"),
        ({"a.jpg": b"1", "a.json": '{"l": 1.5}'}, "sample a: label 1.5 is no number and no name"),
        ({"a.jpg": b"1", "a.json": '{"l": [1, "1"]}'}, "sample a: a label occurs twice"),
        ({"a.jpg": b"1", "a.json": '{"l": [2, -1]}'}, "sample a: found -1 beside other labels"),
        ({"a.jpg": b"1", "a.json": "[" * 100_000}, "sample a: its json cannot be read"),
        ({"a.jpg": b"1", "a.json": '{"l": "\\ud800"}'}, "holds text that is not Unicode, '?'"),
        ({"a.jpg": b"1", "a.cls": "7" * 5000}, "label 77777777777777777777… has 5000 digits"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, opened: Open, files: dict[str, bytes | str], message: str
) -> None:
    path = write_tar(tmp_path / "x.tar", files)
    with pytest.raises(DatasetError) as caught:
        opened(train=str(path), label="json:l" if "a.json" in files else "cls")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_options_that_cannot_be_meant(tmp_path: Path, opened: Open) -> None:
    write_tar(tmp_path / "x.tar", samples(0, 2))
    for train, message in {
        f"{tmp_path}/{{0..3": "a brace without its partner",
        f"{tmp_path}/{{0-3}}.tar": "is neither",
        f"{tmp_path}/y-*.tar": r"y-\*.tar: no such tar",
        f"{tmp_path}/y.tar": "y.tar: no such tar",
        f"{tmp_path}/x.tar.gz": "expected a plain .tar",
        f"{tmp_path}/x.tar::{tmp_path}/*.tar": r"x.tar: listed twice \(train, train\)",
        f"{tmp_path}/x.tar::s3://bucket/x.tar": "have no folder in common",
    }.items():
        with pytest.raises(DatasetError, match=message):
            opened(train=train)
    with pytest.raises(ValidationError, match="shots=2 needs all rows in memory"):
        WebDatasetConfig(train="x.tar", shots=2)
    with pytest.raises(ConfigError, match="are all unset"):
        opened()
    write_tar(tmp_path / "x.tar", {"a.txt": "no image", "b.jpg": b"1"})
    assert opened(train=f"{tmp_path}/x.tar", skip_imageless=True).ids == ["x.tar/b"]


@pytest.fixture
def packed(image_folder: Path) -> Path:
    """The images of `image_folder`, in its order, as two tars of train and one of val."""
    files = sorted(image_folder.rglob("*.jpg"))
    parts = {"train-0": files[:7], "train-1": files[7:10], "val-0": files[10:]}
    for name, part in parts.items():
        content: dict[str, bytes | str] = {}
        for file in part:
            key = f"{file.parent.name}/{file.stem}"
            content |= {
                f"{key}.jpg": file.read_bytes(),
                f"{key}.cls": file.parent.name,
                f"{key}.txt": f"a photo of {file.stem}",
            }
        write_tar(image_folder.parent / "tars" / f"{name}.tar", content)
    return image_folder.parent / "tars"


def extraction(tiny_clip: Path, cache: Path, dataset: dict[str, Any], **more: Any) -> ExtractConfig:
    values = {"device": "cpu", "precision": "fp32", "batch_size": 4, "num_readers": 2, **more}
    return ExtractConfig.model_validate(
        {
            "dataset": dataset,
            "backbone": OpenClipConfig(model=f"local-dir:{tiny_clip}").record(),
            "cache": str(cache),
            **values,
        }
    )


def test_features_equal_those_of_the_same_files_in_a_folder(
    tmp_path: Path,
    tiny_clip: Path,
    image_folder: Path,
    packed: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run(extraction(tiny_clip, tmp_path / "plain", {"kind": "folder", "root": str(image_folder)}))
    options = {
        "kind": "webdataset",
        "train": f"{packed}/train-{{0..1}}.tar",
        "val": f"{packed}/val-*.tar",
        "index": str(tmp_path / "index"),
    }
    config = extraction(tiny_clip, tmp_path / "streamed", options)

    def all_rows(self: StreamedManifest) -> None:
        raise AssertionError("all rows are in memory")

    monkeypatch.setattr(StreamedManifest, "rows", property(all_rows))
    assert run(config).num_extracted == 14
    plain, streamed = open_cache(tmp_path / "plain"), open_cache(tmp_path / "streamed")
    np.testing.assert_array_equal(
        streamed.array("image/projected").read(), plain.array("image/projected").read()
    )
    np.testing.assert_array_equal(
        streamed.array("rows/content").read(), plain.array("rows/content").read()
    )
    everything = np.arange(14)
    np.testing.assert_array_equal(streamed.labels(everything), plain.labels(everything))
    assert streamed.captions[1] == [f"a photo of {name[-2:]}" for name in streamed.ids]
    assert streamed.ids[0] == "train-0.tar/cat/00"
    assert verify(tmp_path / "streamed") == []
    assert run(config).num_extracted == 0
    with (packed / "train-1.tar").open("r+b") as tar:  # cut off behind the index's back
        tar.truncate(1000)
    with pytest.raises(DatasetError, match=r"train-1.tar: is cut off in member dog/"):
        run(extraction(tiny_clip, tmp_path / "again", options))


def test_tars_on_a_store_read_as_on_a_disk(
    tmp_path: Path, tiny_clip: Path, packed: Path, bucket: str, opened: Open
) -> None:
    for file in packed.iterdir():
        locate(f"{bucket}/some").write(file.name, file.read_bytes())
    here = opened(train=f"{packed}/train-{{0..1}}.tar", val=f"{packed}/val-*.tar")
    there = opened(train=f"{bucket}/some/train-*.tar", val=f"{bucket}/some/val-{{0..0}}.tar")
    assert str(there.root) == f"{bucket}/some"
    assert there.identity == here.identity
    assert (
        read_many(there.root, there.paths)
        == [read_bytes(packed, path) for path in reversed(here.paths)][::-1]
    )
    marks = [stamp(there.root, path) for path in there.paths]
    assert len(set(marks)) == 14
    assert 0 not in marks
    missing = read_many(there.root, ["no.tar@0+3/x", "no.jpg", "val-0.tar@100000+9/x"])
    assert [str(reason) for reason in missing] == [
        "missing",
        "missing",
        "the tar ends before this member does",
    ]
    options = {
        "kind": "webdataset",
        "train": f"{bucket}/some/train-{{0..1}}.tar",
        "index": str(tmp_path / "index"),
    }
    report = run(extraction(tiny_clip, tmp_path / "cache", options))
    assert (report.num_rows, report.num_invalid) == (10, 0)
    assert open_cache(tmp_path / "cache").attributes["root"] == f"{bucket}/some"
    with pytest.raises(DatasetError, match=r"some/no-\*.tar: no such tar"):
        opened(train=f"{bucket}/some/no-*.tar")


def test_a_further_tar_costs_only_its_own_images(
    tmp_path: Path, tiny_clip: Path, packed: Path
) -> None:
    late = (packed / "train-1.tar").rename(packed / "later.tar")
    options = {
        "kind": "webdataset",
        "train": f"{packed}/train-*.tar",
        "val": f"{packed}/val-0.tar",
        "index": str(tmp_path / "index"),
    }
    config = extraction(tiny_clip, tmp_path / "cache", options)
    assert run(config).num_extracted == 11
    late.rename(packed / "train-1.tar")
    report = run(config)
    assert (report.num_rows, report.num_extracted, report.num_copied) == (14, 3, 11)
    run(extraction(tiny_clip, tmp_path / "fresh", options))
    grown, fresh = open_cache(tmp_path / "cache"), open_cache(tmp_path / "fresh")
    assert grown.identity == fresh.identity
    assert grown.ids == fresh.ids
    np.testing.assert_allclose(
        grown.array("image/projected").read(), fresh.array("image/projected").read(), atol=1e-3
    )
