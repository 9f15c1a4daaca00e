"""Caches of tokens: which ones, in which type, what the plan says, and what every reader gives."""

import json
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr

from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError, CacheCorruptError, CacheMismatchError, ConfigError
from featcache.export import to_numpy, to_parquet
from featcache.extract import ExtractConfig, Extraction, plan, run
from featcache.images import load_pixels
from featcache.info import describe
from featcache.layout.quantize import as_stored, dequantize, quantize, smallest_cosine
from featcache.reader import open_cache
from featcache.store import verify
from heads.data import FeatureTable

LENGTH, WIDTH = 17, 64  # one class token and 4 x 4 patches of the tiny CLIP
INT8 = {"tokens": "before_last:1", "token_dtype": "int8"}


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


@pytest.fixture
def backbone(tiny_clip):
    return OpenClipConfig(model=f"local-dir:{tiny_clip}").open()


def encoded(backbone, root, ids, request):
    """Features of images by the backbone alone, in batches of four."""
    pixels = [load_pixels((root / name).read_bytes(), backbone.spec.pixels)[0] for name in ids]
    batches = [torch.stack(pixels[at : at + 4]) for at in range(0, len(pixels), 4)]
    parts = [backbone.encode_image(batch, request) for batch in batches]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


@pytest.fixture
def stored(make, backbone, image_folder):
    """An int8 cache of two views, one image unreadable; the cache and its plain tokens."""
    (image_folder / "train/dog/03.jpg").write_bytes(b"no image")
    config = make(features=INT8, views={"num_views": 2}, max_invalid=0.5)
    run(config)
    cache = open_cache(config.cache)
    ids = [name for name, valid in zip(cache.ids, cache.valid, strict=True) if valid]
    request = FeatureRequest(tokens=True, before_last=1)
    return cache, encoded(backbone, image_folder, ids, request)


def test_int8_tokens_are_read_as_the_numbers_they_stand_for(stored):
    cache, exact = stored
    array = cache.array("image/tokens")
    assert (array.dtype, array.shape) == (np.float32, (14, 2, LENGTH, WIDTH))
    assert array.codes.dtype == np.int8
    assert array.scales.shape == (14, 2, LENGTH)
    found = array.read(view=0)
    assert np.isnan(found[~cache.valid]).all()
    valid = np.flatnonzero(cache.valid)
    np.testing.assert_allclose(found[valid], as_stored(exact["tokens"], "int8"), atol=1e-4)
    # Every way of reading gives the same numbers.
    both = array.read()
    np.testing.assert_array_equal(both[:, 0], found)
    rows = np.array([9, 2, 2, 13, 0])
    np.testing.assert_array_equal(array.take(rows), both[rows])
    np.testing.assert_array_equal(array.read(slice(3, 11, 2), view=1), both[3:11:2, 1])
    np.testing.assert_array_equal(array.read(slice(5, 5)), both[:0])
    out = np.empty((5, *array.shape[1:]), np.float32)
    assert array.read(rows, out) is out
    np.testing.assert_array_equal(out, both[rows])
    np.testing.assert_array_equal(cache.dask("image/tokens").compute(), both)
    for batch, features in cache.batches("image/tokens", "train", 4, shuffle=True):
        np.testing.assert_array_equal(features, both[batch])
    item = pickle.loads(pickle.dumps(cache.dataset("image/tokens", "val")))[1]
    np.testing.assert_array_equal(item["features"].numpy(), both[item["row"]])
    group = zarr.open_group(cache.path, mode="r")["image"]
    by_zarr = dequantize(group["tokens"][...], group["tokens_scale"][...])
    np.testing.assert_array_equal(by_zarr, both)


def test_blocks_of_a_long_read_are_put_together(stored, monkeypatch):
    cache, _ = stored
    array = cache.array("image/tokens")
    whole = array.read()
    monkeypatch.setattr("featcache.layout.quantized_array._BLOCK_BYTES", 3 * array.row_bytes)
    np.testing.assert_array_equal(array.read(), whole)
    np.testing.assert_array_equal(array.take(np.arange(14)[::-1]), whole[::-1])


def test_rows_outside_are_named(stored):
    cache, _ = stored
    array = cache.array("image/tokens")
    for rows in ([12, 13, 14], [-2, -1], [14]):
        with pytest.raises(IndexError, match=r"image/tokens: rows lie outside 0\.\.13"):
            array.take(np.asarray(rows))


