"""Image-caption pairs, their pixels, and how training pixels are varied.

Pixels are kept decoded in memory when they fit a stated budget, otherwise files are decoded batch
by batch with reader threads.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from featcache.backbones.base import PixelSpec
from featcache.config import Config
from featcache.errors import DatasetError, UnreadableImagesError
from featcache.image_bytes import read_bytes
from featcache.images import PixelMode, load_pixels
from featcache.manifest import Manifest
from featcache.storage import Where


class ImagesConfig(Config):
    """How images are read, and how training images are varied."""

    min_area: float = Field(default=0.7, gt=0.0, le=1.0)
    """Smallest share of an image's area that a random crop keeps, (0, 1]; 1 = no crops."""
    flip: bool = True
    """Mirror half of the images; switch off where left and right mean something."""
    normalization: Literal["clip", "coco", "dataset"] = "clip"
    """Channel mean and deviation: CLIP's own (or what the weights to start from were trained with),
    those of COCO's images, or those of the training images."""
    ram_budget_gib: float = Field(default=4.0, ge=0.0)
    """Decoded pixels of a split are kept in memory up to this size, GiB; larger splits are decoded
    batch by batch."""
    num_readers: PositiveInt = 4
    """Decoding threads."""
    max_unreadable: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of a split's images, 0..1, that may be unreadable; they are listed and left out."""


