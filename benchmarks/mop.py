"""Mixture-of-prompts training step against the written-out autograd form: time, memory, gradient.

    OMP_NUM_THREADS=2 python benchmarks/mop.py            # about 7 minutes on 2 quiet cores

"collapse" rows have the anti-collapse penalties on, in both forms; "step" rows end with the step of
an optimiser: default AdamW for the written-out form, fused AdamW for the other.

"sharp" is the original system's regime, "default" that of the default preset.

Times: all rows of a table take turns in one process; medians. CPU seconds of this process stand
beside the time, as other jobs lengthen the time more than them. A turn in which other processes had
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
from plain_mop import plain_collapse_terms, plain_mop_loss
from torch import Tensor
from torch.nn import functional as F

from heads.lazy_adam import LazyAdamW
from heads.losses.mixture_of_prompts import mixture_of_prompts_loss
from heads.losses.prompt_collapse import NO_COLLAPSE, Collapse

NUM_PROMPTS, DIM = 32, 512
RESULT = Path(__file__).parent / "results" / "mop.json"
REGIMES: dict[str, dict[str, float]] = {
    "sharp": {"scale": 50.0, "classification_temperature": 0.07},
    "default": {"scale": 50.0, "classification_temperature": 1.0},
}
COLLAPSE = Collapse(diversity=0.1, entropy=0.01, min_usage=0.01, usage_threshold=0.02)
OPTIMIZERS: dict[str, Callable[[Tensor], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW([p], lr=5e-4, fused=True),
    "lazy_adamw": lambda p: LazyAdamW([p], lr=5e-4),
    "lazy_adamw, bfloat16 moments": lambda p: LazyAdamW([p], lr=5e-4, state_dtype="bfloat16"),
}
KEYS = ("ms", "min_ms", "cpu_ms")
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


def loss_of(
    form: str, tensors: tuple[Tensor, ...], options: dict[str, Any], collapse: Collapse
) -> Tensor:
    features, base, offsets, targets = tensors
    if form == "plain":
        loss = plain_mop_loss(features, base, offsets, targets, **options)[0]
        if collapse == NO_COLLAPSE:
            return loss
        terms = plain_collapse_terms(
            features,
            base,
            offsets,
            targets,
            scale=options["scale"],
            usage_threshold=collapse.usage_threshold,
        )
        weights = (collapse.diversity, collapse.entropy, collapse.min_usage)
        return loss + sum(weight * term for weight, term in zip(weights, terms, strict=True))
    method: Any = METHODS[form]
    return mixture_of_prompts_loss(
        features, base, offsets, targets, method=method, collapse=collapse, **options
    ).loss


def step(
    form: str,
    tensors: tuple[Tensor, ...],
    options: dict[str, Any],
    collapse: Collapse = NO_COLLAPSE,
) -> None:
    tensors[2].grad = None
    loss_of(form, tensors, options, collapse).backward()  # type: ignore[no-untyped-call]


def cpu_times() -> tuple[float, float]:
    """Seconds that all CPUs together have been (up, idle)."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    ticks = [int(field) / os.sysconf("SC_CLK_TCK") for field in fields]
    return sum(ticks), ticks[3] + ticks[4]


