"""Losses of one term a row, and those on cosines, against their written-out forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heads.losses.additive_angular_margin import AdditiveAngularMargin
from heads.losses.base import ClassStatistics
from heads.losses.cross_entropy import CrossEntropyConfig
from heads.losses.zlpr import ZLPR

from . import written_out
from .problem import agrees, gradient, gradient_checks, problem


def test_zlpr() -> None:
    agrees(ZLPR(), written_out.zlpr)
    gradient_checks(ZLPR())


def test_zlpr_of_labels_between_0_and_1() -> None:
    logits, _ = problem()
    labels = np.random.default_rng(5).random(logits.shape)
    found = ZLPR().terms(torch.from_numpy(logits), torch.from_numpy(labels))
    np.testing.assert_allclose(found.numpy(), written_out.zlpr(logits, labels), rtol=1e-10)


def test_f34_zlpr_is_a_loss_of_each_row() -> None:
    logits, labels = map(torch.from_numpy, problem(num_rows=64))
    whole = ZLPR().terms(logits, labels)
    alone = [ZLPR()(logits[i : i + 1], labels[i : i + 1]) for i in range(64)]
    torch.testing.assert_close(whole, torch.stack(alone))
    twice = ZLPR()(torch.cat([logits, logits]), torch.cat([labels, labels]))
    torch.testing.assert_close(twice, whole.mean())
    huge = ZLPR()(torch.full((4096, 6), 60000.0, dtype=torch.float16), torch.zeros(4096, 6))
    assert huge == pytest.approx(60000.0 + np.log(6), rel=1e-6)


def test_zlpr_rows_without_and_with_all_labels() -> None:
    z = torch.randn(2, 4)
    y = torch.tensor([[0.0] * 4, [1.0] * 4])
    expected = torch.stack([z[0].exp().sum().log1p(), (-z[1]).exp().sum().log1p()])
    torch.testing.assert_close(ZLPR().terms(z, y), expected)
    assert torch.isfinite(gradient(ZLPR(), z, y)).all()


@pytest.mark.parametrize(("scale", "margin"), [(30.0, 0.5), (16.0, 0.0), (10.0, 1.4)])
def test_f35_margin_is_an_angle_of_unit_vectors(scale: float, margin: float) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    weights = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    cosines = F.normalize(features) @ F.normalize(weights).T
    labels = (torch.rand(12, 7, generator=generator) < 0.5).double()
    cosines[0, 0], labels[0, 0] = -0.999, 1.0  # past the end of the circle
    loss = AdditiveAngularMargin(scale, margin)
    found = loss.terms(cosines, labels, offset=0.7)
    expected = written_out.angular(cosines.numpy(), labels.numpy(), scale, margin, 0.7)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    assert loss.logits(cosines, labels).abs().max() <= scale * (1 + margin)
    inside = cosines.clamp(-0.97, 0.97).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: loss.terms(c, labels, 0.7), (inside,))


def test_margin_asks_for_more_the_larger_the_angle_everywhere() -> None:
    loss = AdditiveAngularMargin()
    cosines = torch.linspace(1, -1, 2001, dtype=torch.float64)[None]
    turned = loss.logits(cosines, torch.ones_like(cosines))
    assert (turned.diff() <= 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cosines_rounded_beyond_1_are_finite(dtype: torch.dtype) -> None:
    cosines = torch.tensor([[1.0, -1.0, 1.004, -1.004]]).to(dtype)
    for y in (torch.zeros(1, 4), torch.ones(1, 4)):
        assert torch.isfinite(AdditiveAngularMargin().terms(cosines, y)).all()
        assert torch.isfinite(gradient(AdditiveAngularMargin(), cosines, y)).all()


COUNTS = np.array([80, 15, 5, 0])
STATISTICS = ClassStatistics(COUNTS, 100)


@pytest.mark.parametrize("weighting", ["none", "inverse", "sqrt_inverse", "class_balanced"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_softmax_cross_entropy(weighting: str, smoothing: float) -> None:
    config = CrossEntropyConfig(
        label_smoothing=smoothing, class_weights=weighting, beta=0.99, logit_adjustment=1.5
    )
    seen = np.maximum(COUNTS, 1)
    weights = {
        "none": np.ones(4),
        "inverse": 1 / seen,
        "sqrt_inverse": seen**-0.5,
        "class_balanced": np.array([written_out.effective(n, 0.99) for n in seen]),
    }[weighting]
    weights = weights / ((weights * COUNTS).sum() / 100)
    logits = np.random.default_rng(0).normal(size=(20, 4)) * 3
    labels = np.arange(20) % 4
    loss = config.build(STATISTICS)
    z, y = torch.from_numpy(logits).requires_grad_(), torch.from_numpy(labels)
    shifted = logits + 1.5 * np.log(seen / 100)
    expected = written_out.softmax_cross_entropy(shifted, labels, weights, smoothing)
    found = loss.terms(z, y)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-6)
    assert torch.autograd.gradcheck(lambda x: loss.terms(x, y), (z,))
    raw = written_out.softmax_cross_entropy(logits, labels, weights, smoothing)
    np.testing.assert_allclose(loss.eval().terms(z, y).detach().numpy(), raw, rtol=2e-6)


def test_class_weights_leave_the_size_of_the_loss_of_even_logits() -> None:
    labels = torch.repeat_interleave(torch.arange(4), torch.from_numpy(COUNTS))
    z = torch.zeros(100, 4)
    for weighting in ("inverse", "sqrt_inverse", "class_balanced"):
        loss = CrossEntropyConfig(class_weights=weighting).build(STATISTICS)
        assert loss(z, labels).item() == pytest.approx(np.log(4), rel=1e-5)


def test_plain_is_torchs_own() -> None:
    z, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(CrossEntropyConfig().build(STATISTICS)(z, y), F.cross_entropy(z, y))
