"""Heads trained on cached vectors: batches of pairs, the kept epoch, and the backbone they make."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from featcache import finish
from featcache.adapters.projection import Head
from featcache.backbones import BACKBONES
from featcache.errors import CacheError, ConfigError
from featcache.extract import ExtractConfig
from featcache.extract import run as extract
from featcache.finish import FinishConfig
from featcache.reader import open_cache
from finetune import project
from finetune.contrastive.pair_features import PairFeatures, PairMeasure, choose_pairs
from finetune.losses.info_nce import InfoNceConfig
from finetune.project import ProjectConfig, run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def path(tmp_path_factory, make_jpeg, tiny_clip):
    """Cache of 24 train and 8 test images of two classes with 1 to 3 captions, in two views."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(32):
        split = "train" if number < 24 else "test"
        (folder / f"{number}.jpg").write_bytes(make_jpeg(40, 40, number))
        label = ("cat", "dog")[number % 2]
        for caption in range(1 + number % 3):
            name = number if split == "train" else number // 4  # some share their captions
            rows.append((f"{number}.jpg", split, label, f"{label} {name} {caption}"))
    table = folder / "captions.csv"
    pd.DataFrame(rows, columns=["path", "split", "label", "caption"]).to_csv(table, index=False)
    dataset = {"kind": "table", "repeated_rows": "captions", "file": str(table)}
    options = {
        "dataset": {**dataset, "root": str(folder)},
        "backbone": {"model": f"local-dir:{tiny_clip}"},
        "cache": str(folder / "cache"),
        "features": {"storage_dtype": "float32"},
        "views": {"num_views": 2},
        "device": "cpu",
        "precision": "fp32",
    }
    extract(ExtractConfig.model_validate(options))
    return folder / "cache"


def configured(path, out, **changes):
    values = {"cache": path, "out": out, "epochs": 6, "batch_size": 8, "device": "cpu"}
    return ProjectConfig.model_validate({**values, "quiet": True, **changes})


