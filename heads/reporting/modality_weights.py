"""How much a head that weighs modalities trusts each of them, row by row."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from featcache.reporting import style

_NUM_BINS = 25


def draw(weights: npt.NDArray[np.floating], names: Sequence[str]) -> Figure:
    """A histogram of each modality's weight over the rows, and its mean.

    Args:
        weights: (N, M) 0..1; each row sums to 1, or to 0 where all modalities are missing.
        names: M modality names.
    """
    made = style.figure(3.6 * len(names), 3.2)
    all_axes = made.subplots(1, len(names), sharey=True, squeeze=False)[0]
    edges = np.linspace(0, 1, _NUM_BINS + 1)
    for column, (axes, name) in enumerate(zip(all_axes, names, strict=True)):
        own = weights[:, column]
        heights = np.histogram(own, edges)[0] / max(len(own), 1)
        color = style.PALETTE[column % len(style.PALETTE)]
        axes.stairs(heights, edges, fill=True, color=color, zorder=2)
        axes.axvline(own.mean(), color=style.INK, lw=1.2, ls=(0, (4, 2)), zorder=3)
        style.dress(axes, f"{name}: mean weight {own.mean():.2f}")
        axes.set_xlim(0, 1)
        axes.set_xlabel("weight", color=style.MUTED)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    all_axes[0].set_ylabel("rows", color=style.MUTED)
    return made
