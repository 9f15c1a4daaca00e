"""A training step of LoRA on ViT-B-32's image tower, against peft, plain W + BA and full tuning.

    python benchmarks/lora.py                                  # 5 CPU minutes
    python benchmarks/lora.py --model ViT-B-16 --batch 128     # on a GPU: bf16, MFU, peak memory
    python benchmarks/lora.py --model demo --repeats 1 --output /tmp/x.json    # a try

A step is forward, cross-entropy over 100 classes of a linear head, backward and AdamW, on tensors
that are ready. Weights are random; which they are changes no time. The sides:

    full                every weight of the tower is trained
    W + BA              q, k, v, out as parametrizations: the weight is built anew in each step
    lora                q, k, v, out by featcache
    peft                what peft does right on these towers: q, k, v (one A for all three, by
                        target_parameters) and the MLP
    lora, peft's sites  q, k, v and the MLP by featcache
    frozen              forward only: the least that any of them can take

On a CPU, float32 and CPU seconds of this process, as the machine is often shared; rows take turns,
medians. On a GPU, bf16 autocast and CUDA events; model FLOPs by `flops.py`, over the data sheet's
peak. "Saved" is what the forward pass keeps for the backward one, weights not counted.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from flops import image_flops, peak_flops, training_flops
from torch import Tensor, nn
from torch.nn.utils import parametrize

from featcache.adapters.lora import Lora
from featcache.backbones.blocks import clip_blocks

RESULT = Path(__file__).parent / "results" / "lora.json"
RANK, SCALE = 8, 2.0
ATTENTION, PEFT_SITES = ("q", "k", "v", "out"), ("q", "k", "v", "fc1", "fc2")
DEMO = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 64,
        "layers": 2,
        "width": 128,
        "head_width": 64,
        "patch_size": 16,
    },
}


class Built(nn.Module):
    """A weight plus its low-rank change, with gradients through the sum."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def forward(self, weight: Tensor) -> Tensor:
        """The sum."""
        return torch.addmm(weight, self.change.up(), self.change.a, alpha=SCALE)


def attached(visual: nn.Module, sites: tuple[str, ...]) -> Lora:
    """LoRA in a bare image tower."""
    blocks = clip_blocks(visual, "transformer.resblocks")
    towers: Any = SimpleNamespace(model=visual, name="image tower")
    adapter = Lora(towers, blocks, sites, RANK, SCALE, 0.0)
    for change in adapter.changes:
        nn.init.normal_(change.b, std=0.01)
    return adapter


def full(visual: nn.Module) -> list[nn.Parameter]:
    visual.requires_grad_(True)
    return list(visual.parameters())


def lora(visual: nn.Module, sites: tuple[str, ...] = ATTENTION) -> list[nn.Parameter]:
    return list(attached(visual, sites).parameters())


def built(visual: nn.Module) -> list[nn.Parameter]:
    adapter = attached(visual, ATTENTION)
    changes = dict(zip(adapter._weights, adapter.changes, strict=True))
    adapter._put(adapter._originals)
    for name, change in changes.items():
        layer, _, leaf = name.rpartition(".")
        module = visual.get_submodule(layer)
        parametrize.register_parametrization(module, leaf, Built(change))
    return list(adapter.parameters())


def peft(visual: nn.Module) -> list[nn.Parameter]:
    import peft

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK * SCALE,
        target_modules=["c_fc", "c_proj"],
        target_parameters=["attn.in_proj_weight"],
    )
    model = peft.get_peft_model(visual, config)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


SIDES: dict[str, Callable[[nn.Module], list[nn.Parameter]]] = {
    "full": full,
    "W + BA": built,
    "lora": lora,
    "peft": peft,
    "lora, peft's sites": lambda visual: lora(visual, PEFT_SITES),
    "frozen": lambda visual: [],
}


