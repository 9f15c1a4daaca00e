"""Zero-shot confusion: which classes the backbone's own text features take for which."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from featcache.backbones.base import Backbone
from featcache.batches import Rows
from featcache.class_text import class_text_features, ensemble, text_array_name
from featcache.prompts import TEMPLATES, choose_zero_shot, format_prompts
from featcache.reader import Cache
from featcache.reporting import style

MOST_DRAWN = 30
"""Classes in the drawn matrix, at most: those with the largest confusions."""

_ROW_BLOCK = 4096


@dataclass(frozen=True)
class Confusion:
    """What zero-shot prediction takes for what.

    A row with k labels has k predictions, its k best classes; its wrong ones are counted against
    each label that it missed. With one label a row this is the ordinary confusion matrix.

    Attributes:
        split: rows that were predicted.
        rows: (n,) their numbers.
        template_set: name of the prompts.
        right: labels found. num_labels: labels in all.
        true, taken: (e,) classes of each error. error_rows: (e,) its row.
        label_counts: (C,) rows with each label.
    """

    split: str
    rows: Rows
    template_set: str
    right: int
    num_labels: int
    true: npt.NDArray[np.int64]
    taken: npt.NDArray[np.int64]
    error_rows: npt.NDArray[np.int64]
    label_counts: npt.NDArray[np.int64]

    @property
    def recall(self) -> float:
        """Share of labels that were found, 0..1; with one label a row this is top-1."""
        return self.right / max(self.num_labels, 1)

    def largest(self, num: int) -> list[tuple[int, int, int, int]]:
        """(true class, taken class, errors, a row that shows it), most errors first."""
        num_classes = len(self.label_counts)
        code = self.true * num_classes + self.taken
        values, first, counts = np.unique(code, return_index=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:num]
        return [
            (
                int(values[i] // num_classes),
                int(values[i] % num_classes),
                int(counts[i]),
                int(self.error_rows[first[i]]),
            )
            for i in order
        ]


def num_sentences(cache: Cache) -> int:
    """Sentences that would have to be encoded; 0 = the cache holds them all."""
    prompts = format_prompts(cache.classes, TEMPLATES[template_set(cache)])
    missing = [texts for texts in prompts if not cache.has(text_array_name(cache, texts))]
    return len({text for texts in missing for text in texts})


def template_set(cache: Cache) -> str:
    """Name of the template set that suits the cache's classes."""
    return choose_zero_shot(cache.identity.dataset.kind, [str(c) for c in cache.classes.columns])


def confusion(
    cache: Cache,
    max_rows: int,
    open_backbone: Callable[[], Backbone],
    seed: int = 0,
) -> Confusion:
    """Zero-shot predictions on the test, validation or training rows, whichever exist first.

    Args:
        cache: labelled, with image/projected.
        max_rows: rows predicted, at most; drawn at random beyond.
        open_backbone: opens the encoder of the cache, if class text has to be encoded.
        seed: of the draw.

    Raises:
        UserError: if the class text cannot be encoded.
    """
    name = template_set(cache)
    features = class_text_features(cache, TEMPLATES[name], open_backbone)
    vectors = ensemble(torch.from_numpy(features))
    split, rows = _labelled_rows(cache)
    if len(rows) > max_rows:
        rows = np.sort(np.random.default_rng(seed).choice(rows, max_rows, replace=False))
    hot = cache.multi_hot(rows).astype(bool)
    array = cache.row_array("image/projected")
    true, taken, owners = [], [], []
    right = 0
    for start in range(0, len(rows), _ROW_BLOCK):
        part = rows[start : start + _ROW_BLOCK]
        plain = torch.from_numpy(np.asarray(array.read(part, view=0), np.float32))
        scores = F.normalize(plain, dim=-1) @ vectors.T
        labels = hot[start : start + len(part)]
        most = int(labels.sum(1).max(initial=0))
        ranked = scores.topk(most, dim=1).indices.numpy()
        chosen = np.zeros_like(labels)
        kept = np.arange(most)[None] < labels.sum(1)[:, None]
        row, place = np.nonzero(kept)
        chosen[row, ranked[row, place]] = True
        right += int((chosen & labels).sum())
        missed, wrong = labels & ~chosen, chosen & ~labels
        for index in np.flatnonzero(missed.any(1)).tolist():
            own, other = np.flatnonzero(missed[index]), np.flatnonzero(wrong[index])
            true.append(np.repeat(own, len(other)))
            taken.append(np.tile(other, len(own)))
            owners.append(np.full(len(own) * len(other), part[index], np.int64))
    none = [np.empty(0, np.int64)]
    return Confusion(
        split,
        rows,
        name,
        right,
        int(hot.sum()),
        np.concatenate(true or none),
        np.concatenate(taken or none),
        np.concatenate(owners or none),
        hot.sum(0, dtype=np.int64),
    )


