"""Training steps of ML-Decoder: the project's head against a plain loop over a DataLoader.

    python benchmarks/ml_decoder.py                 # about 5 minutes on 2 cores
    python benchmarks/ml_decoder.py --rows 112 --repeats 1 --output /tmp/x.json   # a try

The plain loop is what the method's own code does: batches of 56 rows from a DataLoader, torch's
attention layer, a product for each group, Adam. Both start from the same weights and give the same
logits (checked first). Rows of a table take turns; medians of CPU seconds of this process, as the
machine is often shared; wall seconds are kept beside them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_ml_decoder import PlainMlDecoder
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from heads.losses.base import ClassStatistics
from heads.losses.binary_cross_entropy import BinaryCrossEntropyConfig
from heads.models.ml_decoder import MlDecoder
from heads.query_decoder import QueryDecoder

RESULT = Path(__file__).parent / "results" / "ml_decoder.json"
PLAN = [(4, 20), (4, 100), (49, 20), (49, 100)]
"""Tokens a row and classes; 4 = pooled over a 2 x 2 grid, 49 = all patches of ViT-B-32."""


def plain_epoch(model: PlainMlDecoder, optimizer: Any, tokens: Tensor, targets: Tensor) -> None:
    for features, wanted in DataLoader(TensorDataset(tokens, targets), 56, shuffle=True):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(features), wanted).backward()
        optimizer.step()


def head_epoch(
    head: MlDecoder, optimizer: Any, tokens: Tensor, targets: Tensor, mixed: bool
) -> None:
    order = torch.randperm(len(tokens))
    for index in order.split(512):
        optimizer.zero_grad(set_to_none=True)
        for piece in index.tensor_split(max(1, len(index) // 64)):  # as optim.accumulate does
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = head.loss((tokens[piece],), targets[piece], 0.0)["loss"]
            (loss * (len(piece) / len(index))).backward()
        optimizer.step()


def measure(num_tokens: int, num_classes: int, num_rows: int, repeats: int) -> dict[str, Any]:
    """Seconds a thousand rows of each form, and how far their logits are apart."""
    torch.manual_seed(0)
    tokens = torch.randn(num_rows, num_tokens, 512)
    targets = (torch.rand(num_rows, num_classes) < 0.1).float()
    plain = PlainMlDecoder(512, num_classes)
    statistics_of = ClassStatistics(targets.sum(0).long().numpy(), num_rows)
    criterion = BinaryCrossEntropyConfig().build(statistics_of)
    head = MlDecoder(QueryDecoder(512), num_classes, criterion=criterion)
    plain.copy_to(head)
    with torch.no_grad():
        expected = plain.eval()(tokens[:32])
        difference = float((head.eval()(tokens[:32]) - expected).abs().max() / expected.std())
    plain.train()
    head.train()
    trained = [p for p in plain.parameters() if p.requires_grad]
    slow = torch.optim.Adam(trained, lr=1e-4)
    fast = torch.optim.AdamW(head.parameters(), lr=1e-4, fused=True)
    forms: dict[str, Callable[[], None]] = {
        "plain loop": lambda: plain_epoch(plain, slow, tokens, targets),
        "head": lambda: head_epoch(head, fast, tokens, targets, False),
        "head, bf16": lambda: head_epoch(head, fast, tokens, targets, True),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(repeats):
        for name, work in forms.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    scale = 1000 / num_rows
    rows = {
        name: {
            "cpu_seconds": scale * statistics.median(cpu for cpu, _ in values),
            "wall_seconds": scale * statistics.median(wall for _, wall in values),
        }
        for name, values in seconds.items()
    }
    base = rows["plain loop"]["cpu_seconds"]
    for row in rows.values():
        row["speedup"] = base / row["cpu_seconds"]
    return {"L": num_tokens, "C": num_classes, "logit_difference": difference, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULT)
    arguments = parser.parse_args()
    record: dict[str, Any] = {
        "command": f"python benchmarks/ml_decoder.py --rows {arguments.rows} "
        f"--repeats {arguments.repeats}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "results": [],
    }
    print("seconds for 1000 training rows, D=512, W=768, 8 heads, 2048 hidden, dropout 0.1")
    for num_tokens, num_classes in PLAN:
        result = measure(num_tokens, num_classes, arguments.rows, arguments.repeats)
        record["results"].append(result)
        print(f"L={num_tokens} C={num_classes}, logits differ by {result['logit_difference']:.0e}")
        for name, row in result["rows"].items():
            print(
                f"  {name:10s} {row['cpu_seconds']:7.2f} CPU s {row['wall_seconds']:7.2f} s "
                f"{row['speedup']:5.2f}x",
                flush=True,
            )
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
