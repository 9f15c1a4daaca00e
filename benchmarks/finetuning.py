"""finetune.train from files to a trained adapter: its rate, what it waits for, MFU, peak memory.

    python benchmarks/finetuning.py                                      # a small ViT on a CPU
    python benchmarks/finetuning.py --model ViT-B-16 --files 8192 --batch 256     # on a GPU: bf16

JPEGs of 500x375 are made here and read anew in every epoch, with crops of 0.08 to 1 of the whole
images. Weights are random; which they are changes no time. The sides, the second epoch of each:

    full    finetune.train, every weight of the image tower
    lora    finetune.train, LoRA in all blocks of it
    plain   a loop as one writes it: ImageFolder, Pillow, v2 transforms, DataLoader, open_clip's
            tower and a linear layer, autocast, AdamW; every weight

`benchmarks/lora.py` measures the step alone, on tensors that are ready. Model FLOPs by `flops.py`;
utilisation is over the data sheet's peak, on GPUs that have one there.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
import torch.nn.functional as F
from extract import make_images
from flops import image_flops, peak_flops, training_flops
from pydantic import NonNegativeInt, PositiveInt
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from featcache.backbones.base import PixelSpec
from featcache.backbones.local_dir import save_local_dir
from featcache.config import Config, run_job
from featcache.precision import resolve_device
from finetune.contrastive.architectures import build, model_config
from finetune.train import TrainConfig
from finetune.train import run as finetune

CLASSES = 8
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


class BenchmarkConfig(Config):
    """Measures fine-tuning from files."""

    model: str = "demo-vit"
    """Preset of finetune.pretrain, or open_clip name of a ViT."""
    files: PositiveInt = 256
    """Training images."""
    batch: PositiveInt = 32
    """Images a step."""
    workers: NonNegativeInt | None = None
    """Decoding processes of every side; unset = what finetune.train takes by itself."""
    device: str = "auto"
    """auto, cpu or cuda:N."""
    folder: Path | None = None
    """Where temporary files go; unset = the system's folder for them."""
    out: Path = Path("benchmarks/results/finetuning.json")
    """JSON file for the figures."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Makes files and weights, measures, prints and writes the figures."""
    device = resolve_device(config.device)
    architecture = model_config(config.model)
    size = architecture["vision_cfg"]["image_size"]
    rows = {}
    with tempfile.TemporaryDirectory(dir=config.folder) as name:
        folder = Path(name)
        for split, count in (("train", config.files // CLASSES), ("val", 2)):
            for number in range(CLASSES):
                make_images(folder / "images" / split / f"class {number}", 375, 500, count)
        torch.manual_seed(0)
        (folder / "model").mkdir()
        pixels = PixelSpec((size, size), MEAN, STD)
        save_local_dir(folder / "model", build(architecture).state_dict(), architecture, pixels)
        forward = image_flops(architecture)
        for side in ("full", "lora"):
            rows[side] = by_finetune(config, folder, side, device)
        workers = config.workers if config.workers is not None else rows["full"]["workers"]
        rows["plain"] = by_plain_loop(config, folder, size, workers, device)
    peak = peak_flops(device)
    for side, row in rows.items():
        flops = training_flops(forward, "thin" if side == "lora" else "all")
        row["model_tflops_per_second"] = row["images_per_second"] * flops / 1e12
        if peak:
            row["mfu"] = row["model_tflops_per_second"] * 1e12 / peak
    result = {
        "model": config.model,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "batch": config.batch,
        "rows": rows,
    }
    show(result)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def by_finetune(
    config: BenchmarkConfig, folder: Path, side: Literal["full", "lora"], device: torch.device
) -> dict[str, Any]:
    """Two epochs of the job; the second one's figures."""
    start_peak(device)
    job = TrainConfig.model_validate(
        {
            "dataset": {"kind": "folder", "root": folder / "images"},
            "backbone": {"kind": "open_clip", "model": f"local-dir:{folder / 'model'}"},
            "adapter": {"kind": side},
            "out": folder / side,
            "text": {"weight": 0.0},
            "optim": {"epochs": 2, "batch_size": config.batch},
            "stop": {"patience": None},
            "augmentation": {"min_area": 0.08, "max_aspect": 4 / 3},
            "loading": {"num_workers": config.workers},
            "device": str(device),
            "quiet": True,
        }
    )
    metrics = finetune(job).metrics
    lines = (folder / side / "history.jsonl").read_text().splitlines()
    second = json.loads(lines[1])
    return {
        "images_per_second": second["images_per_second"],
        "share_waiting": second["waiting"],
        "trained_parameters": metrics["num_parameters"],
        "peak_gib": peak_gib(device),
        "workers": job.loading.workers_for(device),
    }


def by_plain_loop(
    config: BenchmarkConfig, folder: Path, size: int, workers: int, device: torch.device
) -> dict[str, Any]:
    """Two epochs of the loop; the second one's figures."""
    start_peak(device)
    crop = v2.RandomResizedCrop(size, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC)
    floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), *floats])
    files = ImageFolder(str(folder / "images" / "train"), transform)
    loader = DataLoader(
        files,
        config.batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{folder / 'model'}")
    tower = clip.visual.to(device).train()
    with torch.no_grad():
        width = tower(torch.zeros(1, 3, size, size, device=device)).shape[1]
    head = nn.Linear(width, CLASSES).to(device)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-5, fused=True)
    mixed = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    rate = waiting = 0.0
    for _ in range(2):
        seen, waited, started = 0, 0.0, time.perf_counter()
        batches = iter(loader)
        while True:
            before = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - before
            if batch is None:
                break
            pixels, labels = (part.to(device, non_blocking=True) for part in batch)
            with mixed:
                logits = head(F.normalize(tower(pixels), dim=-1))
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            seen += len(labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        rate, waiting = seen / seconds, waited / seconds
    return {
        "images_per_second": rate,
        "share_waiting": waiting,
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "peak_gib": peak_gib(device),
        "workers": workers,
    }


def start_peak(device: torch.device) -> None:
    """Begins to watch the GPU's memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Largest memory of tensors since `start_peak`, GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def show(result: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"{result['model']} on {result['device']}, batches of {result['batch']}")
    plain = result["rows"]["plain"]["images_per_second"]
    for side, row in result["rows"].items():
        memory = "" if row["peak_gib"] is None else f"  peak {row['peak_gib']:.2f} GiB"
        used = f"  MFU {row['mfu']:.1%}" if "mfu" in row else ""
        rate = row["images_per_second"]
        print(
            f"  {side:6} {rate:8.1f} images/s ({rate / plain:.2f} of plain)  "
            f"{row['share_waiting']:4.0%} waiting  "
            f"{row['trained_parameters']:>12,} parameters{used}{memory}"
        )


if __name__ == "__main__":
    run_job(BenchmarkConfig, run)
