"""Time and memory that reading iNaturalist 2021's annotations takes, from JSON to checked manifest.

    python benchmarks/inaturalist.py                 # full size, about 2 minutes, 1.4 GB of disk
    python benchmarks/inaturalist.py --rows 50000    # a quick look

Writes annotation files of the real size and shape (all fields of the published ones, ids and names
made up), and reads them in a process of its own, so that its peak memory is the reader's. Goals at
full size: under 2 minutes and under 6 GiB.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, PositiveInt

from featcache.config import Config, run_job
from featcache.datasets.inaturalist_layout import probe_rows

READ = """
import json, resource, sys, time

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

from featcache.datasets.inaturalist import InaturalistConfig
result = {"peak_gib_before": peak()}
start = time.perf_counter()
manifest = InaturalistConfig(root=sys.argv[1]).open()
result |= {"open_seconds": time.perf_counter() - start, "open_peak_gib": peak()}
start = time.perf_counter()
identity = manifest.identity
result |= {"identity_seconds": time.perf_counter() - start, "peak_gib": peak()}
result |= {"rows": len(manifest), "classes": manifest.num_classes, "labels": identity.labels}
print(json.dumps(result))
"""


class BenchmarkConfig(Config):
    """Measures reading annotations of iNaturalist 2021's size."""

    rows: PositiveInt = 2_686_843
    """Training images; the real set has 2,686,843."""
    val_rows: NonNegativeInt = 100_000
    """Validation images; the real set has 100,000."""
    classes: PositiveInt = 10_000
    """Species; the real set has 10,000."""
    folder: Path | None = None
    """Where the temporary files are written; unset = the system's folder for temporary files."""
    out: Path = Path("benchmarks/results/inaturalist.json")
    """JSON file for the figures."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Writes the files, reads them in another process, prints and writes the figures."""
    root = Path(tempfile.mkdtemp(dir=config.folder))
    try:
        categories = _categories(config.classes)
        _write(root, "train", config.rows, 0, categories)
        if config.val_rows:
            _write(root, "val", config.val_rows, config.rows, categories)
        (root / "categories.json").write_text(json.dumps(categories), encoding="utf-8")
        size = sum(file.stat().st_size for file in root.glob("*.json"))
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-c", READ, str(root)], check=True, stdout=subprocess.PIPE, text=True
        )
        result: dict[str, Any] = {"json_bytes": size, **json.loads(process.stdout)}
        result["process_seconds"] = time.perf_counter() - start
    finally:
        shutil.rmtree(root)
    _print(result)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _categories(count: int) -> list[dict[str, Any]]:
    categories = []
    for number in range(count):
        taxa = {
            "kingdom": ("Animalia", "Plantae", "Fungi")[number % 3],
            "phylum": f"Phylum{number % 13}",
            "class": f"Classis{number % 51}",
            "order": f"Ordo{number % 273}",
            "family": f"Familia{number % 1103}",
            "genus": f"Genus{number % 4884}",
        }
        name = f"{taxa['genus']} epitheton{number}"
        categories.append(
            {
                "id": number,
                "name": name,
                "common_name": f"Common Species {number}",
                "supercategory": "Insects",
                **taxa,
                "specific_epithet": f"epitheton{number}",
                "image_dir_name": "_".join([f"{number:05d}", *taxa.values(), f"epitheton{number}"]),
            }
        )
    return categories


def _write(
    root: Path, split: str, rows: int, first_id: int, categories: list[dict[str, Any]]
) -> None:
    """Annotations of one split, and the few images that are looked for."""
    generator = random.Random(first_id)
    classes = [generator.randrange(len(categories)) for _ in range(rows)]
    looked_for = set(probe_rows(rows))
    with (root / f"{split}2021.json").open("w", encoding="utf-8") as stream:
        stream.write('{"info": {"year": 2021, "version": "1"}, "images": [')
        for row, category in enumerate(classes):
            folder = categories[category]["image_dir_name"]
            name = f"{split}/{folder}/{generator.getrandbits(128):032x}.jpg"
            image = {
                "id": first_id + row,
                "width": 500,
                "height": 375,
                "file_name": name,
                "license": 0,
                "rights_holder": f"José {row}",
                "date": "2018-05-12 10:20:30+00:00",
                "latitude": round(generator.uniform(-90, 90), 5),
                "longitude": round(generator.uniform(-180, 180), 5),
                "location_uncertainty": 77,
            }
            stream.write((", " if row else "") + json.dumps(image))
            if row in looked_for:
                (root / "2021" / name).parent.mkdir(parents=True, exist_ok=True)
                (root / "2021" / name).touch()
        stream.write('], "annotations": [')
        for row, category in enumerate(classes):
            number = first_id + row
            annotation = {"id": number, "image_id": number, "category_id": category}
            stream.write((", " if row else "") + json.dumps(annotation))
        stream.write('], "categories": ' + json.dumps(categories) + "}")


def _print(result: dict[str, Any]) -> None:
    print(f"{result['rows']:,} images, {result['json_bytes'] / 1e9:.2f} GB of JSON")
    print(f"JSON to checked manifest   {result['open_seconds']:6.1f} s")
    print(f"hashes over all rows       {result['identity_seconds']:6.1f} s")
    print(f"whole process with imports {result['process_seconds']:6.1f} s")
    print(f"peak memory                {result['peak_gib']:6.2f} GiB", end=" ")
    print(f"({result['peak_gib_before']:.2f} GiB of it imports)")


if __name__ == "__main__":
    run_job(BenchmarkConfig, run)
