import json
import os
import shutil
import threading
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import canonical_json
from featcache.errors import (
    BackboneError,
    CacheError,
    CacheMismatchError,
    ConfigError,
    UnreadableImagesError,
)
from featcache.extract import ExtractConfig, plan, run
from featcache.extraction import Extraction
from featcache.layout.chunks import sealed
from featcache.reader import open_cache
from featcache.store import Store, verify


@pytest.fixture
def make(image_folder, tiny_clip, tmp_path):
    """Configuration of an extraction of the small image folder; keywords override."""

    def build(cache="cache", **changes):
        values = {
            "dataset": {"root": str(image_folder)},
            "backbone": {"model": f"local-dir:{tiny_clip}"},
            "cache": str(tmp_path / cache),
            "device": "cpu",
            "precision": "fp32",
            "batch_size": 4,
            "num_readers": 2,
            **changes,
        }
        return ExtractConfig.model_validate(values)

    return build


def array_bytes(path):
    """Bytes of all row arrays' chunk files by name: no times, no versions."""
    arrays = [*path.glob("image/*"), *path.glob("text/projected")]
    arrays += [path / "rows/valid", path / "rows/content", path / "rows/stamp"]
    files = [file for array in arrays for file in (array / "c").rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(files)}


def features(path, name="image/projected"):
    return open_cache(path).array(name).read()


def direct(image_folder, tiny_clip, ids):
    """float32 features by open_clip alone: its own transform, one image at a time."""
    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    transform = backbone.reference_transform()
    with torch.no_grad():
        return np.stack(
            [
                backbone.model.encode_image(transform(Image.open(image_folder / name))[None])[0]
                for name in ids
            ]
        )


def test_features_equal_a_direct_pass(make, image_folder, tiny_clip):
    config = make()
    report = run(config)
    assert (report.num_rows, report.num_extracted, report.num_invalid) == (14, 14, 0)
    cache = open_cache(config.cache)
    found = cache.array("image/projected").read()
    assert found.dtype == np.float16
    expected = direct(image_folder, tiny_clip, cache.ids)
    # Pixels within one step of open_clip's; 1e-3 of the vectors' length after fp16 rounding.
    difference = np.linalg.norm(found.astype(np.float32) - expected, axis=1)
    assert (difference / np.linalg.norm(expected, axis=1)).max() < 2e-3
    assert len(cache.rows("train")) == 10
    assert cache.labels(cache.rows("val")).tolist() == [0, 0, 1, 1]


def test_reference_equals_a_direct_pass_of_the_same_batch_to_the_bit(make, image_folder, tiny_clip):
    config = make(reference=True, batch_size=14)
    run(config)
    cache = open_cache(config.cache)
    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    transform = backbone.reference_transform()
    pixels = torch.stack([transform(Image.open(image_folder / name)) for name in cache.ids])
    with torch.inference_mode():
        expected = backbone.model.encode_image(pixels).numpy()
    found = cache.array("image/projected").read()
    assert found.dtype == np.float32
    assert np.array_equal(found, expected)
    assert cache.identity.preprocess.mode == "reference"


def test_all_features_together_equal_each_alone(make):
    together = make("all", features={"pooled": True, "tokens": "grid:2"})
    run(together)
    for name, options in (
        ("image/projected", {}),
        ("image/pooled", {"projected": False, "pooled": True}),
        ("image/tokens", {"projected": False, "tokens": "grid:2"}),
    ):
        alone = make(name.replace("/", "-"), features=options)
        run(alone)
        assert np.allclose(features(alone.cache, name), features(together.cache, name), atol=2e-3)
    assert features(together.cache, "image/tokens").shape == (14, 4, 64)


BASE = {"features": {"pooled": True, "tokens": "grid:2"}, "views": {"num_views": 2}}


@pytest.fixture
def base(make):
    config = make("base", **BASE)
    run(config)
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {"num_readers": 1},
        {"num_readers": 7},
        {"shard_rows": 4},
        {"shard_rows": 8, "num_readers": 3},
        {"mode": "scaled"},  # no image is big enough to be scaled
    ],
)
def test_bytes_do_not_depend_on_shards_or_readers(make, base, changes):
    other = make("other", **BASE, **changes)
    run(other)
    for name in ("image/projected", "image/pooled", "image/tokens"):
        first, second = features(base.cache, name), features(other.cache, name)
        assert first.shape[:2] == (14, 2)
        assert np.array_equal(first, second)
    assert np.array_equal(
        Store.open(base.cache).read("rows/content"), Store.open(other.cache).read("rows/content")
    )


