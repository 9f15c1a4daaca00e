"""Any loss of several linear classifiers at once against each by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heads.losses import LOSSES, stacked
from heads.losses.additive_angular_margin import AdditiveAngularMargin
from heads.losses.base import Loss
from heads.losses.stacked import stacked_loss

from .problem import COUNTS, STATISTICS

VARIANTS = {
    **{kind: (kind, {}) for kind in LOSSES},
    "asl by sum": ("asl", {"reduction": "sum"}),
    "rebalanced by batch": ("rebalanced", {"weight_norm": "by_batch"}),
    "cross_entropy with all": (
        "cross_entropy",
        {"label_smoothing": 0.1, "class_weights": "inverse", "logit_adjustment": 1.0},
    ),
}


def parameters(loss: Loss, seed: int = 0) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(37, 10, generator=generator)
    weights = [torch.randn(len(COUNTS), 10, generator=generator) for _ in range(5)]
    biases = [torch.randn(len(COUNTS), generator=generator) for _ in range(5)]
    if loss.needs_cosines:
        features = F.normalize(features)
        weights = [F.normalize(weight) for weight in weights]
        biases = [bias.mean() for bias in biases]
    return features, [w.requires_grad_() for w in weights], [b.requires_grad_() for b in biases]


def targets_of(loss: Loss, one_label: bool) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    if one_label or not loss.reads_multi_hot:
        return torch.randint(len(COUNTS), (37,), generator=generator)
    return (torch.rand(37, len(COUNTS), generator=generator) < 0.3).float()


def by_itself(loss: Loss, features: Tensor, weight: Tensor, bias: Tensor, wanted: Tensor) -> Tensor:
    if isinstance(loss, AdditiveAngularMargin):
        return loss.terms(features @ weight.T, wanted, offset=bias).mean()
    return loss(F.linear(features, weight, bias), wanted)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("one_label", [False, True])
@pytest.mark.parametrize(("chunk", "group"), [(50, 10), (10**6, 600), (10**6, 10**6)])
def test_stacked_equals_each_alone(
    monkeypatch: pytest.MonkeyPatch, name: str, one_label: bool, chunk: int, group: int
) -> None:
    monkeypatch.setattr(stacked, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(stacked, "GROUP_ELEMENTS", group)
    kind, options = VARIANTS[name]
    loss = LOSSES[kind](**options).build(STATISTICS)
    features, weights, biases = parameters(loss)
    wanted = targets_of(loss, one_label)
    factors = torch.tensor([1.0, 2.0, -0.5, 0.0, 3.0])
    found = stacked_loss(loss, features, weights, biases, wanted)
    gradients = torch.autograd.grad((found * factors).sum(), [*weights, *biases])
    expected = torch.stack(
        [by_itself(loss, features, *pair, wanted) for pair in zip(weights, biases, strict=True)]
    )
    direct = torch.autograd.grad((expected * factors).sum(), [*weights, *biases])
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, direct, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bce", "focal", "cross_entropy", "aam"])
def test_without_biases(kind: str) -> None:
    loss = LOSSES[kind]().build(STATISTICS)
    features, weights, biases = parameters(loss)
    wanted = targets_of(loss, False)
    none = torch.zeros_like(biases[0])
    found = stacked_loss(loss, features, weights, [], wanted)
    expected = [by_itself(loss, features, weight, none, wanted) for weight in weights]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("kind", ["bce", "distribution_balanced", "cross_entropy", "aam"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_losses_and_gradients_stay_float32_and_near(
    kind: str, dtype: torch.dtype
) -> None:
    loss = LOSSES[kind]().build(STATISTICS)
    features, weights, biases = parameters(loss)
    wanted = targets_of(loss, False)
    exact = stacked_loss(loss, features, weights, biases, wanted)
    expected = torch.autograd.grad(exact.sum(), weights)
    with torch.autocast("cpu", dtype):
        found = stacked_loss(loss, features, weights, biases, wanted)
    gradients = torch.autograd.grad(found.sum(), weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=0.03, atol=0.0)
    for one, other in zip(gradients, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))
