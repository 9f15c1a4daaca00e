"""Heads made of the training rows at once: against scikit-learn and slow loops."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from heads import evaluate, train
from heads.base import FeatureSpec
from heads.evaluate import EvaluateConfig
from heads.mlp import RowScale
from heads.models import HEADS
from heads.models.knn import Knn, KnnConfig
from heads.models.logistic_regression import LogisticRegressionConfig, Solver
from heads.models.ridge import SHARPNESS, RidgeConfig, fit_ridge
from heads.train import TrainConfig

N, C, D = 240, 4, 6


def rows(num_rows: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (num_rows,), generator=generator)
    labels[:C] = torch.arange(C)
    centres = torch.randn(C, D, generator=torch.Generator().manual_seed(9))
    return centres[labels] + torch.randn(num_rows, D, generator=generator) + 0.5, labels


def multi_hot() -> tuple[Tensor, Tensor]:
    features, _ = rows()
    directions = torch.randn(C, D, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(N, C, generator=torch.Generator().manual_seed(4))
    return features, (features @ directions.T + noise > 1.0).float()


def spec(features: Tensor, targets: Tensor) -> FeatureSpec:
    counts = np.ones(C, np.int64)
    return FeatureSpec(
        feature_dim=D,
        num_classes=C,
        task="single_label" if targets.ndim == 1 else "multi_label",
        class_counts=counts,
        classes=pd.DataFrame({"name": [f"c{i}" for i in range(C)], "count": counts}),
        prompts=None,
        logit_scale=100.0,
        mean=features.mean(0),
        std=features.std(0),
        num_rows=len(features),
        support=lambda: ((features,), targets),
    )


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn"])
def test_logistic_regression_is_that_of_scikit_learn(solver: Solver) -> None:
    features, labels = rows()
    penalties = (1e-3, 1e-1)
    config = LogisticRegressionConfig(
        penalties=penalties, scaling="none", solver=solver, tolerance=1e-6
    )
    head = config.build(spec(features, labels))
    for penalty in penalties:
        model = LogisticRegression(C=1 / (penalty * N), tol=1e-9, max_iter=5000)
        model.fit(features.double().numpy(), labels.numpy())
        logits = dict(head.candidates(features))[f"penalty {penalty:g}"]
        expected = model.predict_proba(features.double().numpy())
        np.testing.assert_allclose(logits.softmax(1).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn"])
def test_several_labels_are_one_logistic_regression_a_class(solver: Solver) -> None:
    features, hot = multi_hot()
    config = LogisticRegressionConfig(
        penalties=(1e-2,), scaling="none", solver=solver, tolerance=1e-6
    )
    logits = config.build(spec(features, hot))(features)
    for index in range(C):
        model = LogisticRegression(C=1 / (1e-2 * N), tol=1e-9, max_iter=5000)
        model.fit(features.double().numpy(), hot[:, index].numpy())
        expected = model.predict_proba(features.double().numpy())[:, 1]
        np.testing.assert_allclose(logits[:, index].sigmoid().numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn"])
def test_classes_without_a_training_row_are_never_predicted(solver: Solver) -> None:
    features, labels = rows()
    keep = labels >= 2
    config = LogisticRegressionConfig(
        penalties=(1e-2,), scaling="none", solver=solver, tolerance=1e-6
    )
    logits = config.build(spec(features[keep], labels[keep]))(features)
    assert torch.isfinite(logits).all()
    assert set(logits.argmax(1).tolist()) <= {2, 3}
    own = features.double().numpy()
    # Its one weight vector w is our two, w/2 and -w/2, which have half the squared length.
    model = LogisticRegression(C=2 / (1e-2 * int(keep.sum())), tol=1e-8, max_iter=5000)
    model.fit(own[keep.numpy()], labels[keep].numpy())
    expected = model.predict_proba(own)
    np.testing.assert_allclose(logits.softmax(1)[:, 2:].numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("solver", ["lbfgs", "sklearn"])
def test_labels_that_all_rows_or_none_have_are_no_error(solver: Solver) -> None:
    features, hot = multi_hot()
    hot[:, 0], hot[:, 1] = 1.0, 0.0
    config = LogisticRegressionConfig(penalties=(1e-2,), solver=solver)
    logits = config.build(spec(features, hot))(features)
    assert (logits[:, 0] > 0).all()
    assert (logits[:, 1] < 0).all()


def test_ridge_is_that_of_scikit_learn_for_every_penalty() -> None:
    features, labels = rows()
    penalties = (1e-3, 1e-1, 10.0)
    head = RidgeConfig(penalties=penalties, scaling="none").build(spec(features, labels))
    for penalty, (_, logits) in zip(penalties, head.candidates(features), strict=True):
        model = Ridge(alpha=penalty * N).fit(features.double().numpy(), np.eye(C)[labels])
        expected = SHARPNESS * model.predict(features.double().numpy())
        np.testing.assert_allclose(logits.numpy(), expected, atol=2e-4)


def test_ridge_of_several_labels_says_yes_above_one_half() -> None:
    features, hot = multi_hot()
    logits = RidgeConfig(penalties=(1e-2,), scaling="none").build(spec(features, hot))(features)
    model = Ridge(alpha=1e-2 * N).fit(features.double().numpy(), hot.double().numpy())
    regressed = model.predict(features.double().numpy())
    np.testing.assert_allclose(logits.numpy(), SHARPNESS * (regressed - 0.5), atol=2e-4)


def test_equal_votes_are_those_of_scikit_learn() -> None:
    features, labels = rows()
    new, _ = rows(50, seed=1)
    head = KnnConfig(neighbours=(7,), weights="equal").build(spec(features, labels))
    model = KNeighborsClassifier(7, metric="cosine").fit(features.numpy(), labels.numpy())
    expected = model.predict_proba(new.numpy())
    np.testing.assert_allclose(head(new).exp().numpy(), expected, atol=2e-6)


def test_weighted_votes_follow_the_equation() -> None:
    features, labels = rows()
    new, _ = rows(20, seed=1)
    head = KnnConfig(neighbours=(5,), temperature=0.07).build(spec(features, labels))
    shares = np.zeros((20, C))
    keys = features.double() / features.double().norm(dim=1, keepdim=True)
    for index, row in enumerate(new.double()):
        cosines = (keys @ (row / row.norm())).numpy()
        for neighbour in np.argsort(-cosines)[:5]:
            shares[index, labels[neighbour]] += np.exp(cosines[neighbour] / 0.07)
    shares /= shares.sum(1, keepdims=True)
    np.testing.assert_allclose(head(new).exp().numpy(), np.maximum(shares, 1e-6), atol=1e-5)


def test_several_labels_vote_each_for_itself() -> None:
    features, hot = multi_hot()
    head = KnnConfig(neighbours=(3,), weights="equal").build(spec(features, hot))
    keys = features / features.norm(dim=1, keepdim=True)
    nearest = (keys @ keys.T).topk(3).indices
    expected = hot[nearest].mean(1)
    np.testing.assert_allclose(head(features).sigmoid().numpy(), expected.numpy(), atol=2e-6)


def test_more_neighbours_than_rows_means_all_of_them() -> None:
    head = Knn(torch.eye(3), torch.tensor([0, 1, 1]), 2, neighbours=(10,), temperature=None)
    torch.testing.assert_close(head(torch.ones(1, 3)).exp(), torch.tensor([[1 / 3, 2 / 3]]))


@pytest.mark.parametrize("kind", ["knn", "ridge", "logistic_regression"])
def test_fitted_heads_go_through_the_jobs(
    kind: str, make_single: Callable[..., Path], tmp_path: Path
) -> None:
    config = TrainConfig(
        cache=make_single(), head=HEADS[kind](), run=tmp_path / kind, device="cpu", quiet=True
    )
    report = train.run(config)
    assert len(report.metrics["by_candidate"]) > 1
    assert report.metrics["epochs"] == 0
    assert report.metrics["seconds"] > 0
    assert report.metrics["test"]["top1"] > 0.6
    found = evaluate.run(EvaluateConfig(run=tmp_path / kind, split="test", device="cpu"))
    assert found.metrics["top1"] == report.metrics["test"]["top1"]


def test_ridge_of_rows_in_parts_is_that_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 5, generator=generator) + torch.linspace(0, 6, 60)[:, None]
    targets = torch.randint(0, 3, (60,), generator=generator)
    found = []
    for step in (60, 7):  # the mean of the first part is not that of all
        monkeypatch.setattr("heads.models.ridge._ROWS", step)
        found.append(fit_ridge(RowScale(5, "none"), rows, targets, 3, (0.1,)))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_quiet_reaches_a_head_that_is_fitted_as_it_is_built(
    make_single: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("heads.models.logistic_regression._QUIET_SECONDS", -1.0)
    for quiet in (False, True):
        train.run(
            TrainConfig(
                cache=make_single(f"c{quiet}"),
                head=LogisticRegressionConfig(),
                run=tmp_path / f"r{quiet}",
                device="cpu",
                quiet=quiet,
            )
        )
        captured = capsys.readouterr()
        assert ("pass 1" in captured.err) is not quiet


@pytest.mark.parametrize("kind", ["ridge", "logistic_regression"])
def test_tokens_count_side_by_side(
    kind: str, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    features, labels = rows()
    tokens = features.view(N, 3, 2).numpy()
    options = {
        "labels": [[int(label)] for label in labels],
        "splits": ["train"] * 160 + ["val"] * 40 + ["test"] * 40,
        "num_classes": C,
    }
    flat = make_cache("flat", features.numpy(), **options)
    cut = make_cache("cut", tokens, array="image/tokens", **options)
    scores = []
    for cache, feature in ((flat, "projected"), (cut, "tokens")):
        head = HEADS[kind].model_validate({"feature": feature, "scaling": "none"})
        folder = tmp_path / feature
        train.run(TrainConfig(cache=cache, head=head, run=folder, device="cpu", quiet=True))
        found = evaluate.run(EvaluateConfig(run=folder, split="test", device="cpu"))
        scores.append((found.metrics["top1"], found.metrics["mean_margin"]))
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
