"""Job: cosines of some images and some texts as a table and a picture.

python -m heads.similarity --cache cache/flickr8k --out flickr.png
python -m heads.similarity --images photos --texts '["a red rose", "a tulip"]' --backbone.model …
"""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator

from featcache.backbones import AnyBackbone
from featcache.backbones.base import Backbone
from featcache.backbones.open_clip import OpenClipConfig
from featcache.class_text import class_text_features, encode_prompts, ensemble, open_cache_backbone
from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.errors import CacheError, DatasetError
from featcache.images import PixelMode
from featcache.manifest import Manifest
from featcache.precision import PrecisionChoice, resolve_device
from featcache.prompts import expand, format_prompts
from featcache.reader import Cache, open_cache
from featcache.storage import CachePath, Where
from heads.image_text import ImageEncoder, open_image_text
from heads.predict import find_images
from heads.run_folder import write_atomic
from heads.text_lines import text_lines

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
IMAGES, CAPTIONS = "image/projected", "text/projected"


class SimilarityConfig(Config):
    """A picture of how similar images and texts are."""

    images: Path | None = None
    """Image file or folder; needs texts."""
    dataset: AnyDataset | None = Field(default=None, discriminator="kind")
    """Images with their captions, or else with their classes as texts."""
    cache: CachePath | None = None
    """The same from a cache: features are read, not made; backbone is its own."""
    split: str | None = None
    """Split that the images come from; unset = test, val or the first, whichever is there."""
    texts: str | list[str] | None = None
    """Sentences, or .txt files with one a line; unset = first caption of each image, or the names
    of their classes in `templates`."""
    templates: str | list[str] = "plain"
    """Template sets and templates that class names are put into, averaged; unused with captions."""
    num_images: int = Field(default=8, ge=1, le=40)
    """Images taken at even steps, 1..40; with class names one of each class, at even steps too."""
    backbone: AnyBackbone = Field(default=OpenClipConfig(), discriminator="kind")
    """Encoder of images and texts; with `cache` it must not be given."""
    mode: PixelMode = "fast"
    """Decode and resize, as in extraction; unused with `cache`."""
    precision: PrecisionChoice = "auto"
    """Arithmetic: fp32, bf16, fp16; auto = the device's fastest that agrees with fp32; unused with
    `cache`."""
    num_readers: PositiveInt | Literal["auto"] = "auto"
    """Threads that read and decode; auto = one per processor this job may use."""
    out: Path = Path("similarity.png")
    """Picture to write; the numbers go to a .csv beside it."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""

    @model_validator(mode="before")
    @classmethod
    def _folder_unless_said(cls, values: Any) -> Any:
        dataset = values.get("dataset") if isinstance(values, Mapping) else None
        if isinstance(dataset, Mapping) and "kind" not in dataset:
            return {**values, "dataset": {"kind": "folder", **dataset}}
        return values

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("images", "dataset", "cache") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"found {' and '.join(given) or 'no images'}; give one of images, dataset, cache"
            )
        if self.images is not None and self.texts is None:
            raise ValueError(f"images={self.images} needs texts to compare them with")
        if self.images is not None and self.split is not None:
            raise ValueError(f"split={self.split} is of a dataset or cache; leave it out")
        if self.cache is not None and self.backbone != OpenClipConfig():
            raise ValueError(
                f"backbone={self.backbone.kind} and cache={self.cache}: features of a cache are "
                "compared with texts by the backbone that wrote it; leave backbone out"
            )
        if self.out.suffix != ".png":
            raise ValueError(f"out={self.out} has to end with .png")
        return self


@dataclass(frozen=True)
class Similarity:
    """Images against texts.

    Attributes:
        root, paths: n images.
        texts: m texts.
        cosines: (m, n) float32.
        own: (m, n) where the text is the image's own; None if nothing is known about that.
    """

    root: Where
    paths: list[str]
    texts: list[str]
    cosines: FloatArray
    own: npt.NDArray[np.bool_] | None

    def summary(self) -> dict[str, float]:
        """Mean cosine of own and of foreign pairs, and how often an own one is the best of all.

        Empty if nothing is known about own pairs.
        """
        if self.own is None:
            return {}
        values = {"own": float(self.cosines[self.own].mean())}
        if not self.own.all():
            values["foreign"] = float(self.cosines[~self.own].mean())
        columns = np.arange(self.cosines.shape[1])
        values["images_right"] = float(self.own[self.cosines.argmax(0), columns].mean())
        rows = np.arange(self.cosines.shape[0])
        values["texts_right"] = float(self.own[rows, self.cosines.argmax(1)].mean())
        return values


def run(config: SimilarityConfig) -> Similarity:
    """Compares, prints, and writes the picture and its numbers.

    Raises:
        ConfigError, BackboneError, DatasetError, CacheError: one line on what is missing.
    """
    device = resolve_device(config.device)
    if config.cache is not None:
        found = _of_cache(config, open_cache(config.cache), device)
    else:
        found = _of_images(config, device)
    from heads.similarity_figure import write_matrix  # matplotlib takes a second

    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_matrix(found, config.out)
    table = pd.DataFrame(found.cosines, columns=found.paths, index=pd.Index(found.texts))
    write_atomic(config.out.with_suffix(".csv"), table.to_csv(index_label="text").encode())
    print(f"{len(found.paths)} images, {len(found.texts)} texts: {config.out}")
    shown = found.summary()
    if shown:
        foreign = f", foreign pairs {shown['foreign']:.3f}" if "foreign" in shown else ""
        print(
            f"  mean cosine of own pairs {shown['own']:.3f}{foreign}; own text is best for "
            f"{shown['images_right']:.0%} of the images, own image for "
            f"{shown['texts_right']:.0%} of the texts"
        )
    return found


def spread(count: int, most: int) -> IntArray:
    """At most `most` of the numbers 0..count-1, at even steps."""
    taken = min(count, most)
    return np.arange(taken, dtype=np.int64) * count // max(taken, 1)


def one_of_each_class(labels: IntArray, most: int) -> tuple[IntArray, IntArray]:
    """Positions of the first row of at most `most` classes at even steps, and these classes.

    Args:
        labels: (n,) class of each row, -1 = none.
        most: classes.
    """
    known, first = np.unique(labels, return_index=True)
    first, known = first[known >= 0], known[known >= 0]
    chosen = spread(len(known), most)
    return first[chosen].astype(np.int64), known[chosen].astype(np.int64)


def first_captions(
    rows: IntArray, offsets: IntArray, captions: Sequence[str]
) -> tuple[list[str], IntArray, npt.NDArray[np.bool_]]:
    """The first caption of each image, equal ones once.

    Args:
        rows: (n,) images, each with a caption.
        offsets: (N+1,) row i has captions offsets[i]..offsets[i+1].
        captions: all captions.

    Returns:
        m texts; (m,) their numbers; (m, n) whether an image has the text among its captions.
    """
    lists = [[str(captions[n]) for n in range(offsets[row], offsets[row + 1])] for row in rows]
    numbers: dict[str, int] = {}
    for row, own in zip(rows, lists, strict=True):
        numbers.setdefault(own[0], int(offsets[row]))
    owned = np.asarray([[text in own for own in lists] for text in numbers], np.bool_)
    return list(numbers), np.asarray(list(numbers.values()), np.int64), owned


def cosines(texts: FloatArray, images: FloatArray) -> FloatArray:
    """(m, n) cosines of (m, P) texts and (n, P) images, not normalised."""
    one, two = (F.normalize(torch.from_numpy(part).float(), dim=1) for part in (texts, images))
    found: FloatArray = (one @ two.T).numpy()
    return found


def _of_cache(config: SimilarityConfig, cache: Cache, device: torch.device) -> Similarity:
    if not cache.has(IMAGES):
        raise CacheError(
            f"{cache.path}: no {IMAGES}, which texts are compared with; extract it with "
            "--features.projected from a backbone that reads text"
        )
    split = config.split or _usual_split(cache.split_names)
    rows = cache.rows(split)
    given = text_lines(config.texts, "texts")
    captioned = rows[cache.caption_counts[rows] > 0]

    def backbone() -> Backbone:
        return open_cache_backbone(cache, str(device))

    own: npt.NDArray[np.bool_] | None = None
    if given is not None:
        rows, texts = rows[spread(len(rows), config.num_images)], given
        features = encode_prompts(backbone(), [texts])[0]
    elif len(captioned) and cache.has(CAPTIONS):
        rows = captioned[spread(len(captioned), config.num_images)]
        offsets, captions = cache.captions
        texts, first, own = first_captions(rows, offsets, captions)
        features = cache.array(CAPTIONS).take(first).astype(np.float32)
    else:
        rows, classes = _classes(cache.task, _cache_labels(cache, rows), rows, config, cache.path)
        texts = [str(cache.classes["name"][number]) for number in classes]
        templates = expand(config.templates)
        prompts = torch.from_numpy(class_text_features(cache, templates, backbone))
        features = ensemble(prompts).numpy()[classes]
        own = np.eye(len(rows), dtype=np.bool_)
    _require(rows, f"{cache.path}: split {split!r}")
    images = cache.row_array(IMAGES).read(rows, view=0).astype(np.float32)
    root = cache.attributes["root"]
    paths = [cache.paths[int(row)] for row in rows]
    return Similarity(root, paths, _blanks(texts), cosines(features, images), own)


def _of_images(config: SimilarityConfig, device: torch.device) -> Similarity:
    given = text_lines(config.texts, "texts")
    own: npt.NDArray[np.bool_] | None = None
    if config.images is not None:
        assert given is not None, "checked with the options"
        folder = config.images if config.images.is_dir() else config.images.parent
        root: Where = folder
        paths = find_images(config.images)
        paths = [paths[place] for place in spread(len(paths), config.num_images)]
        prompts = [given]
        texts = given
    else:
        assert config.dataset is not None, "checked with the options"
        manifest = config.dataset.open()
        root = manifest.root
        paths, texts, prompts, own = _dataset_rows(config, manifest, given)
    backbone, _ = open_image_text(
        config.backbone, device, config.precision, root, paths, config.mode
    )
    encoder = ImageEncoder(backbone, mode=config.mode, num_readers=config.num_readers)
    features, kept = [], []
    for batch in encoder.batches(root, paths):
        features.append(batch.features.cpu().numpy())
        kept.append(batch.rows)
        for place, reason in batch.reasons.items():
            print(f"left out: {paths[place]} ({reason})")
    readable = np.concatenate(kept)
    if not len(readable):
        raise DatasetError(f"{root}: none of {len(paths)} images can be read")
    vectors = ensemble(torch.from_numpy(encode_prompts(backbone, prompts))).numpy()
    matrix = cosines(vectors, np.concatenate(features))
    shown = [paths[place] for place in readable]
    return Similarity(
        root, shown, _blanks(texts), matrix, None if own is None else own[:, readable]
    )


def _dataset_rows(
    config: SimilarityConfig, manifest: Manifest, given: list[str] | None
) -> tuple[list[str], list[str], list[list[str]], npt.NDArray[np.bool_] | None]:
    """Paths, the texts that are shown, the T x m sentences that are encoded, and own pairs."""
    ranges = manifest.split_ranges
    split = config.split or _usual_split(list(ranges))
    if split not in ranges:
        raise DatasetError(f"{manifest.root}: no split {split!r}; it has {', '.join(ranges)}")
    block = manifest.block(*ranges[split])  # the only split that is read
    rows = np.arange(len(block), dtype=np.int64)
    captioned = rows[np.diff(block.caption_offsets) > 0]
    own: npt.NDArray[np.bool_] | None = None
    if given is not None:
        rows, texts, prompts = rows[spread(len(rows), config.num_images)], given, [given]
    elif len(captioned):
        rows = captioned[spread(len(captioned), config.num_images)]
        texts, _, own = first_captions(rows, block.caption_offsets, block.captions)
        prompts = [texts]
    else:
        counts = np.diff(block.label_offsets)
        labels = np.full(len(rows), -1, np.int64)
        labels[counts > 0] = block.label_values[block.label_offsets[:-1][counts > 0]]
        rows, classes = _classes(manifest.task, labels, rows, config, manifest.root)
        table = manifest.classes.iloc[classes].reset_index(drop=True)
        texts = [str(name) for name in table["name"]]
        prompts = format_prompts(table, expand(config.templates))
        own = np.eye(len(rows), dtype=np.bool_)
    return [block.paths[row] for row in rows], texts, prompts, own


def _classes(
    task: str, labels: IntArray, rows: IntArray, config: SimilarityConfig, where: object
) -> tuple[IntArray, IntArray]:
    """A row of each of some classes, and these classes."""
    if task != "single_label" or not (labels >= 0).any():
        raise DatasetError(
            f"{where}: no captions and no single label to compare images with; give --texts"
        )
    places, classes = one_of_each_class(labels, config.num_images)
    return rows[places], classes


def _cache_labels(cache: Cache, rows: IntArray) -> IntArray:
    if cache.task != "single_label":
        return np.full(len(rows), -1, np.int64)
    return cache.labels(rows).astype(np.int64)


def _usual_split(names: Sequence[str]) -> str:
    return next((name for name in ("test", "val") if name in names), names[0])


def _require(rows: IntArray, where: str) -> None:
    if not len(rows):
        raise CacheError(f"{where} has no readable image")


def _blanks(texts: Sequence[str]) -> list[str]:
    return [" ".join(text.replace("_", " ").split()) for text in texts]


def wrapped(text: str, width: int = 38, lines: int = 3) -> str:
    """A text in at most so many lines, cut with an ellipsis."""
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


if __name__ == "__main__":
    run_job(SimilarityConfig, run)
