"""The linear probe: its losses, its side-by-side training, its accuracy."""

import dataclasses
import itertools
from itertools import zip_longest

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from featcache.errors import BackboneError, ConfigError
from heads import optim
from heads.base import FeatureSpec
from heads.losses import stacked
from heads.losses.additive_angular_margin import AdditiveAngularMargin
from heads.losses.base import Loss
from heads.losses.binary_cross_entropy import BinaryCrossEntropy
from heads.losses.cross_entropy import CrossEntropy
from heads.losses.stacked import stacked_loss
from heads.models.linear import Linear, LinearConfig, pair_name
from heads.models.zero_shot import ZeroShotConfig
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


@pytest.mark.parametrize(
    ("num_parameters", "number"), [(512, 12), (2**24 // 12, 12), (2**24 // 3, 3), (2**25, 1)]
)
def test_the_default_grid_shrinks_where_its_weights_would_not_fit(
    num_parameters: int, number: int
) -> None:
    pairs = LinearConfig().pairs(num_parameters)
    assert len(pairs) == number
    assert set(pairs) <= set(LinearConfig().pairs(1))
    assert (1e-2, 0.1) in pairs
    assert pairs == sorted(pairs)


def test_a_grid_set_by_hand_is_tried_whole() -> None:
    huge = 2**30
    assert len(LinearConfig(lrs=(1.0, 2.0), weight_decays=(0.0, 0.1)).pairs(huge)) == 4
    assert LinearConfig(lrs=(1.0, 2.0)).pairs(huge) == [(1.0, 0.1), (2.0, 0.1)]
    assert LinearConfig(weight_decays=(0.0, 0.1)).pairs(huge) == [(0.01, 0.0), (0.01, 0.1)]
    assert len(LinearConfig(lrs=(1.0, 2.0)).pairs(512)) == 6


def test_the_record_of_an_unset_grid_takes_optims_choice() -> None:
    again = LinearConfig.model_validate(LinearConfig().record())
    assert again.with_optim(0.5, None).lrs == (0.5,)


def text_spec(task: str = "single_label", criterion: Loss | None = None) -> FeatureSpec:
    generator = torch.Generator().manual_seed(0)
    classes = pd.DataFrame({"name": list("abcdef"), "count": 1})
    return FeatureSpec(
        10,
        6,
        task,
        np.ones(6, np.int64),
        classes,
        torch.randn(3, 6, 10, generator=generator),
        100.0,
        mean=torch.randn(10, generator=generator),
        std=torch.ones(10),
        criterion=criterion or CrossEntropy(),
    )


@pytest.mark.parametrize(
    "options",
    [{"scaling": "l2"}, {"scaling": "l2", "cosine": True}, {"scaling": "none", "cosine": True}],
)
def test_text_start_is_the_zero_shot_classifier(options: dict[str, object]) -> None:
    features, _ = problem()
    head = LinearConfig(init="text", **options).build(text_spec())
    expected = ZeroShotConfig(templates="a {name}").build(text_spec())(features)
    torch.testing.assert_close(head(features), expected, rtol=1e-4, atol=1e-3)
    for _, logits in head.candidates(features):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("cosine", [False, True])
def test_text_start_gives_the_mean_image_even_chances_of_several_labels(cosine: bool) -> None:
    spec = text_spec("multi_label", BinaryCrossEntropy())
    head = LinearConfig(init="text", scaling="l2", cosine=cosine).build(spec)
    assert spec.mean is not None
    logits = head(spec.mean[None])
    torch.testing.assert_close(logits.mean(), torch.tensor(0.0), atol=1e-3, rtol=0)


def test_text_start_needs_features_of_norm_1_in_the_space_of_text() -> None:
    for options in ({}, {"scaling": "none"}, {"cosine": True}):
        with pytest.raises(ValueError, match=r"init=text with scaling=.*set scaling=l2"):
            LinearConfig(init="text", **options)
    with pytest.raises(ValueError, match="feature=pooled is not in the space of text"):
        LinearConfig(text_weight=0.3, feature="pooled")
    wide = dataclasses.replace(text_spec(), feature_dim=12)
    with pytest.raises(BackboneError, match="width 10, image features 12"):
        LinearConfig(init="text", scaling="l2").build(wide)


def test_text_alignment_adds_its_cross_entropy_and_is_watched() -> None:
    features, labels = problem()
    plain = LinearConfig(lrs=(0.1,), weight_decays=(0.0,)).build(text_spec())
    head = LinearConfig(lrs=(0.1,), weight_decays=(0.0,), text_weight=0.3).build(text_spec())
    found = head.loss((features,), labels, 0.0)
    prompts = text_spec().prompts
    assert prompts is not None
    unit = F.normalize(F.normalize(prompts, dim=-1).mean(0), dim=-1)
    cosines = F.normalize(features) @ unit.T
    expected = F.cross_entropy(100.0 * cosines, labels)
    torch.testing.assert_close(found["text_loss"], expected)
    alone = plain.loss((features,), labels, 0.0)["loss"]
    torch.testing.assert_close(found["loss"], alone + 0.3 * expected)
    ((name, logits),) = head.monitors(features)
    assert name == "text"
    torch.testing.assert_close(logits, 100.0 * cosines)
    assert not list(plain.monitors(features))
    with pytest.raises(ConfigError, match=r"text_weight=0\.3 is for single_label"):
        LinearConfig(text_weight=0.3).build(text_spec("multi_label", BinaryCrossEntropy()))


@pytest.mark.parametrize("criterion", [AdditiveAngularMargin(20.0, 0.3), BinaryCrossEntropy()])
@pytest.mark.parametrize("bias", [False, True])
def test_cosine_logits_have_one_scale_and_one_offset(criterion: Loss, bias: bool) -> None:
    features, labels = problem()
    config = LinearConfig(cosine=True, scaling="none", bias=bias, lrs=(0.1, 0.2))
    head = config.build(text_spec("multi_label", criterion))
    scale = 20.0 if isinstance(criterion, AdditiveAngularMargin) else 100.0
    with torch.no_grad():
        for weight, offset in zip_longest(head.weights, head.biases):
            weight.normal_()
            if offset is not None:
                offset.fill_(0.4)
    targets = F.one_hot(labels, 6).float()
    for index, (_, logits) in enumerate(head.candidates(features)):
        cosines = F.normalize(features) @ F.normalize(head.weights[index]).T
        torch.testing.assert_close(logits, scale * cosines + (0.4 if bias else 0.0))
    cosines = F.normalize(features) @ F.normalize(head.weights[0]).T
    offset = 0.4 if bias else 0.0
    if isinstance(criterion, AdditiveAngularMargin):
        angle = torch.acos(cosines) + 0.3 * targets
        expected = F.binary_cross_entropy_with_logits(20 * torch.cos(angle) + offset, targets)
    else:
        expected = F.binary_cross_entropy_with_logits(100 * cosines + offset, targets)
    one = LinearConfig(cosine=True, scaling="none", bias=bias, lrs=(0.1,), weight_decays=(0.0,))
    alone = one.build(text_spec("multi_label", criterion))
    alone.load_trained_state(head.trained_state(next(iter(head.candidates(features)))[0]))
    torch.testing.assert_close(alone.loss((features,), targets, 0.0)["loss"], expected)
    found = head.loss((features,), targets, 0.0)["loss"]
    found.backward()
    for parameter in head.parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0


def test_scale_of_cosines_is_said_once() -> None:
    with pytest.raises(ConfigError, match=r"cosine_scale=10 contradicts loss.scale=30"):
        LinearConfig(cosine=True, cosine_scale=10).build(
            text_spec("multi_label", AdditiveAngularMargin())
        )
    with pytest.raises(ValueError, match="cosine_scale=10 is read with cosine=true only"):
        LinearConfig(cosine_scale=10)


def test_f35_angular_margin_trains_a_head_whose_half_is_a_usable_threshold() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 16, generator=generator)
    targets = (torch.rand(600, 6, generator=generator) < 0.3).float()
    targets = targets[targets.any(1)]
    features = targets @ centres + 0.3 * torch.randn(len(targets), 16, generator=generator)
    torch.manual_seed(0)
    head = Linear(
        16,
        6,
        scaling="none",
        criterion=AdditiveAngularMargin(margin=0.2),
        cosine_scale=30.0,
        weight=torch.randn(6, 16),
    )
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        head.loss((features,), targets, 0.0)["loss"].backward()
        optimizer.step()
    predicted = head(features) > 0
    assert (predicted == targets.bool()).float().mean() > 0.95
    assert head.biases[0].abs() > 0.5, "the offset has nothing to do"