@dataclass(frozen=True)
class Pairs:
    """The rows of one split that have a caption.

    Attributes:
        rows: (n,) int64 manifest rows.
        root: folder that `paths` start from.
        paths: n images, as `featcache.image_bytes.read_bytes` takes them.
        labels: (n,) int64 class of a single-label set, -1 = none.
        caption_offsets: (n+1,) int64 start of each row's captions in `caption_ids`.
        caption_ids: (m,) int64 captions as indices into `texts`.
        texts: U distinct captions, in order of first use.
        num_without: rows of the split that have no caption and were left out.
    """

    rows: npt.NDArray[np.int64]
    root: Where
    paths: list[str]
    labels: npt.NDArray[np.int64]
    caption_offsets: npt.NDArray[np.int64]
    caption_ids: npt.NDArray[np.int64]
    texts: list[str]
    num_without: int

    def __len__(self) -> int:
        return len(self.rows)

    def captions_of(
        self, which: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(k+1,) offsets and the caption ids of k of the rows, `which` being indices into them."""
        starts, counts = self.caption_offsets[which], np.diff(self.caption_offsets)[which]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        positions = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
        return offsets, self.caption_ids[positions]


def pairs_of(manifest: Manifest, split: str) -> Pairs:
    """The image-caption pairs of a split.

    Raises:
        DatasetError: if the split does not exist or none of its rows has a caption.
    """
    in_split = np.flatnonzero(np.asarray(manifest.splits, dtype=object) == split)
    if len(in_split) == 0:
        known = ", ".join(dict.fromkeys(manifest.splits))
        raise DatasetError(f"{manifest.root}: no split {split!r}; the dataset has {known}")
    counts = np.diff(manifest.caption_offsets)[in_split]
    rows = in_split[counts > 0]
    if len(rows) == 0:
        raise DatasetError(
            f"{manifest.root}: the {manifest.kind} dataset has no captions in its split {split!r}; "
            "contrastive pretraining needs image-caption pairs, choose a dataset with captions"
        )
    counts = counts[counts > 0]
    starts = manifest.caption_offsets[rows]
    number: dict[str, int] = {}
    ids = [
        number.setdefault(manifest.caption_values[position], len(number))
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
        for position in range(start, start + count)
    ]
    labels = np.full(len(rows), -1, np.int64)
    if manifest.task == "single_label":
        labeled = np.diff(manifest.label_offsets)[rows] > 0
        labels[labeled] = manifest.label_values[manifest.label_offsets[rows[labeled]]]
    return Pairs(
        rows=rows,
        root=manifest.root,
        paths=[manifest.paths[row] for row in rows.tolist()],
        labels=labels,
        caption_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        caption_ids=np.asarray(ids, dtype=np.int64),
        texts=list(number),
        num_without=len(in_split) - len(rows),
    )


class ImageStore:
    """Images of a list of files as uint8 pixels of one size.

    Attributes:
        in_memory: whether all of them are held decoded.
        problems: path to reason, of every image found unreadable so far.
    """

    def __init__(
        self,
        root: Where,
        paths: Sequence[str],
        spec: PixelSpec,
        mode: PixelMode,
        options: ImagesConfig,
    ) -> None:
        """Decodes all files if their pixels fit the budget.

        Args:
            root: folder that `paths` start from.
            paths: images.
            spec: size, resize and crop of the pixels.
            mode: see `featcache.images`.
            options: memory budget, number of threads, share that may be unreadable.

        Raises:
            UnreadableImagesError: if more files than allowed cannot be read.
        """
        self.problems: dict[str, str] = {}
        self._root, self._paths = root, list(paths)
        self._spec, self._mode = spec, mode
        self._allowed = math.floor(options.max_unreadable * len(self._paths))
        self._pool = ThreadPoolExecutor(options.num_readers, thread_name_prefix="reader")
        num_bytes = len(self._paths) * 3 * math.prod(spec.size)
        self.in_memory = num_bytes <= options.ram_budget_gib * 2**30
        self._pixels: Tensor | None = None
        if self.in_memory:
            everything = np.arange(len(self._paths), dtype=np.int64)
            self._pixels, self._readable = self._decode(everything)

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, which: npt.NDArray[np.int64]) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """Pixels of the readable ones of some files.

        Args:
            which: (n,) int64 indices into the list of files.

        Returns:
            (k, 3, H, W) uint8, and the (k,) indices they belong to; k <= n, order kept.
        """
        if self._pixels is not None:
            which = which[self._readable[which]]
            return self._pixels[torch.from_numpy(which)], which
        pixels, readable = self._decode(which)
        return pixels[torch.from_numpy(readable)], which[readable]

    def stream(
        self,
        plan: Iterable[npt.NDArray[np.int64]],
        key: None = None,
        spares: npt.NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
        """Full batches of a plan, the next one decoded in a thread while the last one is used.

        Args:
            plan: distinct rows of one batch after the other.
            key: None.
            spares: sorted rows of which one takes the place of an unreadable one: the next one
                behind it that is readable and not in the batch. None = those are left out.

        Raises:
            UnreadableImagesError: if no spare is left.
        """
        if self.in_memory:
            yield from (self._full(np.asarray(rows), spares) for rows in plan)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="batch") as pool:
            coming: Future[tuple[Tensor, npt.NDArray[np.int64]]] | None = None
            for rows in plan:
                following = pool.submit(self._full, np.asarray(rows), spares)
                if coming is not None:
                    yield coming.result()
                coming = following
            if coming is not None:
                yield coming.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the reader threads."""
        self._pool.shutdown(cancel_futures=True)

    def _full(
        self, rows: npt.NDArray[np.int64], spares: npt.NDArray[np.int64] | None
    ) -> tuple[Tensor, npt.NDArray[np.int64]]:
        """The rows with spares in the places of unreadable ones."""
        pixels, which = self.take(rows)
        if len(which) == len(rows) or spares is None:
            return pixels, which
        chosen, used = rows.copy(), set(rows.tolist())
        while len(which) < len(rows):
            for place in np.flatnonzero(~np.isin(chosen, which)).tolist():
                behind = np.roll(spares, -int(np.searchsorted(spares, chosen[place], "right")))
                spare = next((row for row in behind.tolist() if self._may_serve(row, used)), None)
                if spare is None:
                    raise UnreadableImagesError(
                        f"fewer images than the batch of {len(rows)} can be read; repair them or "
                        "lower batch_size"
                    )
                used.add(spare)
                chosen[place] = spare
            pixels, which = self.take(chosen)
        return pixels, which

    def _may_serve(self, row: int, used: set[int]) -> bool:
        return row not in used and self._paths[row] not in self.problems

    def _decode(self, which: npt.NDArray[np.int64]) -> tuple[Tensor, npt.NDArray[np.bool_]]:
        pixels = torch.zeros((len(which), 3, *self._spec.size), dtype=torch.uint8)
        readable = np.zeros(len(which), np.bool_)

        def decode(place: int) -> None:
            path = self._paths[which[place]]
            try:
                data = read_bytes(self._root, path)
                pixels[place] = load_pixels(data, self._spec, self._mode)[0]
            except ValueError as error:
                self.problems[path] = " ".join(str(error).split())
            else:
                readable[place] = True

        for _ in self._pool.map(decode, range(len(which))):
            pass
        if len(self.problems) > self._allowed:
            path, reason = next(iter(self.problems.items()))
            raise UnreadableImagesError(
                f"{len(self.problems)} images are unreadable, at most {self._allowed} of "
                f"{len(self._paths)} are allowed: first {path} ({reason}); repair them or raise "
                "images.max_unreadable"
            )
        return pixels, readable


def draw_captions(pairs: Pairs, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """(n,) one caption an image, uniformly among its own, as indices into `Pairs.texts`."""
    counts = np.diff(pairs.caption_offsets)
    drawn = np.floor(random.random(len(pairs)) * counts).astype(np.int64)
    ids: npt.NDArray[np.int64] = pairs.caption_ids[pairs.caption_offsets[:-1] + drawn]
    return ids


def draw_views(count: int, min_area: float, flip: bool, random: np.random.Generator) -> Tensor:
    """(count, 2, 3) float32 random crops that keep the image's proportions, and flips.

    Args:
        count: number of images.
        min_area: smallest share of the area that a crop keeps, (0, 1].
        flip: whether half of the images are mirrored.
        random: draws area, place and flip of each image.
    """
    side = np.sqrt(random.uniform(min_area, 1.0, count))
    place = random.uniform(-1.0, 1.0, (count, 2)) * (1.0 - side)[:, None]
    mirror = np.where(random.random(count) < 0.5, -1.0, 1.0) if flip else np.ones(count)
    affine = np.zeros((count, 2, 3), np.float32)
    affine[:, 0, 0], affine[:, 1, 1] = side * mirror, side
    affine[:, :, 2] = place
    return torch.from_numpy(affine)


def view(pixels: Tensor, views: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, *size) float32 crops, resized bilinearly, as one sampling of the whole batch.

    Args:
        pixels: (B, 3, H, W) uint8 or float, any device; the result has its units.
        views: (B, 2, 3) of `draw_views`.
        size: height and width of the result, pixels.
    """
    shape = [len(pixels), 3, *size]
    grid = F.affine_grid(views.to(pixels.device), shape, align_corners=False)
    return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)


def augment(
    pixels: Tensor, size: tuple[int, int], min_area: float, flip: bool, random: np.random.Generator
) -> Tensor:
    """(B, 3, *size) float32 crops and flips that are drawn at once; see `draw_views`, `view`."""
    return view(pixels, draw_views(len(pixels), min_area, flip, random), size)


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) float32 normalised, from pixels in 0..255."""
    shift = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1) * 255.0
    scale = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1) * 255.0
    return (pixels.float() - shift) / scale


def pixel_statistics(
    images: ImageStore, seed: int, sample: int = 2048
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of a dataset's pixels, in units of 0..1.

    Args:
        images: the training images.
        seed: which images are drawn if there are more than `sample`.
        sample: number of images looked at.
    """
    random = np.random.default_rng(seed)
    which = np.sort(random.permutation(len(images))[:sample])
    pixels, _ = images.take(which)
    values = pixels.permute(1, 0, 2, 3).reshape(3, -1).double() / 255.0
    mean, std = values.mean(dim=1), values.std(dim=1).clamp(min=1e-3)
    return (
        tuple(round(value, 6) for value in mean.tolist()),
        tuple(round(value, 6) for value in std.tolist()),
    )
