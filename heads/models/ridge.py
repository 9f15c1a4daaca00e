"""Ridge regression to one-hot labels: the quickest look at what a linear classifier can do.

With centred features X (N, D), centred targets Y (N, C) and penalty λ,

    W = argmin ‖Y − X Wᵀ‖² / N + λ ‖W‖²,    Wᵀ = V (E + λ)⁻¹ Vᵀ (Xᵀ Y / N),    XᵀX / N = V E Vᵀ

so that one eigendecomposition of a D x D matrix serves every penalty; the offset is the mean of Y.
Of L tokens side by side D is L times as large.

Reference: Rifkin, Yeo and Poggio, Regularized Least-Squares Classification, 2003, sections 3 and 5.
Departs from it: linear features only, and penalties are picked on validation rows.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor

from heads.base import FeatureSpec
from heads.fitted_linear import FittedLinear, FittedLinearConfig, penalty_name
from heads.losses.base import as_multi_hot
from heads.mlp import RowScale

_ROWS = 65_536
"""Rows summed at a time, in float32; sums of parts are float64."""
SHARPNESS = 10.0
"""What regressed targets (0..1) are multiplied by to be logits; a temperature is fitted besides."""


class RidgeConfig(FittedLinearConfig):
    """Least squares to one-hot labels with a penalty on the weights, in closed form."""

    kind: Literal["ridge"] = "ridge"
    """Head kind."""
    penalties: tuple[PositiveFloat, ...] = Field(
        default=(1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), min_length=1
    )
    """Weights of the squared weights beside the mean squared error (λ), each > 0; validation picks
    one."""

    def build(self, spec: FeatureSpec) -> FittedLinear:
        """The classifiers, fitted to the training rows of `spec`; a loaded run brings its own."""
        scale = RowScale(spec.feature_dim, self.scaling, spec.mean, spec.std)
        count = len(self.penalties)
        weights = torch.zeros(count, spec.num_classes, spec.feature_dim)
        biases = torch.zeros(count, spec.num_classes)
        if spec.support is not None:
            (features,), targets = spec.support()
            scale = scale.to(features.device)
            weights, biases = fit_ridge(scale, features, targets, spec.num_classes, self.penalties)
            center = 0.5 if spec.task == "multi_label" else 0.0
            weights, biases = SHARPNESS * weights, SHARPNESS * (biases - center)
        return FittedLinear(scale, weights, biases, [penalty_name(one) for one in self.penalties])


def fit_ridge(
    scale: RowScale,
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    penalties: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    """(G, C, D) weights and (G, C) offsets, one for each penalty.

    Args:
        scale: what features go through first.
        features: (N, D) float32 as stored; (N, L, D) tokens are taken side by side.
        targets: (N,) int64 classes, or (N, C) float multi-hot.
        num_classes: C.
        penalties: λ, each > 0.
    """
    num_rows, dim = len(features), features[0].numel()
    step = max(1, _ROWS * features.shape[-1] // dim)
    shift = scale(features[:step]).flatten(1).mean(0)  # near the mean, or products would cancel
    total = features.new_zeros(dim, dtype=torch.float64)
    squares = features.new_zeros(dim, dim, dtype=torch.float64)
    hits = features.new_zeros(dim, num_classes, dtype=torch.float64)
    counts = features.new_zeros(num_classes, dtype=torch.float64)
    for start in range(0, num_rows, step):
        rows = scale(features[start : start + step]).flatten(1) - shift
        hot = as_multi_hot(targets[start : start + step], num_classes)
        total += rows.sum(0, dtype=torch.float64)
        squares += (rows.T @ rows).double()
        hits += (rows.T @ hot).double()
        counts += hot.sum(0, dtype=torch.float64)
    mean, share = total / num_rows, counts / num_rows
    values, vectors = torch.linalg.eigh(squares / num_rows - torch.outer(mean, mean))
    inner = vectors.T @ (hits / num_rows - torch.outer(mean, share))
    weights = torch.stack(
        [(vectors @ (inner / (values.clamp(min=0) + one)[:, None])).T for one in penalties]
    )
    biases = share - weights @ (mean + shift)
    return weights.float(), biases.float()
