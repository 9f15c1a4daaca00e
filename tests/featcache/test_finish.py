"""Features of an adapted backbone out of a cache of its base: what extraction would write."""

import numpy as np
import pandas as pd
import pytest
import torch

from featcache import finish
from featcache.adapter_folder import write_adapter
from featcache.adapters.last_blocks import LastBlocksConfig
from featcache.adapters.projection import ProjectionConfig
from featcache.adapters.vpt import VptConfig
from featcache.backbones.open_clip import OpenClipConfig
from featcache.errors import BackboneError, CacheError, CacheMismatchError
from featcache.extract import ExtractConfig, run
from featcache.finish import FinishConfig, Finishing
from featcache.reader import open_cache
from featcache.store import verify


@pytest.fixture
def captioned(image_folder, tmp_path):
    """Table of the small image folder with two captions for most rows, one image unreadable."""
    (image_folder / "train/dog/03.jpg").write_bytes(b"no image")
    rows = []
    for file in sorted(image_folder.rglob("*.jpg")):
        path = file.relative_to(image_folder)
        for number in range(2 if file.stem != "05" else 1):
            rows.append((path, path.parts[0], path.parts[1], f"picture {file.stem} {number}"))
    table = tmp_path / "captions.csv"
    pd.DataFrame(rows, columns=["path", "split", "label", "caption"]).to_csv(table, index=False)
    options = {"kind": "table", "repeated_rows": "captions"}
    return {**options, "file": str(table), "root": str(image_folder)}


@pytest.fixture
def extract(captioned, tmp_path):
    """Extracts the table with a backbone and features into a cache of that name."""

    def build(name, backbone, **changes):
        values = {
            "dataset": captioned,
            "backbone": backbone.record(),
            "cache": str(tmp_path / name),
            "device": "cpu",
            "precision": "fp32",
            "batch_size": 4,
            "shard_rows": 8,
            "max_invalid": 0.5,
            **changes,
        }
        config = ExtractConfig.model_validate(values)
        return run(config), open_cache(config.cache)

    return build


def trained(base, config, folder):
    """A folder with an adapter whose tensors are not the initial ones."""
    torch.manual_seed(4)
    backbone = base.open()
    adapter = config.attach(backbone.trainable())
    with torch.no_grad():
        for parameter in adapter.trained_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    folder.mkdir()
    write_adapter(folder, base, backbone, config, adapter.state())
    return {"kind": "adapted", "model": str(folder)}


def same(found, expected, arrays, atol):
    assert found.identity == expected.identity
    assert found.attributes["shards"] == expected.attributes["shards"]
    assert found.attributes["arrays"] == expected.attributes["arrays"]
    assert found.feature_names() == arrays
    np.testing.assert_array_equal(found.valid, expected.valid)
    assert not found.valid.all()
    for name in ("rows/content", "rows/stamp", "text/offsets", "rows/label_values"):
        np.testing.assert_array_equal(found.array(name).read(), expected.array(name).read())
    for name in arrays:
        one, other = (cache.array(name).read() for cache in (found, expected))
        np.testing.assert_allclose(one, other, atol=atol, rtol=1e-3)  # NaN where unreadable, both


@pytest.mark.parametrize(("views", "dtype"), [(1, "float32"), (2, "float16")])
def test_tokens_through_trained_last_blocks(extract, tiny_clip, tmp_path, views, dtype):
    base = OpenClipConfig(model=f"local-dir:{tiny_clip}")
    options = {"views": {"num_views": views}, "features": {"storage_dtype": dtype}}
    tokens = {"storage_dtype": dtype, "tokens": "before_last:2", "projected": False}
    extract("tokens", base, **{**options, "features": tokens})
    adapted = trained(base, LastBlocksConfig(num_blocks=1), tmp_path / "tuned")
    config = FinishConfig(cache=tmp_path / "tokens", backbone=adapted, out=tmp_path / "new")
    report = finish.run(config)
    assert (report.num_rows, report.num_invalid, report.num_extracted) == (14, 1, 14)
    new = open_cache(tmp_path / "new")
    direct = extract("direct", config.backbone, **options)[1]
    atol = 1e-5 if dtype == "float32" else 5e-3
    same(new, direct, ["image/projected", "text/projected"], atol)
    assert verify(new.path) == []
    invalid = [r["invalid"] for c in (new, direct) for r in c.store.reports("image").values()]
    assert [i for i in invalid[:2] if i] == [i for i in invalid[2:] if i]
    # Extraction finds nothing to do, and finishing neither.
    assert extract("new", config.backbone, **options)[0].num_extracted == 0
    assert finish.run(config).num_extracted == 0


