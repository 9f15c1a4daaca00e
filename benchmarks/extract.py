"""How fast images become a cache, against the bare forward, plain loops and clip-retrieval.

    python benchmarks/extract.py                        # ViT-B-32, about 8 minutes
    python benchmarks/extract.py --repeats 1 --small_files 64 --big_files 32     # a quick look

JPEGs of 500x375 and 2000x1500 are made here; weights are random (speed does not depend on them).
All rows of the table are measured in one run, in turn; figures are medians. A round in which other
processes took more than 8 % of the CPUs is measured again. Model loading is left out everywhere.

clip-retrieval's own reader, mapper, runner and writer run unchanged if the folder that they are
installed in is given; only its model loader is replaced, since it would download weights:

    pip install --no-deps --target DIR clip-retrieval==2.45.0
    python benchmarks/extract.py --clip_retrieval DIR

Goals: >= 0.85 of the bare bf16 forward (500x375); >= 2.0 times (500x375) and >= 2.5 times
(2000x1500) clip-retrieval's best setting; the bare bf16 forward >= 0.8 of the speed of one large
matrix product; decoding and resizing >= 2.2 times open_clip's transform within one step of 255
(`fast`; two rounded passes reach two steps in a few of ten million values).
"""

import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, PositiveInt
from torch.nn.functional import cosine_similarity, interpolate
from torch.utils.data import DataLoader, Dataset

from featcache.backbones.base import FeatureRequest
from featcache.backbones.open_clip import OpenClip, OpenClipConfig
from featcache.config import Config, run_job
from featcache.extract import ExtractConfig, plan
from featcache.images import load_pixels
from featcache.reader import open_cache

BATCH = 32
MAX_OTHERS = 0.08
SIZES = {"500x375": (375, 500), "2000x1500": (1500, 2000)}
FORWARD_GFLOP = 8.82
"""Multiplications and additions of one 224-pixel image through ViT-B-32's image tower, in 1e9."""


class BenchmarkConfig(Config):
    """Measures extraction."""

    small_files: PositiveInt = 160
    """Images of 500x375 pixels; best a multiple of 32, since a last batch is padded."""
    big_files: PositiveInt = 64
    """Images of 2000x1500 pixels; best a multiple of 32."""
    repeats: PositiveInt = 5
    """Rounds; each measures every row of the table."""
    max_others: float = Field(default=MAX_OTHERS, ge=0, le=1)
    """A round in which others took a larger share of the CPUs is measured again."""
    clip_retrieval: Path | None = None
    """Folder that clip-retrieval is installed in; unset = not measured."""
    folder: Path | None = None
    """Where temporary files go; unset = the system's folder for them."""
    out: Path = Path("benchmarks/results/extract.json")
    """JSON file for the figures."""