def test_a_head_holds_codes_and_gets_floats(stored, monkeypatch):
    cache, _ = stored
    array, rows = cache.array("image/tokens"), cache.rows("train")
    table = FeatureTable(array, rows, torch.device("cpu"))
    assert table.data.dtype == torch.int8
    index = torch.tensor([3, 0, 3])
    np.testing.assert_array_equal(table.batch(index), array.read(rows[index.numpy()], view=0))
    views = torch.tensor([1, 0, 1])
    expected = array.read(rows[index.numpy()])[np.arange(3), views.numpy()]
    np.testing.assert_array_equal(table.batch(index, views), expected)
    np.testing.assert_array_equal(table.slice(1, 4), array.read(rows[1:4], view=0))
    mean, std = table.statistics()
    flat = array.read(rows, view=0).reshape(-1, WIDTH).astype(np.float64)
    np.testing.assert_allclose(mean, flat.mean(0), atol=1e-5)
    np.testing.assert_allclose(std, flat.std(0), rtol=1e-4)
    monkeypatch.setattr("heads.data._free_memory", lambda device: 0)
    files = FeatureTable(array, rows, torch.device("cpu"))
    assert files.held == "files"
    assert torch.equal(files.batch(index, views), table.batch(index, views))


def test_exports_hold_plain_numbers(stored, tmp_path):
    cache, _ = stored
    whole = cache.array("image/tokens").read()
    folder = to_numpy(cache, tmp_path / "numpy")
    assert sorted(file.name for file in folder.glob("*.npy")) == [
        "image.projected.npy",
        "image.tokens.npy",
    ]
    np.testing.assert_array_equal(np.load(folder / "image.tokens.npy"), whole)
    table = pq.read_table(to_parquet(cache, tmp_path / "rows.parquet", ["image/tokens"]))
    shape = json.loads(table.schema.field("tokens").metadata[b"shape"])
    rows = np.stack(table["tokens"].take(np.flatnonzero(cache.valid)).to_pylist())
    np.testing.assert_array_equal(rows.reshape(-1, *shape), whole[cache.valid])


def test_damage_in_codes_or_scales_is_found(stored):
    cache, _ = stored
    for name in ("image/tokens", "image/tokens_scale"):
        file = next(file for file in (cache.path / name / "c").rglob("*") if file.is_file())
        before = file.read_bytes()
        file.write_bytes(before[:7] + bytes([before[7] ^ 1]) + before[8:])
        assert [name in problem for problem in verify(cache.path)] == [True]
        with pytest.raises(CacheCorruptError, match=f"{name}/c/"):
            open_cache(cache.path).array("image/tokens")
        file.write_bytes(before)
    assert verify(cache.path) == []


@pytest.mark.parametrize(
    ("dtype", "cosine"), [("float32", None), ("float16", 1e-6), ("int8", 1e-3)]
)
def test_finished_features_come_close_to_the_cached_ones(
    make, backbone, image_folder, dtype, cosine, capsys
):
    config = make(features={"tokens": "before_last:2", "token_dtype": dtype, "projected": True})
    run(config)
    cache = open_cache(config.cache)
    tokens = torch.from_numpy(cache.array("image/tokens").read())
    finished = backbone.finish_from(tokens, 2).numpy()
    exact = encoded(backbone, image_folder, cache.ids, FeatureRequest())["projected"]
    error = cache.attributes.get("token_error")
    printed = capsys.readouterr().out
    if cosine is None:
        np.testing.assert_allclose(finished, exact, rtol=1e-5, atol=1e-5)
        assert error is None
        assert "relative RMS" not in printed
        return
    found = 1 - smallest_cosine(finished, exact)
    assert 0 < found < cosine
    # What the plan said was measured on the first batch, on which it holds exactly.
    first = 1 - smallest_cosine(finished[:4], exact[:4])
    assert 1 - error["finished_cosine"] == pytest.approx(first, rel=0.02, abs=2e-8)
    assert (error["dtype"], error["num_images"]) == (dtype, 4)
    assert f"{dtype} tokens of the first 4 images: relative RMS error" in printed
    assert describe(cache)["token_error"] == error


@pytest.mark.parametrize("tokens", ["all", "grid:2"])
def test_patch_tokens_in_int8(make, backbone, image_folder, tokens):
    config = make(features={"tokens": tokens, "token_dtype": "int8"})
    run(config)
    cache = open_cache(config.cache)
    side = None if tokens == "all" else 2
    exact = encoded(
        backbone, image_folder, cache.ids, FeatureRequest(tokens=True, token_pool=side)
    )["tokens"]
    codes, scales = quantize(exact)
    array = cache.array("image/tokens")
    np.testing.assert_allclose(array.scales.read(), scales, rtol=1e-4)
    assert np.abs(array.codes.read().astype(int) - codes).max() <= 1
    assert cache.attributes["token_error"]["finished_cosine"] is None
    relative = np.linalg.norm(array.read() - exact) / np.linalg.norm(exact)
    assert cache.attributes["token_error"]["relative_rms"] == pytest.approx(relative, rel=0.1)


