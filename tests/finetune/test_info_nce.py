"""InfoNCE against the equation written out pair by pair, and its scale's bounds."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.losses.info_nce import (
    INITIAL_LOGIT_SCALE,
    MAX_LOGIT_SCALE,
    clamp_logit_scale,
    info_nce,
)


def _features(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 5, generator=generator, dtype=torch.float64), dim=-1)


def _slow(images: Tensor, texts: Tensor, scale: float) -> float:
    """½[CE(z, diag) + CE(zᵀ, diag)], one exponential at a time."""
    count = len(images)
    total = 0.0
    for i in range(count):
        z_row = [math.exp(scale) * float(images[i] @ texts[j]) for j in range(count)]
        z_column = [math.exp(scale) * float(images[j] @ texts[i]) for j in range(count)]
        for z in (z_row, z_column):
            total -= z[i] - math.log(sum(math.exp(value) for value in z))
    return 0.5 * total / count


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equals_the_equation(count: int) -> None:
    images, texts = _features(count, 0), _features(count, 1)
    loss = info_nce(images, texts, torch.tensor(1.3))
    assert loss.item() == pytest.approx(_slow(images, texts, 1.3), abs=1e-5)


def test_gradient_equals_finite_differences() -> None:
    images, texts, scale = _features(4, 0), _features(4, 1), 1.1
    image_leaf, text_leaf = images.clone().requires_grad_(), texts.clone().requires_grad_()
    scale_leaf = torch.tensor(scale, requires_grad=True)
    info_nce(image_leaf, text_leaf, scale_leaf).backward()
    small = 1e-5
    for leaf, place in ((image_leaf, 0), (text_leaf, 1)):
        for row, column in ((0, 0), (2, 3)):
            nudge = torch.zeros(4, 5, dtype=torch.float64)
            nudge[row, column] = small
            pairs = [[images, texts], [images, texts]]
            pairs[0][place] = pairs[0][place] + nudge
            pairs[1][place] = pairs[1][place] - nudge
            slope = (_slow(*pairs[0], scale) - _slow(*pairs[1], scale)) / (2 * small)
            assert leaf.grad is not None
            assert leaf.grad[row, column].item() == pytest.approx(slope, abs=1e-5)
    slope = (_slow(images, texts, scale + small) - _slow(images, texts, scale - small)) / 2 / small
    assert scale_leaf.grad is not None
    assert scale_leaf.grad.item() == pytest.approx(slope, abs=1e-5)


def test_a_model_that_knows_nothing_pays_log_batch() -> None:
    same = torch.ones(9, 4) / 2
    assert info_nce(same, same, torch.tensor(3.0)).item() == pytest.approx(math.log(9))


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 5\).*\(4, 5\)"):
        info_nce(_features(3, 0), _features(4, 1), torch.tensor(0.0))


@pytest.mark.parametrize(("before", "after"), [(-0.5, 0.0), (2.0, 2.0), (4.7, math.log(100))])
def test_logit_scale_is_kept_between_1_and_100(before: float, after: float) -> None:
    scale = torch.nn.Parameter(torch.tensor(before))
    clamp_logit_scale(scale)
    assert scale.item() == pytest.approx(after)
    assert pytest.approx(4.6052, abs=1e-4) == MAX_LOGIT_SCALE
    assert pytest.approx(1 / 0.07) == math.exp(INITIAL_LOGIT_SCALE)
