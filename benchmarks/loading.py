"""How fast files become varied training pixels, against torchvision's dataset and torch's loader.

    python benchmarks/loading.py                       # about 4 minutes on 2 cores
    python benchmarks/loading.py --files 64 --repeats 1 --out /tmp/x.json        # a quick look

JPEGs of 500x375 and 2000x1500 are made here. All rows cut random crops of 0.08 to 1 of the area to
224 pixels and mirror half of them, in batches of 32 uint8 images; `colours` adds TrivialAugment and
a jitter of 0.4. The sides, all with as many processes:

    torchvision         ImageFolder, Pillow, v2 transforms, DataLoader
    + float             the same, made float32 and normalised by the workers, as is usual
    torchvision tensors ImageFolder by torchvision's own JPEG decoder, v2 transforms, DataLoader
    featcache           this package's images, `decode` fast and scaled
    threads             the same by threads of one process
    squares             crops of 0.7 to 1 on the device of squares kept in memory; first and second
                        epoch

Rows take turns, medians. Machines are shared, so images per second of wall-clock time depend on
others; images per CPU second (all processes of a side together) hardly do.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extract import make_images
from pydantic import PositiveInt
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from featcache.backbones.base import PixelSpec
from featcache.config import Config, run_job
from finetune.images.augmentation import AugmentationConfig
from finetune.images.loading import Images, LoadingConfig
from finetune.images.training_images import TrainingImages

BATCH = 32
WARM, BEYOND = 3, 6
"""Batches before the timed ones, and behind them, so that nobody runs out of work meanwhile."""

SIZES = {"500x375": (375, 500), "2000x1500": (1500, 2000)}
SPEC = PixelSpec((224, 224), (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
CROPS = AugmentationConfig(min_area=0.08, max_aspect=4 / 3)
COLOURS = CROPS.model_copy(
    update={"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "policy": "trivial"}
)


class BenchmarkConfig(Config):
    """Measures the making of training batches."""

    files: PositiveInt = 96
    """Images of each size; a multiple of 32."""
    batches: PositiveInt = 12
    """Batches that are timed each time; the big images get half."""
    workers: PositiveInt = 2
    """Processes of each side, or threads."""
    repeats: PositiveInt = 3
    """Rounds; each measures every row once."""
    folder: Path | None = None
    """Where temporary files go; unset = the system's folder for them."""
    out: Path = Path("benchmarks/results/loading.json")
    """JSON file for the figures."""


Side = Callable[[Path, int, int], Iterator[tuple[int, float, float]]]
"""Folder, workers and batches to (images, seconds, CPU seconds) of each measured stretch."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Makes the images, measures, prints the table and writes the JSON."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        for size, (height, width) in SIZES.items():
            make_images(Path(name) / size / "all", height, width, config.files)
        for _ in range(config.repeats):
            for size in SIZES:
                count = config.batches if size == "500x375" else max(2, config.batches // 2)
                for label, side in SIDES.items():
                    if "colours" in label and size != "500x375":
                        continue
                    for number, (images, seconds, cpu) in enumerate(
                        side(Path(name) / size, config.workers, count)
                    ):
                        row = f"{label}, epoch {number + 1}" if label == "squares" else label
                        rates = found.setdefault(row, {}).setdefault(size, [])
                        rates.append((images / seconds, images / cpu))
    result: dict[str, Any] = {
        "workers": config.workers,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "rows": {
            row: {
                size: {
                    "images_per_second": statistics.median(r[0] for r in rates),
                    "images_per_cpu_second": statistics.median(r[1] for r in rates),
                }
                for size, rates in sizes.items()
            }
            for row, sizes in found.items()
        },
    }
    show(result)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def by_torchvision(transforms: list[Any], tensors: bool = False) -> Side:
    """ImageFolder and DataLoader."""

    def decoded(path: str) -> torch.Tensor:
        return decode_image(path, ImageReadMode.RGB)

    def measured(folder: Path, workers: int, count: int) -> Iterator[tuple[int, float, float]]:
        options = {"loader": decoded} if tensors else {}
        files = ImageFolder(str(folder), v2.Compose(transforms), **options)
        order = np.random.default_rng(0).permutation(len(files))
        plan = [chosen(order, number).tolist() for number in range(WARM + count + BEYOND)]
        batches = iter(DataLoader(files, batch_sampler=plan, num_workers=workers))
        for _ in range(WARM):
            next(batches)
        yield timed(lambda: sum(len(next(batches)[0]) for _ in range(count)))

    return measured


def by_featcache(
    augmentation: AugmentationConfig, decode: str = "scaled", threads: bool = False
) -> Side:
    """This package's images."""

    def measured(folder: Path, workers: int, count: int) -> Iterator[tuple[int, float, float]]:
        paths = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.jpg"))
        options = LoadingConfig.model_validate({"decode": decode, "num_readers": workers})
        order = np.random.default_rng(0).permutation(len(paths))
        plan = [chosen(order, number) for number in range(WARM + count + BEYOND)]
        processes = 0 if threads else workers
        with Images(folder, paths, SPEC, augmentation, options, processes) as images:
            stream = images.stream(plan, (0, 0))
            for _ in range(WARM):
                next(stream)
            yield timed(lambda: sum(len(next(stream)[1]) for _ in range(count)))

    return measured


