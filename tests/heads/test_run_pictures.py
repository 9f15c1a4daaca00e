"""Pictures of one run: what they are drawn from, and that it shows."""

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from featcache.reporting import style
from heads.reporting import (
    class_bars,
    label_graph,
    modality_weights,
    prompt_grid,
    reliability,
    taxon_confusion,
)


def pixels(made: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    made.savefig(buffer, format="png", dpi=60)
    return np.asarray(Image.open(buffer).convert("RGB")).reshape(-1, 3)


def area(made: Figure, color: str) -> int:
    wanted = [int(color[at : at + 2], 16) for at in (1, 3, 5)]
    return int((pixels(made) == wanted).all(1).sum())


@pytest.mark.parametrize("num_classes", [12, 450])
def test_class_bars_stand_in_the_order_of_counts_with_their_groups(num_classes: int) -> None:
    counts = np.arange(num_classes) + 1
    groups = ["tail" if n < 5 else "head" for n in range(num_classes)]
    values = np.linspace(0.2, 1, num_classes)
    values[7] = np.nan
    names = [f"name_{n}" for n in range(num_classes)]
    made = class_bars.draw(values, counts, groups, names, "accuracy")
    texts = [text.get_text() for text in made.legends[0].get_texts()]
    head = np.nanmean(values[5:])
    assert texts == [
        f"head: {num_classes - 5:,} classes, mean {head:.1%}",
        f"tail: 5 classes, mean {values[:5].mean():.1%}",
    ]
    ticks = [tick.get_text() for tick in made.axes[0].get_xticklabels()]
    if num_classes == 12:
        assert ticks == [f"name {n}" for n in range(11, -1, -1)]
        assert area(made, style.GROUP_COLORS["tail"]) > 500
    assert area(made, style.GROUP_COLORS["head"]) > 1000


def test_reliability_bars_are_the_share_that_is_right() -> None:
    confidence = np.repeat([0.35, 0.9], [10, 40])
    correct = np.concatenate([np.arange(10) < 2, np.arange(40) < 30])
    made = reliability.draw({"as trained": confidence}, correct)
    bars = [patch.get_height() for patch in made.axes[0].patches]
    assert bars == pytest.approx([0.2, 0.75])
    assert "calibration error 15.0%" in made.axes[0].get_title(loc="left")
    assert [patch.get_height() for patch in made.axes[1].patches] == pytest.approx([0.2, 0.8])


def test_confusions_are_in_the_order_of_the_taxonomy_and_framed() -> None:
    codes = {"genus": np.asarray([0, 1, 0, 1, 2, -1]), "family": np.asarray([1, 0, 1, 0, 0, -1])}
    order = taxon_confusion.taxonomic_order(codes, 6)
    assert order.tolist() == [5, 1, 3, 4, 0, 2]
    labels = np.asarray([0, 0, 0, 0, 1, 2, 3, 4, 5])
    predicted = np.asarray([0, 0, 2, 5, 1, 2, 3, 4, 5])
    names = list("abcdef")
    made = taxon_confusion.draw_classes(labels, predicted, names, codes)
    axes = made.axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["f", "b", "d", "e", "a", "c"]
    matrix = axes.images[0].get_array()
    assert matrix[4].tolist() == [0.25, 0, 0, 0, 0.5, 0.25]
    frames = sorted((patch.get_y(), patch.get_height()) for patch in axes.patches)
    assert frames == [(0.5, 2), (0.5, 3), (3.5, 2), (3.5, 2)]
    taxa = taxon_confusion.draw_taxa(labels, predicted, codes["genus"], ["x", "y", "z"])
    matrix = taxa.axes[0].images[0].get_array()
    assert matrix[0].tolist() == [0.8, 0, 0]  # the fifth was taken for a class without a genus
    assert taxon_confusion.largest(labels, predicted, 1) == [(0, 2, 1)]


def test_many_classes_are_reduced_to_the_most_confused() -> None:
    labels = np.repeat(np.arange(300), 2)
    predicted = labels.copy()
    predicted[::2][100:120] = 7
    made = taxon_confusion.draw_classes(labels, predicted, [f"c{n}" for n in range(300)], {})
    shown = [tick.get_text() for tick in made.axes[0].get_yticklabels()]
    assert shown == ["c7", *(f"c{n}" for n in range(100, 120))]


def test_modality_weights_are_histograms_with_their_mean() -> None:
    weights = np.asarray([[1.0, 0.0], [0.5, 0.5], [0.6, 0.4], [0.0, 0.0]])
    made = modality_weights.draw(weights, ["image", "text"])
    titles = [axes.get_title(loc="left") for axes in made.axes]
    assert titles == ["image: mean weight 0.53", "text: mean weight 0.23"]
    heights = made.axes[0].patches[0].get_data().values
    assert heights.sum() == pytest.approx(1.0)
    assert heights[-1] == heights[0] == 0.25


def test_labels_that_belong_together_are_neighbours_on_the_circle() -> None:
    group = np.asarray([0, 1, 2, 0, 1, 2, 0, 1, 2])
    weights = 0.01 + (group[:, None] == group).astype(float)
    np.fill_diagonal(weights, 0)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(9)
        found = group[order][label_graph.circle_order(weights[np.ix_(order, order)])]
        assert (found[1:] != found[:-1]).sum() == 2
    made = label_graph.draw(weights, [f"label_{n}" for n in range(9)], ["head"] * 9)
    assert len(made.axes[0].collections[0].get_segments()) == 36
    assert {text.get_text() for text in made.axes[0].texts} == {f"label {n}" for n in range(9)}


def test_prompt_grid_shows_the_strongest_claims_and_empty_tiles(tmp_path: Path) -> None:
    shares = np.asarray([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
    claims = prompt_grid.strongest(shares, np.asarray([10, 20, 30]), 4)
    assert [[claim.row for claim in own] for own in claims] == [[10, 30, 20], [20, 30, 10]]
    assert [claim.share for claim in claims[1]] == [0.8, 0.4, 0.1]
    colors = {10: (255, 0, 0), 20: (0, 255, 0), 30: (0, 0, 255)}
    pictures = SimpleNamespace(picture=lambda row: Image.new("RGB", (40, 40), colors[row]))
    sheet = prompt_grid.draw(claims, [0, 1], shares.mean(0), 4, pictures, 40, "a class")
    grid = np.asarray(sheet)
    assert grid.shape == (44 + 2 * 44 + 4, 132 + 4 * 44 + 4, 3)
    for row, expected in enumerate(([10, 30, 20], [20, 30, 10])):
        for column, number in enumerate(expected):
            assert tuple(grid[44 + 44 * row + 35, 132 + 44 * column + 20]) == colors[number]
        empty = grid[44 + 44 * row + 35, 132 + 44 * 3 + 3]
        assert tuple(empty) == (226, 230, 234)
