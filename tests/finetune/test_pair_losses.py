"""Both losses on pairs against the equations pair by pair, finite differences and open_clip's."""

import math
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from featcache.config import Config
from finetune.losses import PAIR_LOSSES, PairLossConfig
from finetune.losses import base as losses_base
from finetune.losses.info_nce import InfoNceConfig, clamp_logit_scale, info_nce
from finetune.losses.siglip import INITIAL_LOGIT_BIAS, INITIAL_LOGIT_SCALE, SiglipConfig, siglip

from .pairs import features, written_out

SCALE, BIAS = 1.3, -2.0


def measured(
    kind: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, rows: int | None = None
) -> Tensor:
    if kind == "siglip":
        return siglip(images, texts, scale, bias, rows_at_once=rows)
    return info_nce(images, texts, scale, rows_at_once=rows)


def double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_the_folder_s_losses_are_found() -> None:
    assert {"info_nce": InfoNceConfig, "siglip": SiglipConfig} == PAIR_LOSSES
    assert all(issubclass(member, Config) for member in PAIR_LOSSES.values())


@pytest.mark.parametrize("kind", PAIR_LOSSES)
@pytest.mark.parametrize("rows", [None, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_equals_the_equation_whatever_rows_are_held_at_once(
    kind: str, rows: int | None, count: int
) -> None:
    images, texts = features(count, 0), features(count, 1)
    loss = measured(kind, images, texts, double(SCALE), double(BIAS), rows)
    bias = BIAS if kind == "siglip" else 0.0
    expected = written_out(kind, images.numpy(), texts.numpy(), SCALE, bias)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
@pytest.mark.parametrize("rows", [None, 3])
def test_gradients_equal_finite_differences_of_the_equation(kind: str, rows: int | None) -> None:
    images, texts = features(5, 0), features(5, 1)
    values = [images.clone(), texts.clone(), torch.tensor(SCALE), torch.tensor(BIAS)]
    leaves = [value.double().requires_grad_() for value in values]
    measured(kind, *leaves, rows).backward()

    def slow(inputs: list[np.ndarray]) -> float:
        bias = float(inputs[3]) if kind == "siglip" else 0.0
        return written_out(kind, inputs[0], inputs[1], float(inputs[2]), bias)

    small = 1e-6
    for number, places in ((0, [(0, 0), (4, 7)]), (1, [(1, 2), (4, 0)]), (2, [()]), (3, [()])):
        if kind == "info_nce" and number == 3:
            continue
        for place in places:
            sides = []
            for sign in (1, -1):
                inputs = [leaf.detach().numpy().copy() for leaf in leaves]
                inputs[number][place] += sign * small
                sides.append(slow(inputs))
            grad = leaves[number].grad
            assert grad is not None
            assert grad[place].item() == pytest.approx((sides[0] - sides[1]) / 2 / small, abs=1e-8)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_equals_open_clip_s_loss_and_gradients(kind: str) -> None:
    found = []
    for own in (True, False):
        leaves = [features(9, 0), features(9, 1)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        scale, bias = double(SCALE), double(BIAS)
        if own:
            loss = measured(kind, *leaves, scale, bias, 4)
        elif kind == "siglip":
            loss = SigLipLoss()(*leaves, scale.exp(), bias)
        else:
            loss = ClipLoss()(*leaves, scale.exp())
        loss.backward()
        learned = [*leaves, scale] + ([bias] if kind == "siglip" else [])
        found.append([loss.detach(), *(leaf.grad for leaf in learned)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_autocast_leaves_the_loss_in_float32(kind: str) -> None:
    images, texts = (features(40, seed).float() for seed in (0, 1))
    outside = measured(kind, images, texts, torch.tensor(4.0), torch.tensor(BIAS))
    with torch.autocast("cpu", torch.bfloat16):
        inside = measured(kind, images, texts, torch.tensor(4.0), torch.tensor(BIAS))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_half_precision_features_get_gradients_in_their_own_precision(kind: str) -> None:
    images, texts = (features(4, seed).to(torch.bfloat16).requires_grad_() for seed in (0, 1))
    scale = torch.nn.Parameter(torch.tensor([1.0]))
    loss = measured(kind, images, texts, scale, torch.tensor(BIAS))
    # Computed in float32 all the same.
    exact = measured(kind, images.double(), texts.double(), scale, torch.tensor(BIAS))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward()
    assert images.grad is not None
    assert images.grad.dtype == torch.bfloat16
    assert scale.grad is not None
    assert scale.grad.shape == (1,)


def test_no_more_of_the_matrix_is_held_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_base, "MATRIX_BYTES", 4 * 100 * 7)
    assert [s.stop - s.start for s in losses_base.row_chunks(20, 100, None)] == [7, 7, 6]
    assert len(list(losses_base.row_chunks(3, 10**9, None))) == 3, "one row at a time at the least"


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_nothing_of_the_matrix_s_size_is_kept_for_the_backward_pass(kind: str) -> None:
    images, texts = (features(64, seed).requires_grad_() for seed in (0, 1))
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        measured(kind, images, texts, double(SCALE), double(BIAS)).backward()
    assert kept
    assert max(kept) == images.numel() < 64 * 64


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_a_loss_that_is_only_looked_at_has_no_graph(kind: str) -> None:
    images, texts = features(4, 0).requires_grad_(), features(4, 1)
    with torch.no_grad():
        loss = measured(kind, images, texts, double(SCALE), double(BIAS))
    assert not loss.requires_grad
    assert loss == measured(kind, images, texts, double(SCALE), double(BIAS)).detach()


def test_a_model_that_knows_nothing_pays_log_batch() -> None:
    same = torch.ones(9, 4) / 2
    assert info_nce(same, same, torch.tensor(3.0)).item() == pytest.approx(math.log(9))


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_unequal_shapes_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"\(3, 8\).*\(4, 8\)"):
        measured(kind, features(3, 0), features(4, 1), double(0.0), double(0.0))


def test_a_bias_belongs_to_siglip_alone() -> None:
    images, texts, scale = features(3, 0), features(3, 1), double(0.0)
    with pytest.raises(ValueError, match="has no bias"):
        InfoNceConfig().loss(images, texts, scale, double(0.0))
    with pytest.raises(ValueError, match="needs a logit_bias"):
        SiglipConfig().loss(images, texts, scale)


def test_losses_start_from_their_papers_values() -> None:
    assert math.exp(INITIAL_LOGIT_SCALE) == pytest.approx(10)
    assert INITIAL_LOGIT_BIAS == -10
    losses: list[PairLossConfig] = [InfoNceConfig(), SiglipConfig()]
    assert [math.exp(one.initial_scale) for one in losses] == pytest.approx([1 / 0.07, 10])
    assert [one.initial_bias for one in losses] == [None, -10]


def test_only_info_nce_bounds_its_scale() -> None:
    for config, after in ((InfoNceConfig(), math.log(100)), (SiglipConfig(), 5.0)):
        scale = torch.nn.Parameter(torch.tensor(5.0))
        config.clamp(scale)
        assert scale.item() == pytest.approx(after)
    scale = torch.nn.Parameter(torch.tensor(-0.5))
    clamp_logit_scale(scale)
    assert scale.item() == 0


def test_siglip_begins_near_its_least_loss() -> None:
    """With the papers' start values, features that know nothing pay about one pair's price."""
    images, texts = features(64, 0), features(64, 1)
    start = torch.tensor(INITIAL_LOGIT_SCALE), torch.tensor(INITIAL_LOGIT_BIAS)
    assert siglip(images, texts, *start).item() < 13
    assert siglip(images, texts, start[0], torch.tensor(0.0)).item() > 100
    assert siglip(F.normalize(images), images, *start).item() < siglip(images, texts, *start).item()


@pytest.mark.parametrize("kind", PAIR_LOSSES)
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_the_largest_scale_overflows_nothing(kind: str, side: float) -> None:
    """exp(100) is no float32."""
    texts, scale = features(4, 0).float(), torch.tensor(math.log(100.0))
    images = (side * texts).requires_grad_()
    loss = measured(kind, images, texts, scale, torch.tensor(10.0))
    assert loss.isfinite()
    loss.backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_a_multiple_of_the_loss_has_that_multiple_of_every_gradient(kind: str) -> None:
    found = []
    for factor in (1.0, 1024.0):
        leaves = [features(5, 0), features(5, 1), torch.tensor(SCALE), torch.tensor(BIAS)]
        leaves = [leaf.double().requires_grad_() for leaf in leaves]
        (factor * measured(kind, *leaves)).backward()
        learned = leaves if kind == "siglip" else leaves[:3]
        found.append([cast(Tensor, leaf.grad) for leaf in learned])
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(many, 1024 * one)
