"""The linear probe: its losses, its side-by-side training, its accuracy."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from featcache.errors import ConfigError
from heads import optim
from heads.base import FeatureSpec
from heads.losses import stacked
from heads.losses.binary_cross_entropy import BinaryCrossEntropy
from heads.losses.cross_entropy import CrossEntropy
from heads.losses.stacked import stacked_loss
from heads.models.linear import Linear, LinearConfig, pair_name
from heads.optim import OptimConfig, ScheduleConfig


def problem(num_rows: int = 400, num_classes: int = 6, dim: int = 10):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(num_classes, dim))
    labels = rng.integers(0, num_classes, num_rows)
    features = centres[labels] + 0.9 * rng.normal(size=(num_rows, dim)) + 2.0
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("chunk", [50, 10**6])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_losses_equal_torchs_own(
    monkeypatch: pytest.MonkeyPatch, chunk: int, multi_label: bool, bias: bool
) -> None:
    monkeypatch.setattr(stacked, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    features, labels = problem(37)
    targets = (torch.rand(37, 6) < 0.3).float() if multi_label else labels
    weights = [torch.randn(6, 10, requires_grad=True) for _ in range(3)]
    biases = [torch.randn(6, requires_grad=True) for _ in range(3 if bias else 0)]
    ours, theirs = (
        (BinaryCrossEntropy(), F.binary_cross_entropy_with_logits)
        if multi_label
        else (CrossEntropy(), F.cross_entropy)
    )
    factors = torch.tensor([1.0, 2.0, -0.5])
    found = stacked_loss(ours, features, weights, biases, targets)
    found_gradients = torch.autograd.grad((found * factors).sum(), [*weights, *biases])
    expected = torch.stack(
        [
            theirs(F.linear(features, weight, biases[g] if bias else None), targets)
            for g, weight in enumerate(weights)
        ]
    )
    gradients = torch.autograd.grad((expected * factors).sum(), [*weights, *biases])
    torch.testing.assert_close(found, expected)
    for one, other in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_extreme_logits_give_finite_losses() -> None:
    weight = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    features = torch.ones(1, 1)
    loss = stacked_loss(CrossEntropy(), features, [weight], [], torch.tensor([1]))
    assert loss.item() == pytest.approx(2000.0)
    many = stacked_loss(BinaryCrossEntropy(), features, [weight], [], torch.tensor([[0.0, 1.0]]))
    assert many.item() == pytest.approx(1000.0)


def train(
    pairs: list[tuple[float, float]],
    multi_label: bool = False,
    epochs: int = 20,
    optimizer_kind: str = "adamw",
) -> Linear:
    features, labels = problem()
    targets = F.one_hot(labels, 6).float() if multi_label else labels
    std, mean = torch.std_mean(features, 0, correction=0)
    criterion = BinaryCrossEntropy() if multi_label else CrossEntropy()
    head = Linear(10, 6, scaling="standard", pairs=pairs, mean=mean, std=std, criterion=criterion)
    config = OptimConfig(
        optimizer=optimizer_kind,
        epochs=epochs,
        batch_size=100,
        schedule=ScheduleConfig(shape="cosine", warmup_steps=0),
    )
    optimizer = optim.build(config, head)
    num_steps = config.num_steps(len(features))
    factor = optim.lr_factor(config.schedule, num_steps)
    for step in range(num_steps):
        rows = slice(100 * (step % 4), 100 * (step % 4) + 100)
        optim.set_lr(optimizer, factor(step))
        loss = head.loss((features[rows],), targets[rows], step / num_steps)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head


@pytest.mark.parametrize("multi_label", [False, True])
def test_each_copy_equals_one_trained_alone(multi_label: bool) -> None:
    pairs = list(itertools.product((1e-3, 1e-2, 1e-1), (0.0, 1.0)))
    together = train(pairs, multi_label)
    features, _ = problem()
    logits = dict(together.candidates(features))
    for pair in pairs:
        alone = train([pair], multi_label)
        torch.testing.assert_close(logits[pair_name(*pair)], alone(features), rtol=1e-4, atol=1e-4)
        kept = Linear(10, 6, scaling="standard")
        kept.load_trained_state(together.trained_state(pair_name(*pair)))
        torch.testing.assert_close(kept(features), logits[pair_name(*pair)])
    spread = torch.stack(list(logits.values())).std(0).mean()
    assert spread > 0.05, "the copies do not differ, so the comparison shows nothing"


def test_weights_and_accuracy_match_logistic_regression() -> None:
    features, labels = problem()
    decay = 0.01
    head = train([(0.05, decay)], epochs=150, optimizer_kind="adam")
    scaled = head.scale(features).numpy()
    # scikit-learn sums the loss over rows and has C in front of it: C = 1 / (rows * decay).
    reference = LogisticRegression(C=1 / (len(scaled) * decay), tol=1e-8, max_iter=500)
    reference.fit(scaled, labels.numpy())
    weight = head.weights[0].detach().numpy()
    # A shift of all classes' weights changes nothing, but the penalty fixes it at 0.
    assert np.abs(weight - reference.coef_).max() < 0.02
    assert np.abs(reference.coef_).max() > 0.5
    found = head(features).argmax(1).numpy()
    assert (found == reference.predict(scaled)).mean() > 0.99


@pytest.mark.parametrize("scaling", ["standard", "l2", "none"])
def test_scalings(scaling: str) -> None:
    features, _ = problem()
    std, mean = torch.std_mean(features, 0, correction=0)
    std[3] = 0.0
    scaled = Linear(10, 6, scaling=scaling, mean=mean, std=std).scale(features)
    if scaling == "standard":
        torch.testing.assert_close(scaled.mean(0), torch.zeros(10), atol=1e-5, rtol=0)
        torch.testing.assert_close(scaled[:, 3], features[:, 3] - mean[3])
    elif scaling == "l2":
        torch.testing.assert_close(scaled.square().mean(1), torch.ones(len(features)))
    else:
        assert scaled is features


def spec() -> FeatureSpec:
    classes = pd.DataFrame({"name": list("abcdef"), "count": 1})
    counts = np.ones(6, np.int64)
    return FeatureSpec(10, 6, "single_label", counts, classes, None, 100.0)


def test_choice_of_one_candidate_rebuilds_it_alone() -> None:
    config = LinearConfig(lrs=(0.1, 0.2), weight_decays=(0.0, 1.0))
    assert len(config.build(spec()).pairs) == 4
    chosen = config.only(pair_name(0.2, 1.0))
    assert chosen.build(spec()).pairs == ((0.2, 1.0),)
    with pytest.raises(KeyError):
        config.only("lr 7, weight decay 0")


def test_optim_replaces_the_grid_unless_it_is_set_by_hand() -> None:
    assert LinearConfig().with_optim(0.5, None).lrs == (0.5,)
    assert LinearConfig().with_optim(None, 0.5).weight_decays == (0.5,)
    assert LinearConfig().with_optim(None, None) == LinearConfig()
    with pytest.raises(ConfigError, match=r"optim.lr=0.5 contradicts head.lrs=\(0.1, 0.2\)"):
        LinearConfig(lrs=(0.1, 0.2)).with_optim(0.5, None)
