"""The two-layer head on one modality: its equation, its scaling, what its run needs to predict."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.neural_network import MLPClassifier

from heads.mlp import Mlp, RowScale, present
from heads.models.naive import ARRAYS, Naive, NaiveConfig
from heads.run_folder import load_run
from heads.train import TrainConfig
from heads.train import run as train


def test_logits_are_those_of_scikit_learns_network_with_the_same_weights() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    theirs = MLPClassifier((6,), max_iter=1, batch_size=40, random_state=0)
    with pytest.warns(UserWarning, match="Maximum iterations"):
        theirs.fit(features, np.arange(40) % 3)
    head = Naive(RowScale(6, "none"), Mlp(6, 3))
    state = head.state_dict()
    for layer, name in ((0, "classifier.0"), (1, "classifier.3")):
        state[f"{name}.weight"] = torch.from_numpy(theirs.coefs_[layer].T.copy())
        state[f"{name}.bias"] = torch.from_numpy(theirs.intercepts_[layer])
    head.load_state_dict(state)
    found = head.eval()(torch.from_numpy(features)).softmax(1).detach().numpy()
    np.testing.assert_allclose(found, theirs.predict_proba(features), atol=1e-6)


def test_rows_are_scaled_as_asked() -> None:
    features = torch.tensor([[3.0, 4.0, 7.0], [1.0, 0.0, 7.0]])
    std, mean = torch.std_mean(features, 0, correction=0)
    standard = RowScale(3, "standard", mean, std)(features)
    torch.testing.assert_close(standard.mean(0), torch.zeros(3))
    torch.testing.assert_close(standard.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))
    lengths = RowScale(3, "l2")(features).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((2,), 3**0.5))
    assert RowScale(3, "none")(features) is features


def test_a_row_of_zeros_is_a_missing_modality_and_stays_finite() -> None:
    features = torch.tensor([[0.0, 0.0], [0.0, -1.0]])
    assert present(features).tolist() == [False, True]
    assert present(features[:, None, :]).tolist() == [False, True]
    assert torch.isfinite(RowScale(2, "l2")(features)).all()


@pytest.mark.parametrize("feature", ARRAYS)
def test_each_feature_is_an_array_of_the_cache(feature: str) -> None:
    assert NaiveConfig(feature=feature).arrays() == (ARRAYS[feature],)


@pytest.mark.parametrize("scaling", ["standard", "l2"])
def test_a_trained_run_predicts_alone_what_it_scored(
    make_single: Callable[..., Path], tmp_path: Path, scaling: str
) -> None:
    cache = make_single("toy", noise=0.3)
    config = TrainConfig(
        cache=cache,
        head=NaiveConfig(scaling=scaling),
        optim={"epochs": 5, "lr": 1e-2},
        run=tmp_path / "run",
        quiet=True,
    )
    assert train(config).metrics["test"]["top1"] > 0.9
    head = load_run(tmp_path / "run").head
    assert isinstance(head, Naive)
    assert head.criterion is None
    if scaling == "standard":
        assert head.scale.mean.abs().max() > 0, "statistics of the training rows are lost"