def test_interrupted_and_resumed_equals_uninterrupted(make, base, monkeypatch):
    whole = make("whole", **BASE, shard_rows=4)
    run(whole)
    part = make("part", **BASE, shard_rows=4)
    encode = Extraction._extract_images
    for stop in range(3):

        def cut(self, shard, stop=stop):
            if shard.index > stop:
                raise KeyboardInterrupt
            return encode(self, shard)

        monkeypatch.setattr(Extraction, "_extract_images", cut)
        with pytest.raises(KeyboardInterrupt):
            run(part)
        assert sorted(Store.open(part.cache).reports("image")) == list(range(stop + 1))
        with pytest.raises(CacheError, match="shards are missing"):
            open_cache(part.cache)
    monkeypatch.setattr(Extraction, "_extract_images", encode)
    report = run(part)
    assert report.num_extracted == 2  # the last shard only
    assert array_bytes(part.cache) == array_bytes(whole.cache)
    assert len(array_bytes(part.cache)) == 6 * 4


def test_an_error_in_the_encoder_leaves_no_thread_behind(make, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    before = threading.active_count()
    monkeypatch.setattr("featcache.extraction.encode_views", fail)
    with pytest.raises(KeyboardInterrupt):
        run(make())
    assert threading.active_count() == before
    monkeypatch.undo()
    assert run(make()).num_extracted == 14  # the lock was given back, too


def test_a_second_run_does_nothing(make, monkeypatch, capsys):
    config = make()
    run(config)
    before = array_bytes(config.cache)
    monkeypatch.setattr("featcache.extraction.encode_views", None)
    report = run(config)
    assert "is complete: 14 rows, nothing to do" in capsys.readouterr().out
    assert report.num_extracted == 0
    assert array_bytes(config.cache) == before


def test_batch_sizes_agree_within_rounding(make):
    configs = [make(f"b{size}", batch_size=size, reference=True) for size in (1, 4, 14, 32)]
    for config in configs:
        run(config)
    base, *others = (features(config.cache) for config in configs)
    for other in others:
        assert np.abs(other - base).max() < 1e-5 * np.abs(base).max()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions_agree_within_their_tolerance(make, precision):
    exact, fast = make("exact"), make("fast", precision=precision)
    run(exact)
    run(fast)
    first, second = (torch.tensor(features(c.cache)).float() for c in (exact, fast))
    assert cosine_similarity(first, second).min() > 0.999
    assert not torch.equal(first, second)
    assert open_cache(fast.cache).identity.precision == precision


def test_auto_takes_the_fast_precision_only_if_it_agrees(make, monkeypatch, capsys):
    monkeypatch.setattr("featcache.precision.fastest_precision", lambda device: "bf16")
    good, strict = make("good", precision="auto"), make("strict", precision="auto", min_cosine=1)
    assert run(good).precision == "bf16"
    assert "bf16 on cpu (smallest cosine to fp32 over 4 images: 0.99" in capsys.readouterr().out
    assert run(strict).precision == "fp32"
    assert "fp32 on cpu (bf16 is below 1.0" in capsys.readouterr().out
    assert Store.open(strict.cache).attributes["precision_cosine"] < 1
    with pytest.raises(BackboneError, match="precision bf16 differs from fp32 by more than"):
        run(make("explicit", precision="bf16", min_cosine=1))
    # A resumed cache keeps the one it began with, without another look.
    monkeypatch.setattr("featcache.precision.fastest_precision", lambda device: "fp32")
    assert run(good).precision == "bf16"


def test_real_files(make, image_folder, make_photo):
    folder = image_folder / "train" / "cat"
    jpeg = (folder / "00.jpg").read_bytes()
    (folder / "a-truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "b-empty.jpg").write_bytes(b"")
    (folder / "c-text.jpg").write_text("this is not an image")
    make_photo(50, 50, 1).save(folder / "d-png.jpg", "PNG")
    (folder / "e-missing.jpg").symlink_to(folder / "nowhere.jpg")
    locked = folder / "f-alpha.png"
    make_photo(50, 50, 2).convert("RGBA").save(locked)
    config = make(max_invalid=0.3)
    report = run(config)
    assert (report.num_rows, report.num_invalid) == (20, 4)
    reports = Store.open(config.cache).reports("image")
    reasons = {
        os.path.basename(item["path"]): item["reason"]
        for _, shard in sorted(reports.items())
        for item in shard["invalid"]
    }
    assert reasons["b-empty.jpg"] == "empty file"
    assert reasons["e-missing.jpg"] == "missing"
    assert reasons["c-text.jpg"] == "not an image, or of an unknown format"
    assert "truncated" in reasons["a-truncated.jpg"]
    cache = open_cache(config.cache)
    values = cache.array("image/projected").read()
    for row, name in enumerate(cache.ids):
        bad = os.path.basename(name) in reasons
        assert bad == bool(np.isnan(values[row]).all())
        assert bad != bool(np.isfinite(values[row]).all())
        assert cache.valid[row] != bad
    content = Store.open(config.cache).read("rows/content")
    assert np.array_equal(content == 0, ~cache.valid)


def test_a_directory_in_the_place_of_an_image(make, image_folder):
    config = make(max_invalid=0.5)
    with plan(config) as session:
        file = image_folder / session.manifest.paths[3]
        file.unlink()
        file.mkdir()
        for shard in session.pending():
            session.extract(shard)
        assert [item["reason"] for item in session.invalid()] == ["is a directory"]


def test_too_many_unreadable_images_fail_and_keep_what_is_done(make, image_folder):
    good = {}
    for name in ("00.jpg", "02.jpg"):
        file = image_folder / "train" / "cat" / name
        good[file] = file.read_bytes()
        file.write_bytes(b"broken")
    config = make(shard_rows=4)
    pattern = (
        r"2 of 14 images \(14\.3 %\) cannot be read, more than max_invalid 0.01 allows; the first "
        r"is train/cat/00.jpg: not an image.*--retry_invalid.*--max_invalid"
    )
    for _ in range(2):  # running again says the same, at once
        with pytest.raises(UnreadableImagesError, match=pattern):
            run(config)
        assert list(Store.open(config.cache).reports("image")) == [0]
    last = make("last", shard_rows=16, batch_size=2)
    with pytest.raises(UnreadableImagesError):
        run(last)
    with pytest.raises(CacheError, match=r"all shards are done, but .* did not end well"):
        open_cache(last.cache)
    for file, data in good.items():
        file.write_bytes(data)
    report = run(make(shard_rows=4, retry_invalid=True))
    assert (report.num_invalid, report.num_extracted) == (0, 14)
    clean = make("clean", shard_rows=4)
    run(clean)
    assert array_bytes(config.cache) == array_bytes(clean.cache)


def test_retry_invalid_redoes_only_the_shards_with_unreadable_images(make, image_folder):
    file = image_folder / "train" / "dog" / "09.jpg"
    data = file.read_bytes()
    file.unlink()
    file.symlink_to("nowhere.jpg")
    config = make(shard_rows=4, max_invalid=0.2)
    assert run(config).num_invalid == 1
    assert run(config).num_extracted == 0
    file.unlink()
    file.write_bytes(data)
    again = make(shard_rows=4, max_invalid=0.2, retry_invalid=True)
    report = run(again)
    assert (report.num_invalid, report.num_extracted) == (0, 4)
    assert open_cache(config.cache).valid.all()
    assert run(again).num_extracted == 0


def test_a_killed_retry_leaves_no_valid_row_without_features(make, image_folder, monkeypatch):
    (image_folder / "train/cat/00.jpg").write_bytes(b"no image")
    config = make(shard_rows=4, max_invalid=0.2)
    run(config)
    (image_folder / "train/cat/02.jpg").write_bytes(b"not any more")  # of the same shard
    write = Store.write_chunks

    def cut(self, name, start_row, data):
        if name == "rows/valid":
            raise KeyboardInterrupt
        write(self, name, start_row, data)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write_chunks", cut)
        with pytest.raises(KeyboardInterrupt):
            run(make(shard_rows=4, max_invalid=0.2, retry_invalid=True))
    with pytest.raises(CacheError, match="1 of 4 shards are missing"):
        open_cache(config.cache)
    report = run(config)
    assert (report.num_extracted, report.num_invalid) == (4, 2)
    cache = open_cache(config.cache)
    without = np.isnan(cache.array("image/projected").read()).any(axis=1)
    assert np.array_equal(cache.valid, ~without)


def test_repair_extracts_damaged_shards_again(make, capsys):
    config = make(shard_rows=4)
    run(config)
    before = array_bytes(config.cache)
    first, second = sorted((config.cache / "image/projected").glob("c/*/*"))[1:3]
    damaged = bytearray(first.read_bytes())
    damaged[5] ^= 1
    first.write_bytes(damaged)
    second.unlink()
    listed = config.cache / "shards/image/c/3"
    listed.write_bytes(listed.read_bytes()[:-1] + b"?")
    report = run(make(shard_rows=4, repair=True))
    out = capsys.readouterr().out
    assert "damaged: image/00001, image/00002" in out
    assert "damaged: the report of image/00003" in out
    assert report.num_extracted == 10
    assert verify(config.cache) == []
    assert array_bytes(config.cache) == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"precision": "bf16"}, "precision"),
        ({"mode": "scaled"}, "preprocess.mode"),
        ({"features": {"pooled": True}}, "features.pooled"),
        ({"features": {"storage_dtype": "float32"}}, "features.storage_dtype"),
        ({"views": {"num_views": 2}}, "features.num_views"),
    ],
)
def test_a_cache_that_holds_something_else_is_refused(make, changes, field):
    run(make())
    with pytest.raises(CacheMismatchError, match=f"{field} differs"):
        run(make(**changes))


