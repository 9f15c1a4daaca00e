"""Job: one self-contained HTML page about a trained head.

python -m heads.report --run runs/garden-linear-1a2b3c

Training writes the same page with what it has at hand; this one has confidence intervals whatever
they cost, other rows if asked for, and the pictures that sub-prompts claim.
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt

from featcache.config import Config, run_job
from featcache.errors import ConfigError
from featcache.precision import resolve_device
from featcache.reader import Cache
from featcache.reporting import page
from featcache.reporting.page import Section
from featcache.reporting.thumbnails import Thumbnails
from featcache.storage import CachePath
from heads.calibration import read_calibration
from heads.data import FeatureTables
from heads.evaluate import choose_split, open_known, open_part
from heads.reporting import prompt_grid
from heads.reporting.run_page import RunPage, head_sections
from heads.run_folder import LoadedRun, load_run, read_history, read_json
from heads.scoring import Intervals, MetricsConfig, score_part
from heads.train import TrainConfig
from heads.visualise import HasPrompts, encoded, prompt_claims

_TILE = 84


class ReportConfig(Config):
    """Writes one self-contained HTML page about a trained head."""

    run: Path
    """Run folder that heads.train wrote."""
    cache: CachePath | None = None
    """Cache to score it on; unset = the one (or the joined ones) it was trained on."""
    join: tuple[CachePath, ...] = ()
    """Further caches, joined by id, for a head that was trained on several; needs cache."""
    split: str | None = None
    """Split that is shown; unset = test if it has labels, otherwise val."""
    metrics: MetricsConfig = MetricsConfig(bootstrap=1000)
    """How metrics are counted."""
    prompts: NonNegativeInt = 2
    """Classes whose sub-prompts are shown with pictures, for heads that have any, 0 or more: those
    with most and with fewest rows, and some between."""
    prompt_images: PositiveInt = 10
    """Images of each sub-prompt, 1 or more."""
    root: str | None = None
    """Folder of the images; unset = the one recorded at extraction."""
    out: Path | None = None
    """Page to write; unset = report.html in the run folder."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""


def run(config: ReportConfig) -> Path:
    """Writes the page and returns its path.

    Raises:
        ConfigError: if `out` is no name of a page.
        RunError: if the run is unfinished, or no row of the split is labelled.
    """
    if config.out is not None and config.out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"out: {config.out} has to end with .html; other formats are not written")
    device = resolve_device(config.device)
    loaded = load_run(config.run, device)
    cache = open_known(loaded, config.cache, config.join)
    split = config.split or choose_split(cache)
    arrays, part = open_part(loaded, cache, split)
    calibration = read_calibration(config.run)
    table = FeatureTables(arrays, part.rows, device)
    scored = score_part(loaded.head, table, part, loaded.classes, config.metrics, calibration)
    values = read_json(config.run / "metrics.json")
    decided = str(values["val_rows_from"])
    others: list[tuple[str, dict[str, float], Intervals]] = []
    if split != decided:
        others.append((decided, values["val"], {}))
    shown = RunPage(
        folder=config.run.resolve(),
        record=loaded.record,
        values=values,
        config=TrainConfig.from_yaml(config.run / "config.yaml").record(),
        history=read_history(config.run),
        classes=loaded.classes,
        main=scored,
        others=others,
        calibration=calibration,
        options=config.metrics,
        extra=[
            *head_sections(loaded.head, table, split, loaded.classes, config.metrics),
            *_prompt_sections(config, loaded, cache, split, device),
        ],
    )
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
    out = shown.write(config.out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
    return out


def _prompt_sections(
    config: ReportConfig, run: LoadedRun, cache: Cache, split: str, device: torch.device
) -> Iterator[Section]:
    if not config.prompts or not isinstance(run.head, HasPrompts):
        return
    rows = cache.rows(split)
    counts = np.bincount(cache.labels(rows)[cache.labels(rows) >= 0], minlength=cache.num_classes)
    order = np.argsort(-counts, kind="stable")[: int((counts > 0).sum())]
    places = np.unique(np.linspace(0, len(order) - 1, config.prompts).round().astype(int))
    thumbnails = Thumbnails(cache, config.root, _TILE)
    body = page.paragraph(
        "Each row is one sub-prompt of a class and the images that it claims most; γ is its share "
        "in the image, at a temperature of 5. A sub-prompt that claims the same images as another "
        "says nothing of its own."
    )
    for number in order[places].tolist():
        claims = prompt_claims(run, cache, split, number, 5.0, device)
        sheet = prompt_grid.draw(
            claims.strongest(config.prompt_images),
            range(claims.shares.shape[1]),
            claims.usage,
            config.prompt_images,
            thumbnails,
            _TILE,
            f"{claims.name}: {len(claims.rows):,} {split} images",
        )
        content = base64.b64encode(encoded(sheet, "JPEG")).decode()
        uri = f"data:image/jpeg;base64,{content}"
        body += page.chart(uri, f"images claimed by the sub-prompts of {claims.name}")
    if thumbnails.num_missing:
        body += page.paragraph(
            f"{thumbnails.num_missing:,} images cannot be read now (grey).", note=True
        )
    yield Section("prompts", "Sub-prompts", body)


if __name__ == "__main__":
    run_job(ReportConfig, run)
