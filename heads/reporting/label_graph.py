"""Which labels a head lets speak to each other: labels on a circle, edges as wide as they weigh."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from featcache.reporting import style

MOST_LABELS = 60
"""Labels drawn, at most: those with the heaviest edges."""

_MOST_EDGES = 300


def draw(edges: npt.NDArray[np.floating], names: Sequence[str], groups: Sequence[str]) -> Figure:
    """Labels on a circle in the order that brings neighbours together, coloured by group.

    Args:
        edges: (C, C) weight of the edge between two labels, >= 0; 0 = none. Both directions are
            drawn as one edge of their larger weight; a label's edge to itself is left out.
        names: C label names.
        groups: C of head, medium, tail.
    """
    both = np.maximum(edges, edges.T).astype(np.float64)
    np.fill_diagonal(both, 0)
    shown = np.arange(len(names))
    if len(names) > MOST_LABELS:
        shown = np.argsort(-both.max(1), kind="stable")[:MOST_LABELS]
    shown = shown[circle_order(both[np.ix_(shown, shown)])]
    part = both[np.ix_(shown, shown)]
    angles = np.pi / 2 - 2 * np.pi * np.arange(len(shown)) / max(len(shown), 1)
    places = np.stack([np.cos(angles), np.sin(angles)], 1)
    left, right = np.nonzero(np.triu(part, 1))
    weights = part[left, right]
    heaviest = np.argsort(-weights, kind="stable")[:_MOST_EDGES][::-1]
    made = style.figure(8.2, 8.2)
    axes = made.subplots()
    if len(heaviest):
        strength = weights[heaviest] / weights.max()
        curves = [_curve(places[left[i]], places[right[i]]) for i in heaviest]
        axes.add_collection(
            LineCollection(
                curves,
                linewidths=0.4 + 3.2 * strength,
                colors=[(0.18, 0.40, 0.56, 0.12 + 0.68 * s) for s in strength],
                zorder=1,
            )
        )
    colors = [style.GROUP_COLORS[groups[index]] for index in shown.tolist()]
    left_right, up_down = places.T
    axes.scatter(left_right, up_down, s=64, c=colors, zorder=3, edgecolors="white", linewidths=1)
    size = 9.5 if len(shown) <= 30 else 7.5
    for index, angle, (x, y) in zip(shown.tolist(), angles, places, strict=True):
        degrees = np.degrees(angle)
        flipped = np.cos(angle) < -1e-9
        axes.text(
            1.05 * x,
            1.05 * y,
            style.short_name(names[index], 18),
            rotation=degrees + 180 if flipped else degrees,
            rotation_mode="anchor",
            ha="right" if flipped else "left",
            va="center",
            fontsize=size,
            color=style.INK,
        )
    axes.set_xlim(-1.45, 1.45)
    axes.set_ylim(-1.45, 1.45)
    axes.set_aspect("equal")
    axes.axis("off")
    return made


def circle_order(weights: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
    """(n,) an order in which labels with heavy edges are close: by the second smallest eigenvector.

    Reference: Fiedler, A property of eigenvectors of nonnegative symmetric matrices, 1975.

    Args:
        weights: (n, n) symmetric, >= 0.
    """
    if len(weights) < 3:
        return np.arange(len(weights))
    degree = np.maximum(weights.sum(1), 1e-12)
    scale = 1 / np.sqrt(degree)
    laplacian = np.eye(len(weights)) - scale[:, None] * weights * scale
    vectors = np.linalg.eigh(laplacian)[1]
    return np.argsort(scale * vectors[:, 1], kind="stable")


def _curve(start: npt.NDArray[np.float64], end: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(21, 2) an arc that bends towards the centre."""
    at = np.linspace(0, 1, 21)[:, None]
    bend = 0.35 * (start + end) / 2
    return (1 - at) ** 2 * start + 2 * at * (1 - at) * bend + at**2 * end