def draw(found: Confusion, names: list[str]) -> Figure:
    """The matrix of the most confused classes, each row in shares of the true class.

    Args:
        found: see `confusion`.
        names: C class names.
    """
    num_classes = len(names)
    chosen = np.arange(num_classes)
    if num_classes > MOST_DRAWN:
        ends = [pair[:2] for pair in found.largest(10 * MOST_DRAWN)]
        chosen = np.asarray(list(dict.fromkeys(c for pair in ends for c in pair)), np.int64)
        chosen = np.sort(chosen[:MOST_DRAWN])
    place = np.full(num_classes, -1)
    place[chosen] = np.arange(len(chosen))
    counts = np.zeros((len(chosen), len(chosen)))
    kept = (place[found.true] >= 0) & (place[found.taken] >= 0)
    np.add.at(counts, (place[found.true[kept]], place[found.taken[kept]]), 1)
    missed = np.bincount(np.unique(_keys(found), axis=0)[:, 0], minlength=num_classes)
    np.fill_diagonal(counts, (found.label_counts - missed)[chosen])
    share = counts / np.maximum(found.label_counts[chosen], 1)[:, None]
    return draw_shares(share, [names[index] for index in chosen])


def draw_shares(share: npt.NDArray[np.floating], names: Sequence[str]) -> Figure:
    """A confusion matrix.

    Args:
        share: (n, n) part of row i's class that was taken for column j's, 0..1.
        names: n class names.
    """
    side = float(np.clip(0.24 * len(names) + 2.6, 4.5, 9.5 if len(names) <= 40 else 11))
    made = style.figure(side, side)
    axes = made.subplots()
    ramp = LinearSegmentedColormap.from_list("report", ["#ffffff", "#9dbcd4", "#16425b"])
    image = axes.imshow(share, cmap=ramp, vmin=0, vmax=1)
    shown = [style.short_name(name, 24) for name in names]
    size = 9 if len(names) <= 20 else 7.5 if len(names) <= 40 else 5.5
    axes.set_xticks(range(len(names)), shown, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), shown)
    axes.tick_params(length=0, labelsize=size, colors=style.INK)
    axes.set_xlabel("predicted", color=style.MUTED)
    axes.set_ylabel("true", color=style.MUTED)
    for spine in axes.spines.values():
        spine.set_color(style.GRID)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.grid(visible=True, which="minor", color=style.GRID, lw=0.6)
    axes.tick_params(which="minor", length=0)
    if len(names) <= 12:
        for (row, column), value in np.ndenumerate(share):
            if value >= 0.005:
                ink = "white" if value > 0.5 else style.INK
                axes.text(
                    column, row, f"{100 * value:.0f}", ha="center", va="center", color=ink, size=8
                )
    bar = made.colorbar(image, ax=axes, shrink=0.6, pad=0.02, format=lambda v, _: f"{v:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=style.MUTED, length=0)
    return made


def _keys(found: Confusion) -> npt.NDArray[np.int64]:
    """(e, 2) missed class and row of each error."""
    return np.stack([found.true, found.error_rows], 1)


def _labelled_rows(cache: Cache) -> tuple[str, Rows]:
    offsets = cache.label_lists[0]
    for split in ("test", "val", *cache.split_names):
        if split in cache.split_names:
            rows = cache.rows(split)
            rows = rows[offsets[rows + 1] > offsets[rows]]
            if len(rows):
                return split, rows
    return cache.split_names[0], np.empty(0, np.int64)
