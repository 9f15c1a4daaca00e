"""Training speed and memory of every head; the loop against loops over a DataLoader; probes.

    OMP_NUM_THREADS=2 python benchmarks/head_speed.py  # about 10 minutes on 2 cores
    python benchmarks/head_speed.py --rows 4096 --repeats 1  # a try
    python benchmarks/head_speed.py --sections heads --only linear router              # a part

Four tables, on random features of width 512 held in memory as the training job holds them:

heads   one epoch of every kind at its default batch, with its validation on 4096 rows, by
        `heads.fitting.fit`; kinds without training: fitting and that validation. Memory is the peak
        of the resident memory above what it was with features and libraries loaded.
plain   the same loop against the one of earlier systems (rows from a DataLoader, their batch
        sizes): an epoch, a whole training, and what both then score on held-out rows.
probe   logistic regression by full-batch L-BFGS against scikit-learn's, one penalty and tolerance.
copies  64 (learning rate, weight decay) pairs of `linear` against one, and the matrix products that
        the 64 need against those alone.

Rows of a table take turns in one process; medians. A turn in which other processes had more than
8 % of the CPU is repeated once; the share that was left is in the result.
"""

import argparse
import contextlib
import ctypes
import gc
import io
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from head_material import (
    CPU,
    DIM,
    FEWER_ROWS,
    Problem,
    held_out,
    make_problem,
    scaled,
)
from mop import memory_status, timed
from plain_heads import PlainRouter, train_plainly
from plain_ml_decoder import PlainMlDecoder
from threadpoolctl import threadpool_limits
from torch import Tensor, nn
from torch.nn import functional as F

from heads import optim as optimisation
from heads.base import Head
from heads.evaluate import score_candidates
from heads.fitting import fit
from heads.mlp import RowScale
from heads.models import HEADS
from heads.models.linear import LinearConfig
from heads.models.logistic_regression import fit_by_sklearn, fit_path
from heads.models.ridge import fit_ridge
from heads.optim import OptimConfig
from heads.threads import enough_threads

RESULT = Path(__file__).parent / "results" / "heads.json"
SECTIONS = ("heads", "plain", "probe", "copies")
PLAN = [("linear", 1, 4), ("router", 1, 2), ("ml_decoder", 1, 1)]
"""Kinds with a plain form, epochs of the plain loop, epochs of the project's."""
MAX_OTHERS = 0.08
Work = Callable[[], Any]