def timed(work: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds that `work` took, its CPU seconds, and the share of all CPU that others had."""
    up, idle = cpu_times()
    own, start = time.process_time(), time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    own = time.process_time() - own
    up_after, idle_after = cpu_times()
    busy = (up_after - up) - (idle_after - idle) - own
    return seconds, own, max(0.0, busy) / max(up_after - up, 1e-3)


def take_turns(rows: dict[str, Callable[[], None]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each row, rows interleaved, and the mean share others had in a turn."""
    for work in rows.values():
        work()
    turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, work in rows.items():
            tries = [timed(work)]
            while tries[-1][2] > 0.08 and len(tries) < 3:
                tries.append(timed(work))
            turns[name].append(min(tries, key=lambda turn: turn[2]))
    result = {}
    for name, found in turns.items():
        seconds, cpu, shares = (sorted(column) for column in zip(*found, strict=True))
        result[name] = {
            "ms": 1e3 * seconds[len(found) // 2],
            "min_ms": 1e3 * seconds[0],
            "cpu_ms": 1e3 * cpu[len(found) // 2],
            "others": sum(shares) / len(found),
        }
    return result


def memory_status() -> dict[str, int]:
    """Resident bytes now and at their peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def child(
    form: str, num_rows: int, num_classes: int, regime: str, optimizer_name: str, data: str
) -> None:
    """Runs steps in this process; prints peak memory above the parameters and seconds as JSON."""
    options: dict[str, Any] = dict(REGIMES[regime])
    tiny = problem(8, 40)
    tiny[2].requires_grad_()
    step(form, tiny, options)
    tensors = problem(num_rows, num_classes, data)
    tensors[2].requires_grad_()
    ctypes.CDLL(None).malloc_trim(0)  # free heap left over from building would hide allocations
    before = memory_status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5")
    seconds, touched = [], num_classes
    if optimizer_name == "none":
        step(form, tensors, options)
    else:
        optimizer = OPTIMIZERS[optimizer_name](tensors[2])
        if isinstance(optimizer, LazyAdamW):
            options["touched_share"] = 1e-4
        for _ in range(4):  # the first step makes the optimiser's state
            start = time.perf_counter()
            step(form, tensors, options)
            optimizer.step()
            seconds.append(time.perf_counter() - start)
            assert tensors[2].grad is not None
            if tensors[2].grad.is_sparse:
                touched = tensors[2].grad._indices().shape[1]
    peak = memory_status()["VmHWM"]
    median = sorted(seconds[1:])[len(seconds) // 2 - 1] if seconds else None
    print(json.dumps({"extra": peak - before, "seconds": median, "touched": touched}))


def peak_memory(
    form: str, num_rows: int, num_classes: int, regime: str, optimizer_name: str, data: str
) -> dict[str, Any]:
    arguments = [form, str(num_rows), str(num_classes), regime, optimizer_name, data]
    command = [sys.executable, __file__, "--child", *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
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

    def whole(form: str, collapse: Collapse = NO_COLLAPSE) -> None:
        step(form, tensors, options, collapse)
        optimizers[form].step()

    def multiply() -> None:
        torch.mm(features, prompts.t(), out=product)

    rows: dict[str, Callable[[], None]] = {"float32 product": multiply}
    for form in ("plain", *METHODS):
        rows[form] = lambda form=form: step(form, tensors, options)  # type: ignore[misc]
    for form in optimizers:
        rows[f"{form} + step"] = lambda form=form: whole(form)  # type: ignore[misc]
    for form in optimizers:
        rows[f"{form} + collapse"] = lambda form=form: step(form, tensors, options, COLLAPSE)  # type: ignore[misc]
        rows[f"{form} + collapse + step"] = lambda form=form: whole(form, COLLAPSE)  # type: ignore[misc]
    times = take_turns(rows, repeats)
    result: dict[str, Any] = {"B": num_rows, "C": 1000, "data": data, "regime": regime}
    result["times"] = times
    result["gradient_difference"] = {}
    for name, collapse in (("", NO_COLLAPSE), (" + collapse", COLLAPSE)):
        gradients = {}
        for form in ("plain", *METHODS):
            step(form, tensors, options, collapse)
            assert offsets.grad is not None
            gradients[form] = offsets.grad
        norm = gradients["plain"].norm()
        for form in METHODS:
            difference = (gradients[form] - gradients["plain"]).norm() / norm
            result["gradient_difference"][form + name] = float(difference)
    result["extra_mib"] = {
        form: peak_memory(form, num_rows, 1000, regime, "none", data)["extra"] / 2**20
        for form in ("plain", "fused")
    }
    result["of_product"] = times["fused"]["ms"] / times["float32 product"]["ms"]
    result["speedup"] = {
        more: {key: times["plain" + more][key] / times["fused" + more][key] for key in KEYS}
        for more in ("", " + step", " + collapse", " + collapse + step")
    }
    return result


def show(result: dict[str, Any]) -> None:
    print(f"\nB={result['B']} C=1000 K=32 D=512, {result['data']} data, {result['regime']} softmax")
    for name, row in result["times"].items():
        print(
            f"  {name:24s} {row['ms']:8.0f} ms (fastest {row['min_ms']:.0f}, CPU "
            f"{row['cpu_ms']:.0f})   others' CPU {row['others']:.0%}"
        )
    for more, ratio in result["speedup"].items():
        label = "plain / fused: loss + gradient" + more
        print(
            f"  {label:50s} {ratio['ms']:.2f} (fastest {ratio['min_ms']:.2f}, "
            f"CPU {ratio['cpu_ms']:.2f})"
        )
    print(f"  fused / float32 product {result['of_product']:.2f}")
    differences = (f"{name} {value:.0e}" for name, value in result["gradient_difference"].items())
    print("  gradient's relative difference:", ", ".join(differences))
    memory = result["extra_mib"]
    print(
        f"  peak extra memory: plain {memory['plain']:.0f} MiB, fused {memory['fused']:.0f} MiB "
        f"= 1/{memory['plain'] / memory['fused']:.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        form, num_rows, num_classes, *others = arguments.child
        child(form, int(num_rows), int(num_classes), *others)
        return
    record: dict[str, Any] = {
        "command": f"python benchmarks/mop.py --repeats {arguments.repeats}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "results": [],
        "large_step": {},
    }

    def save() -> None:  # after each part: a run takes some minutes
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")

    plan = [
        (512, "random", "sharp"),
        (512, "gap", "default"),
        (4096, "random", "sharp"),
        (4096, "gap", "default"),
    ]
    for num_rows, data, regime in plan:
        repeats = arguments.repeats if num_rows < 1000 else min(3, arguments.repeats)
        record["results"].append(measure(num_rows, data, regime, repeats))
        show(record["results"][-1])
        save()
    print(
        "\nC=10000 K=32 D=512 B=1024: MiB above the 625 of the parameters, seconds a step, classes"
    )
    for regime, optimizer_name in (
        ("sharp", "adamw"),
        ("sharp", "lazy_adamw"),
        ("sharp", "lazy_adamw, bfloat16 moments"),
        ("default", "adamw"),
    ):
        found = peak_memory("fused", 1024, 10_000, regime, optimizer_name, "gap")
        record["large_step"][f"{regime}, {optimizer_name}"] = found
        print(
            f"  {regime:8s} {optimizer_name:28s} {found['extra'] / 2**20:6.0f} MiB "
            f"{found['seconds']:6.2f} s {found['touched']:6d}",
            flush=True,
        )
        save()


if __name__ == "__main__":
    main()
