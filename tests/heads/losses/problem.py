"""Logits, labels and class counts that the losses are tried on."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from heads.losses.base import ClassStatistics, Loss

from .written_out import Array

COUNTS = np.array([400, 120, 0, 30, 3, 413])
"""Class 2 has no row, class 5 all of them."""
NUM_ROWS = 413
STATISTICS = ClassStatistics(COUNTS, NUM_ROWS)
SEEN = np.maximum(COUNTS, 1).astype(float)


def problem(num_rows: int = 9, seed: int = 0) -> tuple[Array, Array]:
    """(B, 6) float64 logits up to ±12 or so, and labels; the last row has none."""
    rng = np.random.default_rng(seed)
    logits = 4.0 * rng.normal(size=(num_rows, len(COUNTS)))
    labels = (rng.random(logits.shape) < 0.4).astype(float)
    labels[0, :] = 1.0
    labels[-1, :] = 0.0
    return logits, labels


def agrees(loss: Loss, expected: Callable[[Array, Array], Array], seed: int = 0) -> None:
    """Holds a loss against its written-out form: float64 closely, half precision as rounded."""
    logits, labels = problem(seed=seed)
    wanted = expected(logits, labels)
    assert np.isfinite(wanted).all()
    targets = torch.from_numpy(labels)
    double = torch.from_numpy(logits)
    before = double.clone()
    found = loss.terms(double, targets)
    assert torch.equal(double, before), "the caller's logits were changed"
    # Class weights are float32 buffers.
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=1e-12)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rounded = double.to(dtype)
        found = loss.terms(rounded, targets.float())
        assert found.dtype == torch.float32
        again = expected(rounded.double().numpy(), labels)
        np.testing.assert_allclose(found.numpy(), again, rtol=2e-4, atol=1e-6)


def gradient_checks(loss: Loss, seed: int = 0) -> None:
    """Compares the gradient with finite differences in float64."""
    logits, labels = problem(num_rows=4, seed=seed)
    start = torch.from_numpy(logits).requires_grad_()
    targets = torch.from_numpy(labels)
    assert torch.autograd.gradcheck(lambda z: loss.terms(z, targets), (start,))


def gradient(loss: Loss, logits: Tensor, targets: Tensor) -> Tensor:
    """d mean loss / d logits."""
    logits = logits.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(logits, targets), logits)
    return found
