"""Losses with class counts in them against their written-out forms."""

import numpy as np
import pytest
import torch

from heads.losses.base import ClassStatistics
from heads.losses.class_balanced import ClassBalancedConfig
from heads.losses.class_balanced_ntr import ClassBalancedNTRConfig
from heads.losses.distribution_balanced import DistributionBalancedConfig
from heads.losses.frequency import effective_number_weights
from heads.losses.inverse_frequency import InverseFrequencyConfig
from heads.losses.negative_tolerant import NegativeTolerantConfig
from heads.losses.rebalanced import RebalancedConfig

from . import written_out
from .problem import COUNTS, NUM_ROWS, SEEN, STATISTICS, agrees, gradient, gradient_checks, problem
from .written_out import Array


@pytest.mark.parametrize("alpha", [None, 0.5, 0.2])
@pytest.mark.parametrize("focal", [True, False])
@pytest.mark.parametrize("norm", ["none", "by_instance", "by_batch"])
@pytest.mark.parametrize("divide", [False, True])
def test_distribution_balanced(alpha: float | None, focal: bool, norm: str, divide: bool) -> None:
    config = DistributionBalancedConfig(
        alpha=alpha,
        focal=focal,
        weight_norm=norm,
        ntr_divide=divide,
        neg_scale=5.0,
        map_gamma=0.3,
        init_bias=0.07,
        loss_weight=0.5,
    )

    def expected(z: Array, y: Array) -> Array:
        weights = written_out.rebalance(y, SEEN, 0.1, 10.0, 0.3)
        if norm == "by_instance":
            weights = weights / weights.max(1)[:, None]
        elif norm == "by_batch":
            weights = weights / weights.max()
        nu = written_out.shift(COUNTS, NUM_ROWS, 0.07) / (5.0 if divide else 1.0)
        terms = written_out.tolerant(
            z, y, nu, 5.0, 2.0 if focal else None, alpha if focal else None
        )
        return 0.5 * (2.0 if focal and alpha is None else 1.0) * weights * terms

    loss = config.build(STATISTICS)
    agrees(loss, expected)
    gradient_checks(loss)


@pytest.mark.parametrize("focal", [True, False])
def test_negative_tolerant(focal: bool) -> None:
    loss = NegativeTolerantConfig(focal=focal).build(STATISTICS)
    nu = written_out.shift(COUNTS, NUM_ROWS, 0.05)
    agrees(
        loss,
        lambda z, y: written_out.tolerant(
            z, y, nu, 2.0, 2.0 if focal else None, 0.5 if focal else None
        ),
    )
    gradient_checks(loss)


def test_f14_the_focusing_factor_is_of_each_element() -> None:
    z = torch.tensor([[3.0, -3.0]])
    y = torch.tensor([[1.0, 1.0]])
    config = DistributionBalancedConfig(init_bias=0.0, weight_norm="none")
    even = ClassStatistics(np.array([10, 10]), 20)
    focused, plain = (
        config.model_copy(update={"focal": focal}).build(even).terms(z, y)
        for focal in (True, False)
    )
    factors = (focused / plain / config.balance)[0]
    torch.testing.assert_close(factors, torch.sigmoid(-z[0]).square())


@pytest.mark.parametrize("config", [DistributionBalancedConfig(), NegativeTolerantConfig()])
def test_f15_logits_stay_raw_and_the_class_offset_is_for_training(
    config: DistributionBalancedConfig | NegativeTolerantConfig,
) -> None:
    logits, labels = map(torch.from_numpy, problem())
    before = logits.clone()
    loss = config.build(STATISTICS)
    trained = loss(logits, labels)
    assert torch.equal(logits, before)
    evaluated = loss.eval()(logits, labels)
    without = config.model_copy(update={"init_bias": 0.0}).build(STATISTICS)
    torch.testing.assert_close(evaluated, without(logits, labels))
    assert abs(trained - evaluated) > 1e-3


@pytest.mark.parametrize("kind", ["init_bias", "neg_scale", "gamma", "map_gamma", "map_beta"])
def test_f17_every_option_has_an_effect(kind: str) -> None:
    logits, labels = map(torch.from_numpy, problem())
    first = DistributionBalancedConfig()
    second = first.model_copy(update={kind: 1.7 * getattr(first, kind)})
    values = [config.build(STATISTICS)(logits, labels).item() for config in (first, second)]
    assert values[0] != pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("norm", ["none", "by_instance", "by_batch"])