def test_changed_weights_are_refused(make, tiny_clip, tmp_path):
    from safetensors.torch import load_file, save_file

    run(make())
    other = tmp_path / "other_clip"
    shutil.copytree(tiny_clip, other)
    weights = load_file(other / "open_clip_model.safetensors")
    weights["visual.proj"] += 0.1
    save_file(weights, other / "open_clip_model.safetensors")
    with pytest.raises(CacheMismatchError, match=r"backbone.weights differs"):
        run(make(backbone={"model": f"local-dir:{other}"}))
    assert run(make(restart=True)).num_extracted == 14


def test_restart_deletes_caches_only(make, tmp_path):
    config = make("precious", restart=True)
    config.cache.mkdir()
    (config.cache / "thesis.txt").write_text("ten years of work")
    with pytest.raises(CacheError, match="not a feature cache"):
        run(config)
    assert (config.cache / "thesis.txt").exists()


@pytest.mark.parametrize("change", ["format", "identity"])
def test_restart_replaces_a_cache_of_another_version(make, capsys, change):
    config = make()
    run(config)
    root = config.cache / "zarr.json"
    document = json.loads(root.read_bytes())
    attributes = document["attributes"]["featcache"]
    if change == "format":
        attributes["format"] = 0
    else:
        attributes["identity"]["features"]["smell"] = True
    root.write_bytes(sealed("", document))
    stale = config.cache.with_name("cache.donor-0123abcd")
    shutil.copytree(config.cache, stale)
    with pytest.raises(CacheError, match="--restart"):
        run(config)
    assert run(make(restart=True)).num_extracted == 14
    assert "restart: deleting a cache of another version (" in capsys.readouterr().out
    assert not stale.exists()
    attributes.clear()  # somebody's own group of that name
    attributes["format"] = 0
    root.write_bytes(sealed("", document))
    with pytest.raises(CacheError, match="not a feature cache"):
        run(make(restart=True))
    assert root.exists()


