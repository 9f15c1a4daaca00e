"""The same checks over every dataset kind, each on a small copy of what it reads.

A new kind adds a maker here: a function that writes a data set of three classes or more into a
folder, and returns the options that read it.
"""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from scipy.io import savemat

from featcache import extract
from featcache.datasets import DATASETS
from featcache.image_bytes import read_bytes
from featcache.manifest import SPLITS, Manifest
from featcache.reader import open_cache
from featcache.streamed import StreamedManifest

Jpeg = Callable[[int, int, int], bytes]
Make = Callable[[Path, Jpeg], dict[str, Any]]
SHAPES = ("round", "square", "angular", "straight")
MAKERS: dict[str, Make] = {}


def maker(function: Make) -> Make:
    MAKERS[function.__name__] = function
    return function


def save(file: Path, content: bytes | str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


@maker
def folder(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    for number in range(24):
        save(root / SHAPES[number % 4] / f"{number}.jpg", jpeg(8, 8, number))
    return {"root": root}


@maker
def table(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    lines = ["path,label,caption"]
    for number in range(24):
        save(root / f"img/{number}.jpg", jpeg(8, 8, number))
        lines.append(f"img/{number}.jpg,{SHAPES[number % 4]},a shape")
    save(root / "set.csv", "\n".join(lines))
    return {"file": root / "set.csv"}


@maker
def digits(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    return {"root": root, "size": 8}


@maker
def garden(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    return {"root": root, "num_images": 30, "num_species": 4, "image_size": 16}


@maker
def inaturalist(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    categories = [{"id": 3 * n, "name": f"Forma {shape}"} for n, shape in enumerate(SHAPES)]
    for split, first in (("train", 0), ("val", 16)):
        images, pairs = [], []
        for number in range(first, first + 16 - first // 2):
            name = f"{split}/{number % 4}/{number}.jpg"
            images.append({"id": number, "file_name": name})
            pairs.append({"image_id": number, "category_id": 3 * (number % 4)})
            save(root / "2021" / name, jpeg(8, 8, number))
        data = {"images": images, "annotations": pairs[::-1], "categories": categories[::-1]}
        save(root / f"{split}2021.json", json.dumps(data))
    return {"root": root}


@maker
def flowers102(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    for number in range(1, 13):
        save(root / "jpg" / f"image_{number:05d}.jpg", jpeg(8, 8, number))
    savemat(root / "imagelabels.mat", {"labels": np.tile([5, 102, 1, 77], 3)})
    parts = {"trnid": range(1, 5), "valid": range(5, 9), "tstid": range(9, 13)}
    savemat(root / "setid.mat", {name: np.asarray(part) for name, part in parts.items()})
    return {"root": root}


@maker
def wordnet_folder(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    for number in range(16):
        split = "val" if number < 4 else "train"
        save(root / split / f"n0000000{number % 4}" / f"{number}.JPEG", jpeg(8, 8, number))
    names = [f"n0000000{number} {9 - number} {shape}" for number, shape in enumerate(SHAPES)]
    save(root / "map_clsloc.txt", "\n".join(names[::-1]))
    return {"root": root}


@maker
def torchvision(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    for split in ("train", "val", "test"):
        lines = [f"{shape}/{shape}_{split}.jpg" for shape in SHAPES]
        save(root / f"labels/{split}1.txt", "\n".join(lines))
        for number, line in enumerate(lines):
            save(root / "images" / line, jpeg(8, 8, number))
    return {"name": "dtd", "root": root}


def _long_tail(root: Path, jpeg: Jpeg, prefix: str) -> dict[str, Any]:
    for split, numbers in (("train", range(20)), ("test", range(20, 26))):
        lines = []
        for number in numbers:
            save(root / f"img {split}/{number}.jpg".replace(" ", "_"), jpeg(8, 8, number))
            lines.append(f"img_{split}/{number}.jpg {number % 5} {5 + number % 3}")
        save(root / f"{prefix}_lt_{split}.txt", "\r\n".join(lines))
    return {"root": root}


@maker
def voc_lt(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    return _long_tail(root, jpeg, "voc")


@maker
def coco_lt(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    return _long_tail(root, jpeg, "coco")


@maker
def kaggle_csv(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    train, test = ["ImageID,Labels,Caption"], ["ImageID,Caption"]
    for number in range(30):
        save(root / f"data/{number}.jpg", jpeg(8, 8, number))
        labels = f"{1 + number % 3} {13 + number % 2}"
        train += [f'{number}.jpg,{labels},"a "big" thing"'] if number < 20 else []
        test += [f'{number}.jpg,"a thing"'] if number >= 20 else []
    save(root / "train.csv", "\n".join(train))
    save(root / "test.csv", "\n".join(test))
    return {"root": root}


@maker
def coco_captions(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    categories = [{"id": 5 * n + 1, "name": shape} for n, shape in enumerate(SHAPES)]
    for split, count in (("train", 12), ("val", 4)):
        images, captions, objects = [], [], []
        for number in range(count):
            name = f"{split}{number:08d}.jpg"
            save(root / f"{split}2017" / name, jpeg(8, 8, number))
            images.append({"id": number, "file_name": name})
            captions += [{"id": k, "image_id": number, "caption": f"{k} things"} for k in range(2)]
            objects.append({"id": number, "image_id": number, "category_id": 5 * (number % 4) + 1})
        both = {"images": images, "annotations": captions}
        save(root / f"annotations/captions_{split}2017.json", json.dumps(both))
        both = {"images": images, "annotations": objects, "categories": categories}
        save(root / f"annotations/instances_{split}2017.json", json.dumps(both))
    return {"root": root, "instances": True}


@maker
def hugging_face(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    kind = {"names": list(SHAPES), "_type": "ClassLabel"}
    for split, count in (("train", 12), ("test", 4)):
        cells = [{"bytes": jpeg(8, 8, number), "path": None} for number in range(count)]
        images = pa.array(cells, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        rows = pa.table({"image": images, "label": [number % 4 for number in range(count)]})
        (root / split).mkdir(parents=True)
        with pa.ipc.new_stream(root / split / "data-00000-of-00001.arrow", rows.schema) as writer:
            writer.write_table(rows)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": split}
        save(root / split / "state.json", json.dumps(state))
        features = {"image": {"_type": "Image"}, "label": kind}
        save(root / split / "dataset_info.json", json.dumps({"features": features}))
    save(root / "dataset_dict.json", json.dumps({"splits": ["train", "test"]}))
    return {"root": root}


@maker
def webdataset(root: Path, jpeg: Jpeg) -> dict[str, Any]:
    for split, count in (("train", 12), ("val", 4)):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for number in range(count):
                for suffix, data in (
                    ("jpg", jpeg(8, 8, number)),
                    ("cls", SHAPES[number % 4].encode()),
                ):
                    member = tarfile.TarInfo(f"{split}{number:03d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    patterns = {"train": str(root / "train.tar"), "val": str(root / "val.tar")}
    return {**patterns, "index": root / "index"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(params=sorted(DATASETS))
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    assert name in MAKERS, f"no maker for {name}; add one to this file"
    return name


@pytest.fixture
def source(kind: str, sources: Path, make_jpeg: Jpeg) -> dict[str, Any]:
    """Options that read the kind's data set, which is made once."""
    root = sources / kind
    if not root.exists():
        root.mkdir()
        options = MAKERS[kind](root, make_jpeg)
        (sources / f"{kind}.json").write_text(json.dumps(options, default=str))
    found: dict[str, Any] = json.loads((sources / f"{kind}.json").read_text())
    return found


def opened(kind: str, options: dict[str, Any]) -> Manifest:
    return DATASETS[kind].model_validate(options).open()


def test_the_record_opens_the_same_dataset(kind: str, source: dict[str, Any]) -> None:
    config = DATASETS[kind].model_validate(source)
    manifest = config.open()
    assert DATASETS[kind].model_validate(config.record()).open().identity == manifest.identity
    assert manifest.kind == source.get("name", kind)


def test_rows_and_classes_are_sound(kind: str, source: dict[str, Any]) -> None:
    manifest = opened(kind, source)
    assert len(set(manifest.ids)) == len(manifest) > 0
    assert manifest.num_classes >= 3
    assert len(set(manifest.classes["name"])) == manifest.num_classes
    ranks = [SPLITS.index(name) for name in manifest.splits]
    assert ranks == sorted(ranks), "train, then val, then test"
    counts = np.zeros(manifest.num_classes, int)
    for row, split in enumerate(manifest.splits):
        start, stop = manifest.label_offsets[row : row + 2]
        labels = manifest.label_values[start:stop].tolist()
        assert len(set(labels)) == len(labels)
        if split == "train":
            counts[labels] += 1
    assert manifest.classes["count"].astype(int).tolist() == counts.tolist()
    assert counts.sum() > 0


def test_every_image_can_be_read(kind: str, source: dict[str, Any]) -> None:
    manifest = opened(kind, {**source, "limit": 3})
    for path in manifest.paths:
        assert read_bytes(manifest.root, path)[:4] in (b"\xff\xd8\xff\xe0", b"\x89PNG")


def test_limit_keeps_the_class_list(kind: str, source: dict[str, Any]) -> None:
    whole, part = opened(kind, source), opened(kind, {**source, "limit": 2})
    for split in set(whole.splits):
        rows = [row for row, name in enumerate(whole.splits) if name == split]
        streamed = isinstance(whole, StreamedManifest)
        rows = rows[:2] if streamed or len(rows) < 2 else [rows[0], rows[len(rows) // 2]]
        assert [whole.ids[row] for row in rows] == [
            name for name, of in zip(part.ids, part.splits, strict=True) if of == split
        ]
    assert part.identity.classes == whole.identity.classes


def test_the_order_in_which_a_disk_lists_files_does_not_matter(
    kind: str, source: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = opened(kind, source).identity
    scandir, listdir = os.scandir, os.listdir

    class Backwards:
        def __init__(self, path: Any = "."):
            with scandir(path) as found:
                self._entries = sorted(found, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Any:
            return iter(self._entries)

        def __exit__(self, *error: object) -> None:
            pass

        def __iter__(self) -> Any:
            return iter(self._entries)

    monkeypatch.setattr(os, "scandir", Backwards)
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path), reverse=True))
    assert opened(kind, source).identity == usual


def test_a_dataset_may_move(
    kind: str, source: dict[str, Any], sources: Path, tmp_path: Path
) -> None:
    usual = opened(kind, source)
    moved = tmp_path / "elsewhere" / kind
    shutil.copytree(sources / kind, moved, symlinks=True)
    text = json.dumps(source).replace(str(sources / kind), str(moved))
    assert opened(kind, json.loads(text)).identity == usual.identity


def test_extraction_gives_a_cache_with_its_rows_and_classes(
    kind: str, source: dict[str, Any], tiny_clip: Path, tmp_path: Path
) -> None:
    dataset = {**source, "kind": kind, "limit": 6}
    manifest = opened(kind, dataset)
    options = {"device": "cpu", "precision": "fp32", "batch_size": 4, "num_readers": 1}
    backbone = {"kind": "open_clip", "model": f"local-dir:{tiny_clip}"}
    values = {**options, "dataset": dataset, "backbone": backbone, "cache": tmp_path / "cache"}
    extract.run(extract.ExtractConfig.model_validate(values))
    cache = open_cache(tmp_path / "cache")
    assert cache.identity.dataset == manifest.identity
    assert list(cache.classes["name"]) == manifest.classes["name"].tolist()
    assert cache.valid.all()
    assert np.isfinite(cache.array("image/projected").read()).all()


def test_the_documentation_has_a_section(kind: str) -> None:
    text = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")
    sections = {part.splitlines()[0]: part for part in text.split("\n## ")[1:]}
    titles = {name: title for title in sections for name in title.replace(",", " ").split()}
    assert kind in titles
    assert "python -m featcache.extract --dataset " in sections[titles[kind]], "one full command"