class Files(Dataset[torch.Tensor]):
    """What a plain loop does per image."""

    def __init__(self, files: list[Path], transform: Callable[[Any], torch.Tensor]) -> None:
        self.files = files
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.transform(Image.open(self.files[row]))


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Makes the images, measures, prints the table and writes the JSON."""
    warnings.filterwarnings("ignore", module="torch.utils.data")  # workers, pinned memory
    backbones = {
        precision: OpenClipConfig(model="ViT-B-32", pretrained="random:0").open("cpu", precision)
        for precision in ("fp32", "bf16")
    }
    # Opening is not what is measured here: every extraction gets these two.
    OpenClipConfig.open = lambda self, device="cpu", precision="fp32": backbones[precision]
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        for size, number in (("500x375", config.small_files), ("2000x1500", config.big_files)):
            make_images(folder / size / "train" / "all", *SIZES[size], number)
        decoding = {size: measure_decoding(folder / size, backbones["fp32"]) for size in SIZES}
        agreement = {size: check_agreement(folder, size, backbones["fp32"]) for size in SIZES}
        cases = make_cases(config, folder, backbones)
        rates, others, redone = measure(cases, config)
    result = summary(config, rates, decoding, agreement)
    result["share_of_cpu_taken_by_others"] = others
    result["rounds_measured_again"] = redone
    show(result)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def make_images(folder: Path, height: int, width: int, number: int) -> None:
    """JPEGs of smooth noise over several octaves: sizes and spectra like photographs'."""
    folder.mkdir(parents=True)
    for index in range(number):
        generator = torch.Generator().manual_seed(index)
        total = 0.04 * torch.randn(3, height, width, generator=generator)
        for side in (4, 16, 64, 256):
            grid = torch.randn(1, 3, height // side + 2, width // side + 2, generator=generator)
            layer = interpolate(grid, (height, width), mode="bicubic", align_corners=False)[0]
            total += layer * (side / 256) ** 0.7
        pixels = (128 + 50 * total / total.std()).clamp(0, 255).byte()
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        image.save(folder / f"{index:04d}.jpg", quality=90)


def make_cases(
    config: BenchmarkConfig, folder: Path, backbones: dict[str, OpenClip]
) -> dict[str, Callable[[], float]]:
    """What is measured, by name; each call gives images (or GFLOP) per second."""
    pixels = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)

    def forward(precision: str) -> float:
        request, number = FeatureRequest(), 3 if precision == "fp32" else 5
        began = time.perf_counter()
        for _ in range(number):
            backbones[precision].encode_image(pixels, request)
        return number * BATCH / (time.perf_counter() - began)

    def product() -> float:
        rows, inner, columns = 3200, 768, 3072
        x = torch.randn(rows, inner).bfloat16()
        layer = torch.nn.Linear(inner, columns).bfloat16()
        with torch.inference_mode():
            layer(x)
            began = time.perf_counter()
            for _ in range(40):
                layer(x)
        return 40 * 2e-9 * rows * inner * columns / (time.perf_counter() - began)

    cases: dict[str, Callable[[], float]] = {
        "matrix product bf16, GFLOP/s": product,
        "bare forward fp32": lambda: forward("fp32"),
        "bare forward bf16": lambda: forward("bf16"),
    }
    for size in SIZES:
        source = folder / size
        cases[f"{size} extraction, fast"] = lambda s=source: extract(s, "fast")
        cases[f"{size} extraction, scaled"] = lambda s=source: extract(s, "scaled")
        for workers in (0, 2):
            cases[f"{size} plain loop fp32, {workers} workers"] = lambda s=source, w=workers: (
                plain_loop(s, backbones["fp32"], w)
            )
        if config.clip_retrieval is not None:
            for workers, batch in ((4, 256), (2, 64)):
                cases[f"{size} clip-retrieval, {workers} workers, batch {batch}"] = (
                    lambda s=source, w=workers, b=batch: clip_retrieval(
                        config.clip_retrieval, s, backbones["fp32"], w, b
                    )
                )
    return cases


def images_of(source: Path) -> list[Path]:
    return sorted(source.rglob("*.jpg"))


def extract(source: Path, mode: str) -> float:
    """Images per second from files to a complete cache on disk."""
    cache = source.parent / f"cache-{source.name}"
    shutil.rmtree(cache, ignore_errors=True)
    config = ExtractConfig.model_validate(
        {
            "dataset": {"root": str(source)},
            "backbone": {"model": "ViT-B-32", "pretrained": "random:0"},
            "cache": str(cache),
            "mode": mode,
            "device": "cpu",
            "batch_size": BATCH,
        }
    )
    with redirect_stdout(io.StringIO()), plan(config) as session:
        began = time.perf_counter()
        for shard in session.pending():
            session.extract(shard)
        report = session.finish()
        return report.num_extracted / (time.perf_counter() - began)


def plain_loop(source: Path, backbone: OpenClip, workers: int) -> float:
    """Images per second of a DataLoader and a float32 tower, features saved as one .npy."""
    files = images_of(source)
    began = time.perf_counter()
    np.save(source.parent / "plain.npy", plain_features(files, backbone, workers))
    return len(files) / (time.perf_counter() - began)


def plain_features(files: list[Path], backbone: OpenClip, workers: int) -> np.ndarray:
    loader = DataLoader(
        Files(files, backbone.reference_transform()), batch_size=BATCH, num_workers=workers
    )
    with torch.no_grad():
        features = [backbone.model.encode_image(batch) for batch in loader]
    return torch.cat(features).half().numpy()


