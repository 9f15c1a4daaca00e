"""Sections of the report as HTML, from what the other parts found."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from featcache.batches import Rows
from featcache.reader import Cache
from featcache.reporting import confusion, histogram, page, style
from featcache.reporting.confusion import Confusion
from featcache.reporting.duplicates import Leak
from featcache.reporting.page import Section
from featcache.reporting.thumbnails import Thumbnails
from featcache.shot_groups import BOUNDARIES, group_names, stated_groups

_MOST_LISTED = 1000
_SHOWN_INVALID = 50
_SHOWN_CONFUSIONS = 15
_MOST_SAMPLES = 96


def split_section(cache: Cache, splits: Mapping[str, Mapping[str, int]]) -> Section:
    """Images, labels and captions of each split.

    Args:
        cache: the cache.
        splits: rows, valid, invalid by split name.
    """
    header = ["split", "images", "readable", "unreadable"]
    label_offsets, values = cache.label_lists
    caption_offsets = cache.array("text/offsets").read()
    labelled, captioned = cache.num_classes > 0, bool(cache.attributes["num_captions"])
    header += ["labels", "labels per image", "classes present"] if labelled else []
    header += ["captions", "captions per image"] if captioned else []
    rows = []
    for name, (start, stop) in cache.attributes["splits"].items():
        counts, size = splits[name], max(stop - start, 1)
        row: list[Any] = [name, counts["rows"], counts["valid"], counts["invalid"]]
        if labelled:
            first, last = int(label_offsets[start]), int(label_offsets[stop])
            row += [last - first, f"{(last - first) / size:.2f}"]
            row.append(len(np.unique(values[first:last])))
        if captioned:
            num = int(caption_offsets[stop] - caption_offsets[start])
            row += [num, f"{num / size:.2f}"]
        rows.append(row)
    return Section("splits", "Splits", page.table(header, rows, numbers=range(1, len(header))))


def class_section(cache: Cache, names: Sequence[str]) -> Section:
    """Histogram of training images, by head, medium and tail."""
    counts, split = _counts(cache)
    groups = _groups(cache, counts)
    low, high = BOUNDARIES
    origin = "head, medium and tail as the dataset states them"
    if stated_groups(cache.classes) is None:
        origin = f"head: {high} or more; tail: fewer than {low}"
    text = (
        f"{len(counts):,} classes with {counts.min():,} to {counts.max():,} {split} images "
        f"(median {np.median(counts):,.0f}; {origin})."
    )
    if (counts == 0).any():
        text += f" {int((counts == 0).sum()):,} classes have none."
    chart = histogram.draw(counts, groups, list(names), split)
    body = page.paragraph(text) + page.chart(style.data_uri(chart), text)
    if len(names) <= _MOST_LISTED:
        rows = [[n, g, int(c)] for n, g, c in zip(names, groups, counts, strict=True)]
        listing = page.table(["class", "group", f"{split} images"], rows, numbers=[2])
        body += page.folded("All classes as a table", listing)
    return Section("classes", "Classes", body)


def sample_section(
    cache: Cache,
    thumbnails: Thumbnails,
    num_classes: int,
    num_images: int,
    rng: np.random.Generator,
) -> Section:
    """Thumbnails: a strip for each chosen class, or one block where there are no classes."""
    if not cache.num_classes or cache.task == "unlabelled":
        rows = drawn(np.arange(cache.num_rows), min(num_classes * num_images, _MOST_SAMPLES), rng)
        tiles = "".join(thumbnails.tile(row) for row in rows.tolist())
        text = f"{len(rows):,} of {cache.num_rows:,} images, drawn at random"
        return Section("samples", "Samples", _sample_text(text, thumbnails) + _tiles(tiles))
    counts, split = _counts(cache)
    groups = _groups(cache, counts)
    order = np.argsort(-counts, kind="stable")
    shown = min(num_classes, len(order))
    chosen = order[np.linspace(0, len(order) - 1, shown).round().astype(int)]
    offsets, values = cache.label_lists
    owners = np.repeat(np.arange(cache.num_rows), np.diff(offsets))
    strips = []
    for number in chosen.tolist():
        members = drawn(owners[values == number], num_images, rng)
        tiles = "".join(thumbnails.tile(row) for row in members.tolist())
        label = (
            f"<b>{escape(thumbnails.names[number])}</b><br><span class=muted>"
            f"{int(counts[number]):,} {split} {page.badge(groups[number], groups[number])}</span>"
        )
        strips.append(f'<div class="strip"><div class="name">{label}</div>{_tiles(tiles)}</div>\n')
    text = (
        f"Up to {num_images} images, drawn at random, of each of {shown} of {len(order):,} classes"
    )
    if 1 < shown < len(order):
        text += ", from the one with most training images to the one with fewest"
    return Section("samples", "Samples", _sample_text(text, thumbnails) + "".join(strips))


def leak_section(
    cache: Cache,
    leaks: Sequence[Leak],
    copies: int,
    threshold: float | None,
    thumbnails: Thumbnails,
    num_pairs: int,
) -> Section:
    """What splits share, as counts and as pairs of pictures.

    Args:
        cache: the cache.
        leaks: see `find_leaks`.
        copies: rows whose content an earlier row has.
        threshold: cosine that makes a near copy; None = only exact copies were looked for.
        thumbnails: for the pairs.
        num_pairs: pairs shown for two splits, at most.
    """
    text = (
        f"{copies:,} readable images have the same file content as an earlier one, in any split. "
    )
    if threshold is None:
        text += "The cache holds no pooled feature to look for near copies with."
    else:
        text += (
            f"Near copies: images whose whitened features have a cosine of {threshold:g} or more; "
            "look at the pairs, a feature that is blind to a difference calls it a copy."
        )
    body = page.paragraph(text)
    if not leaks:
        body += page.paragraph("There is one split, so nothing can leak between splits.")
    rows = []
    for leak in leaks:
        total, base = len(cache.rows(leak.split)), len(cache.rows(leak.other))
        whole = leak.num_queries + len(leak.exact) == total and leak.num_base == base
        rows.append(
            [
                f"{leak.split} in {leak.other}",
                total,
                len(leak.exact),
                len(leak.near),
                f"{leak.num_queries:,} with {leak.num_base:,}",
                "all" if whole else "drawn at random",
            ]
        )
    if rows:
        header = ["", "images", "exact copies", "near copies", "compared", "which"]
        body += page.table(header, rows, numbers=range(1, 5))
    return Section(
        "leaks",
        "Leaks between splits",
        body + "".join(_pairs(leak, thumbnails, num_pairs) for leak in leaks),
    )


def confusion_section(cache: Cache, found: Confusion, thumbnails: Thumbnails) -> Section:
    """Zero-shot score, confusion matrix, largest confusions."""
    single, names = cache.task == "single_label", thumbnails.names
    total = len(cache.rows(found.split))
    some = f" of {total:,}, drawn at random," if len(found.rows) < total else ""
    share = "of the images are right" if single else "of the labels are found"
    chance = f" (chance {1 / cache.num_classes:.1%})" if single else ""
    text = (
        f"{found.recall:.1%} {share}{chance} on {len(found.rows):,}{some} labelled {found.split} "
        f"images with the template set “{found.template_set}”."
    )
    if not single:
        text += (
            " An image with k labels is given its k best classes; each missed label counts "
            "against each wrong class."
        )
    body = page.paragraph(text)
    pairs = found.largest(_SHOWN_CONFUSIONS)
    if not pairs:
        return Section("confusion", CONFUSION, body + page.paragraph("No class is confused."))
    if len(names) > confusion.MOST_DRAWN:
        body += page.paragraph("The classes with the largest confusions:", note=True)
    chart = style.data_uri(confusion.draw(found, names))
    words = "confusion matrix, each row in shares of the true class"
    body += page.chart(chart, words, narrow=len(names) <= 20)
    rows = "".join(
        f"<tr><td>{thumbnails.tile(row)}</td><td>{escape(names[true])}</td>"
        f"<td>{escape(names[taken])}</td><td class=n>{errors:,}</td>"
        f"<td class=n>{errors / max(int(found.label_counts[true]), 1):.0%}</td></tr>\n"
        for true, taken, errors, row in pairs
    )
    body += (
        "<h3>Largest confusions</h3><table><thead><tr><th>example</th><th>true</th>"
        "<th>predicted</th><th class=n>images</th><th class=n>of the class</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>\n"
    )
    return Section("confusion", CONFUSION, body)


CONFUSION = "Zero-shot confusion"


def closing_sections(cache: Cache, info: Mapping[str, Any]) -> Iterator[Section]:
    """Unreadable images, if any; arrays and identity.

    Args:
        cache: the cache.
        info: see `featcache.info.describe`.
    """
    invalid = info["invalid"]
    if invalid:
        reasons = Counter(item["reason"] for item in invalid).most_common()
        body = page.table(["reason", "images"], reasons, numbers=[1])
        listing = [[item["path"], item["reason"]] for item in invalid[:_SHOWN_INVALID]]
        summary = f"The first {len(listing)} of {len(invalid):,}"
        body += page.folded(summary, page.table(["path", "reason"], listing))
        yield Section("unreadable", "Unreadable images", body)
    arrays = [
        [name, " x ".join(f"{size:,}" for size in array["shape"]), array["dtype"]]
        for name, array in info["arrays"].items()
    ]
    body = page.table(["array", "shape", "type"], arrays)
    leaves = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(value)}</code></td></tr>\n"
        for name, value in _leaves(cache.identity.record())
    )
    leaves = f"<table><tbody>{leaves}</tbody></table>\n"
    body += page.folded("Everything that the numbers depend on", leaves)
    versions = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    body += page.paragraph(f"Fingerprint {cache.fingerprint}. Written with {versions}.", note=True)
    yield Section("identity", "What the cache holds", body)


def drawn(rows: Rows, num: int, rng: np.random.Generator) -> Rows:
    """At most `num` of the rows, at random, ascending."""
    return np.sort(rng.choice(rows, num, replace=False)) if len(rows) > num else rows


def _counts(cache: Cache) -> tuple[npt.NDArray[np.int64], str]:
    """(C,) images of each class, and where they were counted."""
    counts = cache.classes["count"].to_numpy(np.int64)
    if counts.any():
        return counts, "train"
    everywhere = np.bincount(cache.label_lists[1], minlength=len(counts))
    return everywhere.astype(np.int64), "labelled"


def _groups(cache: Cache, counts: npt.NDArray[np.int64]) -> list[str]:
    stated = stated_groups(cache.classes)
    return group_names(counts) if stated is None else stated


def _pairs(leak: Leak, thumbnails: Thumbnails, num_pairs: int) -> str:
    exact = leak.exact[:num_pairs].tolist()
    near = list(zip(leak.near.tolist(), leak.cosines.tolist(), strict=True))
    near = near[: num_pairs - len(exact)]
    figures = [thumbnails.pair(row, other, "same file") for row, other in exact]
    figures += [thumbnails.pair(row, other, f"cosine {c:.3f}") for (row, other), c in near]
    if not figures:
        return ""
    found = len(leak.exact) + len(leak.near)
    some = ""
    if len(figures) < found:
        some = page.paragraph(f"The {len(figures):,} closest of {found:,}.", note=True)
    head = f"<h3>{escape(f'{leak.split} (left) in {leak.other} (right)')}</h3>\n"
    return f'{head}{some}<div class="pairs">{"".join(figures)}</div>\n'


def _sample_text(text: str, thumbnails: Thumbnails) -> str:
    if thumbnails.num_missing:
        text += f"; {thumbnails.num_missing:,} of them cannot be read now (grey)"
    return page.paragraph(text + ".")


def _tiles(tiles: str) -> str:
    return f'<div class="tiles">{tiles}</div>'


def _leaves(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)