def test_a_file_in_the_way_of_the_cache(make, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CacheError, match=r"notes\.txt is a file; choose another path"):
        run(make("notes.txt/caches/birds"))


def test_one_writer_at_a_time(make):
    config = make()
    with plan(config):
        failures = []

        def second():
            try:
                run(config)
            except CacheError as error:
                failures.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "is writing this cache" in failures[0]


def test_values_that_float16_cannot_hold_name_the_image(make, monkeypatch):
    from featcache import extraction

    encode = extraction.encode_views

    def huge(backbone, pixels, request, rows, texts):
        arrays = encode(backbone, pixels, request, rows, texts)
        arrays["projected"][1, 3] = self_value
        return arrays

    monkeypatch.setattr(extraction, "encode_views", huge)
    self_value = 70_000.0
    with pytest.raises(
        BackboneError,
        match=r"image/projected of image train/cat/02.jpg holds 7e\+04, float16 reaches 6.55e\+04; "
        "set --features.storage_dtype float32",
    ):
        run(make())
    assert run(make("wide", features={"storage_dtype": "float32"})).num_invalid == 0
    self_value = float("nan")
    with pytest.raises(BackboneError, match=r"holds nan.*precision fp32"):
        run(make("nan", features={"storage_dtype": "float32"}))


def table(tmp_path, image_folder):
    rows = [
        {"path": str(file.relative_to(image_folder)), "label": file.parent.name, "split": "train"}
        for file in sorted(image_folder.rglob("*.jpg"))
    ]
    for number, row in enumerate(rows):
        captions = [f"picture {number} of a {row['label']}"] * (number % 3)
        row["captions"] = json.dumps(captions) if captions else ""
    file = tmp_path / "table.csv"
    lines = ["path,label,split,captions"]
    for row in rows:
        caption = row["captions"].replace('"', '""')
        lines.append(f'{row["path"]},{row["label"]},{row["split"]},"{caption}"')
    file.write_text("\n".join(lines) + "\n")
    return {"kind": "table", "file": str(file), "root": str(image_folder)}


