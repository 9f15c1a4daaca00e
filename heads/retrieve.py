"""Job: how often the features find an image's own caption among all, and a caption's own image.

python -m heads.retrieve --cache cache/flickr8k --split test
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import PositiveInt
from torch import Tensor
from torch.nn import functional as F

from featcache.config import Config, run_job
from featcache.errors import CacheError
from featcache.precision import resolve_device
from featcache.reader import Cache, open_cache
from featcache.storage import CachePath
from heads.metrics import IntArray
from heads.run_folder import write_json

IMAGES, CAPTIONS = "image/projected", "text/projected"

_SCORES_AT_A_TIME = 1 << 24


class RetrieveConfig(Config):
    """Recall of captions by images and of images by captions."""

    cache: CachePath
    """Cache with image/projected and features of captions (text/projected)."""
    split: str = "test"
    """Split whose images and captions are searched; each image is sought among all of them."""
    at: tuple[PositiveInt, ...] = (1, 5, 10)
    """Numbers k of best answers among which the right one has to be."""
    out: Path | None = None
    """JSON file to write as well."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""


def run(config: RetrieveConfig) -> dict[str, float]:
    """Searches, prints and returns recalls by name, such as `image_to_text_recall_1`.

    Raises:
        CacheError: if the cache lacks an array, or no image of the split has a caption.
        ConfigError: if there is no such split.
    """
    cache = open_cache(config.cache)
    device = resolve_device(config.device)
    images, captions, owner = caption_features(cache, config.split)
    values = recalls(
        torch.from_numpy(images).to(device),
        torch.from_numpy(captions).to(device),
        torch.from_numpy(owner).to(device),
        config.at,
    )
    values = {"num_images": len(images), "num_captions": len(captions), **values}
    if config.out is not None:
        record = {"cache": str(config.cache), "split": config.split}
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(config.out, {**record, "fingerprint": cache.fingerprint, **values})
    print(f"{cache.path}: {config.split}, {len(images):,} images, {len(captions):,} captions")
    for direction, what in (("image_to_text", "captions"), ("text_to_image", "images")):
        found = "  ".join(f"R@{k} {values[f'{direction}_recall_{k}']:7.2%}" for k in config.at)
        rank = values[f"num_{direction}_median_rank"]
        print(f"  {what:<8} {found}  median rank {rank:g}")
    return values


def caption_features(
    cache: Cache, split: str
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], IntArray]:
    """(n, P) images that have captions, (m, P) their captions in order, (m,) each one's image.

    Raises:
        CacheError: if the cache lacks an array, or no image of the split has a caption.
        ConfigError: if there is no such split.
    """
    for name in (IMAGES, CAPTIONS):
        if not cache.has(name):
            raise CacheError(
                f"{cache.path}: no {name}, which retrieval compares; extract it with "
                "--features.projected and --features.text from a dataset with captions"
            )
    offsets = cache.array("text/offsets").read()
    rows = cache.rows(split)
    rows = rows[offsets[rows + 1] > offsets[rows]]
    if not len(rows):
        raise CacheError(
            f"{cache.path}: no readable image of split {split!r} has a caption; splits are "
            f"{', '.join(cache.split_names)}"
        )
    sizes = offsets[rows + 1] - offsets[rows]
    owner = np.repeat(np.arange(len(rows)), sizes)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    captions = cache.array(CAPTIONS).take(np.repeat(offsets[rows], sizes) + within)
    images = cache.row_array(IMAGES).read(rows, view=0)
    return images.astype(np.float32), captions.astype(np.float32), owner.astype(np.int64)


def recalls(
    images: Tensor, captions: Tensor, owner: Tensor, at: tuple[int, ...] = (1, 5, 10)
) -> dict[str, float]:
    """Share of images with one of their own captions among the k best, and of captions likewise.

    `num_…_median_rank` counts from 1. Equal cosines are in order of their number.

    Args:
        images: (n, P) float32, not normalised.
        captions: (m, P) float32, not normalised, those of one image together.
        owner: (m,) int64 ascending: the image of each caption.
        at: the numbers k.
    """
    images, captions = F.normalize(images, dim=1), F.normalize(captions, dim=1)
    numbers = torch.arange(len(images), device=owner.device)
    first = torch.searchsorted(owner, numbers)
    last = torch.searchsorted(owner, numbers, right=True)
    ranks = {
        "image_to_text": _ranks(images, captions, first, last),
        "text_to_image": _ranks(captions, images, owner, owner + 1),
    }
    values: dict[str, float] = {}
    for direction, rank in ranks.items():
        for k in at:
            values[f"{direction}_recall_{k}"] = float((rank < k).double().mean())
        values[f"num_{direction}_median_rank"] = float(np.median(rank.cpu().numpy() + 1))
    return values


def _ranks(queries: Tensor, gallery: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """(q,) how many of the gallery come before the best right answer, first..last of each query."""
    position = torch.arange(len(gallery), device=gallery.device)
    step = max(1, _SCORES_AT_A_TIME // len(gallery))
    found = []
    for start in range(0, len(queries), step):
        scores = queries[start : start + step] @ gallery.t()
        stop = start + len(scores)
        right = (position >= first[start:stop, None]) & (position < last[start:stop, None])
        best, place = scores.masked_fill(~right, -torch.inf).max(1, keepdim=True)
        ties = (scores == best) & (position < place)
        found.append(((scores > best) | ties).sum(1))
    return torch.cat(found)


if __name__ == "__main__":
    run_job(RetrieveConfig, run)
