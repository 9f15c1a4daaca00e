"""Features in the plane: principal components, and neighbourhoods by t-SNE or UMAP."""

import warnings
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.figure import Figure

from featcache.batches import Rows
from featcache.errors import ConfigError
from featcache.reader import Cache
from featcache.reporting import style

Neighbours = Literal["tsne", "umap", "none"]

MAX_COLORS = 12
_COMPONENTS = 50
"""Principal components that t-SNE and UMAP start from: the rest is noise, and time."""


def principal_components(
    features: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """(n, k) coordinates along the principal components of unit features, and (k,) variance shares.

    Args:
        features: (n, D) float32, not normalised; k is at most 50.
    """
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    centred = features / np.maximum(lengths, 1e-12)
    centred = centred - centred.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    share = values.astype(np.float64) ** 2
    kept = min(_COMPONENTS, len(values))
    share = share / max(share.sum(), 1e-30)
    return np.asarray((left * values)[:, :kept], np.float32), share[:kept]


def neighbour_map(
    components: npt.NDArray[np.float32], method: Neighbours, seed: int
) -> npt.NDArray[np.float32]:
    """(n, 2) places in which near neighbours stay near.

    Args:
        components: (n, k) principal components, n at least 5.
        method: tsne (scikit-learn) or umap.
        seed: of the layout.

    Raises:
        ConfigError: if umap-learn is not installed.
    """
    if method == "umap":
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns that TensorFlow is missing
                from umap import UMAP
        except ImportError:
            raise ConfigError(
                "neighbours=umap needs umap-learn; pip install 'featcache[report]', or use tsne"
            ) from None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fixed seed means one thread, it says
            places = UMAP(
                n_neighbors=min(15, len(components) - 1), random_state=seed
            ).fit_transform(components)
        return np.asarray(places, np.float32)
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(components) - 1) / 3)
    places = TSNE(init="pca", perplexity=perplexity, random_state=seed).fit_transform(components)
    return np.asarray(places, np.float32)


def color_names(cache: Cache, rows: Rows) -> tuple[list[str], str]:
    """What each row's point is coloured by, and what that is called.

    A class each if there are at most 12; otherwise the taxon of the finest level with at most 12;
    otherwise the 11 commonest classes, and "other". Unlabelled sets are coloured by split, rows
    with several labels by their rarest one.
    """
    labels = _one_label(cache, rows)
    if labels is None:
        splits = cache.splits
        return [splits[row] for row in rows.tolist()], "split"
    classes = cache.classes
    names = classes["name"].astype(str).str.replace("_", " ")
    title = "class"
    if len(classes) > MAX_COLORS:
        column = _coarse_column(classes)
        if column is None:
            common = np.bincount(labels[labels >= 0], minlength=len(classes)).argsort()[::-1]
            names = names.where(names.index.isin(common[: MAX_COLORS - 1].tolist()), "other")
        else:
            names, title = classes[column].astype(str), column
    shown = [str(name) or "unknown" for name in names]
    return [shown[label] if label >= 0 else "no label" for label in labels.tolist()], title


def draw(
    maps: Sequence[tuple[str, npt.NDArray[np.float32]]], names: Sequence[str], title: str
) -> Figure:
    """Scatter plots side by side, points coloured by name.

    Args:
        maps: (title, (n, 2) places).
        names: n names.
        title: what the names are.
    """
    made = style.figure(10.8, 5.4)
    counts = pd.Series(names).value_counts()
    last = {"other", "no label", "unknown"}
    order = sorted(counts.index, key=lambda name: (name in last, -counts[name], name))
    order = order[:MAX_COLORS] + [name for name in order[MAX_COLORS:] if name in last]
    colors = dict(zip(order, style.PALETTE, strict=False))
    colors |= dict.fromkeys(last, style.EMPTY)
    given = np.asarray(names, dtype=object)
    size = float(np.clip(9000 / max(len(names), 1), 3, 22))
    for axes, (text, places) in zip(
        made.subplots(1, len(maps), squeeze=False)[0], maps, strict=True
    ):
        for name in reversed(order):
            mask = given == name
            axes.scatter(
                places[mask, 0],
                places[mask, 1],
                s=size,
                color=colors.get(name, style.EMPTY),
                linewidths=0,
                alpha=0.75,
                label=name,
                rasterized=True,
            )
        style.dress(axes, text)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_aspect("equal", adjustable="datalim")
        for spine in axes.spines.values():
            spine.set_visible(True)
    handles, labels = axes.get_legend_handles_labels()
    made.legend(
        handles[::-1],
        [label if len(label) < 26 else label[:24] + "…" for label in labels[::-1]],
        loc="outside lower center",
        ncols=6,
        frameon=False,
        fontsize=9,
        labelcolor=style.INK,
        markerscale=max(1.0, 5 / size**0.5),
        title=title,
        title_fontproperties={"size": 9},
        handletextpad=0.2,
    )
    return made


def _one_label(cache: Cache, rows: Rows) -> npt.NDArray[np.int64] | None:
    """(n,) a class of each row, -1 without; None for an unlabelled set."""
    if not cache.num_classes or cache.task == "unlabelled":
        return None
    if cache.task == "single_label":
        return cache.labels(rows)
    hot = cache.multi_hot(rows).astype(bool)
    rarity = -cache.classes["count"].to_numpy(np.float64)
    labels = np.where(hot, rarity, -np.inf).argmax(1)
    return np.where(hot.any(1), labels, -1)


def _coarse_column(classes: pd.DataFrame) -> str | None:
    """The metadata column with most values, among those with 2 to 12."""
    counts = {
        str(column): classes[column].nunique()
        for column in classes.columns
        if column not in ("name", "count", "group") and (classes[column] != "").mean() > 0.9
    }
    usable = {column: count for column, count in counts.items() if 2 <= count <= MAX_COLORS}
    return max(usable, key=lambda column: usable[column]) if usable else None
