"""What fine-tuning leaves beside the adapter: the head as a run folder, and all metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.tuning import head_folder
from finetune.tuning.examples import Material
from finetune.tuning.head_folder import EncodedDataset
from finetune.tuning.loop import Fit, Measured
from finetune.tuning.objective import Objective
from finetune.tuning.tuned import Tuned
from heads import run_folder
from heads.base import FeatureSpec
from heads.models.linear import Linear, LinearConfig
from heads.parts import class_counts
from heads.progress import duration
from heads.results import write_results
from heads.run_folder import WEIGHTS
from heads.scoring import MetricsConfig

NAMES = {"cls": "head", "txt": "text"}
"""What scores are called for people."""


def result_values(
    tuned: Tuned,
    fitted: Fit,
    measured: Mapping[str, Measured],
    metric: str,
    num_bytes: int,
    device: torch.device,
) -> dict[str, Any]:
    """What metrics.json says of a training.

    Args:
        tuned: adapter and head.
        fitted: how they were trained.
        measured: by role, as the finished backbone sees the rows.
        metric: name of the accuracy.
        num_bytes: of the adapter's tensors on disk.
        device: trained on.
    """
    history, rows = fitted.history, len(measured["train"].part)
    sizes = {name: tensor.numel() for name, tensor in tuned.state().items()}
    adapter = sum(count for name, count in sizes.items() if name.startswith("adapter/"))
    encoded = sum(len(one.part) for one in measured.values())
    encoding = sum(one.seconds for one in measured.values())
    seconds = sum(line["seconds"] for line in history)
    values: dict[str, Any] = {
        "metric": metric,
        "selected_on": "val" if "val" in measured else "none",
        "best_epoch": fitted.best_epoch,
        "candidate": "",
        "epochs": len(history),
        "steps": history[-1]["step"],
        "num_train_rows": rows,
        "num_parameters": sum(sizes.values()),
        "num_adapter_parameters": adapter,
        "num_head_parameters": sum(sizes.values()) - adapter,
        "adapter_bytes": num_bytes,
        "seconds": seconds,
        "images_per_second": _mean(history, "images_per_second"),
        "waiting": _mean(history, "waiting"),
        "encoding_images_per_second": encoded / encoding,
        "device": str(device),
        "val_rows_from": measured.get("val", measured["train"]).part.name,
    }
    for role, one in measured.items():
        values |= {f"{role}_acc_{name}": value for name, value in one.accuracy.items()}
        values[f"{role}_loss"] = one.loss
    return values


def _mean(history: list[dict[str, Any]], name: str) -> float:
    return float(sum(line[name] for line in history) / len(history))


def write_head(
    folder: Path,
    dataset: EncodedDataset,
    material: Material,
    objective: Objective,
    config: LinearConfig,
    measured: Mapping[str, Measured],
    values: Mapping[str, Any],
    options: MetricsConfig,
    seed: int,
) -> Linear:
    """Writes the head as a finished run folder of heads; returns it.

    Args:
        folder: to be made.
        dataset: as the adapted backbone sees it.
        material: what was trained on.
        objective: holds the head; without one, class text becomes the weights of a linear head.
        config: builds the head.
        measured: features and rows by role.
        values: see `result_values`.
        options: how metrics are counted.
        seed: of the training.
    """
    folder.mkdir(exist_ok=True)
    device = next((t.device for t in objective.state_dict().values()), torch.device("cpu"))
    head = objective.head
    if head is None:
        assert objective.text is not None, "neither head nor text"
        with torch.no_grad():
            weight = (objective.text_scale * objective.text()).cpu()
        beta = objective.offset  # one for all classes; without it every class would be affirmed
        offset = None if beta is None else beta.detach().cpu().expand(len(weight))
        config = config.model_copy(update={"bias": offset is not None})
        head = Linear(
            weight.shape[1],
            len(weight),
            bias=config.bias,
            scaling="unit",
            weight=weight,
            offset=offset,
        )
        head = head.to(device)
    head.eval()
    width, name = head.mean.shape[0], f"image/{dataset.feature}"
    train = measured["train"].part
    spec = FeatureSpec(
        feature_dim=width,
        num_classes=material.num_classes,
        task=material.task,
        class_counts=class_counts(train, material.num_classes),
        classes=material.classes,
        prompts=None,
        logit_scale=dataset.backbone.spec.logit_scale,
        num_rows=len(train),
        feature_dims={name: width},
    )
    record = run_folder.describe_head(dataset, config, spec)
    state = head.trained_state()
    run_folder.write_json(folder / "head.json", record)
    run_folder.write_tensors(folder / WEIGHTS["best"], state)
    own = {**values, "num_parameters": sum(tensor.numel() for tensor in state.values())}
    found = write_results(
        folder,
        head,
        [(one.part, head_folder.tables(name, one.features, device)) for one in shown(measured)],
        options=options,
        calibrating="val" in measured,
        seed=seed,
        classes=material.classes,
        values=own,
        history=(),
        record=record,
        config={},
        page=False,
    )
    run_folder.write_json(folder / "metrics.json", own | found)
    return head


def shown(measured: Mapping[str, Measured]) -> list[Measured]:
    """The rows that decided (or trained, where none did), and those that are reported."""
    first = measured.get("val", measured["train"])
    return [first, *([measured["test"]] if "test" in measured else [])]


def summary(values: Mapping[str, Any]) -> str:
    """The result in a few lines, from metrics.json."""
    frozen = values.get("frozen", {}).get("accuracy", {})
    lines = [
        f"trained {values['epochs']} epochs in {duration(values['seconds'])}, "
        f"{values['images_per_second']:,.0f} images/s, {values['waiting']:.0%} of the time waiting "
        f"for data; best epoch {values['best_epoch']}"
    ]
    for role in ("train", "val", "test"):
        found = [
            f"{label} {values[f'{role}_acc_{name}']:.2%}"
            for name, label in NAMES.items()
            if f"{role}_acc_{name}" in values
        ]
        if role in frozen:
            found.append(f"head on frozen features {frozen[role]:.2%}")
        if found:
            lines.append(f"  {role:5}  {values['metric']}: {', '.join(found)}")
    return "\n".join(lines)
