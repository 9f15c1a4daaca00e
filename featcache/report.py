"""Job: one self-contained HTML page about a cache and the dataset behind it.

python -m featcache.report --cache cache/inat2021 --out report.html
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from featcache.class_text import open_cache_backbone
from featcache.config import Config, run_job
from featcache.errors import ConfigError, UserError
from featcache.info import describe
from featcache.layout.chunks import write_file
from featcache.layout.feature_array import FeatureArray
from featcache.precision import resolve_device
from featcache.reader import Cache, open_cache
from featcache.reporting import page, projection, sections, style
from featcache.reporting.confusion import Confusion, confusion, num_sentences
from featcache.reporting.duplicates import Leak, find_leaks, num_copies
from featcache.reporting.page import Fact, Section
from featcache.reporting.thumbnails import Thumbnails
from featcache.storage import CachePath

_AUTO_SENTENCES = 2000
"""Class sentences that `zero_shot=auto` encodes at most: a minute of a CPU."""


class ReportConfig(Config):
    """Writes one self-contained HTML page about a cache: classes, images, leaks, confusions."""

    cache: CachePath
    """Folder of the cache, or s3://bucket/prefix; complete."""
    out: Path = Path("report.html")
    """Page to write; it holds its pictures and needs no network."""
    root: str | None = None
    """Folder of the images; unset = the one recorded at extraction."""
    classes: NonNegativeInt = 24
    """Classes shown with pictures, spread from the largest to the smallest, 0 or more."""
    images: PositiveInt = 8
    """Pictures of each class, 1 or more."""
    points: PositiveInt = 1500
    """Rows in the projections, drawn at random, 1 or more."""
    neighbours: projection.Neighbours = "tsne"
    """Layout beside the principal components: tsne, umap (needs umap-learn), or none."""
    duplicate_cosine: float = Field(default=0.9, gt=0, le=1)
    """Cosine of whitened features from which on two images count as near copies, 0..1."""
    max_comparisons: PositiveInt = 1_000_000_000
    """Pairs of rows compared for two splits, at most; beyond, rows are drawn at random."""
    pairs: NonNegativeInt = 24
    """Near copies shown for two splits, 0 or more."""
    zero_shot: Literal["auto", "yes", "no"] = "auto"
    """Zero-shot confusion; auto = unless more than 2,000 sentences had to be encoded for it."""
    zero_shot_rows: PositiveInt = 20_000
    """Rows predicted for the confusion, at most, 1 or more."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    seed: NonNegativeInt = 0
    """Seed of everything that is drawn at random, 0 or more."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        out: the page.
        seconds: by section.
        leaks: what splits share.
        confusion: zero-shot confusion; None = not made.
    """

    out: Path
    seconds: dict[str, float]
    leaks: list[Leak]
    confusion: Confusion | None


def run(config: ReportConfig) -> Report:
    """Writes the page.

    Raises:
        CacheError: if there is no complete cache.
        ConfigError: if `out` is a folder, or umap is asked for and missing.
    """
    if config.out.is_dir():
        raise ConfigError(f"out: {config.out} is a folder; name a file such as report.html")
    if config.out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"out: {config.out} has to end with .html; other formats are not written")
    cache = open_cache(config.cache)
    config.out.parent.mkdir(parents=True, exist_ok=True)  # refused now, not behind all the work
    info = describe(cache)
    thumbnails = Thumbnails(cache, config.root)
    rng = np.random.default_rng(config.seed)
    clock = _Clock(config.quiet)
    parts = [sections.split_section(cache, info["splits"])]
    if cache.num_classes:
        parts.append(sections.class_section(cache, thumbnails.names))
    clock.lap("classes")
    if config.classes:
        parts.append(sections.sample_section(cache, thumbnails, config.classes, config.images, rng))
    clock.lap("samples")
    array = _feature(cache)
    if array is not None:
        parts += _projection(config, cache, array, rng)
    clock.lap("projection")
    leaks = find_leaks(
        cache,
        array,
        config.duplicate_cosine,
        config.max_comparisons,
        resolve_device(config.device),
        config.seed,
    )
    threshold = None if array is None else config.duplicate_cosine
    parts.append(
        sections.leak_section(cache, leaks, num_copies(cache), threshold, thumbnails, config.pairs)
    )
    clock.lap("leaks")
    found = None
    if config.zero_shot != "no" and cache.num_classes and cache.task != "unlabelled":
        try:
            found = _confusion(config, cache)
            parts.append(sections.confusion_section(cache, found, thumbnails))
        except UserError as error:
            if config.zero_shot == "yes":
                raise
            reason = page.paragraph(f"Not made: {error}")
            parts.append(Section("confusion", sections.CONFUSION, reason))
    clock.lap("confusion")
    parts += sections.closing_sections(cache, info)
    title = cache.path.resolve().name
    text = page.page(
        title, _subtitle(cache), _facts(cache, info["num_invalid"], leaks, found), parts
    )
    write_file(config.out, text.encode())
    if not config.quiet:
        print(f"{config.out}: {len(text) / 1e6:.1f} MB")
    return Report(config.out, clock.seconds, leaks, found)


class _Clock:
    """Seconds of each part, printed as they end."""

    def __init__(self, quiet: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._quiet, self._last = quiet, time.perf_counter()

    def lap(self, name: str) -> None:
        """The part of that name ends now."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        if not self._quiet:
            print(f"{name:<12} {self.seconds[name]:6.1f} s", flush=True)