def train(problem: Problem, epochs: int, **options: Any) -> Head:
    """The head trained as the training job does it; built and scored where nothing trains."""
    torch.manual_seed(0)
    head = problem.config.build(problem.spec)
    if not head.trainable:
        score_candidates(head.eval(), problem.material.val, problem.material.val_part)
        return head
    defaults = problem.config.optim_defaults
    optim = OptimConfig(epochs=epochs, **{"batch_size": defaults.batch_size, **options})
    optim = optimisation.resolve(optim, defaults, problem.spec.num_rows)
    assert isinstance(optim.batch_size, int)
    values = sum(p.numel() for p in head.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder, enough_threads(optim.batch_size * values):
        fit(
            head,
            problem.material,
            optim,
            folder=Path(folder),
            fingerprint="made",
            metric="score",
            seed=0,
        )
    return head.eval()


def take_turns(rows: dict[str, Work], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of each row, rows interleaved, and the mean share that others had."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, work in rows.items():
            turns = [timed(work)]
            if turns[0][2] > MAX_OTHERS:
                turns.append(timed(work))
            found[name].append(min(turns, key=lambda turn: turn[2]))
    return {
        name: {
            "seconds": statistics.median(turn[0] for turn in turns),
            "cpu_seconds": statistics.median(turn[1] for turn in turns),
            "others": statistics.mean(turn[2] for turn in turns),
        }
        for name, turns in found.items()
    }


def peak_extra(work: Work) -> float:
    """MiB of resident memory that `work` needs above what is there before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free heap left over would hide allocations
    before = memory_status()["VmRSS"]
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    work()
    return (memory_status()["VmHWM"] - before) / 2**20


def measure_head(kind: str, num_rows: int, repeats: int) -> dict[str, Any]:
    """One epoch of a kind with its validation; fitting and validation where nothing trains."""
    rows = max(256, num_rows // FEWER_ROWS.get(kind, 1))
    problem = make_problem(kind, rows)
    head = problem.config.build(problem.spec)
    epochs = 1 if head.selectable else 2  # the first of several stages has nothing to pick

    def epoch() -> None:
        train(problem, epochs)

    train(make_problem(kind, 256), epochs, batch_size=64)  # loads libraries and thread pools
    times: dict[str, float] = {}
    extra = peak_extra(lambda: times.update(take_turns({kind: epoch}, repeats)[kind]))
    seconds = times["seconds"] / epochs
    batch = problem.config.optim_defaults.batch_size if head.trainable else None
    print(
        f"  {kind:20s} {rows:6d} {problem.spec.num_classes:4d} {batch or '-':>6} {seconds:8.3f} "
        f"{1 / seconds:8.3f} {rows / seconds:10,.0f} {extra:6.0f}   {times['others']:.0%}",
        flush=True,
    )
    return {
        "kind": kind,
        "task": problem.task,
        "rows": rows,
        "classes": problem.spec.num_classes,
        "batch": batch,
        "seconds": seconds,
        "epochs_per_second": 1 / seconds,
        "extra_mib": extra,
        "others": times["others"],
    }


def plain_module(kind: str, num_classes: int) -> tuple[nn.Module, int, float]:
    """The earlier systems' form of a head, their batch size, and a learning rate for it."""
    torch.manual_seed(0)
    if kind == "linear":
        return nn.Linear(DIM, num_classes), 32, 1e-3
    if kind == "router":
        return PlainRouter(DIM, num_classes), 256, 1e-3
    return PlainMlDecoder(DIM, num_classes), 56, 1e-4


def measure_plain(
    kind: str, num_rows: int, plain_epochs: int, epochs: int, repeats: int
) -> dict[str, Any]:
    """The project's loop against a plain one: seconds of an epoch, and what both score in the end.

    Large batches take fewer steps an epoch, so they may be given more epochs to score as much; the
    speed-up of the whole training is told beside that of an epoch.
    """
    rows = max(256, num_rows // FEWER_ROWS.get(kind, 1))
    problem = make_problem(kind, rows)
    val = problem.material.val.slice(0, len(problem.material.val))
    # The plain module gets rows that are scaled already, in its favour.
    scale = scaled if kind == "router" else problem.config.build(problem.spec).scale
    plain_rows = [scale(part) for part in problem.material.train.slice(0, rows)]
    plain_val = [scale(part) for part in val]
    targets = problem.material.train_part.target_tensor(CPU)
    single = problem.task == "single_label"
    criterion = F.cross_entropy if single else F.binary_cross_entropy_with_logits
    _, batch_size, lr = plain_module(kind, problem.spec.num_classes)
    own = problem
    if kind == "linear":  # one pair, as the plain loop trains one
        own = replace(problem, config=problem.config.with_optim(1e-2, 0.1))
    forms: dict[str, dict[str, Any]] = {"project": {}, "project, bf16": {"precision": "bf16"}}
    scores: dict[str, float] = {}

    def plainly() -> None:
        model = plain_module(kind, problem.spec.num_classes)[0]
        train_plainly(
            model, plain_rows, targets, batch_size, epochs=plain_epochs, lr=lr, criterion=criterion
        )
        with torch.inference_mode():
            scores["plain loop"] = held_out(problem, model(*plain_val))

    def quickly(name: str) -> None:
        head = train(own, epochs, **forms[name])
        with torch.inference_mode():
            scores[name] = max(held_out(own, logits) for _, logits in head.candidates(*val))

    works: dict[str, Work] = {"plain loop": plainly}
    for name in forms:
        works[name] = lambda name=name: quickly(name)  # type: ignore[misc]
    times = take_turns(works, repeats)
    print(f"\nplain: {kind}, {rows} rows; plain loop in batches of {batch_size}")
    base = times["plain loop"]["seconds"]
    for name, row in times.items():
        count = plain_epochs if name == "plain loop" else epochs
        row |= {"score": scores[name], "epochs": count, "speedup": base / row["seconds"]}
        row["epoch_speedup"] = row["speedup"] * count / plain_epochs
        print(
            f"  {name:14s} {row['seconds'] / count:7.2f} s an epoch, {row['epoch_speedup']:5.2f}x; "
            f"{count} epochs {row['seconds']:7.2f} s ({row['cpu_seconds']:.1f} CPU s), "
            f"{row['speedup']:5.2f}x; held-out {'accuracy' if single else 'mAP'} "
            f"{row['score']:.4f}; others {row['others']:.0%}",
            flush=True,
        )
    return {"kind": kind, "rows": rows, "plain_batch": batch_size, "times": times}


def measure_probe(num_rows: int, repeats: int) -> dict[str, Any]:
    """Logistic regression with λ = 1e-3 on correlated columns, as backbones have them."""
    rng = np.random.default_rng(0)
    classes = 100
    labels = rng.integers(0, classes, num_rows + 10_000)
    mixing = torch.linalg.qr(torch.from_numpy(rng.standard_normal((DIM, DIM), np.float32)))[0]
    spectrum = torch.linspace(0, -3, DIM).exp()  # deviations of 1 to 1/20 along the axes
    centres = torch.from_numpy(rng.standard_normal((classes, DIM), np.float32))
    noise = torch.from_numpy(rng.standard_normal((len(labels), DIM), np.float32))
    rows = (centres[labels] + 7 * noise) @ (mixing * spectrum) @ mixing.T
    rows = (rows - rows[:num_rows].mean(0)) / rows[:num_rows].std(0)
    targets = torch.from_numpy(labels)
    train_rows, train_targets = rows[:num_rows].contiguous(), targets[:num_rows]
    scores: dict[str, float] = {}

    def probe(name: str, solve: Callable[[], tuple[Tensor, Tensor]]) -> Work:
        def work() -> None:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                weights, biases = solve()
            logits = F.linear(rows[num_rows:], weights[0], biases[0])
            scores[name] = float((logits.argmax(1) == targets[num_rows:]).float().mean())

        return work

    penalty = [1e-3]
    plain = RowScale(DIM, "none")
    forms: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "scikit-learn": lambda: fit_by_sklearn(train_rows, train_targets, classes, penalty),
        "logistic_regression": lambda: fit_path(train_rows, train_targets, classes, penalty),
        "ridge": lambda: fit_ridge(plain, train_rows, train_targets, classes, (1e-2,)),
    }
    times = take_turns({name: probe(name, solve) for name, solve in forms.items()}, repeats)
    print(f"\nprobe: {num_rows} x {DIM}, {classes} classes, penalty {penalty[0]:g}, tolerance 1e-4")
    for name, row in times.items():
        row |= {
            "accuracy": scores[name],
            "speedup": times["scikit-learn"]["seconds"] / row["seconds"],
        }
        print(
            f"  {name:20s} {row['seconds']:7.2f} s {row['cpu_seconds']:7.2f} CPU s "
            f"{row['speedup']:6.2f}x   held-out accuracy "
            f"{row['accuracy']:.4f}   others {row['others']:.0%}",
            flush=True,
        )
    return {"rows": num_rows, "classes": classes, "penalty": penalty[0], "times": times}


def measure_copies(num_rows: int, num_classes: int, repeats: int) -> dict[str, Any]:
    """64 pairs of `linear` against one, and the two matrix products of a step of 64 alone."""
    problem = make_problem("linear", num_rows, num_classes)
    grids = {
        "1 pair": {"lrs": (1e-2,), "weight_decays": (0.1,)},
        "64 pairs": {
            "lrs": tuple(np.geomspace(1e-3, 1e-1, 8).round(5).tolist()),
            "weight_decays": (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0),
        },
    }
    works: dict[str, Work] = {}
    for name, grid in grids.items():
        own = replace(problem, config=LinearConfig.model_validate(grid))
        works[name] = lambda own=own: train(own, 1)  # type: ignore[misc]
    works["64 pairs, bf16"] = lambda: train(own, 1, precision="bf16")
    optim = optimisation.resolve(OptimConfig(), problem.config.optim_defaults, num_rows)
    batch = min(int(optim.batch_size or 0), 512)
    some, weight = torch.randn(batch, DIM), torch.randn(64 * num_classes, DIM)
    logits, gradient = torch.empty(batch, len(weight)), torch.empty_like(weight)

    def multiply() -> None:
        for _ in range(0, num_rows, batch):
            torch.mm(some, weight.T, out=logits)
            torch.mm(logits.T, some, out=gradient)

    works["products of 64"] = multiply
    times = take_turns(works, repeats)
    ratio = times["64 pairs"]["seconds"] / times["1 pair"]["seconds"]
    print(f"\ncopies: linear, {num_rows} rows, {num_classes} classes, one epoch")
    for name, row in times.items():
        print(
            f"  {name:16s} {row['seconds']:7.2f} s {row['cpu_seconds']:7.2f} CPU s   others "
            f"{row['others']:.0%}"
        )
    print(f"  64 pairs / 1 pair {ratio:.2f}", flush=True)
    return {"rows": num_rows, "classes": num_classes, "ratio": ratio, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--only", nargs="+", default=[], help="kinds of heads; unset = all")
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    rows, repeats = arguments.rows, arguments.repeats
    kinds = [kind for kind in sorted(HEADS) if kind in (arguments.only or HEADS)]
    record: dict[str, Any] = {
        "command": f"python benchmarks/head_speed.py --rows {rows} --repeats {repeats}",
        "torch": torch.__version__,
        "threads": arguments.threads,
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }

    def keep(section: str, result: dict[str, Any]) -> None:  # after each part: a run is long
        record.setdefault(section, []).append(result)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")

    started = time.perf_counter()
    with threadpool_limits(arguments.threads):
        if "plain" in arguments.sections:
            for kind, plain_epochs, epochs in PLAN:
                if kind in kinds:
                    keep("plain", measure_plain(kind, rows, plain_epochs, epochs, repeats))
        if "probe" in arguments.sections:
            keep("probe", measure_probe(max(2000, rows // 4), repeats))
        if "copies" in arguments.sections:
            for num_classes in (10, 100):
                keep("copies", measure_copies(rows // 4, num_classes, repeats))
        if "heads" in arguments.sections:
            print(
                f"\nheads: one epoch at the default batch, D={DIM}; extra = peak MiB; others' CPU"
            )
            print("  kind                   rows    C  batch  seconds epochs/s     rows/s  extra")
            for kind in kinds:
                keep("heads", measure_head(kind, rows, repeats))
    print(f"\n{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