def test_captions_are_encoded_beside_the_images(make, tmp_path, image_folder, tiny_clip):
    dataset = table(tmp_path, image_folder)
    config = make(dataset=dataset, shard_rows=8)
    report = run(config)
    cache = open_cache(config.cache)
    offsets, captions = cache.captions
    assert report.num_captions == len(captions) == 13
    assert offsets[-1] == 13
    found = features(config.cache, "text/projected").astype(np.float32)
    backbone = OpenClipConfig(model=f"local-dir:{tiny_clip}").open()
    expected = backbone.encode_text(captions).numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    other = make("small", dataset=dataset, shard_rows=4)
    run(other)
    assert np.array_equal(features(other.cache, "text/projected"), found.astype(np.float16))
    without = make("without", dataset=dataset, features={"text": False})
    run(without)
    assert not open_cache(without.cache).has("text/projected")


def test_shards_may_be_extracted_from_several_threads(make):
    whole, parts = make("whole", shard_rows=4), make("parts", shard_rows=4)
    run(whole)
    with plan(parts) as session:
        threads = [threading.Thread(target=session.extract, args=(s,)) for s in session.pending()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert session.pending() == []
        session.finish()
    assert array_bytes(parts.cache) == array_bytes(whole.cache)


def test_a_full_disk_is_noticed_before_anything_is_written(make, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1, 1, 10_000))
    config = make()
    with pytest.raises(CacheError, match=r"needs .* are free"):
        run(config)
    assert not config.cache.exists()


def test_what_will_be_written_is_said_first(make, capsys):
    run(make(features={"tokens": "all"}))
    out = capsys.readouterr().out
    assert "14 rows" in out
    assert "image/tokens     14 x 16 x 64 float16" in out
    assert out.index("total") < out.index("is complete")


def test_progress_is_plain_lines_where_there_is_no_terminal(make, monkeypatch, capsys):
    ticks = iter(range(0, 10_000, 7))
    monkeypatch.setattr("featcache.pipeline.time.monotonic", lambda: next(ticks))
    run(make(shard_rows=4))
    lines = [line for line in capsys.readouterr().out.splitlines() if " left" in line]
    assert len(lines) == 2
    assert lines[0].startswith(" 57.1 %  8/14 images")
    assert all(word in lines[0] for word in ("read", "encode", "write"))
    assert "\r" not in lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4, "shard_rows": 6}, "shard_rows 6 is not a multiple of batch_size 4"),
        ({"reference": True, "precision": "bf16"}, "reference true contradicts precision bf16"),
        ({"features": {"projected": False}}, "keep nothing"),
        ({"features": {"tokens": "grid:0"}}, "pattern"),
        ({"features": {"token_layer": 0}}, "layers count from 1"),
        ({"device": "tpu"}, "no such device|not supported"),
        ({"device": "cuda:99"}, "torch sees"),
        ({"features": {"text_policy": "os:nothing"}}, "os has no function 'nothing'"),
        ({"features": {"tokens": "grid:9"}}, "finer than the 4x4"),
        ({"features": {"tokens": "all", "token_layer": 9}}, "token_layer 9 does not exist"),
    ],
)
def test_mistakes_stop_before_anything_is_written(make, changes, message):
    with pytest.raises((ConfigError, BackboneError, ValueError), match=message):
        run(make(**changes))
    assert not make().cache.exists()


def test_resuming_with_other_shards_is_refused(make):
    run(make(shard_rows=4))
    with pytest.raises(ConfigError, match="began with 4; leave shard_rows unset"):
        run(make(shard_rows=8))
    assert run(make()).num_extracted == 0


def test_configuration_round_trips(make, tmp_path):
    config = make(features={"tokens": "grid:2"}, views={"num_views": 3})
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert ExtractConfig.from_yaml(file) == config
    assert canonical_json(ExtractConfig.from_yaml(file).record()) == canonical_json(config.record())
