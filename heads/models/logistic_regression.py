"""Logistic regression on all training rows at once by L-BFGS: the linear probe of the literature.

    W, b = argmin mean_i ℓ(W x_i + b, y_i) + λ/2 ‖W‖²

with ℓ the softmax cross-entropy, or for several labels a row the sum over classes of the sigmoid
one. λ = 1/(C N) is what other programs call C. Penalties are solved from the largest to the
smallest, each from the last one's solution.

Reference: Radford et al., Learning Transferable Visual Models From Natural Language Supervision,
2021, appendix A.3 (L-BFGS on frozen features, penalty by validation). Departs from it: features are
scaled by column, and the grid is coarse.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from heads.base import FeatureSpec
from heads.fitted_linear import FittedLinear, FittedLinearConfig, penalty_name, scaled_in_parts
from heads.mlp import RowScale
from heads.progress import ProgressLine, duration
from heads.threads import enough_threads

Solver = Literal["lbfgs", "sklearn"]
_CERTAIN = 30.0
"""Size of the logit of a class that no training row has, or that every one has."""
_CHUNK = 2**17
"""Logits held at a time (512 KiB of float32): they stay in a core's own cache, an eighth faster."""
_LEAST_ROWS = 512
"""Rows taken at a time all the same: a product of fewer is slow where classes are many."""
_ROUNDING = 1e-10
"""Changes of the loss, or of any weight, below this are rounding: nothing more can be gained."""
_QUIET_SECONDS = 2.0
"""Fits shorter than this show no progress."""


class LogisticRegressionConfig(FittedLinearConfig):
    """Logistic regression on all rows at once; validation picks the penalty."""

    kind: Literal["logistic_regression"] = "logistic_regression"
    """Head kind."""
    penalties: tuple[PositiveFloat, ...] = Field(
        default=(1.0, 1e-1, 1e-2, 1e-3, 1e-4), min_length=1
    )
    """Weights of half the squared weights beside the mean loss (λ), each > 0; validation picks one;
    1/(C N) gives scikit-learn's C for N rows."""
    solver: Solver = "lbfgs"
    """lbfgs = this project's, on the device of the features; sklearn = scikit-learn's."""
    max_iter: PositiveInt = 1000
    """Most L-BFGS iterations for a penalty, 1 or more."""
    tolerance: PositiveFloat = 1e-4
    """Largest entry of the gradient at which a fit is done, > 0."""

    def build(self, spec: FeatureSpec) -> FittedLinear:
        """The classifiers, fitted to the training rows of `spec`; a loaded run brings its own."""
        scale = RowScale(spec.feature_dim, self.scaling, spec.mean, spec.std)
        penalties = sorted(self.penalties, reverse=True)
        weights = torch.zeros(len(penalties), spec.num_classes, spec.feature_dim)
        biases = torch.zeros(len(penalties), spec.num_classes)
        if spec.support is not None:
            (features,), targets = spec.support()
            scale = scale.to(features.device)
            rows = scaled_in_parts(scale, features)
            known, never, always = fittable(targets, spec.num_classes)
            weights = rows.new_zeros(*weights.shape[:2], rows.shape[1])
            biases = biases.to(rows)
            biases[:, never], biases[:, always] = -_CERTAIN, _CERTAIN
            if len(known):
                reduced = (
                    targets[:, known] if targets.ndim == 2 else torch.searchsorted(known, targets)
                )
                solve = fit_by_sklearn if self.solver == "sklearn" else fit_path
                weights[:, known], biases[:, known] = solve(
                    rows,
                    reduced,
                    len(known),
                    penalties,
                    max_iter=self.max_iter,
                    tolerance=self.tolerance,
                )
        return FittedLinear(scale, weights, biases, [penalty_name(one) for one in penalties])


