"""Growth of caches that are not a folder's float features on a local disk; comparing without it."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from featcache import diff, extraction
from featcache.datasets import DATASETS
from featcache.diff import DiffConfig
from featcache.errors import CacheError, ConfigError
from featcache.extract import ExtractConfig, run
from featcache.extraction import Extraction
from featcache.growing import swap
from featcache.mirror import mirror_root, mirrors
from featcache.reader import open_cache
from featcache.storage import locate, place
from featcache.store import Store, verify


@pytest.fixture
def encoded(monkeypatch):
    """List that takes the number of images of every call of the encoder."""
    calls: list[int] = []
    encode = extraction.encode_views

    def counted(backbone, pixels, request, rows, *rest):
        calls.append(rows)
        return encode(backbone, pixels, request, rows, *rest)

    monkeypatch.setattr(extraction, "encode_views", counted)
    return calls


@pytest.fixture
def make(image_folder, tiny_clip, tmp_path, opened_once):
    def build(cache="cache", **changed):
        values = {
            "dataset": {"root": str(image_folder)},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "cache": cache if "://" in cache else str(tmp_path / cache),
            "device": "cpu",
            "batch_size": 4,
            "shard_rows": 4,
            "num_readers": 2,
            "precision": "fp32",
            **changed,
        }
        return ExtractConfig.model_validate(values)

    return build


def assert_same_rows(grown, fresh, names):
    """Equal up to the rounding of another place in a batch, which float16 and int8 may amplify."""
    first, second = open_cache(grown), open_cache(fresh)
    assert first.fingerprint == second.fingerprint
    assert first.ids == second.ids
    for name in names:
        a, b = (c.array(name).read().astype(np.float32) for c in (first, second))
        assert np.allclose(a, b, rtol=0, atol=0.02 * np.abs(b).max()), name


def test_a_cache_in_a_store_grows(make, bucket, image_folder, make_jpeg, encoded, monkeypatch):
    local, remote = make(), make(f"{bucket}/birds")
    for config in (local, remote):
        run(config)
    (image_folder / "train/cat/04.jpg").unlink()
    (image_folder / "train/dog/zz.jpg").write_bytes(make_jpeg(40, 40, 1))
    shutil.copy(image_folder / "train/dog/zz.jpg", image_folder / "train/dog/zzz.jpg")
    before = open_cache(remote.cache).array("image/projected").read()
    extract = Extraction.extract

    def cut(self, shard):
        if shard.index == 2:
            raise KeyboardInterrupt
        return extract(self, shard)

    with monkeypatch.context() as patch:
        patch.setattr(Extraction, "extract", cut)
        with pytest.raises(KeyboardInterrupt):
            run(remote)
    assert np.array_equal(open_cache(remote.cache).array("image/projected").read(), before)
    encoded.clear()
    for config in (local, remote):
        assert run(config).num_extracted == 1
    assert encoded == [1, 1]
    parent = place(f"{bucket}")
    assert {e.key.split("/")[0] for e in locate(parent).list()} == {"birds"}
    assert sorted({m.folder.parent.name.rpartition("-")[0] for m in mirrors()}) == ["birds"]
    assert not list(mirror_root().glob("birds.next-*"))
    assert verify(remote.cache) == []
    for name in ("image/projected", "rows/valid", "rows/content", "rows/stamp"):
        first, second = (open_cache(c.cache).store.read(name) for c in (local, remote))
        assert first.tobytes() == second.tobytes(), name
    # The dataset changes again during an update: in a store nothing can be set aside.
    (image_folder / "val/dog/zz.jpg").write_bytes(make_jpeg(40, 40, 2))
    with monkeypatch.context() as patch:
        patch.setattr(swap, "replace", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(remote)
    (image_folder / "val/dog/zz2.jpg").write_bytes(make_jpeg(40, 40, 3))
    run(remote)
    run(make("fresh"))
    assert_same_rows(remote.cache, make("fresh").cache, ["image/projected"])
    assert len(open_cache(remote.cache).history) == 2


def test_int8_tokens_are_copied_with_their_scales(make, image_folder, make_jpeg, encoded):
    features = {"tokens": "all", "token_dtype": "int8", "pooled": True}
    config = make(features=features)
    run(config)
    before = open_cache(config.cache)
    scales = dict(zip(before.ids, before.store.read("image/tokens_scale"), strict=True))
    codes = dict(zip(before.ids, before.store.read("image/tokens"), strict=True))
    (image_folder / "train/cat/01.jpg").write_bytes(make_jpeg(40, 40, 1))
    encoded.clear()
    run(config)
    assert sum(encoded) == 1
    assert verify(config.cache) == []
    after = open_cache(config.cache)
    assert after.attributes["token_error"] == before.attributes["token_error"]
    for row, name in enumerate(after.ids):
        if name in codes:
            assert np.array_equal(after.store.read("image/tokens")[row], codes[name])
            assert np.array_equal(after.store.read("image/tokens_scale")[row], scales[name])
    fresh = make("fresh", features=features)
    run(fresh)
    assert_same_rows(config.cache, fresh.cache, ["image/tokens", "image/pooled"])


def write_tar(path: Path, images: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in images.items():
            for suffix, content in ((".jpg", data), (".cls", name[0].encode())):
                info = tarfile.TarInfo(name + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def test_a_set_of_tars_grows_by_tars(make, tmp_path, make_jpeg, encoded, monkeypatch):
    from featcache.growing import survey

    folder = tmp_path / "tars"
    folder.mkdir()
    for tar in range(3):
        images = {f"{n % 2}-{tar}{n}": make_jpeg(40, 40, 10 * tar + n) for n in range(5)}
        write_tar(folder / f"{tar}.tar", images)
    dataset = {
        "kind": "webdataset",
        "train": str(folder / "*.tar"),
        "index": str(tmp_path / "index"),
    }
    (folder / "2.tar").rename(tmp_path / "2.tar")
    config = make(dataset=dataset)
    run(config)
    (tmp_path / "2.tar").rename(folder / "2.tar")
    read: list[str] = []
    read_many = survey.read_many
    monkeypatch.setattr(
        survey, "read_many", lambda root, paths: read.extend(paths) or read_many(root, paths)
    )
    encoded.clear()
    assert run(config).num_rows == 15
    assert sum(encoded) == 5
    assert len(read) == 5
    assert all("2.tar@" in path for path in read)
    fresh = make("fresh", dataset=dataset)
    run(fresh)
    assert_same_rows(config.cache, fresh.cache, ["image/projected"])


def test_diff_says_what_an_update_would_do(make, image_folder, make_jpeg, encoded, capsys):
    config = make()
    run(config)
    encoded.clear()
    found = diff.run(DiffConfig(cache=config.cache))
    assert found["same"]
    assert "no difference" in capsys.readouterr().out
    (image_folder / "train/cat/00.jpg").unlink()
    (image_folder / "train/dog/01.jpg").rename(image_folder / "val/dog/01.jpg")
    (image_folder / "train/cat/04.jpg").write_bytes(make_jpeg(33, 44, 104))
    for split in ("train", "val"):
        (image_folder / split / "owl").mkdir()
        (image_folder / split / "owl/x.jpg").write_bytes(make_jpeg(50, 30, len(split)))
    found = diff.run(DiffConfig(cache=config.cache))
    expected = {
        "gained": 2,
        "lost": 1,
        "moved": 1,
        "relabelled": 0,
        "recaptioned": 0,
        "changed": 1,
        "new_classes": ["owl"],
        "removed_classes": [],
        "lost_images": 2,
        "images_to_encode": 3,
        "files_read": 4,
        "bytes": 3 * 32 * 2,
        "images_by_split": {"train": 2, "val": 1},
        "num_rows": {"cache": 14, "dataset": 15},
    }
    assert {name: found[name] for name in expected} == expected
    assert found["lost_share"] == pytest.approx(2 / 14)
    assert found["seconds"] == pytest.approx(3 / found["images_per_second"])
    out = capsys.readouterr().out
    assert "to encode: 3 images (2 train, 1 val), 192 B" in out
    assert "an update drops 2 images, 14.3% of the cache's" in out
    dataset = {"kind": "folder", "root": str(image_folder)}
    options = {"cache": config.cache, "dataset": dataset, "json": True}
    assert diff.run(DiffConfig.model_validate(options)) == found
    assert json.loads(capsys.readouterr().out) == found
    assert encoded == []
    report = run(config)
    assert report.num_extracted == found["images_to_encode"]
    assert diff.run(DiffConfig(cache=config.cache))["same"]


def test_diff_of_a_table_counts_labels_and_captions(make, image_folder, tmp_path):
    def write(label, captions):
        lines = ["path,label,split,captions"]
        for number, file in enumerate(sorted(image_folder.rglob("*.jpg"))):
            texts = json.dumps(captions(number)).replace('"', '""')
            lines.append(f'{file.relative_to(image_folder)},{label(number)},train,"{texts}"')
        (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")

    write(lambda n: "b", lambda n: ["one", "two"])
    dataset = {"kind": "table", "file": str(tmp_path / "t.csv"), "root": str(image_folder)}
    config = make(dataset=dataset)
    run(config)
    # A new class before the old one gives all labels other numbers: that alone changes no row.
    write(lambda n: "a" if n == 3 else "b", lambda n: ["two", "one"] if n == 5 else ["one", "two"])
    found = diff.run(DiffConfig(cache=config.cache))
    assert (found["relabelled"], found["recaptioned"]) == (1, 1)
    assert (found["images_to_encode"], found["captions_to_encode"]) == (0, 0)
    assert found["files_read"] == 0
    write(lambda n: "b", lambda n: ["one", "two"])
    (image_folder / "val/cat/10.jpg").write_bytes((image_folder / "val/cat/12.jpg").read_bytes())
    found = diff.run(DiffConfig(cache=config.cache))
    assert (found["same_rows"], found["same"], found["changed"]) == (True, False, 1)


def test_diff_takes_single_options_over_those_recorded(make, image_folder, tmp_path, make_jpeg):
    lines = ["path,label,split"]
    lines += [f"{f.relative_to(image_folder)},b,train" for f in image_folder.rglob("*.jpg")]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    dataset = {"kind": "table", "file": str(tmp_path / "t.csv"), "root": str(image_folder)}
    config = make(dataset=dataset)
    run(config)
    other = tmp_path / "elsewhere"
    shutil.copytree(image_folder, other)
    next(other.rglob("*.jpg")).write_bytes(make_jpeg(20, 30, 77))
    flags = ["--cache", str(config.cache), "--dataset.root", str(other)]
    asked = DiffConfig.from_command_line(flags)
    assert asked.dataset.record() == {
        **Store.open(config.cache).attributes["dataset"],
        "root": str(other),
    }
    found = diff.run(asked)
    assert (found["num_rows"]["dataset"], found["changed"]) == (14, 1)
    limited = DiffConfig.model_validate({"cache": config.cache, "dataset": {"limit": 3}})
    assert diff.run(limited)["lost"] == 11
    said = DiffConfig.from_command_line([*flags, "--dataset", "folder"])
    assert said.dataset.record() == DATASETS["folder"](root=other).record()
    with pytest.raises(ConfigError, match=r"^cache: Field required$"):
        DiffConfig.from_command_line(flags[2:])
    with pytest.raises(ValueError, match=r"dataset\.table\.delimiters"):
        DiffConfig.model_validate({"cache": config.cache, "dataset": {"delimiters": 3}})


def test_diff_without_a_known_dataset(written):
    path = written().path
    with pytest.raises(CacheError, match=r"made from dataset kind None.*name the dataset with"):
        diff.run(DiffConfig(cache=path))
