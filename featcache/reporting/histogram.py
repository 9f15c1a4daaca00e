"""How many training images each class has: the long tail at a glance."""

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from featcache.reporting import style

MOST_NAMED = 40
"""Classes up to which each gets its name under its bar."""


def draw(counts: npt.NDArray[np.int64], groups: list[str], names: list[str], split: str) -> Figure:
    """Bars of the classes' image counts, most first, coloured and shaded by group.

    Args:
        counts: (C,) images.
        groups: C of head, medium, tail.
        names: C class names.
        split: what was counted.
    """
    order = np.argsort(-counts, kind="stable")
    heights = counts[order]
    group = np.asarray(groups, dtype=object)[order]
    named = len(counts) <= MOST_NAMED
    made = style.figure(10.8, 3.9 if named else 3.4)
    axes = made.subplots()
    edges = np.arange(len(counts) + 1) - 0.5
    for name, color in style.GROUP_COLORS.items():
        member = group == name
        if not member.any():
            continue
        if len(counts) <= 400:
            axes.bar(np.flatnonzero(member), heights[member], 0.86, color=color, zorder=2)
        else:
            shown = np.where(member, heights, 0)
            axes.stairs(shown, edges, fill=True, color=color, zorder=2)
        places = np.flatnonzero(member)
        if (np.diff(places) == 1).all():  # stated groups need not follow the counts
            axes.axvspan(places[0] - 0.5, places[-1] + 0.5, color=color, alpha=0.07, lw=0)
    top = max(int(heights.max(initial=0)), 1)
    if top >= 4 * max(int(heights.min(initial=top)), 1):
        axes.set_yscale("log")
        axes.set_ylim(0.7, top * 1.6)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    else:
        axes.set_ylim(0, top * 1.15)
    axes.set_xlim(-0.6, len(counts) - 0.4)
    style.dress(axes)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(f"{split} images", color=style.MUTED)
    if named:
        shown_names = [style.short_name(names[index]) for index in order]
        axes.set_xticks(range(len(counts)), shown_names, rotation=45, ha="right")
        axes.tick_params(axis="x", length=0, labelcolor=style.INK)
    else:
        axes.set_xlabel("classes, from many images to few", color=style.MUTED)
    present = [name for name in style.GROUP_COLORS if (group == name).any()]
    style.legend_above(
        made,
        [Patch(color=style.GROUP_COLORS[name]) for name in present],
        [f"{name}: {int((group == name).sum()):,} classes" for name in present],
    )
    return made