def test_resumed_and_cut_otherwise_the_bytes_are_the_same(make, monkeypatch):
    whole = make("whole", features=INT8)
    run(whole)
    part = make("part", features=INT8, shard_rows=4)
    encode = Extraction._extract_images

    def cut(self, shard):
        if shard.index > 1:
            raise KeyboardInterrupt
        return encode(self, shard)

    monkeypatch.setattr(Extraction, "_extract_images", cut)
    with pytest.raises(KeyboardInterrupt):
        run(part)
    unfinished = open_cache(part.cache, allow_incomplete=True)
    done = unfinished.array("image/tokens").read()
    assert np.isnan(done[8:]).all()
    monkeypatch.undo()
    run(part)
    first, second = (open_cache(config.cache).array("image/tokens") for config in (whole, part))
    np.testing.assert_array_equal(first.codes.read(), second.codes.read())
    np.testing.assert_array_equal(first.scales.read(), second.scales.read())
    np.testing.assert_array_equal(done[:8], first.read()[:8])


def test_a_dry_run_tells_sizes_and_error_and_writes_nothing(make, capsys):
    config = make(features=INT8, dry_run=True)
    report = run(config)
    out = capsys.readouterr().out
    assert not config.cache.exists()
    # 14 rows fill one chunk of 16: 17 x 64 codes, 4 bytes a scale, and the checksums.
    codes, scales = 16 * LENGTH * WIDTH + 4, 16 * LENGTH * 4 + 4
    half = 16 * LENGTH * WIDTH * 2 + 4
    kilo = [f"{number / 1000:.1f} kB" for number in (codes, codes + scales, half)]
    assert (
        f"image/tokens       14 x 17 x 64 int8, {kilo[0]} ({kilo[1]} with scales; float16 would "
        f"take {kilo[2]})" in out
    )
    assert "int8 tokens of the first 4 images: relative RMS error" in out
    assert "dry run: nothing was written" in out
    assert report.num_extracted == 0
    with pytest.raises(ConfigError, match="dry_run true writes nothing"):
        plan(config)
    real = make(features=INT8)
    assert run(real).fingerprint == report.fingerprint
    run(config)
    assert "0 of 1 shards are missing" in capsys.readouterr().out
    with pytest.raises(CacheMismatchError, match="token_dtype"):
        run(make(features={"tokens": "before_last:1"}, dry_run=True))


def test_sizes_on_disk_are_those_that_were_announced(make, capsys):
    config = make(features=INT8)
    run(config)
    printed = capsys.readouterr().out
    for name in ("image/tokens", "image/tokens_scale"):
        files = [f for f in (config.cache / name / "c").rglob("*") if f.is_file()]
        size = sum(file.stat().st_size for file in files)
        assert (
            f"float32, {size / 1000:.1f} kB" in printed or f"int8, {size / 1000:.1f} kB" in printed
        )
    arrays = describe(open_cache(config.cache))["arrays"]
    assert arrays["image/tokens"]["num_bytes"] == 14 * LENGTH * (WIDTH + 4)
    assert "image/tokens_scale" not in arrays


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"tokens": "before_last:0"}, "tokens"),
        ({"tokens": "before_last:1", "token_layer": 1}, "contradicts tokens before_last:1"),
        ({"tokens": "all", "token_dtype": "int4"}, "token_dtype"),
    ],
)
def test_options_that_contradict_each_other(make, features, message):
    with pytest.raises(ValueError, match=message):
        make(features=features)


def test_places_that_the_tower_does_not_have(make):
    with pytest.raises(BackboneError, match="before_last:1 to before_last:2"):
        run(make(features={"tokens": "before_last:3"}))
    with pytest.raises(ValueError, match=r"reference true contradicts features.token_dtype int8"):
        make(features=INT8, reference=True)


def test_tokens_too_large_for_float16_say_which_option_helps(make, monkeypatch):
    def huge(backbone, pixels, request, rows, texts):
        return {"tokens": np.full((rows, LENGTH, WIDTH), 7e4, np.float32)}

    monkeypatch.setattr("featcache.extraction.encode_views", huge)
    options = {"tokens": "before_last:1", "projected": False}
    with pytest.raises(
        BackboneError, match=r"float16 reaches .* set --features.token_dtype float32"
    ):
        run(make(features=options))
    config = make("int8", features={**options, "token_dtype": "int8"})
    run(config)  # a scale reaches as far as float32
    assert open_cache(config.cache).array("image/tokens").read() == pytest.approx(7e4)


def test_a_grown_cache_keeps_its_codes_and_what_was_measured(make, image_folder, make_jpeg):
    config = make(features=INT8)
    run(config)
    before = open_cache(config.cache)
    codes = before.array("image/tokens").codes.read()
    scales, ids = before.array("image/tokens").scales.read(), before.ids
    (image_folder / "train/cat/aa.jpg").write_bytes(make_jpeg(60, 70, 99))
    assert run(config).num_extracted == 1
    grown = open_cache(config.cache)
    assert grown.num_rows == 15
    old = [grown.ids.index(name) for name in ids]
    np.testing.assert_array_equal(grown.array("image/tokens").codes.read()[old], codes)
    np.testing.assert_array_equal(grown.array("image/tokens").scales.read()[old], scales)
    assert np.isfinite(grown.array("image/tokens").read()).all()
    assert grown.attributes["token_error"] == before.attributes["token_error"]
    assert verify(config.cache) == []
