"""Focal, asymmetric and plain sigmoid losses against their written-out forms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from heads.losses.asymmetric import Asymmetric
from heads.losses.binary_cross_entropy import BinaryCrossEntropy
from heads.losses.focal import Focal
from heads.losses.multi_label_soft_margin import MultiLabelSoftMargin
from heads.losses.smooth import Smooth, SmoothConfig

from . import written_out
from .problem import STATISTICS, agrees, gradient, gradient_checks
from .written_out import Array


def test_sigmoid_cross_entropy() -> None:
    loss = BinaryCrossEntropy()
    agrees(
        loss, lambda z, y: written_out.each(z, y, lambda i, c: written_out.bce(z[i, c], y[i, c]))
    )
    gradient_checks(loss)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 2.0), (None, 0.5), (0.9, 0.0)])
def test_focal(alpha: float | None, gamma: float) -> None:
    loss = Focal(alpha, gamma)
    agrees(loss, lambda z, y: written_out.focal(z, y, alpha, gamma))
    gradient_checks(loss)


def test_focal_without_focus_is_cross_entropy() -> None:
    z, y = torch.randn(5, 3), (torch.rand(5, 3) < 0.5).float()
    expected = F.binary_cross_entropy_with_logits(z, y)
    torch.testing.assert_close(Focal(None, 0.0)(z, y), expected)
    torch.testing.assert_close(2 * Focal(0.5, 0.0)(z, y), expected)


@pytest.mark.parametrize(
    ("gamma_neg", "gamma_pos", "clip"), [(4, 0, 0.05), (4, 1, 0.05), (2, 1, 0), (0.5, 0.5, 0.2)]
)
def test_asymmetric(gamma_neg: float, gamma_pos: float, clip: float) -> None:
    for detach in (True, False):
        loss = Asymmetric(
            gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip, detach_focusing=detach
        )
        agrees(loss, lambda z, y: written_out.asl(z, y, gamma_neg, gamma_pos, clip))
    gradient_checks(loss)


def test_detached_focusing_is_a_constant_weight_in_the_gradient() -> None:
    z = torch.tensor([[2.0, -0.5]], dtype=torch.float64)
    y = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    found = gradient(Asymmetric(gamma_neg=4, gamma_pos=1, clip=0.05), z, y)
    p = torch.sigmoid(z)
    p_m = p[0, 0] - 0.05
    negative = p_m**4 * p[0, 0] * (1 - p[0, 0]) / (1 - p_m)
    positive = -(1 - p[0, 1]) * (1 - p[0, 1])
    torch.testing.assert_close(found, torch.stack([negative, positive])[None] / 2)
    whole = gradient(Asymmetric(gamma_neg=4, gamma_pos=1, detach_focusing=False), z, y)
    assert not torch.allclose(found, whole)


def test_easy_negatives_have_no_asymmetric_loss() -> None:
    z = torch.tensor([[-4.0, -2.5]])  # probabilities 0.018 and 0.076
    terms = Asymmetric(clip=0.05).terms(z, torch.zeros(1, 2))
    assert terms[0, 0] == 0
    assert terms[0, 1] > 0
    assert gradient(Asymmetric(clip=0.05, detach_focusing=False), z, torch.zeros(1, 2))[0, 0] == 0


def test_asymmetric_sums_over_the_batch_if_told_to() -> None:
    z, y = torch.randn(7, 3), (torch.rand(7, 3) < 0.5).float()
    mean, total = Asymmetric()(z, y), Asymmetric(reduction="sum")(z, y)
    torch.testing.assert_close(total, mean * 21)


@pytest.mark.parametrize("loss", [Focal(), Asymmetric(gamma_pos=1), BinaryCrossEntropy()])
def test_class_indices_are_read_as_one_label_a_row(loss: torch.nn.Module) -> None:
    z, labels = torch.randn(5, 4), torch.tensor([0, 3, 3, 1, 2])
    torch.testing.assert_close(loss(z, labels), loss(z, F.one_hot(labels, 4).float()))


@pytest.mark.parametrize("loss", [Focal(), Asymmetric(), Asymmetric(clip=0.0, gamma_pos=0.5)])
def test_wrong_by_far_is_finite(loss: torch.nn.Module) -> None:
    z = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    for y in (torch.zeros(1, 2), torch.ones(1, 2)):
        assert torch.isfinite(loss.terms(z, y)).all()
        assert torch.isfinite(gradient(loss, z, y)).all()


def test_half_labels_weigh_both_sides() -> None:
    z = torch.tensor([[0.7]], dtype=torch.float64)
    loss = Focal(0.25, 2.0)
    sides = [loss(z, torch.full_like(z, value)).item() for value in (0.0, 1.0, 0.3)]
    assert sides[2] == pytest.approx(0.7 * sides[0] + 0.3 * sides[1])
    assert np.ptp(sides[:2]) > 0.01


def test_soft_margin_is_torchs_own() -> None:
    agrees(
        MultiLabelSoftMargin(),
        lambda z, y: written_out.each(z, y, lambda i, c: written_out.bce(z[i, c], y[i, c])).mean(1),
    )
    z, y = torch.randn(5, 4), (torch.rand(5, 4) < 0.5).float()
    torch.testing.assert_close(MultiLabelSoftMargin()(z, y), F.multilabel_soft_margin_loss(z, y))


def test_f36_smoothing_smooths_by_default() -> None:
    loss = SmoothConfig().build(STATISTICS)

    def expected(z: Array, y: Array) -> Array:
        wanted = y * 0.9 + 0.05
        return written_out.each(z, y, lambda i, c: written_out.bce(z[i, c], wanted[i, c]))

    agrees(loss, expected)
    gradient_checks(loss)
    least = torch.tensor([[np.log(0.95 / 0.05)]])  # where a smoothed positive is content
    assert gradient(Smooth(), least, torch.ones(1, 1)).abs() < 1e-6
    with pytest.raises(ValueError, match="epsilon"):
        SmoothConfig(epsilon=0.0)