def _feature(cache: Cache) -> FeatureArray | None:
    """The array that similarity is measured with."""
    names = [name for name in ("image/projected", "image/pooled") if cache.has(name)]
    return cache.row_array(names[0]) if names else None


def _projection(
    config: ReportConfig, cache: Cache, array: FeatureArray, rng: np.random.Generator
) -> list[Section]:
    """Principal components, and a map of neighbourhoods; nothing for fewer than 5 rows."""
    valid = np.flatnonzero(cache.valid)
    if len(valid) < 5 or array.shape[-1] < 2:
        return []
    rows = sections.drawn(valid, config.points, rng)
    features = np.asarray(array.read(rows, view=0), np.float32)
    components, shares = projection.principal_components(features)
    title = f"principal components ({shares[0]:.0%} and {shares[1]:.0%} of the variance)"
    maps = [(title, components[:, :2])]
    if config.neighbours != "none":
        places = projection.neighbour_map(components, config.neighbours, config.seed)
        method = {"tsne": "t-SNE", "umap": "UMAP"}[config.neighbours]
        maps.append((f"neighbourhoods ({method})", places))
    names, what = projection.color_names(cache, rows)
    some = ", drawn at random" if len(rows) < len(valid) else ""
    text = (
        f"{array.name} of {len(rows):,} of {len(valid):,} readable images{some}, normalised; "
        f"one colour a {what}."
    )
    chart = page.chart(style.data_uri(projection.draw(maps, names, what)), text)
    return [Section("projection", "Features", page.paragraph(text) + chart)]


def _confusion(config: ReportConfig, cache: Cache) -> Confusion:
    """Zero-shot confusion.

    Raises:
        UserError: if it cannot be made, or takes too long to be made unasked.
    """
    if not cache.has("image/projected"):
        raise ConfigError("the cache holds no image/projected to compare text with")
    missing = num_sentences(cache)
    if config.zero_shot == "auto" and missing > _AUTO_SENTENCES:
        raise ConfigError(f"{missing:,} sentences had to be encoded; --zero_shot yes does that")
    device = str(resolve_device(config.device))
    return confusion(
        cache, config.zero_shot_rows, lambda: open_cache_backbone(cache, device), config.seed
    )


def _subtitle(cache: Cache) -> str:
    identity = cache.identity
    return (
        f"{identity.dataset.kind}, {cache.task.replace('_', ' ')}; features of "
        f"{identity.backbone.kind} {identity.backbone.name}, {identity.precision}"
    )


def _facts(
    cache: Cache, num_invalid: int, leaks: list[Leak], found: Confusion | None
) -> list[Fact]:
    """The figures at the top."""
    facts = [Fact(f"{cache.num_rows:,}", "images")]
    if cache.num_classes:
        facts.append(Fact(f"{cache.num_classes:,}", "classes"))
    facts.append(Fact(f"{num_invalid:,}", "unreadable", num_invalid > 0))
    for leak in leaks:
        num = len(leak.exact)
        facts.append(Fact(f"{num:,}", f"{leak.split} copies in {leak.other}", num > 0))
    if found is not None:
        what = "top-1" if cache.task == "single_label" else "labels found"
        facts.append(Fact(f"{found.recall:.1%}", f"zero-shot {what}, {found.split}"))
    return facts


if __name__ == "__main__":
    run_job(ReportConfig, run)
