"""Contrastive pretraining: one step beside open_clip's own and a plain loop; losses; chunks.

    OMP_NUM_THREADS=2 python benchmarks/contrastive.py   # a CPU: small towers, about 6 minutes
    python benchmarks/contrastive.py --device cuda       # a GPU: ViT-B in bf16, some minutes
    python benchmarks/contrastive.py --sections loss --repeats 1

loss    InfoNCE and SigLIP with their gradients on B features of width 512, beside open_clip's
        losses, which leave the gradient to autograd: time and peak memory above the features.
step    one optimizer step from pixels and token ids in memory: `finetune.contrastive.loop`, with
        its random crops; `train_one_epoch` of open_clip_train as it is, on pixels that are ready; a
        plain PyTorch loop. Captions have lengths like COCO's, 8 to 30 tokens.
chunks  the same step with the batch in 1, 2, 4, 8 chunks by gradient caching; open_clip_train with
        `accum_freq`. The loss of all is that of the whole batch.

Rows of a table take turns in one process; medians; ratios on a CPU are of CPU time, as other jobs
lengthen the time more than that. A section's result replaces its last one in the file. Memory is
the peak above what was held before the step (weights and moments are there by then): of the process
on a CPU, of torch's allocator on a GPU. Model FLOPs utilisation counts what `flops.py` says, by the
row's own text length, against the device's data sheet; recomputation does not count.
"""

import argparse
import json
import math
import platform
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import open_clip
import torch
from flops import image_flops, peak_flops, text_flops, training_flops
from head_speed import peak_extra, take_turns
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torch.nn import functional as F

from featcache.backbones.base import PixelSpec
from finetune.contrastive.architectures import PRESETS, build
from finetune.contrastive.loop import Training
from finetune.contrastive.pair_stream import Batch
from finetune.contrastive.text import TokenTable, UsedVocabulary
from finetune.images.augmentation import AugmentationConfig, crop_squares, square_views
from finetune.images.training_images import TrainingImages, VariedBatch, normalize
from finetune.losses.info_nce import InfoNceConfig, info_nce
from finetune.losses.siglip import siglip
from finetune.optim import AdamWConfig
from heads.distributed import Group

RESULT = Path(__file__).parent / "results" / "contrastive.json"
SECTIONS = ("loss", "step", "chunks")
START, END, NUM_IDS = 49406, 49407, 8000
OPTIM = AdamWConfig(lr=5e-4)
Work = Callable[[], Any]