def test_f23_rows_without_labels_have_a_loss_and_a_gradient(norm: str) -> None:
    loss = DistributionBalancedConfig(weight_norm=norm).build(STATISTICS)
    z, y = torch.zeros(2, 6), torch.zeros(2, 6)
    assert torch.isfinite(loss.terms(z, y)).all()
    found = gradient(loss, z, y)
    assert torch.isfinite(found).all()
    assert (found > 0).all(), "negatives are pushed down"


@pytest.mark.parametrize("counts", [[5, 0], [5, 5], [1, 1], [0, 0]])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_classes_in_all_rows_or_in_none_have_finite_offsets(
    counts: list[int], num_rows: int
) -> None:
    statistics = ClassStatistics(np.array(counts), num_rows)
    for config in (DistributionBalancedConfig(), NegativeTolerantConfig()):
        loss = config.build(statistics)
        assert torch.isfinite(
            loss.get_buffer("inner.shift" if hasattr(loss, "inner") else "shift")
        ).all()
        assert torch.isfinite(loss(torch.zeros(3, 2), torch.eye(3, 2)))


def test_terms_of_a_row_do_not_depend_on_its_batch_unless_it_says_so() -> None:
    logits, labels = map(torch.from_numpy, problem())
    for norm in ("none", "by_instance", "by_batch"):
        loss = DistributionBalancedConfig(weight_norm=norm).build(STATISTICS)
        whole, alone = loss.terms(logits, labels)[1:2], loss.terms(logits[1:2], labels[1:2])
        assert torch.allclose(whole, alone) != loss.needs_whole_batch


@pytest.mark.parametrize("focal", [True, False])
def test_rebalanced(focal: bool) -> None:
    loss = RebalancedConfig(focal=focal).build(STATISTICS)
    agrees(
        loss,
        lambda z, y: (
            written_out.rebalance(y, SEEN, 0.1, 10.0, 0.2)
            * written_out.focal(z, y, None, 2.0 if focal else 0.0)
        ),
    )
    gradient_checks(loss)


def effective_weights(y: Array, beta: float, mode: str) -> Array:
    """(B, C) class-balanced weights, by the mode's own words."""
    weights = np.zeros(y.shape)
    for i in range(y.shape[0]):
        own = [SEEN[c] for c in range(y.shape[1]) if y[i, c] == 1]
        for c in range(y.shape[1]):
            if mode == "by_class":
                weights[i, c] = written_out.effective(SEEN[c], beta)
            elif not own:
                weights[i, c] = 1 - beta
            elif mode == "average_n":
                weights[i, c] = written_out.effective(sum(own) / len(own), beta)
            elif mode == "average_w":
                weights[i, c] = sum(written_out.effective(n, beta) for n in own) / len(own)
            else:
                weights[i, c] = written_out.effective(min(own), beta)
    return weights


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("mode", ["by_class", "average_n", "average_w", "min_n"])
def test_class_balanced(mode: str, beta: float) -> None:
    loss = ClassBalancedConfig(mode=mode, beta=beta).build(STATISTICS)
    agrees(
        loss,
        lambda z, y: 10.0 * effective_weights(y, beta, mode) * written_out.focal(z, y, 0.5, 2.0),
    )
    gradient_checks(loss)


def test_class_balanced_without_focus() -> None:
    loss = ClassBalancedConfig(focal=False, loss_weight=1.0).build(STATISTICS)
    agrees(
        loss,
        lambda z, y: effective_weights(y, 0.9, "by_class") * written_out.focal(z, y, None, 0.0),
    )


@pytest.mark.parametrize("focal", [True, False])
def test_class_balanced_with_tolerance(focal: bool) -> None:
    loss = ClassBalancedNTRConfig(focal=focal).build(STATISTICS)
    nu = written_out.shift(COUNTS, NUM_ROWS, 0.05)
    agrees(
        loss,
        lambda z, y: (
            10.0
            * effective_weights(y, 0.9, "by_class")
            * written_out.tolerant(z, y, nu, 2.0, 2.0 if focal else None, 0.5 if focal else None)
        ),
    )
    gradient_checks(loss)


@pytest.mark.parametrize("mode", ["inverse", "sqrt"])
def test_inverse_frequency(mode: str) -> None:
    loss = InverseFrequencyConfig(mode=mode).build(STATISTICS)
    power = 1.0 if mode == "inverse" else 0.5
    agrees(
        loss,
        lambda z, y: (NUM_ROWS / SEEN) ** power * written_out.focal(z, y, None, 0.0),
    )
    gradient_checks(loss)


def test_effective_numbers_of_huge_counts_do_not_cancel() -> None:
    found = effective_number_weights(torch.tensor([1.0, 2.0, 1e7]), 1 - 1e-6)
    expected = [1.0, 1 / (2 - 1e-6), 1e-6]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3)
