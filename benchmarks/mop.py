"""Mixture-of-prompts training step against the written-out autograd form: time, memory, gradient.

    OMP_NUM_THREADS=2 python benchmarks/mop.py            # about 6 minutes on 2 cores

Times: all rows of a table take turns in one process; medians. A turn in which other processes had
more than 8 % of the CPU is repeated, a few times at most; the share that was left is in the result.
Memory: a subprocess builds the tensors, runs a tiny step so that libraries and thread pools are
loaded, resets the kernel's peak of its resident memory (/proc/self/clear_refs), runs one forward
and backward, and reports the peak (VmHWM) above the resident memory before; the gradient is in it.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain_mop import plain_mop_loss
from torch import Tensor
from torch.nn import functional as F

from heads.losses.mixture_of_prompts import mixture_of_prompts_loss

NUM_PROMPTS, DIM = 32, 512
RESULT = Path(__file__).parent / "results" / "mop.json"
REGIMES: dict[str, dict[str, float]] = {
    "sharp": {"scale": 50.0, "classification_temperature": 0.07},
    "moderate": {"scale": 100.0, "classification_temperature": 1.0},
}
METHODS = {"fused": "auto", "fused float32": "float32"}


def problem(num_rows: int, num_classes: int, data: str = "random") -> tuple[Tensor, ...]:
    """Unit features and texts, offsets of length 0.45, targets; `gap` adds a modality gap."""
    torch.manual_seed(0)
    base = F.normalize(torch.randn(num_classes, DIM), dim=1)
    offsets = torch.randn(num_classes, NUM_PROMPTS, DIM) * 0.02
    targets = torch.randint(0, num_classes, (num_rows,))
    noise = F.normalize(torch.randn(num_rows, DIM), dim=1)
    if data == "random":
        return noise, base, offsets, targets
    image_side, text_side = F.normalize(torch.randn(2, DIM), dim=1)
    base = F.normalize(1.5 * text_side + base, dim=1)
    features = F.normalize(1.5 * image_side + 0.6 * base[targets] + noise, dim=1)
    return features, base, offsets, targets


def loss_of(form: str, tensors: tuple[Tensor, ...], options: dict[str, float]) -> Tensor:
    features, base, offsets, targets = tensors
    if form == "plain":
        return plain_mop_loss(features, base, offsets, targets, **options)[0]
    method: Any = METHODS[form]
    return mixture_of_prompts_loss(features, base, offsets, targets, method=method, **options).loss


def step(form: str, tensors: tuple[Tensor, ...], options: dict[str, float]) -> None:
    tensors[2].grad = None
    loss_of(form, tensors, options).backward()


def cpu_times() -> tuple[float, float]:
    """Seconds that all CPUs together have been (up, idle)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    return sum(ticks), ticks[3] + ticks[4]


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds that `work` took, and the share of all CPU time that other processes had."""
    up, idle = cpu_times()
    own, start = time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    own = time.process_time() - own
    up_after, idle_after = cpu_times()
    busy = (up_after - up) - (idle_after - idle) - own
    return seconds, max(0.0, busy) / max(up_after - up, 1e-3)


def take_turns(rows: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each row, rows interleaved, and the largest share others had in a turn."""
    for work in rows.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    shares: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, work in rows.items():
            tries = [timed(work)]
            while tries[-1][1] > 0.08 and len(tries) < 4:
                tries.append(timed(work))
            best = min(tries, key=lambda turn: turn[1])
            seconds[name].append(best[0])
            shares[name].append(best[1])
    return {
        name: {
            "ms": 1e3 * sorted(values)[len(values) // 2],
            "min_ms": 1e3 * min(values),
            "others": sum(shares[name]) / len(values),
        }
        for name, values in seconds.items()
    }


def memory_status() -> dict[str, int]:
    """Resident bytes now and at their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def child(form: str, num_rows: int, num_classes: int, regime: str, with_optimizer: bool) -> None:
    """Runs one step in this process and prints its peak memory as JSON."""
    options = REGIMES[regime]
    tiny = problem(8, 40)
    tiny[2].requires_grad_()
    step(form, tiny, options)
    tensors = problem(num_rows, num_classes)
    tensors[2].requires_grad_()
    parameter_bytes = tensors[2].numel() * 4
    ctypes.CDLL(None).malloc_trim(0)  # free heap left over from building would hide allocations
    before = memory_status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")
    if with_optimizer:
        optimizer = torch.optim.AdamW([tensors[2]], lr=5e-4, fused=True)
        for _ in range(2):  # the first step makes the optimiser's state
            step(form, tensors, options)
            optimizer.step()
    else:
        step(form, tensors, options)
    peak = memory_status()["VmHWM"]
    print(json.dumps({"extra": peak - before, "above_state": peak - 4 * parameter_bytes}))


def peak_memory(
    form: str, num_rows: int, num_classes: int, regime: str, with_optimizer: bool = False
) -> dict[str, int]:
    arguments = [form, str(num_rows), str(num_classes), regime, str(int(with_optimizer))]
    command = [sys.executable, __file__, "--child", *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, int] = json.loads(output.splitlines()[-1])
    return result


def measure(num_rows: int, data: str, regime: str, repeats: int) -> dict[str, Any]:
    """Times, gradient difference and peak memory of all forms at C = 1000."""
    options = REGIMES[regime]
    tensors = problem(num_rows, 1000, data)
    features, base, offsets, _ = tensors
    prompts = F.normalize(base.unsqueeze(1) + offsets, dim=-1).flatten(0, 1)
    product = torch.empty(num_rows, len(prompts))
    offsets.requires_grad_()
    optimizers = {
        "plain": torch.optim.AdamW([offsets], lr=0.0),
        "fused": torch.optim.AdamW([offsets], lr=0.0, weight_decay=0.0, fused=True),
    }

    def whole(form: str) -> None:
        step(form, tensors, options)
        optimizers[form].step()

    def multiply() -> None:
        torch.mm(features, prompts.t(), out=product)

    rows: dict[str, Callable[[], None]] = {"float32 product": multiply}
    for form in ("plain", *METHODS):
        rows[form] = lambda form=form: step(form, tensors, options)  # type: ignore[misc]
    for form in optimizers:
        rows[f"{form} + AdamW"] = lambda form=form: whole(form)  # type: ignore[misc]
    times = take_turns(rows, repeats)
    gradients = {}
    for form in ("plain", *METHODS):
        step(form, tensors, options)
        assert offsets.grad is not None
        gradients[form] = offsets.grad.clone()
    norm = gradients["plain"].norm()
    result: dict[str, Any] = {"B": num_rows, "C": 1000, "data": data, "regime": regime}
    result["times"] = times
    result["gradient_difference"] = {
        form: float((gradients[form] - gradients["plain"]).norm() / norm) for form in METHODS
    }
    if data == "random":
        result["extra_mib"] = {
            form: peak_memory(form, num_rows, 1000, regime)["extra"] / 2**20
            for form in ("plain", "fused")
        }
    plain, fused = times["plain"]["ms"], times["fused"]["ms"]
    result["speedup"] = plain / fused
    result["of_product"] = fused / times["float32 product"]["ms"]
    result["speedup_with_optimizer"] = times["plain + AdamW"]["ms"] / times["fused + AdamW"]["ms"]
    return result


def show(result: dict[str, Any]) -> None:
    print(f"\nB={result['B']} C=1000 K=32 D=512, {result['data']} data, {result['regime']} softmax")
    for name, row in result["times"].items():
        print(
            f"  {name:18s} {row['ms']:8.0f} ms (fastest {row['min_ms']:.0f})"
            f"   others' CPU {row['others']:.0%}"
        )
    print(
        f"  plain / fused {result['speedup']:.2f}; fused / float32 product "
        f"{result['of_product']:.2f}; with optimiser {result['speedup_with_optimizer']:.2f}"
    )
    print("  gradient's relative difference", result["gradient_difference"])
    if "extra_mib" in result:
        memory = result["extra_mib"]
        share = memory["fused"] / memory["plain"]
        print(
            f"  peak extra memory: plain {memory['plain']:.0f} MiB, "
            f"fused {memory['fused']:.0f} MiB = 1/{1 / share:.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        form, num_rows, num_classes, regime, with_optimizer = arguments.child
        child(form, int(num_rows), int(num_classes), regime, with_optimizer == "1")
        return
    record: dict[str, Any] = {
        "command": f"python benchmarks/mop.py --repeats {arguments.repeats}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "results": [],
        "large_step_mib_above_state": {},
    }

    def save() -> None:  # after each part: a run takes ten minutes
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")

    plan = [
        (512, "random", "sharp"),
        (4096, "random", "sharp"),
        (512, "gap", "sharp"),
        (4096, "gap", "moderate"),
    ]
    for num_rows, data, regime in plan:
        record["results"].append(measure(num_rows, data, regime, arguments.repeats))
        show(record["results"][-1])
        save()
    print("\nC=10000 K=32 D=512 B=1024, MiB above parameters, gradient and AdamW state:")
    for regime in REGIMES:
        mib = peak_memory("fused", 1024, 10_000, regime, True)["above_state"] / 2**20
        record["large_step_mib_above_state"][regime] = mib
        print(f"  {regime} {mib:.0f}", flush=True)
        save()


if __name__ == "__main__":
    main()