def clip_retrieval(
    folder: Path, source: Path, backbone: OpenClip, workers: int, batch: int
) -> float:
    """Images per second of clip-retrieval's own reader, mapper, runner and writer."""
    load_clip_retrieval(folder, backbone)
    from clip_retrieval.clip_inference.mapper import ClipMapper
    from clip_retrieval.clip_inference.reader import FilesReader
    from clip_retrieval.clip_inference.runner import Runner
    from clip_retrieval.clip_inference.writer import NumpyWriter

    out = source.parent / "clip_retrieval"
    shutil.rmtree(out, ignore_errors=True)
    quiet = types.SimpleNamespace(start=lambda: None, end=lambda: None)
    kinds = {"enable_text": False, "enable_image": True, "enable_metadata": False}

    class Logger:
        """Its own starts a process; left out, in its favour."""

        start = staticmethod(quiet.start)
        end = staticmethod(quiet.end)

        def __call__(self, stats: dict[str, Any]) -> None:
            self.last = stats

    runner = Runner(
        reader_builder=lambda sampler: FilesReader(
            sampler, backbone.reference_transform(), None, str(source), batch, workers, **kinds
        ),
        mapper_builder=lambda: ClipMapper(
            **kinds, use_mclip=False, clip_model="", use_jit=False, mclip_model=""
        ),
        writer_builder=lambda index: NumpyWriter(
            index, str(out), **kinds, output_partition_count=1
        ),
        logger_builder=lambda index: Logger(),
        output_partition_count=1,
    )
    began = time.perf_counter()
    runner(0)
    seconds = time.perf_counter() - began
    number = len(np.load(next((out / "img_emb").glob("*.npy")), mmap_mode="r"))
    assert number == len(images_of(source)), "clip-retrieval left images out"
    return number / seconds


def load_clip_retrieval(folder: Path, backbone: OpenClip) -> None:
    """Makes its inference modules importable without its web server, index and model packages."""
    if "clip_retrieval" in sys.modules:
        return
    for name in ("clip_retrieval", "clip_retrieval.clip_inference"):
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")))]
        sys.modules[name] = package
    loader: Any = types.ModuleType("all_clip")
    loader.load_clip = lambda **_: (backbone.model, None, None)
    sentences: Any = types.ModuleType("sentence_transformers")
    sentences.SentenceTransformer = None  # only its multilingual text tower needs it
    sys.modules |= {"all_clip": loader, "sentence_transformers": sentences}


