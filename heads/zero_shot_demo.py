"""Likeliest classes of image files by name alone: printed, tabulated and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from featcache.backbones.base import Backbone, PixelSpec
from featcache.class_lists import class_list
from featcache.class_text import encode_prompts, ensemble, open_cache_backbone
from featcache.errors import DatasetError
from featcache.precision import resolve_device
from featcache.prompts import format_prompts
from featcache.reader import Cache, open_cache
from heads.image_text import ImageEncoder, open_image_text
from heads.models.zero_shot import ZeroShot
from heads.predict import find_images
from heads.prediction_figure import Shown, small_picture, write_figures
from heads.predictions import Unreadable, write_unreadable
from heads.progress import ProgressLine
from heads.run_folder import write_atomic
from heads.zero_shot import ZeroShotJobConfig

DISPLAY_SCALE = 35.0
"""Multiplier of the cosines where nothing else is asked for."""
OUT = Path("demo_output")


@dataclass(frozen=True)
class Demonstration:
    """What was predicted.

    Attributes:
        table: a line for each image and class: path, rank from 1, class, probability 0..1.
        figures: pictures that were written.
        unreadable: files that are not in the table, and why.
    """

    table: pd.DataFrame
    figures: list[Path]
    unreadable: list[Unreadable]


def demonstrate(config: ZeroShotJobConfig, images: Path) -> Demonstration:
    """Predicts, prints and draws; writes `predictions.csv` beside the pictures.

    Raises:
        ConfigError: no image, or no class.
        BackboneError: see `heads.zero_shot.run`.
        DatasetError: if no image can be read.
    """
    device = resolve_device(config.device)
    files = find_images(images)
    root = images if images.is_dir() else images.parent
    cache = None if config.cache is None else open_cache(config.cache)
    kind, classes = _classes(config, cache)
    prompts = format_prompts(classes, config.template_list(kind, classes))
    encoder = _open(config, cache, device, root, files)
    head = classifier(encoder.backbone, prompts, config.scale or DISPLAY_SCALE)
    unreadable: list[Unreadable] = []
    rows: list[dict[str, object]] = []
    names = [str(name).replace("_", " ") for name in classes["name"]]
    progress = ProgressLine(config.quiet)
    for batch in encoder.batches(root, files):
        probabilities = class_probabilities(head, batch.features)
        best, index = probabilities.topk(min(config.top_k, len(names)), dim=1)
        for row, shares, numbers in zip(
            batch.rows, best.cpu().numpy(), index.cpu().numpy(), strict=True
        ):
            for rank, (share, number) in enumerate(zip(shares, numbers, strict=True), start=1):
                rows.append(
                    {
                        "path": files[row],
                        "rank": rank,
                        "class": names[number],
                        "probability": float(share),
                    }
                )
        unreadable += [Unreadable(files[r], files[r], why) for r, why in batch.reasons.items()]
        progress.show(f"{batch.stop:,} of {len(files):,} images")
    progress.close()
    if not rows:
        raise DatasetError(
            f"none of {len(unreadable)} images could be read, nothing was predicted; the first is "
            f"{unreadable[0].path} ({unreadable[0].reason})"
        )
    table = pd.DataFrame(rows)
    out = config.out or OUT
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "predictions.csv", table.to_csv(index=False).encode())
    write_unreadable(out / "unreadable.csv", unreadable)
    drawn = table["path"].drop_duplicates()[: config.max_drawn]
    figures: list[Path] = []
    if config.figure:
        shown = _shown(root, table[table["path"].isin(drawn)])
        figures = write_figures(out, shown, images.is_file())
    if not config.quiet:
        _print(table, figures, len(drawn), unreadable, out)
    return Demonstration(table, figures, unreadable)


def classifier(backbone: Backbone, prompts: Sequence[Sequence[str]], scale: float) -> ZeroShot:
    """The zero-shot classifier on the backbone's device; see `featcache.class_text.ensemble`.

    Args:
        backbone: with a text tower.
        prompts: T lists of C sentences.
        scale: multiplier of the cosines.
    """
    features = torch.from_numpy(encode_prompts(backbone, prompts))
    return ZeroShot(ensemble(features), scale=scale).to(backbone.device)


@torch.inference_mode()
def class_probabilities(head: ZeroShot, features: Tensor) -> Tensor:
    """(B, C) softmax over classes from (B, P) features, not normalised."""
    logits: Tensor = head(features)
    return logits.softmax(dim=1)


def _classes(config: ZeroShotJobConfig, cache: Cache | None) -> tuple[str, pd.DataFrame]:
    """Dataset kind ("" = a plain list) and class table that the options mean."""
    if config.classes is not None:
        return "", class_list(config.classes)
    if cache is not None:
        kind, classes = cache.identity.dataset.kind, cache.classes
    elif config.dataset is not None:
        manifest = config.dataset.open()
        kind, classes = manifest.kind, manifest.classes
    else:
        return "", class_list("cifar100")
    if not len(classes):
        raise DatasetError(f"the {kind} dataset has no classes; name them with --classes")
    return kind, classes


def _open(
    config: ZeroShotJobConfig,
    cache: Cache | None,
    device: torch.device,
    root: Path,
    files: list[str],
) -> ImageEncoder:
    """The encoder that the options mean; a cache's reads images as the cache was made."""
    mode, spec = config.mode, None
    if cache is None:
        backbone, _ = open_image_text(config.backbone, device, config.precision, root, files, mode)
    else:
        backbone = open_cache_backbone(cache, str(device))
        pixels = cache.identity.preprocess
        mode, spec = pixels.mode, PixelSpec.of(pixels)
    return ImageEncoder(
        backbone,
        mode=mode,
        spec=spec,
        batch_size=config.batch_size,
        num_readers=config.num_readers,
    )


def _shown(root: Path, table: pd.DataFrame) -> list[Shown]:
    found = []
    for path, own in table.groupby("path", sort=False):
        shares = np.asarray(own["probability"], np.float64).tolist()
        found.append(Shown(str(path), small_picture(root, str(path)), list(own["class"]), shares))
    return found


def _print(
    table: pd.DataFrame,
    figures: list[Path],
    num_drawn: int,
    unreadable: list[Unreadable],
    out: Path,
) -> None:
    num_images = table["path"].nunique()
    for path, own in table.groupby("path", sort=False):
        print(path)
        for _, row in own.iterrows():
            print(f"  {row['class']}: {100 * row['probability']:.2f}%")
    for figure in figures:
        print(f"drawn: {figure}")
    if figures and num_drawn < num_images:
        print(f"the first {num_drawn:,} of {num_images:,} images are drawn; --max_drawn draws more")
    if unreadable:
        first = unreadable[0]
        print(
            f"{len(unreadable):,} of {len(unreadable) + num_images:,} images cannot "
            f"be read, see {out / 'unreadable.csv'}; the first is {first.path} ({first.reason})"
        )
