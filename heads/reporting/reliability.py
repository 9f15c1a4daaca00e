"""Whether a probability of 80 % is right in 80 of 100 cases.

Reference: Guo et al., On Calibration of Modern Neural Networks, 2017, figure 1.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from featcache.reporting import style
from heads.metrics import expected_calibration_error

_NUM_BINS = 15


def draw(
    confidences: Mapping[str, npt.NDArray[np.floating]], correct: npt.NDArray[np.bool_]
) -> Figure:
    """A panel for each set of probabilities: share that is right over probability, and how many.

    Args:
        confidences: name, such as `as trained`, -> (n,) probabilities of n statements.
        correct: (n,) which statements are true.
    """
    made = style.figure(5.0 * len(confidences), 4.4)
    grid = made.subplots(
        2, len(confidences), height_ratios=[4, 1], sharex=True, sharey="row", squeeze=False
    )
    for column, (name, confidence) in enumerate(confidences.items()):
        upper, lower = grid[:, column]
        bins = np.clip(np.ceil(confidence * _NUM_BINS).astype(np.int64) - 1, 0, _NUM_BINS - 1)
        sizes = np.bincount(bins, minlength=_NUM_BINS)
        held = sizes > 0
        right = np.bincount(bins, correct, _NUM_BINS)[held] / sizes[held]
        stated = np.bincount(bins, confidence, _NUM_BINS)[held] / sizes[held]
        centres = ((np.arange(_NUM_BINS) + 0.5) / _NUM_BINS)[held]
        width = 0.9 / _NUM_BINS
        upper.plot([0, 1], [0, 1], color=style.MUTED, lw=1, ls=(0, (4, 2)), zorder=1)
        upper.bar(centres, right, width, color=style.PALETTE[0], zorder=2)
        upper.vlines(centres, right, stated, color=style.PALETTE[1], lw=2.2, zorder=3)
        upper.plot(centres, stated, "_", color=style.PALETTE[1], ms=8, mew=2.2, zorder=3)
        error = expected_calibration_error(confidence, correct, _NUM_BINS)
        style.dress(upper, f"{name}: calibration error {error:.1%}")
        upper.set_xlim(0, 1)
        upper.set_ylim(0, 1.02)
        lower.bar(centres, sizes[held] / sizes.sum(), width, color=style.EMPTY, zorder=2)
        style.dress(lower)
        lower.set_xlabel("probability stated", color=style.MUTED)
        for axes in (upper, lower):
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    grid[0, 0].set_ylabel("share that is right", color=style.MUTED)
    grid[1, 0].set_ylabel("statements", color=style.MUTED)
    return made
