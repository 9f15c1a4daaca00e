"""A cache whose dataset changed: nothing known is encoded again, nothing is ever lost."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from featcache import extraction, survey
from featcache.extract import ExtractConfig, run
from featcache.extraction import Extraction
from featcache.reader import open_cache
from featcache.store import verify

EXACT = {"precision": "fp32", "features": {"storage_dtype": "float32"}}


class Meter:
    """Counts what is encoded, and what is read to be compared."""

    def __init__(self, monkeypatch):
        self.images = self.texts = 0
        self.read: list[str] = []
        encode, read = extraction.encode_views, survey.read_bytes
        encode_texts = Extraction._encode_texts

        def counted(backbone, pixels, request, rows, *rest):
            self.images += rows
            return encode(backbone, pixels, request, rows, *rest)

        def counted_texts(session, texts, *rest):
            self.texts += len(texts)
            return encode_texts(session, texts, *rest)

        def noted(root, path):
            self.read.append(path)
            return read(root, path)

        monkeypatch.setattr(extraction, "encode_views", counted)
        monkeypatch.setattr(Extraction, "_encode_texts", counted_texts)
        monkeypatch.setattr(survey, "read_bytes", noted)

    def reset(self):
        self.images = self.texts = 0
        self.read = []


@pytest.fixture
def meter(monkeypatch):
    return Meter(monkeypatch)


@pytest.fixture
def make(image_folder, tiny_clip, tmp_path):
    """Configuration of an extraction of the small image folder; keywords override."""

    def build(cache="cache", **changed):
        values = {
            "dataset": {"root": str(image_folder)},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "cache": str(tmp_path / cache),
            "device": "cpu",
            "batch_size": 4,
            "shard_rows": 4,
            "num_readers": 2,
            **EXACT,
            **changed,
        }
        return ExtractConfig.model_validate(values)

    return build


def by_id(path, name="image/projected"):
    cache = open_cache(path)
    return dict(zip(cache.ids, cache.array(name).read(), strict=True))


def assert_like_fresh(grown: Path, fresh: Path) -> None:
    """Everything equal to a cache extracted anew: features up to rounding, all else exactly."""
    assert verify(grown) == []
    first, second = open_cache(grown), open_cache(fresh)
    assert first.fingerprint == second.fingerprint
    assert (first.ids, first.paths, first.splits) == (second.ids, second.paths, second.splits)
    for name in ("rows/valid", "rows/content", "rows/stamp"):
        assert np.array_equal(first.store.read(name), second.store.read(name)), name
    assert first.feature_names() == second.feature_names()
    for name in first.feature_names():
        a, b = first.array(name).read(), second.array(name).read()
        assert a.shape == b.shape
        assert np.allclose(a, b, rtol=0, atol=1e-6 * np.nanmax(np.abs(b)), equal_nan=True), name
    assert first.classes.equals(second.classes)
    invalid = [
        [item for _, report in sorted(reports.items()) for item in report["invalid"]]
        for reports in (first.store.reports("image"), second.store.reports("image"))
    ]
    assert invalid[0] == invalid[1]


def leftovers(path: Path) -> list[str]:
    names = {p.name for p in path.parent.iterdir() if p.name.startswith(path.name)}
    return sorted(names - {path.name, f"{path.name}.lock"})


def change_everything(folder: Path, make_jpeg) -> None:
    """Gains, losses, moves, another label, other content, duplicates, a new class."""
    (folder / "train/cat/00.jpg").unlink()
    (folder / "train/dog/01.jpg").rename(folder / "val/dog/01.jpg")  # another split
    (folder / "train/cat/02.jpg").rename(folder / "train/dog/02.jpg")  # another label
    (folder / "train/cat/04.jpg").write_bytes(make_jpeg(33, 44, 104))  # other content
    for name, seed in (("a", 101), ("m", 102), ("z", 103)):
        (folder / f"train/cat/{name}.jpg").write_bytes(make_jpeg(40, 40, seed))
    (folder / "train/owl").mkdir()
    (folder / "val/owl").mkdir()
    shutil.copy(folder / "train/cat/a.jpg", folder / "train/owl/same.jpg")  # new twice
    shutil.copy(folder / "val/dog/11.jpg", folder / "train/owl/known.jpg")  # known already
    (folder / "val/owl/x.jpg").write_bytes(make_jpeg(50, 30, 105))


def test_only_new_content_is_encoded_and_the_rest_is_equal_to_the_bit(
    make, meter, image_folder, make_jpeg, capsys
):
    config = make()
    run(config)
    before = by_id(config.cache)
    change_everything(image_folder, make_jpeg)
    meter.reset()
    report = run(config)
    assert meter.images == 5  # a, m, z, x and the changed 04
    # Moved, gained and changed files are read to be compared; the other ten are not even opened.
    assert len(meter.read) == 9
    assert (report.num_rows, report.num_extracted, report.num_copied) == (19, 5, 14)
    out = capsys.readouterr().out
    assert "6 gained, 1 lost, 2 moved, 1 changed, 1 new class" in out
    assert "5 images to encode, 14 taken over" in out
    after = by_id(config.cache)
    for name in before.keys() & after.keys() - {"train/cat/04.jpg"}:
        assert np.array_equal(before[name], after[name]), name
    assert np.array_equal(before["train/dog/01.jpg"], after["val/dog/01.jpg"])
    assert np.array_equal(after["train/owl/known.jpg"], before["val/dog/11.jpg"])
    assert np.array_equal(after["train/owl/same.jpg"], after["train/cat/a.jpg"])
    assert leftovers(config.cache) == []
    run(make("fresh"))
    assert_like_fresh(config.cache, make("fresh").cache)
    meter.reset()
    assert run(config).num_extracted == 0
    assert meter.images == 0
