"""How heads do with more and more training rows a class."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter

from featcache.reporting import style


def draw(
    curves: Mapping[str, Mapping[int, Sequence[float]]], metric: str, title: str = ""
) -> Figure:
    """The mean over seeds of each head at each number of shots, with one deviation around it.

    Args:
        curves: head -> shots -> values of the seeds, 0..1.
        metric: what the values are.
        title: line above the picture.
    """
    made = style.figure(7.2, 4.4)
    axes = made.subplots()
    shots = sorted({count for curve in curves.values() for count in curve})
    for index, (name, curve) in enumerate(curves.items()):
        where = np.asarray(sorted(curve))
        mean = np.asarray([np.mean(curve[count]) for count in where])
        spread = np.asarray([deviation(curve[count]) for count in where])
        color = style.PALETTE[index % len(style.PALETTE)]
        axes.fill_between(where, mean - spread, mean + spread, color=color, alpha=0.15, lw=0)
        axes.plot(where, mean, color=color, lw=2, marker="o", ms=5, label=name, zorder=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(shots))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(count) for count in shots])
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("training rows a class", color=style.MUTED)
    axes.set_ylabel(metric, color=style.MUTED)
    style.dress(axes, title)
    axes.legend(frameon=False, fontsize=9, labelcolor=style.INK)
    return made


def deviation(values: Sequence[float]) -> float:
    """Standard deviation of a sample (over n - 1); 0 of one value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
