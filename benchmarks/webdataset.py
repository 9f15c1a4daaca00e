"""Peak memory of extracting a WebDataset, at two lengths: it has to be nearly the same.

    python benchmarks/webdataset.py                  # 10,000 and 200,000 images, minutes
    python benchmarks/webdataset.py --rows 1000 --rows 5000     # a quick look

Writes tars of 16 x 16 JPEGs with a label and a caption each, and extracts them by a two-layer CLIP
with random weights, so that the time is that of everything but the encoder. Each length is a
process of its own whose peak (ru_maxrss) counts; a second process finds the finished cache, with
nothing to do. The index of the tars is made by the first one.
"""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt

from featcache.config import Config, run_job

MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
PIXELS = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.3, 0.3, 0.3]}

EXTRACT = """
import json, resource, sys, time

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

import open_clip, torch
from featcache.extract import ExtractConfig, plan
result = {"imports_peak_mib": peak()}
config = ExtractConfig.model_validate(json.loads(sys.argv[1]))
start = time.perf_counter()
manifest = config.dataset.open()
result |= {"open_seconds": time.perf_counter() - start, "open_peak_mib": peak()}
del manifest
start = time.perf_counter()
with plan(config) as session:
    result |= {"plan_seconds": time.perf_counter() - start, "plan_peak_mib": peak()}
    start = time.perf_counter()
    for shard in session.pending():
        session.extract(shard)
    report = session.finish()
result |= {"extract_seconds": time.perf_counter() - start, "peak_mib": peak()}
result |= {"rows": report.num_rows, "extracted": report.num_extracted}
print(json.dumps(result))
"""


class BenchmarkConfig(Config):
    """Measures the memory of streamed extraction."""

    rows: tuple[PositiveInt, ...] = (10_000, 200_000)
    """Images of each run."""
    tar_rows: PositiveInt = 5_000
    """Images of a tar."""
    folder: Path | None = None
    """Where the temporary files are written; unset = the system's folder for temporary files."""
    out: Path = Path("benchmarks/results/webdataset.json")
    """JSON file for the figures."""


def run(config: BenchmarkConfig) -> list[dict[str, Any]]:
    """Writes tars, extracts them in other processes, prints and writes the figures."""
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        model = _write_model(folder / "model")
        results = []
        for rows in config.rows:
            tars = folder / f"tars-{rows}"
            size = _write_tars(tars, rows, config.tar_rows)
            options = {
                "dataset": {
                    "kind": "webdataset",
                    "train": f"{tars}/train-*.tar",
                    "index": str(folder / f"index-{rows}"),
                },
                "backbone": {"model": f"local-dir:{model}"},
                "cache": str(folder / f"cache-{rows}"),
                "features": {"text": False},
                "device": "cpu",
                "precision": "fp32",
                "batch_size": 256,
                "max_invalid": 0.0,
            }
            first, second = _extract(options), _extract(options)
            assert (first["extracted"], second["extracted"]) == (rows, 0)
            results.append({"tar_bytes": size, "first": first, "second": second})
            _print(results[-1])
    least, most = results[0]["first"]["peak_mib"], results[-1]["first"]["peak_mib"]
    print(f"{config.rows[-1] / config.rows[0]:.0f} x the images, {most / least:.3f} x the peak")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _write_model(folder: Path) -> Path:
    """A tiny CLIP with fixed random weights, as `local-dir:` reads it."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(0)
    save_file(CLIP(**MODEL).state_dict(), folder / "open_clip_model.safetensors")
    described = {"model_cfg": MODEL, "preprocess_cfg": PIXELS}
    (folder / "open_clip_config.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def _write_tars(folder: Path, rows: int, tar_rows: int) -> int:
    """Tars of JPEGs, labels and captions; returns their bytes."""
    folder.mkdir()
    random = np.random.default_rng(0)
    size = 0
    for number, start in enumerate(range(0, rows, tar_rows)):
        file = folder / f"train-{number:05d}.tar"
        with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
            for row in range(start, min(rows, start + tar_rows)):
                pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
                stream = io.BytesIO()
                Image.fromarray(pixels).save(stream, "JPEG", quality=50)
                parts = {
                    "jpg": stream.getvalue(),
                    "cls": str(row % 100).encode(),
                    "txt": f"picture number {row} of a class called {row % 100}".encode(),
                }
                for extension, data in parts.items():
                    info = tarfile.TarInfo(f"{row:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        size += file.stat().st_size
    return size


def _extract(options: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    command = [sys.executable, "-c", EXTRACT, json.dumps(options)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    result["process_seconds"] = time.perf_counter() - start
    return result


def _print(result: dict[str, Any]) -> None:
    first, second = result["first"], result["second"]
    print(f"{first['rows']:,} images in {result['tar_bytes'] / 1e6:,.0f} MB of tars")
    for what, name in (("index", "open"), ("tables", "plan"), ("features", "extract")):
        seconds = first[f"{name}_seconds"]
        peak = first["peak_mib" if name == "extract" else f"{name}_peak_mib"]
        rate = first["rows"] / seconds
        print(f"  {what:<9} {seconds:7.1f} s  {rate:9,.0f} rows/s  peak {peak:6.0f} MiB")
    seconds, peak = second["process_seconds"], second["peak_mib"]
    print(f"  again     {seconds:7.1f} s with imports            peak {peak:6.0f} MiB")
    print(
        f"  imports                                     peak {first['imports_peak_mib']:6.0f} MiB"
    )


if __name__ == "__main__":
    run_job(BenchmarkConfig, run)