class Side:
    """A tower with a head, and its step."""

    def __init__(self, name: str, visual: nn.Module, width: int, compiled: bool) -> None:
        device = next(visual.parameters()).device
        visual.requires_grad_(False)
        self.parameters = SIDES[name](visual)
        self.head = nn.Linear(width, 100, device=device)
        self.plain = visual
        self.visual = torch.compile(visual) if compiled else visual
        self.trains = name != "frozen"
        self.device = device
        self.optimizer = torch.optim.AdamW(
            [*self.parameters, *self.head.parameters()], lr=1e-5, fused=True
        )

    def loss(self, pixels: Tensor, labels: Tensor, tower: nn.Module | None = None) -> Tensor:
        """Cross-entropy of a batch; `tower` in place of the side's own."""
        with (
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"),
            torch.set_grad_enabled(self.trains),
        ):
            return F.cross_entropy(self.head((tower or self.visual)(pixels)), labels)

    def step(self, pixels: Tensor, labels: Tensor) -> None:
        """One optimizer step; the forward pass alone if nothing is trained."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(pixels, labels)
        if self.trains:
            loss.backward()
            self.optimizer.step()

    def saved_bytes(self, pixels: Tensor, labels: Tensor) -> int:
        """Bytes of what is kept for backward, but for weights."""
        weights = {p.untyped_storage().data_ptr() for p in self.plain.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss(pixels, labels, self.plain)  # compiled, it may run past the hooks
        del loss
        return sum(kept.values())


def seconds_of(side: Side, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """CPU seconds (on a GPU: the device's) and wall seconds of a step."""
    if side.device.type != "cuda":
        cpu, wall = time.process_time(), time.perf_counter()
        side.step(pixels, labels)
        return time.process_time() - cpu, time.perf_counter() - wall
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        side.step(pixels, labels)
    end.record()
    torch.cuda.synchronize()
    elapsed = start.elapsed_time(end) / 10_000
    return elapsed, elapsed


def measure(arguments: argparse.Namespace, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"])
    base = open_clip.model._build_vision_tower(config["embed_dim"], vision, False).to(device)
    pixels = torch.randn(arguments.batch, 3, vision.image_size, vision.image_size, device=device)
    labels = torch.randint(100, (arguments.batch,), device=device)
    sides, rows = {}, {}
    forward = image_flops(config) * arguments.batch
    for name in SIDES:
        torch.manual_seed(1)
        side = Side(name, copy.deepcopy(base), config["embed_dim"], arguments.compile)
        rows[name] = {
            "trained": sum(p.numel() for p in side.parameters),
            "saved_mb": round(side.saved_bytes(pixels, labels) / 1e6, 1),
        }
        torch.manual_seed(2)
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(arguments.warmup):
            side.step(pixels, labels)
        if device.type == "cuda":
            rows[name]["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
        sides[name] = side
    check(sides, pixels)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(arguments.repeats):
        for name, side in sides.items():
            taken[name].append(seconds_of(side, pixels, labels))
    kinds = {"full": "all", "frozen": "none"}
    for name, values in taken.items():
        row = rows[name]
        row["seconds"] = statistics.median(device_seconds for device_seconds, _ in values)
        row["wall_seconds"] = statistics.median(wall for _, wall in values)
        if peak := peak_flops(device):
            useful = training_flops(forward, kinds.get(name, "thin"))  # type: ignore[arg-type]
            row["mfu"] = round(useful / row["seconds"] / peak, 4)
    for row in rows.values():
        row["to_full"] = round(row["seconds"] / rows["full"]["seconds"], 3)
    return rows


def check(sides: dict[str, Side], pixels: Tensor) -> None:
    """The two ways to the same function give the same features; both learnt the same so far."""
    with torch.autocast(pixels.device.type, enabled=False):
        ours, other = (sides[name].visual(pixels[:4]).detach() for name in ("lora", "W + BA"))
    error = float((ours - other).abs().max() / other.std())
    limit = 1e-3 if pixels.device.type == "cpu" else 0.1
    assert error < limit, f"features differ by {error:.1e} of their deviation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32", help="open_clip's name of a ViT, or demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="torch.compile every side's tower")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    config = DEMO if arguments.model == "demo" else open_clip.get_model_config(arguments.model)
    rows = measure(arguments, config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{arguments.model}, batch {arguments.batch}, {device}; seconds a step")
    for name, row in rows.items():
        gpu = f" {row['peak_mb']:8.0f} MB peak" if "peak_mb" in row else ""
        gpu += f" {row['mfu']:.3f} MFU" if "mfu" in row else ""
        print(
            f"  {name:18s} {row['seconds']:8.4f} s {row['to_full']:5.2f} of full "
            f"{row['saved_mb']:8.1f} MB saved {row['trained']:10,d} trained{gpu}"
        )
    compiled = " --compile" if arguments.compile else ""
    record = {
        "command": f"python benchmarks/lora.py --model {arguments.model} --batch "
        f"{arguments.batch} --repeats {arguments.repeats}{compiled}",
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
