"""Losses on logits written out element by element in float64, from their equations.

Slow on purpose, and with nothing of `heads.losses` in it: what the losses are compared with.
"""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def softplus(x: float) -> float:
    """log(1 + e^x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def bce(z: float, y: float) -> float:
    """softplus(z) − y z."""
    return softplus(z) - y * z


def each(z: Array, y: Array, term: Callable[[int, int], float]) -> Array:
    """(B, C) of term(row, class)."""
    return np.array([[term(i, c) for c in range(z.shape[1])] for i in range(z.shape[0])])


def focal(z: Array, y: Array, alpha: float | None, gamma: float) -> Array:
    """α_t (1 − p_t)^γ bce for y in {0, 1}."""

    def term(i: int, c: int) -> float:
        p = sigmoid(z[i, c])
        p_t = p if y[i, c] == 1 else 1 - p
        a = 1.0 if alpha is None else (alpha if y[i, c] == 1 else 1 - alpha)
        return a * (1 - p_t) ** gamma * bce(z[i, c], y[i, c])

    return each(z, y, term)


def asl(
    z: Array, y: Array, gamma_neg: float, gamma_pos: float, clip: float, eps: float = 1e-8
) -> Array:
    """−[y (1−p)^γ₊ log p + (1−y) p_m^γ₋ log(1−p_m)]."""

    def term(i: int, c: int) -> float:
        p = sigmoid(z[i, c])
        p_m = max(p - clip, 0.0)
        positive = (1 - p) ** gamma_pos * math.log(max(p, eps))
        negative = p_m**gamma_neg * math.log(max(1 - p_m, eps))
        return -(y[i, c] * positive + (1 - y[i, c]) * negative)

    return each(z, y, term)


def rebalance(y: Array, n: Array, a: float, b: float, mu: float) -> Array:
    """a + σ(b (r − μ)); r = 1 in rows without positives."""
    weights = np.zeros(y.shape)
    for i in range(y.shape[0]):
        total = sum(1 / n[j] for j in range(y.shape[1]) if y[i, j] == 1)
        for c in range(y.shape[1]):
            r = (1 / n[c]) / total if total > 0 else 1.0
            weights[i, c] = a + sigmoid(b * (r - mu))
    return weights


def shift(n: Array, num_rows: int, kappa: float) -> Array:
    """ν_c = −κ log(N / n_c − 1), with 1 <= n_c <= N − 1."""
    return np.array([-kappa * math.log(num_rows / min(max(x, 1), num_rows - 1) - 1) for x in n])


def tolerant(
    z: Array, y: Array, nu: Array, zeta: float, gamma: float | None, alpha: float | None
) -> Array:
    """y softplus(−u) + (1−y) softplus(ζu)/ζ, focused by its own probabilities."""

    def term(i: int, c: int) -> float:
        u = z[i, c] + nu[c]
        if y[i, c] == 1:
            q, value = sigmoid(u), softplus(-u)
        else:
            q, value = sigmoid(-zeta * u), softplus(zeta * u) / zeta
        if gamma is not None:
            value *= (1 - q) ** gamma
        if alpha is not None:
            value *= alpha if y[i, c] == 1 else 1 - alpha
        return value

    return each(z, y, term)


def zlpr(z: Array, y: Array) -> Array:
    """log(1 + Σ_pos e^−z) + log(1 + Σ_neg e^z) of each row, weighted by y and 1 − y."""
    rows = []
    for i in range(z.shape[0]):
        positive = sum(y[i, c] * math.exp(-z[i, c]) for c in range(z.shape[1]))
        negative = sum((1 - y[i, c]) * math.exp(z[i, c]) for c in range(z.shape[1]))
        rows.append(math.log1p(positive) + math.log1p(negative))
    return np.array(rows)


def effective(n: float, beta: float) -> float:
    """(1 − β) / (1 − β^n)."""
    return (1 - beta) / (1 - beta**n)


def angular(cosines: Array, y: Array, scale: float, margin: float, offset: float) -> Array:
    """Sigmoid cross-entropy of s [y cos(θ + m) + (1 − y) cos θ] + offset."""

    def term(i: int, c: int) -> float:
        theta = math.acos(cosines[i, c])
        if theta + margin > math.pi:
            turned = math.cos(theta) - margin * math.sin(margin)
        else:
            turned = math.cos(theta + margin)
        z = scale * (y[i, c] * turned + (1 - y[i, c]) * math.cos(theta)) + offset
        return bce(z, y[i, c])

    return each(cosines, y, term)


def softmax_cross_entropy(z: Array, labels: Array, w: Array, epsilon: float) -> Array:
    """−Σ_c w_c q_c log softmax(z)_c, q = (1 − ε) one-hot + ε / C."""
    rows = []
    for i in range(z.shape[0]):
        total = sum(math.exp(z[i, c] - z[i].max()) for c in range(z.shape[1]))
        value = 0.0
        for c in range(z.shape[1]):
            q = (1 - epsilon) * (c == labels[i]) + epsilon / z.shape[1]
            value -= w[c] * q * (z[i, c] - z[i].max() - math.log(total))
        rows.append(value)
    return np.array(rows)