def test_vectors_through_heads_and_tokens_through_the_base_itself(extract, tiny_clip, tmp_path):
    base = OpenClipConfig(model=f"local-dir:{tiny_clip}")
    features = {"storage_dtype": "float32", "tokens": "before_last:1"}
    own = extract("cache", base, features=features)[1]
    heads = ProjectionConfig(image="mlp", text="linear", dim=8)
    adapted = trained(base, heads, tmp_path / "heads")
    config = FinishConfig(cache=tmp_path / "cache", backbone=adapted, out=tmp_path / "new")
    finish.run(config)
    arrays = ["image/projected", "text/projected"]
    direct = extract("direct", config.backbone, features={"storage_dtype": "float32"})[1]
    same(open_cache(tmp_path / "new"), direct, arrays, 1e-5)
    assert direct.array("text/projected").shape[-1] == 8

    finish.run(FinishConfig(cache=tmp_path / "cache", out=tmp_path / "base"))
    again = open_cache(tmp_path / "base")
    assert again.identity.backbone == own.identity.backbone
    for name in arrays:
        one, other = (cache.array(name).read() for cache in (again, own))
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_an_interrupted_run_goes_on(extract, tiny_clip, tmp_path, monkeypatch):
    base = OpenClipConfig(model=f"local-dir:{tiny_clip}")
    extract("tokens", base, features={"tokens": "before_last:1"})
    original = Finishing._extract_images

    def stopped(self, shard):
        if shard.index == 1:
            raise KeyboardInterrupt
        return original(self, shard)

    monkeypatch.setattr(Finishing, "_extract_images", stopped)
    config = FinishConfig(cache=tmp_path / "tokens", out=tmp_path / "new")
    with pytest.raises(KeyboardInterrupt):
        finish.run(config)
    assert not finish.Store.open(tmp_path / "new").complete
    monkeypatch.undo()
    assert finish.run(config).num_extracted == 6  # the second shard of 14 rows
    whole = FinishConfig(cache=tmp_path / "tokens", out=tmp_path / "whole")
    finish.run(whole)
    for name in ("image/projected", "text/projected"):
        one, other = (open_cache(c.out).array(name).read() for c in (config, whole))
        np.testing.assert_array_equal(one, other)


def test_caches_that_do_not_help_are_refused(extract, tiny_clip, tmp_path, monkeypatch):
    base = OpenClipConfig(model=f"local-dir:{tiny_clip}")
    extract("vectors", base)
    extract("tokens", base, features={"tokens": "before_last:1", "projected": False})
    other = base.model_copy(update={"pretrained": "random:5"})

    def refused(error, match, cache, adapted=None):
        with pytest.raises(error, match=match):
            finish.run(FinishConfig(cache=tmp_path / cache, backbone=adapted, out=tmp_path / "x"))
        assert not (tmp_path / "x").exists()

    two = trained(base, LastBlocksConfig(num_blocks=2), tmp_path / "two")
    refused(CacheError, "features.tokens is none, going on", "vectors", two)
    refused(CacheError, "needs before_last:2; extract with that", "tokens", two)
    prompts = trained(base, VptConfig(num_tokens=2), tmp_path / "vpt")
    refused(BackboneError, "no cache of its base helps", "tokens", prompts)
    heads = trained(base, ProjectionConfig(), tmp_path / "heads")
    refused(CacheError, "no image/projected, which adapter projection reads", "tokens", heads)
    foreign = trained(other, LastBlocksConfig(), tmp_path / "foreign")
    refused(CacheMismatchError, "weights differs", "tokens", foreign)
    monkeypatch.setattr("featcache.class_text.BACKBONES", {"timm": None})
    refused(CacheError, "by backbone kind 'open_clip', this installation has timm", "tokens")
