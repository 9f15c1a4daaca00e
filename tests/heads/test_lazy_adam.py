import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heads.lazy_adam import LazyAdamW, _stored


def sparse(rows: list[int], shape: tuple[int, ...], seed: int) -> Tensor:
    values = torch.randn(len(rows), *shape[1:], generator=torch.Generator().manual_seed(seed))
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, shape, check_invariants=True)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_where_every_row_is_touched_it_is_adamw(is_sparse: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(5, 3, 4)) for _ in range(2))
    theirs.data.copy_(ours.data)
    lazy = LazyAdamW([ours], lr=0.03, weight_decay=0.2)
    plain = torch.optim.AdamW([theirs], lr=0.03, weight_decay=0.2)
    for step in range(12):
        grad = sparse([3, 1, 0, 4, 2], (5, 3, 4), step)
        ours.grad = grad if is_sparse else grad.to_dense()
        theirs.grad = grad.to_dense()
        lazy.step()
        plain.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_sparse", [False, True])
def test_rows_equal_a_slow_loop(is_sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heads.lazy_adam._STEP_NUMBERS", 24)  # two rows at a time
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 3, 4))
    expected = parameter.detach().double().clone()
    lr, decay, beta1, beta2, eps = 0.05, 0.3, 0.9, 0.999, 1e-8
    optimizer = LazyAdamW([parameter], lr=lr, weight_decay=decay)
    touches = [[0, 2, 5], [1, 2], [5], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [0]]
    mean, square = torch.zeros(6, 3, 4).double(), torch.zeros(6, 3, 4).double()
    last = [0] * 6
    for step, rows in enumerate(touches, 1):
        grad = sparse(rows, (6, 3, 4), step)
        dense = grad.to_dense().double()
        for row in rows:
            for _ in range(step - last[row]):  # AdamW's moments on steps without a gradient
                mean[row] *= beta1
                square[row] *= beta2
                expected[row] *= 1 - lr * decay
            mean[row] += (1 - beta1) * dense[row]
            square[row] += (1 - beta2) * dense[row] ** 2
            last[row] = step
            root = (square[row] / (1 - beta2**step)).sqrt() + eps
            expected[row] -= lr * mean[row] / (1 - beta1**step) / root
        parameter.grad = grad if is_sparse else grad.to_dense()
        optimizer.step()
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_a_row_without_a_gradient_stays() -> None:
    parameter = nn.Parameter(torch.ones(4, 2))
    optimizer = LazyAdamW([parameter], lr=0.1, weight_decay=0.5)
    for step in range(3):
        parameter.grad = sparse([1], (4, 2), step)
        optimizer.step()
    assert torch.equal(parameter[[0, 2, 3]], torch.ones(3, 2))
    assert bool((parameter[1] != 1.0).all())


def test_bfloat16_moments_are_right_on_average() -> None:
    """Plain rounding would leave the second moment where it is: its steps are too small."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(8, 512)) for _ in range(2))
    low = LazyAdamW([ours], lr=1e-3, state_dtype="bfloat16")
    full = LazyAdamW([theirs], lr=1e-3)
    for step in range(300):
        grad = torch.randn(8, 512) * (1.0 if step < 30 else 0.1)
        ours.grad, theirs.grad = grad, grad.clone()
        low.step()
        full.step()
    kept, exact = (one.state[p]["exp_avg_sq"] for one, p in ((low, ours), (full, theirs)))
    assert kept.dtype == torch.bfloat16
    assert float(kept.float().mean() / exact.mean()) == pytest.approx(1.0, abs=0.01)
    assert (ours - theirs).abs().mean() < 0.05 * theirs.abs().mean()


def test_random_rounding_is_unbiased_and_repeatable() -> None:
    torch.manual_seed(0)
    values = torch.full((200_000,), 1.0 + 0.3 * 2.0**-7)  # 30 % of the way to the next bfloat16
    noise = torch.randn(200_000)
    found = _stored(values, torch.bfloat16, noise, 7).float()
    assert set(found.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert float((found > 1.0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(found, _stored(values, torch.bfloat16, noise, 7).float())
    still = torch.ones(1)  # the same gradient again and again: the salt has to vary it
    up = [float(_stored(values[:1], torch.bfloat16, still, salt)) > 1.0 for salt in range(4000)]
    assert sum(up) / len(up) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_restored_state_goes_on_bit_for_bit(dtype: Any) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(6, 4))
    optimizer = LazyAdamW([parameter], lr=0.1, state_dtype=dtype)

    def go(one: LazyAdamW, weight: nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = sparse([step % 6, (step + 2) % 6], (6, 4), step)
            one.step()

    go(optimizer, parameter, range(5))
    other = nn.Parameter(parameter.detach().clone())
    again = LazyAdamW([other], lr=0.1, state_dtype=dtype)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(optimizer, parameter, range(5, 12))
    go(again, other, range(5, 12))
    assert torch.equal(parameter, other)
    assert again.state[other]["exp_avg"].dtype == getattr(torch, dtype)


def test_a_single_number_is_a_row_of_its_own() -> None:
    """Such as the threshold of learned prompts, or the one offset of cosine classifiers."""
    ours, theirs = (nn.Parameter(torch.tensor(0.3)) for _ in range(2))
    lazy, plain = LazyAdamW([ours], lr=0.03), torch.optim.AdamW([theirs], lr=0.03, weight_decay=0.0)
    for step in range(5):
        for parameter, optimizer in ((ours, lazy), (theirs, plain)):
            parameter.grad = torch.tensor(0.5 - 0.2 * step)
            optimizer.step()
    torch.testing.assert_close(ours, theirs)