def captions(count: int, context: int) -> Tensor:
    """(count, context) token ids: lengths like COCO's, words by Zipf's law."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.normal(12.6, 2.5, count).round(), 8, min(30, context)).astype(int)
    share = 1 / np.arange(1, NUM_IDS + 1)
    ids = np.zeros((count, context), np.int64)
    for row, length in enumerate(lengths):
        ids[row, :length] = random.choice(NUM_IDS, length, p=share / share.sum()) + 300
        ids[row, 0], ids[row, length - 1] = START, END
    return torch.from_numpy(ids)


class Case:
    """One architecture with one batch, and a step of it in each form."""

    def __init__(self, name: str, batch: int, device: torch.device, precision: str) -> None:
        self.batch, self.device, self.precision = batch, device, precision
        self.config = PRESETS.get(name) or open_clip.get_model_config(name)
        side = self.config["vision_cfg"]["image_size"]
        self.side = side
        generator = torch.Generator().manual_seed(1)
        kept = math.ceil(side * 1.125)
        self.raw = torch.randint(
            256, (batch, 3, kept, kept), dtype=torch.uint8, generator=generator
        )
        self.pixels = F.interpolate(self.raw.float(), (side, side)) / 128 - 1
        self.tokens = captions(batch, self.config["text_cfg"].get("context_length", 77))
        self.text_length = int(self.tokens.argmax(1).max()) + 1

    def model(self, **options: Any) -> Any:
        """Fresh weights, the same each time."""
        torch.manual_seed(0)
        return build({**self.config, **options}).to(self.device)

    def plain(self) -> Work:
        """A loop as one writes it: whole captions, autograd, torch's default AdamW."""
        model = self.model()
        optimizer = torch.optim.AdamW(model.parameters(), OPTIM.lr, OPTIM.betas, weight_decay=0.1)
        targets = torch.arange(self.batch, device=self.device)

        def step() -> None:
            images, tokens = self.pixels.to(self.device), self.tokens.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                features = model.encode_image(images, normalize=True)
                texts = model.encode_text(tokens, normalize=True)
                logits = model.logit_scale.exp() * features @ texts.T
                loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            loss.item()

        return step

    def open_clip_train(self, chunks: int = 1) -> Work:
        """One epoch of one step of open_clip's own training loop."""
        model = self.model(output_dict=True)
        named = list(model.named_parameters())
        gains = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n]
        others = [p for n, p in named if not (p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n)]
        optimizer = torch.optim.AdamW(
            [{"params": gains, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.1}],
            lr=OPTIM.lr,
            betas=OPTIM.betas,
        )
        options = Namespace(
            device=str(self.device),
            precision="amp_bf16" if self.precision == "bf16" else "fp32",
            distill=False,
            accum_freq=chunks,
            skip_scheduler=True,
            horovod=False,
            grad_clip_norm=1.0,
            log_every_n_steps=10**9,
            rank=0,
            local_rank=0,
            log_local=False,
            world_size=1,
            batch_size=self.batch // chunks,
            wandb=False,
        )
        parts = zip(self.pixels.chunk(chunks), self.tokens.chunk(chunks), strict=True)
        data = {"train": _OneBatch(list(parts))}
        loss = ClipLoss()

        def step() -> None:
            train_one_epoch(model, data, loss, 0, optimizer, None, None, None, options)

        return step

    def ours(self, chunks: int = 1) -> Work:
        """`finetune.pretrain`'s step, text savings and random crops included."""
        model = self.model().to(memory_format=torch.channels_last).train()
        ids = self.tokens.numpy().astype(np.int32)
        vocabulary = UsedVocabulary(model, ids)
        texts = vocabulary.compact(TokenTable(ids, ids.argmax(1).astype(np.int64) + 1))
        spec = PixelSpec((self.side, self.side), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        training = Training(
            model,
            texts,
            cast(TrainingImages, _InMemory(spec, self.device)),
            InfoNceConfig(),
            OPTIM,
            group=Group(0, 1, self.device),
            precision="bf16" if self.precision == "bf16" else "fp32",
            accumulate=chunks,
        )
        rows = np.arange(self.batch)
        views = torch.from_numpy(square_views(AugmentationConfig(), (0, 0), rows))
        batch = Batch(0, VariedBatch(rows, self.raw, views), rows)

        def step() -> None:
            training.step(batch)[0].item()

        return step

    def flops(self, text_length: int | None) -> float:
        """Model FLOPs of a step, with texts of that many tokens (None = the whole context)."""
        if not isinstance(self.config["vision_cfg"]["layers"], int):
            return math.nan  # convolutions have no formula here
        one = image_flops(self.config) + text_flops(self.config, text_length)
        return self.batch * training_flops(one)


class _InMemory:
    """What `TrainingImages` does with a batch once it is decoded."""

    def __init__(self, spec: PixelSpec, device: torch.device) -> None:
        self._spec, self._device = spec, device

    def inputs(self, batch: VariedBatch) -> Tensor:
        """(b, 3, H, W) crops, normalised, on the device."""
        assert batch.views is not None
        pixels, views = batch.pixels.to(self._device), batch.views.to(self._device)
        return normalize(
            crop_squares(pixels, views, self._spec.size), self._spec.mean, self._spec.std
        )


class _OneBatch:
    """What open_clip_train calls a data set: one batch, in chunks."""

    def __init__(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        self.dataloader = self
        self.parts, self.num_batches = parts, len(parts)
        self.num_samples = sum(len(part[0]) for part in parts)

    def set_epoch(self, epoch: int) -> None:
        """Nothing is drawn."""

    def __iter__(self) -> Any:
        return iter(self.parts)


def memory_of(work: Work, device: torch.device) -> float:
    """MiB that `work` needs at its peak above what was held before; it has run before."""
    if device.type != "cuda":
        return peak_extra(work)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def seconds_of(
    rows: dict[str, Work], device: torch.device, repeats: int
) -> dict[str, dict[str, float]]:
    """Median times of each row, in turn; rows have run before."""
    if device.type != "cuda":
        return take_turns(rows, repeats)
    found: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, work in rows.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                work()
            end.record()
            end.synchronize()
            found[name].append(start.elapsed_time(end) / 5e3)
    return {name: {"seconds": statistics.median(values)} for name, values in found.items()}


def measured(rows: dict[str, Work], device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds, CPU milliseconds where they count, and MiB of each row."""
    memory = {}
    for name, work in rows.items():
        work()
        work()  # moments are there, and libraries have what they keep
        memory[name] = memory_of(work, device)
    result = {}
    for name, times in seconds_of(rows, device, repeats).items():
        result[name] = {"ms": times["seconds"] * 1e3, "extra_mib": memory[name]}
        if "cpu_seconds" in times:
            result[name] |= {"cpu_ms": times["cpu_seconds"] * 1e3, "others": times["others"]}
    return result


def shown(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, row in found.items():
        more = "".join(f"  {key} {value:.3g}" for key, value in row.items() if key not in KEYS)
        print(f"  {name:28s} {row['ms']:9.1f} ms  {row['extra_mib']:8.0f} MiB{more}", flush=True)


KEYS = ("ms", "extra_mib")
TIME = {True: "ms", False: "cpu_ms"}
"""What ratios are of: on shared cores, the CPU time."""


def measure_losses(count: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Both losses and open_clip's, forward and backward, on random unit features."""
    generator = torch.Generator().manual_seed(0)
    sides = [F.normalize(torch.randn(count, 512, generator=generator), dim=1) for _ in range(2)]
    images, texts = (side.to(device).requires_grad_() for side in sides)
    scale = torch.tensor(2.66, device=device, requires_grad=True)
    bias = torch.tensor(-10.0, device=device, requires_grad=True)
    forms: dict[str, Callable[[], Tensor]] = {
        "info_nce": lambda: info_nce(images, texts, scale),
        "info_nce, open_clip": lambda: ClipLoss()(images, texts, scale.exp()),
        "siglip": lambda: siglip(images, texts, scale, bias),
        "siglip, open_clip": lambda: SigLipLoss()(images, texts, scale.exp(), bias),
    }

    def both_ways(form: Callable[[], Tensor]) -> Work:
        def work() -> None:
            for leaf in (images, texts, scale, bias):
                leaf.grad = None
            form().backward()

        return work

    return measured({name: both_ways(form) for name, form in forms.items()}, device, repeats)


def measure_step(
    name: str, batch: int, device: torch.device, precision: str, repeats: int
) -> dict[str, Any]:
    case = Case(name, batch, device, precision)
    found = measured(
        {
            "featcache": case.ours(),
            "open_clip_train": case.open_clip_train(),
            "plain loop": case.plain(),
        },
        device,
        repeats,
    )
    peak, on_gpu = peak_flops(device), device.type == "cuda"
    for form, row in found.items():
        row["images_per_second"] = batch / row["ms"] * 1e3
        row["times_plain"] = found["plain loop"][TIME[on_gpu]] / row[TIME[on_gpu]]
        flops = case.flops(case.text_length if form == "featcache" else None)
        if math.isfinite(flops):
            row["tflops"] = flops / row["ms"] / 1e9
            if peak is not None:
                row["mfu"] = row["tflops"] * 1e12 / peak
    return found


def measure_chunks(
    name: str, batch: int, device: torch.device, precision: str, repeats: int
) -> dict[str, Any]:
    case = Case(name, batch, device, precision)
    rows = {f"featcache, {chunks} chunks": case.ours(chunks) for chunks in (1, 2, 4, 8)}
    rows |= {f"open_clip_train, {n} chunks": case.open_clip_train(n) for n in (1, 4)}
    found = measured(rows, device, repeats)
    time = TIME[device.type == "cuda"]
    for row in found.values():
        row["times_one_chunk"] = row[time] / found["featcache, 1 chunks"][time]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--repeats", type=int, default=3, help="turns of each row")
    parser.add_argument("--batch", type=int, help="images a step; unset = what fits the device")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    precision = "bf16" if on_gpu else "fp32"
    models = ("ViT-B-32", "ViT-B-16") if on_gpu else ("demo-vit", "demo-rn")
    batch = options.batch or (1024 if on_gpu else 64)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "open_clip_torch": open_clip.__version__,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "batch": batch,
    }
    if "loss" in options.sections:
        for count in (8192, 32768) if on_gpu else (2048, 4096):
            result[f"loss, B {count}"] = measure_losses(count, device, options.repeats)
            shown(f"loss and gradients, B = {count}, width 512", result[f"loss, B {count}"])
    if "step" in options.sections:
        for name in models:
            key = f"step, {name}"
            result[key] = measure_step(name, batch, device, precision, options.repeats)
            shown(f"step, {name}, {batch} images, {precision}", result[key])
    if "chunks" in options.sections:
        name, large = models[0], (4 if on_gpu else 2) * batch
        key = f"chunks, {name}"
        result[key] = measure_chunks(name, large, device, precision, options.repeats)
        shown(f"step in chunks, {name}, {large} images, {precision}", result[key])
    held = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    held.setdefault(device.type, {}).update(result)
    RESULT.write_text(json.dumps(held, indent=2) + "\n")
    print(f"\nwritten to {RESULT}")


if __name__ == "__main__":
    main()
