"""What it takes to bring a cache up to date when its dataset changes, against extracting it anew.

    python benchmarks/growth.py                       # 20,000 images, ViT-B-32, about 15 minutes
    python benchmarks/growth.py --num_rows 2000       # a quick look

Small JPEGs are made here; weights are random (speed does not depend on them). The backbone is open
before anything is measured. An update's time is that of the whole job: listing the dataset, looking
at every file's version mark, hashing new files, encoding, copying and linking, the exchange of the
two caches and deleting the old one. Of the first extraction only the encoding of its shards counts.

Goal: one per cent of new images, scattered over the dataset, in at most 3 % of the first
extraction's time.
"""

import io
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveInt

from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import Config, run_job
from featcache.extract import ExtractConfig, plan
from featcache.extract import run as extract
from featcache.identity import Precision
from featcache.reader import open_cache

NUM_CLASSES = 100


class BenchmarkConfig(Config):
    """Measures updates of a cache."""

    num_rows: PositiveInt = 20_000
    """Images of the first extraction."""
    share: float = Field(default=0.01, gt=0, le=1)
    """Share of new images in an update."""
    pixels: PositiveInt = 96
    """Height and width of the images."""
    model: str = "ViT-B-32"
    """open_clip architecture, or `local-dir:FOLDER`."""
    precision: Precision = "bf16"
    """Arithmetic of the tower."""
    shard_rows: PositiveInt = 2048
    """Rows of a shard."""
    folder: Path | None = None
    """Where temporary files go; unset = the system's folder for them."""
    out: Path = Path("benchmarks/results/growth.json")
    """JSON file for the figures."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Makes the images, measures, prints the table and writes the JSON."""
    random = None if config.model.startswith("local-dir:") else "random:0"
    options = {"model": config.model} | ({"pretrained": random} if random else {})
    opened = OpenClipConfig.model_validate(options).open("cpu", config.precision)
    OpenClipConfig.open = lambda self, device="cpu", precision="fp32": opened
    more = max(1, round(config.num_rows * config.share))
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        table = folder / "rows.csv"
        make_images(folder / "images", config.num_rows + 2 * more, config.pixels)
        job = ExtractConfig.model_validate(
            {
                "dataset": {
                    "kind": "table",
                    "file": folder / "rows.csv",
                    "root": folder / "images",
                },
                "backbone": options,
                "cache": folder / "cache",
                "device": "cpu",
                "precision": config.precision,
                "min_cosine": 0.1,
                "shard_rows": config.shard_rows,
            }
        )
        rows = measure(config, job, table, more)
    full = rows[0]["seconds"]
    for row in rows:
        row["share_of_full"] = row["seconds"] / full
    scattered = rows[1]["share_of_full"]
    result = {
        "config": config.model_copy(update={"folder": None}).record(),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "goals": [
            {
                "what": f"{config.share:.0%} scattered new images, share of the first extraction",
                "reached": scattered,
                "goal": "<= 0.03",
                "met": scattered <= 0.03,
            }
        ],
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    show(result)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def measure(
    config: BenchmarkConfig, job: ExtractConfig, table: Path, more: int
) -> list[dict[str, Any]]:
    """The first extraction, then updates of its cache, each of the state that the last one left."""
    total = config.num_rows + 2 * more
    late = np.arange(config.num_rows + more, total)  # at the end of the set
    early = np.sort(np.random.default_rng(0).permutation(config.num_rows + more)[:more])
    first = np.setdiff1d(np.arange(config.num_rows + more), early)  # the others, in between
    states: list[tuple[str, np.ndarray[Any, Any], Callable[[int], int]]] = [
        ("scattered new images", np.arange(config.num_rows + more), label),
        ("new images at the end", np.arange(total), label),
        ("other labels only", np.arange(total), lambda row: label(row + 1)),
        ("images gone", np.setdiff1d(np.arange(total), late), lambda row: label(row + 1)),
    ]
    write_table(table, first, label)
    with plan(job) as session:
        began = time.perf_counter()
        for shard in session.pending():
            session.extract(shard)
        report = session.finish()
        seconds = time.perf_counter() - began
    rows = [{"what": "first extraction", "encoded": report.num_extracted, "seconds": seconds}]
    for what, kept, labelled in states:
        write_table(table, kept, labelled)
        began = time.perf_counter()
        report = extract(job)
        seconds = time.perf_counter() - began
        rows.append({"what": what, "encoded": report.num_extracted, "seconds": seconds})
        assert open_cache(job.cache).num_rows == len(kept)
    began = time.perf_counter()
    report = extract(job)
    seconds = time.perf_counter() - began
    rows.append({"what": "no change", "encoded": report.num_extracted, "seconds": seconds})
    return rows


def label(row: int) -> int:
    """Class of an image; neighbours have different ones."""
    return row % NUM_CLASSES


def write_table(file: Path, rows: np.ndarray[Any, Any], labelled: Callable[[int], int]) -> None:
    """A dataset's rows: images by number."""
    lines = [f"{row:06d}.jpg,class{labelled(row):03d},train" for row in rows.tolist()]
    file.write_text("\n".join(["path,label,split", *lines]) + "\n")


def make_images(folder: Path, number: int, pixels: int) -> None:
    """JPEGs of smooth noise, all different."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(number):
        grid = generator.integers(0, 256, (6, 6, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(grid).resize((pixels, pixels)).save(stream, "JPEG", quality=90)
        (folder / f"{index:06d}.jpg").write_bytes(stream.getvalue())


def show(result: dict[str, Any]) -> None:
    """Prints the table and the goals."""
    print(f"{'':<26} {'encoded':>8} {'seconds':>9} {'of the first':>13}")
    for row in result["rows"]:
        print(
            f"{row['what']:<26} {row['encoded']:>8} {row['seconds']:>9.2f} "
            f"{row['share_of_full']:>12.2%}"
        )
    for goal in result["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        print(f"{goal['what']}: {goal['reached']:.2%}, goal {goal['goal']}: {verdict}")


if __name__ == "__main__":
    run_job(BenchmarkConfig, run)
