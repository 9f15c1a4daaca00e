"""The picture of a pretraining: its loss over the steps, and what validations found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featcache.reporting.style import INK, MUTED, PALETTE, dress, figure

_SHOWN = {
    "zero_shot_top1": "zero-shot top-1",
    "image_to_text_recall_at_1": "image to text, recall at 1",
    "image_to_text_recall_at_5": "image to text, recall at 5",
    "text_to_image_recall_at_5": "text to image, recall at 5",
}
"""Metrics of a validation that are drawn, with their names in the legend."""


def draw_curves(
    file: Path, history: Sequence[Mapping[str, Any]], title: str, chance: float, loss: str
) -> None:
    """The loss over the steps with that of a model that knows nothing; accuracies below.

    Args:
        file: picture to write.
        history: records of the training.
        title: of the picture.
        chance: loss of a model that knows nothing, in nats.
        loss: name of the loss.
    """
    measured = [entry for entry in history if "validation" in entry]
    made = figure(8, 7)
    top, bottom = made.subplots(2, 1, sharex=True)
    steps = [entry["step"] for entry in history]
    top.plot(steps, [entry["loss"] for entry in history], color=PALETTE[0], label="training")
    top.axhline(chance, color=MUTED, linestyle=":", label="knows nothing")
    top.set_xlim(left=0)
    top.set_ylim(0, 1.1 * max([chance, *(entry["loss"] for entry in history)]))
    top.set_ylabel("nats")
    dress(top, f"{title}: loss {loss}")
    shown: list[tuple[int, float]] = []
    for color, (metric, name) in zip(PALETTE, _SHOWN.items(), strict=False):
        points = [
            (e["step"], e["validation"][metric]) for e in measured if metric in e["validation"]
        ]
        shown += points
        if points:
            bottom.plot(*zip(*points, strict=True), marker="o", ms=4, color=color, label=name)
    highest = max([0.1, *(value for _, value in shown)])
    bottom.set_ylim(0, min(1.02, 1.35 * highest))  # room for the names
    bottom.set_xlabel("optimizer step")
    bottom.set_ylabel("share")
    dress(bottom, "Validation")
    for axes in (top, bottom):
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=9.5, labelcolor=INK)
    made.savefig(file)
