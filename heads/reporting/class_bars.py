"""Each class's own metric, from the class with most training images to the one with fewest."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, PercentFormatter

from featcache.reporting import style
from featcache.reporting.histogram import MOST_NAMED

_BARS = 400
"""Classes up to which each has a bar of its own; beyond, a filled outline."""


def draw(
    values: npt.NDArray[np.floating],
    counts: npt.NDArray[np.integer],
    groups: Sequence[str],
    names: Sequence[str],
    metric: str,
) -> Figure:
    """Bars by training images, shaded by head, medium and tail, with each group's mean.

    Args:
        values: (C,) 0..1; NaN = not defined (no rows of the class), drawn as a small cross.
        counts: (C,) training images.
        groups: C of head, medium, tail.
        names: C class names.
        metric: what the values are.
    """
    order = np.argsort(-counts, kind="stable")
    heights, group = values[order], np.asarray(groups, dtype=object)[order]
    named = len(order) <= MOST_NAMED
    made = style.figure(10.8, 4.1 if named else 3.6)
    axes = made.subplots()
    edges = np.arange(len(order) + 1) - 0.5
    labels = []
    for name, color in style.GROUP_COLORS.items():
        member = group == name
        if not member.any():
            continue
        places = np.flatnonzero(member)
        known = heights[member][~np.isnan(heights[member])]
        if len(order) <= _BARS:
            axes.bar(places, np.nan_to_num(heights[member]), 0.86, color=color, zorder=2)
        else:
            shown = np.where(member, np.nan_to_num(heights), 0)
            axes.stairs(shown, edges, fill=True, color=color, zorder=2)
        text = f"{name}: {len(places):,} classes"
        if (np.diff(places) == 1).all():  # stated groups need not follow the counts
            span = places[0] - 0.5, places[-1] + 0.5
            axes.axvspan(*span, color=color, alpha=0.08, lw=0, zorder=0)
            if len(known):
                axes.hlines(known.mean(), *span, color=style.INK, lw=1.2, ls=(0, (4, 2)), zorder=3)
        if len(known):
            text += f", mean {known.mean():.1%}"
        labels.append((Patch(color=color), text))
    empty = np.flatnonzero(np.isnan(heights))
    if len(empty):
        axes.plot(empty, np.full(len(empty), 0.015), "x", color=style.MUTED, ms=4, zorder=3)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(-0.6, len(order) - 0.4)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    style.dress(axes)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(metric, color=style.MUTED)
    if named:
        axes.set_xticks(
            range(len(order)),
            [style.short_name(names[index]) for index in order],
            rotation=45,
            ha="right",
            rotation_mode="anchor",
        )
        axes.tick_params(axis="x", length=0, labelcolor=style.INK)
    else:
        places = np.unique(np.linspace(0, len(order) - 1, 6).round().astype(int))
        sizes = counts[order]
        axes.set_xticks(places)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{sizes[round(at)]:,}"))
        axes.set_xlabel("training images of the class, most first", color=style.MUTED)
    style.legend_above(
        made,
        [patch for patch, _ in labels],
        [text for _, text in labels],
    )
    return made
