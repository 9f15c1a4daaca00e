"""Every step of fine-tuning against a plain loop over a toy tower, without a single image."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featcache.adapters.base import Adapter
from featcache.adapters.full import FullConfig
from featcache.backbones.trainable import TowerName, TrainableTowers
from finetune.tuning import loop as tuning_loop
from finetune.tuning.loop import Fit, Measured, fit, measure
from finetune.tuning.objective import ClassText, Objective
from finetune.tuning.options import ClassifierConfig, StopConfig, TuningConfig
from finetune.tuning.tuned import Tuned
from heads.distributed import Group
from heads.losses.cross_entropy import CrossEntropy
from heads.models.linear import Linear
from heads.parts import Part

WIDTH, DIM, CLASSES, ROWS = 5, 4, 3, 21
ALONE = Group(0, 1, torch.device("cpu"))


class Tower(TrainableTowers):
    """A linear layer, behind dropout if there is any."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(WIDTH, DIM), nn.Dropout(dropout))
        self.name, self.feature_dim, self.blocks = "toy", DIM, {}

    def encode_image(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.model(pixels))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        raise NotImplementedError

    def encode_text(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def tower_of(self, name: str) -> TowerName | None:
        return "image"

    def tail(self, num_blocks: int) -> nn.Module:
        raise NotImplementedError


@dataclass
class Vectors:
    """Inputs that are there already; keeps the plans that were asked for."""

    towers: TrainableTowers
    values: Tensor
    unreadable: frozenset[int] = frozenset()
    plans: list[list[npt.NDArray[np.int64]]] = field(default_factory=list)
    spares: list[npt.NDArray[np.int64] | None] = field(default_factory=list)
    waited: float = 0.0
    problems: dict[str, str] = field(default_factory=dict)

    def augmented(
        self,
        plan: Sequence[npt.NDArray[np.int64]],
        seed: int,
        epoch: int,
        spares: npt.NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
        self.plans.append(list(plan))
        self.spares.append(spares)
        yield from ((self.values[torch.from_numpy(which)], which) for which in plan)

    def plain(self, part: Part, batch_size: int) -> Iterator[tuple[Tensor, npt.NDArray[np.int64]]]:
        for start in range(0, len(part), batch_size):
            which = np.arange(start, min(start + batch_size, len(part)))
            which = which[[row not in self.unreadable for row in which.tolist()]]
            yield self.values[torch.from_numpy(part.rows[which])], which

    def encode(self, inputs: Tensor) -> Tensor:
        return self.towers.encode_image(inputs)

    def encode_finished(self, backbone: Any, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is open."""


def rows(count: int = ROWS) -> Part:
    labels = np.random.default_rng(1).integers(CLASSES, size=count).astype(np.int64)
    return Part("train", np.arange(count, dtype=np.int64), labels)


def vectors(towers: TrainableTowers, **options: Any) -> Vectors:
    values = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2)) * 3
    return Vectors(towers, values, **options)


def made(dropout: float = 0.0) -> Tuned:
    torch.manual_seed(0)
    towers = Tower(dropout)
    head = Linear(DIM, CLASSES, scaling="unit", weight=torch.randn(CLASSES, DIM))
    return Tuned(FullConfig().attach(towers), Objective(head, CrossEntropy(), "single_label"))


def fitted(tuned: Tuned, source: Vectors, folder: Path, val: Part | None = None, **o: Any) -> Fit:
    stop, group = o.pop("stop", StopConfig(patience=None)), o.pop("group", ALONE)
    options = {"lr": 0.05, "epochs": 3, "batch_size": 8, "weight_decay": 0.5, **o}
    optim = TuningConfig.model_validate(options)
    head = ClassifierConfig(lr=0.02, weight_decay=0.25)
    return fit(
        tuned,
        source,
        rows(),
        val,
        optim,
        stop,
        build=lambda: tuned.build_optimizer(optim, head),
        group=group,
        seed=7,
        metric="top1",
        folder=folder,
        quiet=True,
    )


def written_out(
    source: Vectors, clip_norm: float, rates: list[float], size: int = 8
) -> dict[str, Tensor]:
    """The same training by AdamW's equations, in float64; `rates` multiply both peaks."""
    values = {n: t.detach().double().requires_grad_() for n, t in made().state().items()}
    peaks = {  # vectors do not decay
        "adapter/0.weight": (0.05, 0.5),
        "adapter/0.bias": (0.05, 0.0),
        "objective/head.weights.0": (0.02, 0.25),
        "objective/head.biases.0": (0.02, 0.0),
    }
    assert values.keys() == peaks.keys()
    first, second = ({n: torch.zeros_like(v) for n, v in values.items()} for _ in range(2))
    targets = torch.from_numpy(rows().targets)
    batches = [
        whole[i : i + size]
        for whole in map(np.concatenate, source.plans)
        for i in range(0, len(whole), size)
    ]
    for step, (batch, rate) in enumerate(zip(batches, rates, strict=True), 1):
        which = torch.from_numpy(batch)
        weight, bias, head, offset = (values[name] for name in peaks)
        features = F.normalize(source.values[which].double() @ weight.T + bias, dim=1)
        loss = F.cross_entropy(features @ head.T + offset, targets[which])
        found = torch.autograd.grad(loss, list(values.values()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in found))
        assert norm > clip_norm, "else the limit was not tried"
        with torch.no_grad():
            for (name, value), gradient in zip(values.items(), found, strict=True):
                lr, decay = peaks[name][0] * rate, peaks[name][1]
                gradient = gradient * clip_norm / (norm + 1e-6)
                first[name] += 0.1 * (gradient - first[name])
                second[name] += 0.001 * (gradient**2 - second[name])
                root = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
                value *= 1 - lr * decay
                value -= lr * first[name] / (1 - 0.9**step) / root
    return {name: value.detach().float() for name, value in values.items()}


class Unheard(Group):
    """One of several processes, of which no other is heard."""

    def sum_gradients(self, head: nn.Module) -> None:
        """Keeps them."""

    def sum(self, values: Tensor) -> Tensor:
        return values


def test_processes_replace_unreadable_images_by_different_ones(tmp_path: Path) -> None:
    """A cut last epoch too: what is left of it could be too little to choose from."""
    found = []
    for rank in range(2):
        tuned, group = made(), Unheard(rank, 2, torch.device("cpu"))
        source = vectors(tuned.adapter.towers)
        (tmp_path / str(rank)).mkdir()
        fitted(tuned, source, tmp_path / str(rank), group=group, steps=4)
        found.append(source.spares)
    for first, second in zip(*found, strict=True):
        assert first is not None
        assert second is not None
        assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(ROWS))
        assert np.array_equal(first, np.sort(first))


@pytest.mark.parametrize("changes", [{}, {"accumulate": 3}])
def test_steps_are_adamw_s(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Groups, decay, rates, clipping of all gradients together, and pieces of any size."""
    tuned = made()
    source = vectors(tuned.adapter.towers)
    schedule = {"shape": "cosine", "warmup_steps": 2}
    fitted(tuned, source, tmp_path, clip_norm=0.05, schedule=schedule, **changes)
    rates = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 7)) for i in range(7)]
    expected = written_out(source, 0.05, rates)
    for name, tensor in tuned.state().items():
        torch.testing.assert_close(tensor.detach(), expected[name], atol=5e-6, rtol=1e-4, msg=name)


def test_scaled_losses_are_clipped_by_their_own_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 the loss is scaled up; the limit is of the gradient itself."""
    norms: list[float] = []
    clip = nn.utils.clip_grad_norm_

    def noted(*options: Any) -> Tensor:
        norms.append(clip(*options).item())
        return torch.tensor(norms[-1])

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", noted)
    for precision in ("fp32", "fp16"):
        tuned = made()
        (tmp_path / precision).mkdir()
        options = {"clip_norm": 0.05, "precision": precision, "steps": 1}
        fitted(tuned, vectors(tuned.adapter.towers), tmp_path / precision, **options)
    assert norms[0] > 0.05
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


class Names(nn.Module):
    """Class text whose tower is trained; notes in which arithmetic it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.values, self.mixed = nn.Parameter(torch.eye(CLASSES, DIM)), list[bool]()

    def forward(self) -> Tensor:
        self.mixed.append(torch.is_autocast_enabled("cpu"))
        return self.values


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_both_towers_run_in_the_chosen_precision(tmp_path: Path, precision: str) -> None:
    names, tuned = Names(), made()
    tuned.objective.text, tuned.objective.text_weight = cast(ClassText, names), 0.3
    fitted(tuned, vectors(tuned.adapter.towers), tmp_path, precision=precision, steps=2)
    assert names.mixed == [precision == "bf16"] * 2, "once a step"
    assert names.values.grad is not None
    assert names.values.grad.dtype == torch.float32


def test_every_epoch_has_all_rows_in_an_order_of_its_own(tmp_path: Path) -> None:
    tuned = made()
    source = vectors(tuned.adapter.towers)
    result = fitted(tuned, source, tmp_path, epochs=9, steps=8)
    orders = [np.concatenate(plan).tolist() for plan in source.plans]
    assert [len(order) for order in orders] == [21, 21, 16], "8 steps of at most 8 rows"
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(ROWS))
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert [line["step"] for line in result.history] == [3, 6, 8]


def pretend(monkeypatch: pytest.MonkeyPatch, found: list[tuple[float, float]]) -> list[bool]:
    """Lets validation find these accuracies and losses; gives back whether anything trained."""
    coming, trained = iter(found), list[bool]()

    def pretended(objective: Objective, source: Vectors, *others: Any) -> Measured:
        trained.append(cast(nn.Module, source.towers.model).training or objective.training)
        accuracy, loss = next(coming)
        return Measured(rows(), torch.zeros(ROWS, DIM), {"cls": accuracy}, loss, 0.0)

    monkeypatch.setattr(tuning_loop, "measure", pretended)
    return trained


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"on": "loss", "patience": 2}, 5),
        ({"on": "metric", "patience": 2, "min_delta": 0.0}, 4),
        ({"on": "loss", "patience": None}, 6),
        ({}, 6),  # patience 3, min_delta 0.02 of the loss
    ],
)
def test_stopping_looks_at_what_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], epochs: int
) -> None:
    accuracies, losses = [0.5, 0.6, 0.6, 0.6, 0.6, 0.6], [3.0, 2.0, 1.0, 0.985, 0.983, 0.981]
    trained = pretend(monkeypatch, list(zip(accuracies, losses, strict=True)))
    tuned = made(dropout=0.5)
    result = fitted(
        tuned,
        vectors(tuned.adapter.towers),
        tmp_path,
        rows(),
        epochs=6,
        stop=StopConfig.model_validate(options),
    )
    assert len(result.history) == epochs
    assert result.best_epoch == 2, "of equally good ones the first is kept"
    assert not any(trained), "validation sees the model as extraction will"
    assert not tuned.objective.training
    assert not cast(nn.Module, tuned.adapter.towers.model).training


def test_default_stop_is_the_published_one() -> None:
    assert (StopConfig().patience, StopConfig().min_delta, StopConfig().on) == (3, 0.02, "loss")


def test_towers_train_with_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout of trained weights is on in every epoch's steps, the second's too."""
    seen: list[bool] = []
    encode = Vectors.encode

    def watched(self: Vectors, inputs: Tensor) -> Tensor:
        seen.append(cast(nn.Module, self.towers.model).training)
        return encode(self, inputs)

    monkeypatch.setattr(Vectors, "encode", watched)
    tuned = made(dropout=0.5)
    fitted(tuned, vectors(tuned.adapter.towers), tmp_path, rows(), epochs=2)
    steps, measured = 3, 3
    assert seen == ([True] * steps + [False] * measured) * 2


def test_unreadable_rows_are_left_out_of_what_is_measured() -> None:
    tuned = made()
    source = vectors(tuned.adapter.towers, unreadable=frozenset({0, 4, 20}))
    tuned.eval()
    arguments = (rows(), 8, nullcontext(), torch.device("cpu"))
    found = measure(tuned.objective, source, source.encode, *arguments)
    kept = [row for row in range(ROWS) if row not in source.unreadable]
    assert found.part.rows.tolist() == kept
    features = tuned.adapter.towers.encode_image(source.values[kept])
    torch.testing.assert_close(found.features, features.detach())
    logits = tuned.objective.class_logits(features)
    assert logits is not None
    targets = torch.from_numpy(rows().targets[kept])
    assert found.accuracy["cls"] == pytest.approx(
        float((logits.argmax(1) == targets).float().mean())
    )
    assert found.loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)


class Added(Adapter):
    """An adapter of a matrix and a vector."""

    def __init__(self, towers: TrainableTowers) -> None:
        super().__init__(towers)
        self.matrix, self.vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))

    def state(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    def fold(self) -> None:
        raise NotImplementedError


def test_default_groups_are_the_published_ones() -> None:
    """Head 1e-3 and 1e-4, adapter 1e-4 and 1e-2, a tenth of that rate for whole weights."""
    for adapter, lr in ((Added(Tower()), 1e-4), (FullConfig().attach(Tower()), 1e-5)):
        head = Linear(DIM, CLASSES, scaling="unit")
        tuned = Tuned(adapter, Objective(head, CrossEntropy(), "single_label"))
        optimizer = tuned.build_optimizer(TuningConfig(), ClassifierConfig())
        found = [
            (group["name"], group["lr"], group["weight_decay"], {p.ndim for p in group["params"]})
            for group in optimizer.param_groups
        ]
        assert found == [
            ("adapter", lr, 1e-2, {2}),
            ("adapter", lr, 0.0, {1}),
            ("head", 1e-3, 1e-4, {2}),
            ("head", 1e-3, 0.0, {1}),
        ]
        assert all(group["peak_lr"] == group["lr"] for group in optimizer.param_groups)
        assert optimizer.defaults["betas"] == (0.9, 0.999)
    own = TuningConfig(lr=0.5)
    assert tuned.build_optimizer(own, ClassifierConfig()).param_groups[0]["lr"] == 0.5


def test_a_copy_does_not_change_with_later_steps() -> None:
    tuned = made()
    copied = tuned.copied()
    before = {name: tensor.clone() for name, tensor in copied.items()}
    with torch.no_grad():
        for tensor in tuned.state().values():
            tensor.add_(1.0)
    assert all(torch.equal(copied[name], tensor) for name, tensor in before.items())
    tuned.restore(copied)
    assert all(torch.equal(tuned.state()[name], tensor) for name, tensor in before.items())