def squares(folder: Path, workers: int, count: int) -> Iterator[tuple[int, float, float]]:
    """Crops on the device, here the CPU."""
    paths = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*.jpg"))
    options = LoadingConfig(num_workers=workers)
    cpu = torch.device("cpu")
    order = np.arange(len(paths))
    plan = [chosen(order, number) for number in range(len(paths) // BATCH)]
    with TrainingImages(folder, paths, SPEC, AugmentationConfig(), options, cpu) as images:
        for epoch in range(2):
            stream = images.stream(plan, (0, epoch))
            yield timed(lambda: sum(len(images.inputs(batch)) for batch in stream))  # noqa: B023


def chosen(order: np.ndarray[Any, np.dtype[np.int64]], number: int) -> Any:
    """Indices of a batch, the files over and over."""
    return np.take(order, np.arange(number * BATCH, (number + 1) * BATCH), mode="wrap")


def timed(work: Callable[[], int]) -> tuple[int, float, float]:
    """What the work returns, its seconds, and the CPU seconds of this process and its children."""
    before, began = cpu_seconds(), time.perf_counter()
    images = work()
    seconds = time.perf_counter() - began
    return images, seconds, cpu_seconds() - before


def cpu_seconds() -> float:
    """Of this process and of all processes below it that are alive."""
    ticks = 0
    waiting = [os.getpid()]
    while waiting:
        process = waiting.pop()
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            for task in Path(f"/proc/{process}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except FileNotFoundError:  # it has just ended
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def show(result: dict[str, Any]) -> None:
    """Prints the table, with ratios to torchvision's row."""
    first = next(iter(result["rows"].values()))
    print(f"{result['workers']} workers, {result['cpu_cores']} cores; images/s, and per CPU second")
    print(f"{'':34}" + "".join(f"{size:>28}" for size in SIZES))
    for row, sizes in result["rows"].items():
        cells = ""
        for size in SIZES:
            if size not in sizes:
                continue
            rates = sizes[size]
            cpu = rates["images_per_cpu_second"]
            ratio = cpu / first[size]["images_per_cpu_second"]
            cells += f"{rates['images_per_second']:10.0f}{cpu:10.0f} {ratio:6.2f}x"
        print(f"{row:34}{cells}")


CROP = v2.RandomResizedCrop(224, (0.08, 1.0), (3 / 4, 4 / 3), v2.InterpolationMode.BICUBIC)
JITTER = [v2.TrivialAugmentWide(), v2.ColorJitter(0.4, 0.4, 0.4)]
FLOATS = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(SPEC.mean, SPEC.std)]
FLIP, TENSOR = v2.RandomHorizontalFlip(), v2.PILToTensor()
SIDES: dict[str, Side] = {
    "torchvision": by_torchvision([CROP, FLIP, TENSOR]),
    "torchvision + float": by_torchvision([CROP, FLIP, TENSOR, *FLOATS]),
    "torchvision tensors": by_torchvision([CROP, FLIP], tensors=True),
    "featcache fast": by_featcache(CROPS, "fast"),
    "featcache scaled": by_featcache(CROPS),
    "featcache threads": by_featcache(CROPS, threads=True),
    "torchvision, colours": by_torchvision([CROP, FLIP, *JITTER, TENSOR]),
    "torchvision tensors, colours": by_torchvision([CROP, FLIP, *JITTER], tensors=True),
    "featcache scaled, colours": by_featcache(COLOURS),
    "squares": squares,
}

if __name__ == "__main__":
    run_job(BenchmarkConfig, run)