def test_batches_hold_distinct_images_with_captions_of_their_own(path):
    cache = open_cache(path)
    train = choose_pairs(cache, "train", None, 0.1, 0)[0]
    pairs = PairFeatures(cache, train.rows, CPU)
    images = torch.from_numpy(cache.array("image/projected").read(train.rows))
    texts = torch.from_numpy(cache.array("text/projected").read())
    seen_captions, seen_views = set(), set()
    for epoch in range(12):
        batches = list(pairs.batches(8, 0, epoch))
        assert [len(image) for image, _ in batches] == [8] * (len(pairs) // 8)  # never a short one
        used = []
        for image, text in batches:
            distance = (images[None] - image[:, None, None]).abs().amax(-1).flatten(1)
            index, view = divmod(distance.argmin(1).numpy(), 2)
            assert float(distance.amin(1).max()) == 0
            caption = (texts[None] - text[:, None]).abs().amax(-1).argmin(1).numpy()
            rows = train.rows[index]
            assert (cache.caption_offsets[rows] <= caption).all()
            assert (caption < cache.caption_offsets[rows + 1]).all()
            used += index.tolist()
            seen_captions |= set(caption.tolist())
            seen_views |= set(view.tolist())
        assert len(set(used)) == len(used)
    assert len(seen_captions) == pairs.offsets[-1]
    assert seen_views == {0, 1}
    first, again = (next(pairs.batches(8, 3, 5)) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_the_best_epoch_is_kept_and_its_backbone_measures_the_same(path, tmp_path, painted):
    config = configured(
        path, tmp_path / "p", optim={"lr": 0.01}, adapter={"text": "linear"}, templates=["plain"]
    )
    metrics = run(config).metrics
    lines = (config.out / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    assert [line["epoch"] for line in history] == list(range(7))
    assert history[6]["loss"] < history[1]["loss"]
    # Heads begin as nothing, so epoch 0 is the backbone itself; the kept epoch is the best one.
    assert history[0]["mean_recall"] == metrics["before"]["val"]["mean_recall"]
    best = history[metrics["best_epoch"]]
    assert best["mean_recall"] == max(line["mean_recall"] for line in history)
    assert {name: best[name] for name in metrics["after"]["val"]} == metrics["after"]["val"]
    # What finish makes of the cache by the folder measures the same, without heads.
    adapted = {"kind": "adapted", "model": str(config.out)}
    finish.run(FinishConfig(cache=path, backbone=adapted, out=tmp_path / "new"))
    new = open_cache(tmp_path / "new")
    test = choose_pairs(new, "train", None, 0.1, 0)[2]
    prompts = BACKBONES["adapted"].model_validate(adapted).open()
    measure = PairMeasure(new, test, CPU, prompts.encode_text(_prompts(new))[None])
    assert measure(nn.Identity(), nn.Identity()) == pytest.approx(metrics["after"]["test"])
    assert math.isclose(prompts.spec.logit_scale, metrics["logit_scale"], rel_tol=1e-6)
    assert run(config).reused
    assert (config.out / "curves.png").stat().st_size > 10_000


def test_the_first_of_the_best_epochs_is_given_back(path, tmp_path, monkeypatch):
    """And not the last, whose heads differ; dropout is on in steps and off in measuring."""
    recalls = iter([0.1, 0.2, 0.9, 0.3, 0.9, 0.4])
    seen, trained, put_back = [], [], []
    measure, forward, clamp = PairMeasure.__call__, Head.forward, InfoNceConfig.clamp

    def pretended(self, image_head, text_head):
        found = measure(self, image_head, text_head)
        if not isinstance(image_head, nn.Identity) and self.name == "val":
            seen.append({name: t.clone() for name, t in image_head.state_dict().items()})
            found["mean_recall"] = next(recalls, 0.9)
        return found

    def watched(self, features):
        trained.append((self.training, torch.is_grad_enabled()))
        return forward(self, features)

    def noted(self, logit_scale):
        put_back.append(clamp(self, logit_scale))

    monkeypatch.setattr(PairMeasure, "__call__", pretended)
    monkeypatch.setattr(Head, "forward", watched)
    monkeypatch.setattr(InfoNceConfig, "clamp", noted)
    config = configured(path, tmp_path / "p", epochs=5, adapter={"dropout": 0.5})
    assert run(config).metrics["best_epoch"] == 2
    kept = load_file(config.out / "adapter.safetensors")
    for name, tensor in seen[2].items():
        assert torch.equal(kept[f"image.{name}"], tensor)
    assert not torch.equal(seen[2]["second.weight"], seen[5]["second.weight"])
    assert set(trained) == {(True, True), (False, False)}
    assert len(put_back) == 5 * (21 // 8), "the scale, after every step"


def _prompts(cache):
    return [f"a photo of a {name}." for name in cache.classes["name"]]


def test_an_interrupted_training_goes_on_bit_for_bit(path, tmp_path, monkeypatch):
    options = {"adapter": {"image": "mlp", "dropout": 0.3}, "loss": {"kind": "siglip"}}
    whole = configured(path, tmp_path / "whole", **options)
    run(whole)
    monkeypatch.setattr(project, "SAVE_SECONDS", 0.0)
    original, calls = project.seed_all, []

    def stopped(seed, epoch):
        calls.append(epoch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        original(seed, epoch)

    monkeypatch.setattr(project, "seed_all", stopped)
    config = configured(path, tmp_path / "parts", **options)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert not config.out.exists()
    run(config)
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    tensors = [(folder / "adapter.safetensors").read_bytes() for folder in (whole.out, config.out)]
    assert tensors[0] == tensors[1]


def test_a_sigmoid_loss_begins_with_its_own_scale_and_bias(path, tmp_path):
    config = configured(path, tmp_path / "s", loss={"kind": "siglip"}, epochs=1, patience=None)
    metrics = run(config).metrics
    assert abs(metrics["logit_scale"] - 10) < 0.5
    bias = load_file(config.out / "adapter.safetensors")["logit_bias"]
    assert abs(float(bias) + 10) < 0.1


def test_splits_and_caches_without_captions_are_refused(path, tmp_path, image_folder, tiny_clip):
    cache = open_cache(path)
    train, val, test = choose_pairs(cache, "train", None, 0.25, 0)
    assert (len(train), len(val), len(test)) == (18, 6, 8)
    assert not np.intersect1d(train.rows, val.rows).size
    with pytest.raises(ConfigError, match="train_split and val_split are both 'train'"):
        choose_pairs(cache, "train", "train", 0.1, 0)
    options = {
        "dataset": {"root": str(image_folder)},
        "backbone": {"model": f"local-dir:{tiny_clip}"},
        "cache": str(tmp_path / "plain"),
        "device": "cpu",
        "precision": "fp32",
    }
    extract(ExtractConfig.model_validate(options))
    with pytest.raises(CacheError, match="not text/projected; extract a dataset with captions"):
        run(configured(tmp_path / "plain", tmp_path / "x"))
    assert not list(tmp_path.glob("x*"))


def test_an_image_alone_has_no_negatives() -> None:
    with pytest.raises(ConfigError, match=r"batch_size: .* greater than or equal to 2, found 1"):
        ProjectConfig.from_values({"cache": "cache", "out": "out", "batch_size": 1})