def fittable(targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes that can be fitted, that no row has, and that every row has: int64 indices.

    The best offset of the others is infinite, and a solver would run after it.

    Args:
        targets: (N,) int64 classes, or (N, C) float multi-hot.
        num_classes: C.
    """
    if targets.ndim == 1:
        counts = torch.bincount(targets, minlength=num_classes)
        never, always = counts == 0, counts == len(targets)
    else:
        never, always = ~targets.any(0), targets.all(0)
    known = ~never & ~always
    return known.nonzero()[:, 0], never.nonzero()[:, 0], always.nonzero()[:, 0]


def fit_path(
    rows: Tensor,
    targets: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    *,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """(G, C, D) weights and (G, C) offsets for each penalty, each fit begun from the one before.

    Args:
        rows: (N, D) float32 scaled features.
        targets: (N,) int64 classes, or (N, C) float multi-hot; every class occurs.
        num_classes: C.
        penalties: G of them, best from large to small.
        max_iter: most iterations for a penalty.
        tolerance: largest entry of the gradient at which a fit is done.
    """
    weight, bias = rows.new_zeros(num_classes, rows.shape[1]), rows.new_zeros(num_classes)
    weights, biases = [], []
    started = time.perf_counter()
    progress = ProgressLine()
    for number, penalty in enumerate(penalties, 1):
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iter,
            max_eval=2 * max_iter,
            tolerance_grad=tolerance,
            tolerance_change=_ROUNDING,
            history_size=10,
            line_search_fn="strong_wolfe",
        )
        count = 0

        def closure(penalty: float = penalty, number: int = number) -> Tensor:
            nonlocal count
            loss, weight.grad, bias.grad = loss_and_gradient(rows, targets, weight, bias)
            weight.grad.add_(weight, alpha=penalty)
            loss = loss + 0.5 * penalty * weight.square().sum(dtype=torch.float64)
            count += 1
            seconds = time.perf_counter() - started
            if seconds > _QUIET_SECONDS:
                progress.show(
                    f"penalty {penalty:g} ({number} of {len(penalties)})  pass {count}  "
                    f"loss {float(loss):.5f}  {duration(seconds)} so far"
                )
            return loss

        with enough_threads(rows.numel() * num_classes):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        weights.append(weight.clone())
        biases.append(bias.clone())
    progress.close()
    return torch.stack(weights), torch.stack(biases)


def loss_and_gradient(
    rows: Tensor, targets: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean over rows of the cross-entropy (0-d float64), and its gradients (C, D) and (C,).

    Two products a pass, in chunks of rows that stay in the processor's cache. The loss is summed in
    float64: a line search compares differences that float32 sums do not have.

    Args:
        rows: (N, D) float32.
        targets: (N,) int64 classes (softmax), or (N, C) float multi-hot (sum of sigmoid terms).
        weight: (C, D) float32.
        bias: (C,) float32.
    """
    num_rows, num_classes = len(rows), len(weight)
    total = rows.new_zeros((), dtype=torch.float64)
    weight_gradient, bias_gradient = torch.zeros_like(weight), torch.zeros_like(bias)
    factor = weight.T
    step = max(_LEAST_ROWS, _CHUNK // num_classes)
    for start in range(0, num_rows, step):
        part, wanted = rows[start : start + step], targets[start : start + step]
        logits = torch.addmm(bias, part, factor)
        if wanted.ndim == 2:
            total += (F.softplus(logits) - wanted * logits).sum(dtype=torch.float64)
            slopes = logits.sigmoid_().sub_(wanted)
        else:
            own = wanted[:, None]
            logits -= logits.amax(1, keepdim=True)
            total -= logits.gather(1, own).sum(dtype=torch.float64)
            slopes = logits.exp_()
            sums = slopes.sum(1, keepdim=True)
            total += sums.log().sum(dtype=torch.float64)
            slopes /= sums
            slopes.scatter_add_(1, own, slopes.new_full(own.shape, -1.0))
        weight_gradient.addmm_(slopes.T, part)
        bias_gradient += slopes.sum(0)
    return total / num_rows, weight_gradient.div_(num_rows), bias_gradient.div_(num_rows)


def fit_by_sklearn(
    rows: Tensor,
    targets: Tensor,
    num_classes: int,
    penalties: Sequence[float],
    *,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """What `fit_path` gives, by scikit-learn on the CPU, each penalty from scratch."""
    from sklearn.linear_model import LogisticRegression

    data, wanted = rows.cpu().numpy(), targets.cpu().numpy()
    weights = np.zeros((len(penalties), num_classes, data.shape[1]), np.float32)
    biases = np.zeros((len(penalties), num_classes), np.float32)
    for index, penalty in enumerate(penalties):

        def fitted(labels: npt.NDArray[Any], penalty: float = penalty) -> Any:
            # Two opposite weight vectors of half the length have half the squared length.
            halved = 2 if wanted.ndim == 1 and num_classes == 2 else 1
            strength = halved / (penalty * len(data))
            model = LogisticRegression(C=strength, max_iter=max_iter, tol=tolerance)
            return model.fit(data, labels)

        if wanted.ndim == 2:
            for column in range(num_classes):
                model = fitted(wanted[:, column])
                weights[index, column], biases[index, column] = model.coef_[0], model.intercept_[0]
            continue
        model = fitted(wanted)
        if num_classes > 2:
            weights[index], biases[index] = model.coef_, model.intercept_
        else:  # one classifier, for the difference of the two logits
            weights[index] = np.stack([-model.coef_[0], model.coef_[0]]) / 2
            biases[index] = np.stack([-model.intercept_[0], model.intercept_[0]]) / 2
    return torch.from_numpy(weights).to(rows), torch.from_numpy(biases).to(rows)
