"""The evaluation job: tables on disk, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.nn import functional as F

from featcache.errors import CacheMismatchError, ConfigError
from featcache.reader import open_cache
from heads import evaluate, train
from heads.data import FeatureTables, open_arrays
from heads.evaluate import EvaluateConfig, MetricsConfig
from heads.models.linear import LinearConfig
from heads.models.one_vs_rest import OneVsRestConfig
from heads.optim import OptimConfig
from heads.parts import labelled_part
from heads.run_folder import RunError
from heads.train import TrainConfig

from .conftest import toy_spec

CacheMaker = Callable[..., Path]


def trained(cache: Path, **options: Any) -> Path:
    head = LinearConfig(lrs=(0.1,), weight_decays=(0.0,))
    values: dict[str, Any] = {"head": head, "optim": OptimConfig(epochs=3)}
    run = cache.parent.parent / "run"
    return train.run(TrainConfig(cache=cache, run=run, quiet=True, **(values | options))).run


def test_evaluation_repeats_the_figures_of_the_training(
    make_single: CacheMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(make_single())
    recorded = json.loads((run / "metrics.json").read_text())
    for split in ("val", "test"):
        scores = evaluate.run(EvaluateConfig(run=run, split=split))
        assert scores.metrics == recorded[split]
        written = json.loads((run / f"metrics_{split}.json").read_text())
        assert written["top1"] == recorded[split]["top1"]
    out = capsys.readouterr().out
    assert "top1" in out
    assert "genus_summed" in out


def test_per_class_table(make_single: CacheMaker) -> None:
    cache = make_single(noise=2.0)
    run = trained(cache)
    scores = evaluate.run(EvaluateConfig(run=run))
    table = pd.read_csv(run / "classes_test.csv")
    opened = open_cache(cache)
    assert table["name"].tolist() == [f"c{i}" for i in range(5)]
    assert table["num_train"].tolist() == opened.classes["count"].tolist()
    assert table["num_rows"].tolist() == np.bincount(opened.labels(opened.rows("test"))).tolist()
    assert table["num_predicted"].sum() == 80
    right = (table["accuracy"] * table["num_rows"]).sum()
    assert right / 80 == pytest.approx(scores.metrics["top1"])
    assert table["accuracy"].mean() == pytest.approx(scores.metrics["balanced_accuracy"])
    assert 0.2 < scores.metrics["top1"] < 1.0


def test_multi_label_evaluation(make_multi: CacheMaker) -> None:
    cache = make_multi()
    run = trained(cache)
    scores = evaluate.run(EvaluateConfig(run=run))
    table = pd.read_csv(run / "classes_test.csv")
    opened = open_cache(cache)
    rows = opened.rows("test")
    features = opened.array("image/projected").read(rows)
    loaded = evaluate.load_run(run)
    import torch

    logits = loaded.head(torch.from_numpy(features)).detach().numpy()
    expected = average_precision_score(opened.multi_hot(rows), logits, average=None)
    np.testing.assert_allclose(table["average_precision"], expected)
    assert scores.metrics["map"] == pytest.approx(expected.mean())
    assert scores.metrics["map"] > 0.7


def test_another_cache_of_the_same_kind_is_scored(make_single: CacheMaker) -> None:
    run = trained(make_single())
    other = make_single("other", seed=5)
    scores = evaluate.run(EvaluateConfig(run=run, cache=other, split="train"))
    assert scores.metrics["num_rows"] == 300
    assert scores.metrics["top1"] > 0.8


def test_a_cache_with_other_classes_or_backbone_is_refused(make_single: CacheMaker) -> None:
    run = trained(make_single())
    renamed = pd.DataFrame({"name": ["c0", "c1", "x", "c3", "c4"]})
    cases = {
        r"classes differ: class 2 is 'x' in the cache, 'c2' in the head": {"classes": renamed},
        r"classes differ: the cache has 6, the head 5": {"num_classes": 6},
        r"backbone.weights differs: the cache holds 'w1'.* trained on 'w0'": {"weights": "w1"},
    }
    for number, (message, options) in enumerate(cases.items()):
        cache = make_single(f"other{number}", **options)
        with pytest.raises(CacheMismatchError, match=message):
            evaluate.run(EvaluateConfig(run=run, cache=cache))


def test_a_training_cache_that_was_replaced_is_noticed(make_single: CacheMaker) -> None:
    import shutil

    cache = make_single()
    run = trained(cache)
    shutil.rmtree(cache)
    make_single(seed=9)
    with pytest.raises(CacheMismatchError, match="fingerprint"):
        evaluate.run(EvaluateConfig(run=run))


def test_shot_boundaries_and_levels_are_options(make_single: CacheMaker) -> None:
    run = trained(make_single())
    counts = open_cache(json.loads((run / "head.json").read_text())["cache"]["path"]).classes
    middle = int(counts["count"].median())
    options = MetricsConfig(shot_boundaries=(1, middle), levels=("family",))
    scores = evaluate.run(EvaluateConfig(run=run, metrics=options)).metrics
    assert scores["num_head_classes"] == int((counts["count"] >= middle).sum())
    assert scores["num_tail_classes"] == 0
    assert "family" in scores
    assert "genus" not in scores
    with pytest.raises(ConfigError, match="no column 'tribe'"):
        evaluate.run(EvaluateConfig(run=run, metrics=MetricsConfig(levels=("tribe",))))
    with pytest.raises(ValueError, match="shot_boundaries are 9 and 9"):
        MetricsConfig(shot_boundaries=(9, 9))


def test_groups_of_the_dataset_hold_unless_boundaries_are_given(make_single: CacheMaker) -> None:
    names = ["tail", "head", "head", "head", "medium"]
    table = pd.DataFrame({"name": [f"c{i}" for i in range(5)], "group": names})
    run = trained(make_single(classes=table))
    recorded = json.loads((run / "metrics.json").read_text())["test"]
    assert [recorded[f"num_{g}_classes"] for g in ("head", "medium", "tail")] == [3, 1, 1]
    assert evaluate.run(EvaluateConfig(run=run)).per_class["group"].tolist() == names
    options = MetricsConfig(shot_boundaries=(1, 2))
    scores = evaluate.run(EvaluateConfig(run=run, metrics=options)).metrics
    assert scores["num_head_classes"] == 5


def test_a_test_list_without_labels_is_not_scored(make_cache: CacheMaker) -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(60, 12)).astype(np.float32)
    labels = [[int(value > 0)] for value in features[:40, 0]] + [[] for _ in range(20)]
    splits = ["train"] * 30 + ["val"] * 10 + ["test"] * 20
    cache = make_cache("toy", features, labels, splits, num_classes=2, task="multi_label")
    run = trained(cache)
    assert evaluate.run(EvaluateConfig(run=run)).metrics["num_rows"] == 10
    with pytest.raises(RunError, match="split 'test' has no valid labelled row"):
        evaluate.run(EvaluateConfig(run=run, split="test"))


def test_an_empty_split_is_refused(make_single: CacheMaker) -> None:
    run = trained(make_single())
    cache = make_single("hollow", invalid=list(range(360, 440)))
    with pytest.raises(RunError, match="split 'test' has no valid labelled row"):
        evaluate.run(EvaluateConfig(run=run, cache=cache, split="test"))


def test_the_validation_loss_of_one_class_is_that_class_alone(
    make_multi: Callable[..., Path],
) -> None:
    cache = open_cache(make_multi())
    part = labelled_part(cache, "test")
    arrays = open_arrays(cache, OneVsRestConfig())
    table = FeatureTables(arrays, part.rows, torch.device("cpu"))
    spec = toy_spec({"image/projected": 12}, 6, "multi_label")
    head = OneVsRestConfig(class_index=2).build(spec).eval()
    logits = head(*table.slice(0, len(part)))[:, 2].detach()
    expected = F.binary_cross_entropy_with_logits(
        logits, torch.from_numpy(part.targets[:, 2]).float()
    )
    found = evaluate.score_candidates(head, table, part, with_loss=True).loss
    assert found == pytest.approx(float(expected))
