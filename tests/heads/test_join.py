"""Heads on joined caches: train, evaluate, predict; two backbones are better than one."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from featcache import class_text, extract, report
from featcache.errors import CacheError, CacheMismatchError
from featcache.extract import ExtractConfig
from featcache.join import open_joined
from featcache.reader import open_cache
from featcache.report import ReportConfig
from heads import evaluate, predict, train
from heads.evaluate import EvaluateConfig
from heads.models.linear import LinearConfig
from heads.models.zero_shot import ZeroShotConfig, ensemble
from heads.optim import OptimConfig
from heads.predict import PredictConfig
from heads.run_folder import RunError, load_run
from heads.train import TrainConfig

Make = Callable[..., Path]


def config(cache: Path, join: tuple[Path, ...], run: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "head": LinearConfig(lrs=(0.03,), weight_decays=(0.0,)),
        "optim": OptimConfig(epochs=8),
        "quiet": True,
        "device": "cpu",
    }
    return TrainConfig(cache=cache, join=join, run=run, **(values | options))


@pytest.fixture
def halves(make_cache: Make) -> tuple[Path, Path]:
    """Two caches of one dataset; each tells apart only two of the four classes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 400)
    splits = ["train"] * 250 + ["val"] * 50 + ["test"] * 100
    paths = []
    for name, blind in (("one", labels // 2), ("two", labels % 2)):
        centres = rng.normal(size=(2, 12)) * 3
        features = (centres[blind] + rng.normal(size=(400, 12))).astype(np.float16)
        rows = [[label] for label in labels]
        paths.append(make_cache(name, features, rows, splits, num_classes=4, weights=name))
    return paths[0], paths[1]


def test_a_head_sees_what_either_backbone_sees(halves: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = halves
    alone = [train.run(config(path, (), tmp_path / path.name)).score for path in halves]
    joined = train.run(config(one, (two,), tmp_path / "both"))
    assert max(alone) < 0.7
    assert joined.score > 0.95
    loaded = load_run(joined.run)
    assert loaded.features == {"image/projected": 24}
    assert [member.alias for member in loaded.members] == ["one", "two"]
    assert [member.path for member in loaded.members] == [str(one), str(two)]
    again = train.run(config(one, (two,), tmp_path / "both"))
    assert again.reused


def test_the_cache_that_lacks_a_feature_is_named(halves: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = halves
    lacking = config(one, (two,), tmp_path / "both").model_copy(
        update={"head": LinearConfig(feature="pooled")}
    )
    with pytest.raises(CacheError, match=r"reads image/pooled.*; it is not in one, two; choose"):
        train.run(lacking)


def test_evaluation_finds_all_caches_again(
    halves: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = halves
    report = train.run(config(one, (two,), tmp_path / "both"))
    scores = evaluate.run(EvaluateConfig(run=report.run, split="test", device="cpu"))
    assert scores.metrics["top1"] == report.metrics["test"]["top1"]
    assert f"test of {one} + {two}" in capsys.readouterr().out
    named = EvaluateConfig(run=report.run, cache=one, join=(two,), split="test", device="cpu")
    assert evaluate.run(named).metrics == scores.metrics
    with pytest.raises(CacheMismatchError, match=r"1 cache\(s\) given, the head in .* on 2 \("):
        evaluate.run(EvaluateConfig(run=report.run, cache=one, device="cpu"))
    swapped = EvaluateConfig(run=report.run, cache=two, join=(one,), device="cpu")
    with pytest.raises(CacheMismatchError, match=r"two: backbone.weights differs"):
        evaluate.run(swapped)
    single = train.run(config(one, (), tmp_path / "single"))
    with pytest.raises(CacheMismatchError, match=r"2 cache\(s\) given, the head in .* on 1 \("):
        evaluate.run(EvaluateConfig(run=single.run, cache=one, join=(two,), device="cpu"))
    for model in (EvaluateConfig, PredictConfig):
        with pytest.raises(ValueError, match="needs cache"):
            model.model_validate(
                {"run": report.run, "join": [two], "out": "x.csv", "images": "x"}
                if model is PredictConfig
                else {"run": report.run, "join": [two]}
            )


@pytest.fixture
def backbones(tiny_clip: Path, image_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Caches of one folder by two backbones that normalise pixels differently."""
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other_clip"
    shutil.copytree(tiny_clip, other)
    tensors = load_file(other / "open_clip_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for tensor in tensors.values():
        if tensor.is_floating_point() and tensor.ndim > 1:
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    save_file(tensors, other / "open_clip_model.safetensors")
    settings = json.loads((other / "open_clip_config.json").read_text())
    settings["preprocess_cfg"]["mean"] = [0.1, 0.2, 0.3]
    (other / "open_clip_config.json").write_text(json.dumps(settings))
    paths = tmp_path / "caches" / "first", tmp_path / "caches" / "second"
    extract_into(paths, (tiny_clip, other), image_folder)
    return paths


def extract_into(paths: Sequence[Path | str], models: Sequence[Path], images: Path) -> None:
    for path, model in zip(paths, models, strict=True):
        values = {
            "cache": path,
            "dataset": {"kind": "folder", "root": images},
            "backbone": {"kind": "open_clip", "model": f"local-dir:{model}"},
            "device": "cpu",
        }
        extract.run(ExtractConfig.model_validate(values))


def test_a_join_of_grown_caches_is_evaluated_as_such(
    backbones: tuple[Path, Path],
    tiny_clip: Path,
    image_folder: Path,
    tmp_path: Path,
    make_jpeg: Callable[[int, int, int], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = backbones
    run = train.run(config(one, (two,), tmp_path / "both", optim=OptimConfig(epochs=1))).run
    (image_folder / "val" / "dog" / "new.jpg").write_bytes(make_jpeg(40, 40, 99))
    extract_into(backbones, (tiny_clip, tmp_path / "other_clip"), image_folder)
    capsys.readouterr()
    scores = evaluate.run(EvaluateConfig(run=run, split="val", device="cpu"))
    assert scores.metrics["num_rows"] == 5
    printed = capsys.readouterr().out.splitlines()
    for path in backbones:
        assert any(line.startswith(f"{path}: trained on an earlier state") for line in printed)
    steps = [
        f"an earlier state of {path}; it had 14 rows then; since: 1 gained" for path in backbones
    ]
    message = f"both: trained there on {steps[0]}; {steps[1]}; --restart trains anew on all rows"
    with pytest.raises(RunError, match=re.escape(message)):
        train.run(config(one, (two,), tmp_path / "both", optim=OptimConfig(epochs=1)))


def test_a_member_that_got_another_class_is_told_with_its_history(
    backbones: tuple[Path, Path],
    tmp_path: Path,
    image_folder: Path,
    make_jpeg: Callable[[int, int, int], bytes],
) -> None:
    one, two = backbones
    run = train.run(config(one, (two,), tmp_path / "both", optim=OptimConfig(epochs=1))).run
    (image_folder / "train" / "owl").mkdir()
    (image_folder / "train" / "owl" / "new.jpg").write_bytes(make_jpeg(40, 40, 99))
    extract_into(backbones[1:], (tmp_path / "other_clip",), image_folder)
    message = (
        "classes differ: 2 in first, 3 in second; join caches of one dataset; "
        f"{two}: it had 14 rows then; since: 1 gained, 1 new class"
    )
    named = {"cache": one, "join": (two,)}
    for options in ({}, named):
        with pytest.raises(CacheMismatchError, match=f"^{re.escape(message)}$"):
            evaluate.run(EvaluateConfig(run=run, split="val", device="cpu", **options))
    out = tmp_path / "out.csv"
    with pytest.raises(CacheMismatchError, match=f"^{re.escape(message)}$"):
        predict.run(PredictConfig(run=run, split="val", out=out, device="cpu"))
    other = train.run(config(one, (), tmp_path / "alone", optim=OptimConfig(epochs=1))).run
    with pytest.raises(CacheMismatchError, match=r"join caches of one dataset$"):
        evaluate.run(EvaluateConfig(run=other, split="val", device="cpu", **named))


def test_new_images_go_through_every_backbone(
    backbones: tuple[Path, Path], image_folder: Path, tmp_path: Path
) -> None:
    one, two = backbones
    run = train.run(config(one, (two,), tmp_path / "both", optim=OptimConfig(epochs=3))).run
    cached = predict.run(
        PredictConfig(
            run=run, cache=one, join=(two,), split="val", out=tmp_path / "a.csv", device="cpu"
        )
    ).table
    recorded = PredictConfig(run=run, split="val", out=tmp_path / "c.csv", device="cpu")
    assert predict.run(recorded).table.equals(cached)
    shutil.rmtree(tmp_path / "caches")
    broken = image_folder / "val" / "cat" / "broken.jpg"
    broken.write_bytes(b"nothing")
    found = predict.run(
        PredictConfig(run=run, images=image_folder / "val", out=tmp_path / "b.csv", device="cpu")
    )
    assert [(one.path, one.reason) for one in found.unreadable] == [
        ("cat/broken.jpg", "not an image, or of an unknown format")
    ]
    assert found.table["path"].tolist() == [
        path.removeprefix("val/") for path in cached["path"].sort_values()
    ]
    cached = cached.sort_values("path")
    assert found.table["class_1"].tolist() == cached["class_1"].tolist()
    assert_allclose(found.table["probability_1"], cached["probability_1"], atol=2e-3)


def test_a_member_may_lie_in_a_store(
    tiny_clip: Path, image_folder: Path, bucket: str, tmp_path: Path
) -> None:
    local, there = tmp_path / "local", f"{bucket}/there"
    extract_into((local, there), (tiny_clip, tiny_clip), image_folder)
    options = {"cache": local, "join": [there], "run": tmp_path / "run", "quiet": True}
    run = train.run(TrainConfig.model_validate({**options, "optim": {"epochs": 1}})).run
    assert [member.path for member in load_run(run).members] == [str(local), there]
    scores = evaluate.run(EvaluateConfig(run=run, split="val", device="cpu"))
    assert scores.metrics["num_rows"] == 4
    pages = []
    for cache in (local, there):
        values = {"cache": cache, "out": tmp_path / "r.html", "neighbours": "none", "quiet": True}
        pages.append(report.run(ReportConfig.model_validate(values)).out.read_text())
    assert pages[0].replace("local<", "there<") == pages[1]


def test_zero_shot_takes_the_mean_of_the_backbones_cosines(
    backbones: tuple[Path, Path], tmp_path: Path
) -> None:
    one, two = backbones
    head = ZeroShotConfig(templates="plain")
    run = train.run(config(one, (two,), tmp_path / "both", head=head)).run
    joined = open_joined(backbones)
    rows = joined.rows("val")
    features = torch.from_numpy(joined.array("image/projected").read(rows))
    cosines = []
    for path in backbones:
        cache = open_cache(path)
        text = class_text.class_text_features(cache, ["a photo of a {name}."], pytest.fail)
        image = torch.from_numpy(cache.array("image/projected").read(rows)).float()
        vectors = ensemble(torch.from_numpy(text))
        cosines.append(torch.nn.functional.normalize(image, dim=1) @ vectors.T)
    scale = joined.attributes["logit_scale"]
    expected = scale * torch.stack(cosines).mean(0)
    torch.testing.assert_close(load_run(run).head(features), expected, atol=1e-3, rtol=1e-4)
