"""Features of a cache as heads read them: no loaders, only tables that are cut by index arrays."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featcache.backbones.prompt_tower import PromptTower
from featcache.caption_tokens import CAPTION_TOKENS, CaptionTokens
from featcache.errors import CacheError
from featcache.joined_cache import VECTORS, JoinedCache
from featcache.layout.quantized_array import QuantizedArray
from featcache.reader import Cache, FeatureArray
from heads.base import Features, HeadConfig

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

TEXT = "text/projected"
"""Name under which heads read one caption vector an image; the cache has a row a caption."""

_MEMINFO = Path("/proc/meminfo")
_SCAN_ROWS = 65_536
_SCAN_VALUES = 1 << 28
"""Most numbers looked at together: 1 GiB of float32, which tokens reach with far fewer rows."""
_SPAN_VALUES = 1 << 25
"""Most numbers of an array, or scores, of the rows that are scored together: 128 MiB of float32."""
_FLAGS = {
    "image/projected": "--features.projected",
    "image/pooled": "--features.pooled",
    "image/tokens": "--features.tokens all (or grid:K)",
    "image/multimodal": "--features.multimodal states",
    "image/multimodal_mask": "--features.multimodal states",
    "image/multimodal_pooled": "--features.multimodal pooled",
    TEXT: "--features.text from a dataset with captions",
}


def reads_captions(name: str) -> bool:
    """Whether an array has nothing for an image without a caption."""
    return name.startswith(("text/", "image/multimodal"))


@dataclass(frozen=True)
class HeadArrays:
    """The arrays of a cache that a head reads, opened.

    Attributes:
        arrays: by name, in the order in which the head takes them; each with a row an image.
        captioned: (N,) rows with a caption; None if no array needs one.
    """

    arrays: Mapping[str, FeatureArray]
    captioned: Mask | None

    @property
    def readable(self) -> Mask | None:
        """(N,) rows that hold anything for the head; None = all that are valid."""
        return self.captioned if all(map(reads_captions, self.arrays)) else None

    def only(self, names: Sequence[str]) -> "HeadArrays":
        """Those of the arrays that are named, in that order."""
        return HeadArrays({name: self.arrays[name] for name in names}, self.captioned)


def open_arrays(
    cache: Cache,
    head: HeadConfig,
    training: bool = False,
    tower: Callable[[], PromptTower] | None = None,
) -> HeadArrays:
    """The arrays that a head reads.

    Args:
        cache: where they are.
        head: which ones.
        training: also those that only its loss reads.
        tower: opens the text tower of the cache's backbone, for captions as tokens; None = heads
            that read those are refused.

    Raises:
        CacheError: if the cache was extracted without one of them; the message says which option
            of the extraction makes it.
    """
    names = [*head.arrays(), *(head.training_arrays() if training else ())]
    arrays = {name: _open(cache, head, name, tower) for name in names}
    needed = any(map(reads_captions, names))
    return HeadArrays(arrays, cache.caption_counts > 0 if needed else None)


def _open(
    cache: Cache, head: HeadConfig, name: str, tower: Callable[[], PromptTower] | None
) -> FeatureArray:
    if name == CAPTION_TOKENS:
        if not cache.caption_counts.any():
            raise CacheError(
                f"{cache.path}: head {head.kind} reads captions, the cache holds none; extract a "
                "dataset with captions, or set head.classification_weight 1"
            )
        assert tower is not None, "nothing to tokenise captions with"
        return CaptionTokens(cache, tower())
    lacking = [one for one in cache.parts if not one.has(name)]
    if not lacking and name == TEXT:
        return cache.caption_means()
    if cache.has(name):
        return cache.array(name)
    held = ", ".join(cache.feature_names())
    advice = f"extract it with {_FLAGS[name]}, or choose another head or feature"
    if name == "image/projected" and cache.attributes.get("projected_dim") == 0:
        advice = (
            "its backbone reads no text and has no projection, so choose a head on pooled features "
            "(--head linear --head.feature pooled)"
        )
    if isinstance(cache, JoinedCache):
        advice = f"a join has only {', '.join((*VECTORS, TEXT))}; choose another head or feature"
        if lacking:
            without = ", ".join(key for key, one in cache.members.items() if one in lacking)
            advice = f"it is not in {without}; choose another head or feature"
    raise CacheError(
        f"{cache.path}: head {head.kind} reads {name}, the cache holds {held}; {advice}"
    )


class FeatureTables:
    """Chosen rows of every array that a head reads, cut into batches on a device.

    Attributes:
        tables: one table an array, in the head's order.
        rows: (n,) int64 row numbers in the cache.
        device: where batches go.
        num_views: V, the same for all arrays with views; 1 = none has any.
    """

    def __init__(self, arrays: HeadArrays, rows: IntArray, device: torch.device) -> None:
        """Reads the rows once; see `FeatureTable`.

        Raises:
            CacheError: if a row holds NaN or infinity.
        """
        missing = None if arrays.captioned is None else ~arrays.captioned[rows]
        self.tables = tuple(
            FeatureTable(array, rows, device, missing if reads_captions(name) else None)
            for name, array in arrays.arrays.items()
        )
        self.rows, self.device = rows, device
        self.num_views = max(table.num_views for table in self.tables)
        assert {table.num_views for table in self.tables} <= {1, self.num_views}

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def feature_dims(self) -> dict[str, int]:
        """Last axis of each array, by name; the length of a mask is that of its array's tokens."""
        return {table.name: table.feature_dim for table in self.tables}

    @property
    def index_device(self) -> torch.device:
        """Where positions of rows should lie, so that `batch` moves none: the device, or the CPU.

        Moving them in every step would let the CPU wait for the device in every step.
        """
        everywhere = all(table.held == "device" for table in self.tables)
        return self.device if everywhere else torch.device("cpu")

    def batch(self, index: Tensor, views: Tensor | None = None) -> Features:
        """B rows of each array, on the device; see `FeatureTable.batch`.

        Args:
            index: (b,) int64 positions among the chosen rows, on the CPU or the device.
            views: (b,) int64 view of each row, in all arrays that have views; None = the plain one.
        """
        return tuple(table.batch(index, views) for table in self.tables)

    def slice(self, start: int, stop: int) -> Features:
        """Consecutive rows of each array, plain view, on the device."""
        return tuple(table.slice(start, stop) for table in self.tables)

    def spans(self, num_classes: int) -> list[tuple[int, int]]:
        """Ranges of consecutive rows whose features, and C scores each, are held at a time."""
        most = max(num_classes, *(table.row_values for table in self.tables))
        step = max(1, min(_SCAN_ROWS, _SPAN_VALUES // most))
        return [(start, min(start + step, len(self))) for start in range(0, len(self), step)]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(D,) float32 mean and deviation of the first array's columns; see `FeatureTable`."""
        return self.tables[0].statistics()


class FeatureTable:
    """Features of chosen rows, cut into float32 batches on a device; masks stay bool.

    They are held on the device if they fit into half of its free memory, otherwise in host memory
    if they fit into half of that, otherwise every batch is read from the cache's mapped files. Int8
    tokens are held as such, with their scales; a batch of them becomes float32 on the device.

    Attributes:
        name: of the array.
        held: "device", "memory" or "files".
        data: (n, ...) what is held, as it is stored; None for "files".
        scales: (n, ...) of int8 tokens, else None.
        num_views: V; 1 = no view axis.
    """

    def __init__(
        self,
        array: FeatureArray,
        rows: IntArray,
        device: torch.device,
        missing: Mask | None = None,
    ) -> None:
        """Reads the rows once.

        Args:
            array: (N, D), (N, L, D), a mask (N, L), or with a view axis behind N.
            rows: (n,) row numbers.
            device: where batches go.
            missing: (n,) rows that have no features, and are read as zeros; None = all have some.

        Raises:
            CacheError: if a row holds NaN or infinity.
        """
        self.array, self.rows, self.device, self.name = array, rows, device, array.name
        self.num_views = array.num_views
        self._missing = None
        if missing is not None and missing.any():
            self._missing = torch.from_numpy(missing)
        stored = [array.codes, array.scales] if isinstance(array, QuantizedArray) else [array]
        total = len(rows) * sum(part.row_bytes for part in stored)
        fits = total <= _free_memory(torch.device("cpu")) // 2
        self.data: Tensor | None = None
        self.scales: Tensor | None = None
        self.held: Literal["device", "memory", "files"] = "files"
        if fits:
            held = [torch.from_numpy(part.read(rows)) for part in stored]
            self.held = "memory"
            if self._missing is not None:
                for part in held:
                    part[self._missing] = 0
            self._require_finite(held[-1], rows)  # a token of NaN has the scale NaN
            if device.type != "cpu" and total <= _free_memory(device) // 2:
                held = [part.to(device) for part in held]
            if device.type == held[0].device.type:
                self.held = "device"
            self.data = held[0]
            self.scales = held[1] if len(held) > 1 else None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def feature_dim(self) -> int:
        """Length of the last axis."""
        return self.array.shape[-1]

    @property
    def row_values(self) -> int:
        """Numbers of one row in one view."""
        return int(np.prod(self.array.shape[1:])) // self.num_views

    def batch(self, index: Tensor, views: Tensor | None = None) -> Tensor:
        """(b, ...) float32 features (masks: bool, token ids: int32) on the device.

        Args:
            index: (b,) int64 positions among the chosen rows, on the CPU or the device.
            views: (b,) int64 view of each row; None = the plain view 0.
        """
        if self.data is None:
            index = index.cpu()
            rows = self.rows[index.numpy()]
            read = torch.from_numpy(self.array.take(rows))
            if self._missing is not None:
                read[self._missing[index]] = 0
            self._require_finite(read, rows)
            return self._input(self._one_view(read, views))
        index = index.to(self.data.device)
        part = self._input(self._chosen(self.data, index, views))
        if self.scales is not None:
            part.mul_(self._chosen(self.scales, index, views).to(self.device)[..., None])
        return part

    def slice(self, start: int, stop: int) -> Tensor:
        """(stop − start, ...) float32 plain features of consecutive rows."""
        if self.data is None or self.scales is not None:
            return self.batch(torch.arange(start, min(stop, len(self))))
        return self._input(self._one_view(self.data[start:stop], None))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """(D,) float32 mean and standard deviation of each column, over rows (and tokens).

        Rows that have no features do not count.
        """
        total = torch.zeros(self.feature_dim, dtype=torch.float64, device=self.device)
        squares, count, shift = torch.zeros_like(total), 0, None
        step = max(1, min(_SCAN_ROWS, _SCAN_VALUES // self.row_values))
        for start in range(0, len(self), step):
            part = self.slice(start, start + step)
            if self._missing is not None:
                part = part[~self._missing[start : start + step].to(part.device)]
            if not len(part):
                continue
            part = part.flatten(0, -2)
            if shift is None:
                shift = part.mean(0)  # near the mean, or squares would cancel
            part = part - shift
            total += part.sum(0, dtype=torch.float64)
            squares += part.square_().sum(0, dtype=torch.float64)
            count += len(part)
        assert shift is not None, "no rows"
        mean = total / count
        variance = (squares / count - mean.square()).clamp_(min=0)
        return (mean + shift).float(), variance.sqrt_().float()

    def _chosen(self, data: Tensor, index: Tensor, views: Tensor | None) -> Tensor:
        """Rows of what is held, each in one view; the other views are not read."""
        if self.num_views > 1:
            data = data.flatten(0, 1)
            index = index * self.num_views
            if views is not None:
                index = index + views.to(index.device)
        return data.index_select(0, index)

    def _one_view(self, part: Tensor, views: Tensor | None) -> Tensor:
        """The view of each row that `views` names, or the plain one."""
        if self.num_views == 1:
            return part
        if views is None:
            return part[:, 0]
        own = torch.arange(len(part), device=part.device)
        return part[own, views.to(part.device)]

    def _input(self, part: Tensor) -> Tensor:
        part = part.to(self.device)
        return part if part.dtype in (torch.bool, torch.int32) else part.float()

    def _require_finite(self, data: Tensor, rows: IntArray) -> None:
        """Checks what was read of `rows`."""
        if not data.is_floating_point():
            return
        for start in range(0, len(data), _SCAN_ROWS):
            part = data[start : start + _SCAN_ROWS]
            # One reduction: a sum is finite exactly if no element is NaN or infinite (float32 holds
            # the sum of float16s; for float32 it may overflow, and then the elements decide).
            if torch.isfinite(part.sum(dtype=torch.float32)):
                continue
            good = torch.isfinite(part.flatten(1)).all(1)
            if not good.all():
                row = int(rows[start + int((~good).nonzero()[0])])
                raise CacheError(
                    f"{self.name}: row {row} of the cache is valid but holds NaN or "
                    "infinity; extract again with --features.storage_dtype float32"
                )


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated; pages of files that the system merely keeps are free."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return int(rest.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