def measure_decoding(source: Path, backbone: OpenClip) -> dict[str, float]:
    """Milliseconds per image on one thread, and the largest difference in steps of 255."""
    transform, spec = backbone.reference_transform(), backbone.spec.pixels
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    data = [file.read_bytes() for file in images_of(source)[:12]]
    methods: dict[str, Callable[[bytes], torch.Tensor]] = {
        "open_clip": lambda d: transform(Image.open(io.BytesIO(d))),
        "fast": lambda d: load_pixels(d, spec, "fast")[0],
        "scaled": lambda d: load_pixels(d, spec, "scaled")[0],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(7):
        for name, method in methods.items():
            began = time.perf_counter()
            for item in data:
                method(item)
            times[name].append(1000 * (time.perf_counter() - began) / len(data))
    torch.set_num_threads(threads)
    found = {f"{name}, ms": statistics.median(values) for name, values in times.items()}
    found["fast, times open_clip"] = found["open_clip, ms"] / found["fast, ms"]
    found["scaled, times open_clip"] = found["open_clip, ms"] / found["scaled, ms"]
    steps: dict[str, list[torch.Tensor]] = {"fast": [], "scaled": []}
    for item in data:
        exact = (methods["open_clip"](item) * std + mean) * 255
        for name, values in steps.items():
            values.append((methods[name](item) - exact).abs().round())
    for name, values in steps.items():
        found[f"{name}, largest step"] = max(float(value.max()) for value in values)
        found[f"{name}, share above one step"] = float(torch.stack(values).gt(1).float().mean())
    return found


def check_agreement(folder: Path, size: str, backbone: OpenClip) -> dict[str, float]:
    """Smallest cosine of cached features to the plain float32 loop's."""
    plain = torch.from_numpy(plain_features(images_of(folder / size), backbone, 0)).float()
    found = {}
    for mode in ("fast", "scaled"):
        extract(folder / size, mode)
        cached = open_cache(folder / f"cache-{size}").array("image/projected").read()
        features = torch.from_numpy(cached).float()
        found[mode] = float(cosine_similarity(features, plain).min())
    return found


def measure(
    cases: dict[str, Callable[[], float]], config: BenchmarkConfig
) -> tuple[dict[str, list[float]], list[float], int]:
    """Rates of each case, the CPU share that others took in each round, rounds not counted."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    others: list[float] = []
    redone = 0
    while len(others) < config.repeats:
        before = cpu_seconds()
        found = {name: call() for name, call in cases.items()}
        total, busy, own = (b - a for a, b in zip(before, cpu_seconds(), strict=True))
        share = max(0.0, busy - own) / total
        if share > config.max_others and redone < config.repeats:
            redone += 1
            continue
        others.append(share)
        for name, rate in found.items():
            rates[name].append(rate)
    return rates, others, redone


def cpu_seconds() -> tuple[float, float, float]:
    """(all CPUs' time, their busy time, CPU time of this process and its finished children)."""
    with Path("/proc/stat").open(encoding="utf-8") as stream:
        ticks = [int(field) for field in stream.readline().split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    idle = ticks[3] + ticks[4]
    return sum(ticks) / tick, (sum(ticks) - idle) / tick, sum(os.times()[:4])


def summary(
    config: BenchmarkConfig,
    rates: dict[str, list[float]],
    decoding: dict[str, dict[str, float]],
    agreement: dict[str, dict[str, float]],
) -> dict[str, Any]:
    middle = {name: statistics.median(values) for name, values in rates.items()}
    forward = middle["bare forward bf16"]
    product = middle["matrix product bf16, GFLOP/s"]
    of_forward = middle["500x375 extraction, fast"] / forward
    goals = [
        ("500x375 extraction, of the bare bf16 forward", of_forward, 0.85),
        ("bare bf16 forward, of the matrix product", forward * FORWARD_GFLOP / product, 0.8),
    ]
    ratios = {}
    for size, goal in (("500x375", 2.0), ("2000x1500", 2.5)):
        peers = [rate for name, rate in middle.items() if name.startswith(f"{size} clip-retrieval")]
        loops = [rate for name, rate in middle.items() if name.startswith(f"{size} plain loop")]
        ours = middle[f"{size} extraction, fast"]
        if peers:
            goals.append(
                (f"{size} extraction, times clip-retrieval's best", ours / max(peers), goal)
            )
        ratios[f"{size} extraction, times the best plain loop"] = ours / max(loops)
        goals.append(
            (f"{size} decoding, times open_clip", decoding[size]["fast, times open_clip"], 2.2)
        )
    return {
        "config": config.model_copy(update={"folder": None, "clip_retrieval": None}).record(),
        "threads": torch.get_num_threads(),
        "images_per_second": middle,
        "all_images_per_second": rates,
        "decoding_one_thread": decoding,
        "smallest_cosine_to_plain_loop": agreement,
        "ratios": ratios,
        "clip_retrieval": "measured" if config.clip_retrieval else "not installed",
        "goals": [
            {"what": what, "reached": value, "goal": f">= {goal}", "met": value >= goal}
            for what, value, goal in goals
        ],
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }


def show(result: dict[str, Any]) -> None:
    rates = result["images_per_second"]
    for name, rate in rates.items():
        of = rate / rates["bare forward bf16"]
        shown = f"{rate:>8.1f}" + ("" if "GFLOP" in name else f"  {of:>5.2f} of the bf16 forward")
        print(f"{name:<46} {shown}")
    if result["clip_retrieval"] == "not installed":
        print("clip-retrieval: not installed (see --clip_retrieval)")
    for size, found in result["decoding_one_thread"].items():
        print(f"{size} decoding: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))
    for size, found in result["smallest_cosine_to_plain_loop"].items():
        print(f"{size} cosine to the plain loop: {found}")
    for what, ratio in result["ratios"].items():
        print(f"{what:<50} {ratio:>7.2f}")
    for goal in result["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        print(f"{goal['what']:<50} {goal['reached']:>7.2f}  goal {goal['goal']:<8} {verdict}")
    others = result["share_of_cpu_taken_by_others"]
    print(
        f"share of the CPUs that others took: {100 * statistics.median(others):.1f} %, at most "
        f"{100 * max(others):.1f} %; {result['rounds_measured_again']} rounds measured again"
    )


if __name__ == "__main__":
    run_job(BenchmarkConfig, run)
