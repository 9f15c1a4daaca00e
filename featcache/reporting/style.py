"""Colours and figures of the report: one look for every picture."""

import base64
import io
import warnings
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

INK, MUTED, GRID, EMPTY = "#22303c", "#66727d", "#e3e7eb", "#c5ccd3"

PALETTE = (
    "#2f6690",
    "#e07a2f",
    "#3a9d6e",
    "#b5446e",
    "#7a5bb0",
    "#c9a227",
    "#5fb3c9",
    "#8f5d3b",
    "#d98ca6",
    "#7f9c3b",
    "#16425b",
    "#5b6770",
)
"""Colours of categories, told apart in this order."""

GROUP_COLORS = {"head": "#2f6690", "medium": "#3a9d6e", "tail": "#e07a2f"}


def figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    made = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)
    return made


def dress(axes: Axes, title: str = "") -> None:
    """Gives axes the report's title, grid and colours."""
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK, pad=10)
    axes.grid(visible=True, color=GRID, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=MUTED, labelsize=9, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def legend_above(made: Figure, patches: Sequence[Patch], texts: Sequence[str]) -> None:
    """A legend in one line over the figure, at its right."""
    made.legend(
        list(patches),
        list(texts),
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )


def short_name(name: str, longest: int = 20) -> str:
    """A class name that fits beside an axis: blanks for underscores, cut with an ellipsis."""
    name = name.replace("_", " ")
    return name if len(name) <= longest else name[: longest - 1] + "…"


def data_uri(made: Figure) -> str:
    """A figure as an image that stands in the page itself, sharp at every size.

    Text is drawn as outlines, the same everywhere; where the font lacks a letter (a class name in
    Chinese) it is left to the fonts of whoever opens the page.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        content = _svg(made, "path")
        if any("missing from font" in str(warning.message) for warning in caught):
            content = _svg(made, "none")
    return "data:image/svg+xml;base64," + base64.b64encode(content).decode()


def _svg(made: Figure, fonttype: str) -> bytes:
    buffer = io.BytesIO()
    # Fixed salt and no date: the same cache gives the same page.
    with mpl.rc_context({"svg.hashsalt": "featcache", "svg.fonttype": fonttype}):
        made.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()
