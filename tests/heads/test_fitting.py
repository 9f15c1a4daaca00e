"""The training loop: precision, pieces, averages, stages, early stopping, checkpoints."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import torch
from safetensors.torch import load_file

from featcache.reader import open_cache
from heads import evaluate, fitting, train
from heads.base import FeatureSpec
from heads.evaluate import EvaluateConfig, Validation
from heads.models.linear import Linear, LinearConfig
from heads.optim import OptimConfig, ScheduleConfig
from heads.run_folder import RunError, load_run
from heads.train import TrainConfig

CacheMaker = Callable[..., Path]


def config(cache: Path, run: Path, **options: Any) -> TrainConfig:
    optim = {"epochs": 4, "lr": 0.03, "weight_decay": 0.0, **options.pop("optim", {})}
    values = {"cache": cache, "run": run, "head": LinearConfig(), "quiet": True, "device": "cpu"}
    return TrainConfig(**(values | options), optim=OptimConfig(**optim))


def tensors(run: Path, weights: str = "head") -> dict[str, torch.Tensor]:
    return load_file(run / f"{weights}.safetensors")


def history(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def biggest_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("task", ["single", "multi"])
def test_a_batch_in_pieces_trains_as_a_whole(
    make_single: CacheMaker, make_multi: CacheMaker, tmp_path: Path, task: str
) -> None:
    cache = make_single() if task == "single" else make_multi()
    for accumulate in (1, 3):  # neither the batch nor the short last one is a multiple of 3
        options = {"batch_size": 80, "accumulate": accumulate, "optimizer": "sgd"}
        train.run(config(cache, tmp_path / str(accumulate), optim=options))
    whole, pieces = history(tmp_path / "1"), history(tmp_path / "3")
    assert biggest_difference(tensors(tmp_path / "1"), tensors(tmp_path / "3")) < 1e-6
    for one, other in zip(whole, pieces, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_nearly_as_float32(
    make_single: CacheMaker, tmp_path: Path, precision: str
) -> None:
    cache, dtypes = make_single(), set()
    original = Linear.scale

    def scale(self: Linear, features: torch.Tensor) -> torch.Tensor:
        dtypes.add(torch.mm(features, features.T).dtype)
        return original(self, features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "scale", scale)
        train.run(config(cache, tmp_path / precision, optim={"precision": precision}))
    assert {"bf16": torch.bfloat16, "fp16": torch.float16}[precision] in dtypes
    train.run(config(cache, tmp_path / "fp32"))
    state = tensors(tmp_path / precision)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    plain = tensors(tmp_path / "fp32")
    assert biggest_difference(state, plain) < 0.05 * float(plain["weights.0"].abs().max())
    for one, other in zip(history(tmp_path / precision), history(tmp_path / "fp32"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


def test_the_scale_of_a_float16_loss_follows_overflows(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalers = []
    original = torch.amp.GradScaler.step
    monkeypatch.setattr(
        torch.amp.GradScaler,
        "step",
        lambda self, optimizer: scalers.append(self.get_scale()) or original(self, optimizer),
    )

    def loss(self: Linear, features: Any, targets: torch.Tensor, progress: float) -> Any:
        logits = torch.nn.functional.linear(1000 * features[0], self.weights[0])
        return {"loss": torch.nn.functional.cross_entropy(logits.float(), targets)}

    monkeypatch.setattr(Linear, "loss", loss)
    options = {"precision": "fp16", "clip_norm": 1.0, "lr": 1e-4}
    train.run(config(make_single(), tmp_path / "run", optim=options))
    assert scalers[0] == 65536.0
    assert scalers[-1] < scalers[0]
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run").values())


def test_the_average_of_weights_is_validated_and_kept(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: list[torch.Tensor] = []
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *arguments: Any, **options: Any) -> Any:
        if not trace:
            trace.append(torch.zeros(5, 12))
        result = original(self, *arguments, **options)
        trace.append(self.param_groups[0]["params"][0].detach().clone())
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    asked = config(make_single(noise=3.0), tmp_path / "run", optim={"ema_decay": 0.9})
    report = train.run(asked)
    expected = trace[0].double()
    for number, weight in enumerate(trace[1:], 1):
        decay = min(0.9, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * weight.double()
    last = tensors(report.run, "head_last")["weights.0"]
    torch.testing.assert_close(last.double(), expected, atol=1e-5, rtol=1e-5)
    assert (last - trace[-1]).abs().max() > 1e-3
    scores = evaluate.run(EvaluateConfig(run=report.run, split="val", weights="last", device="cpu"))
    assert scores.metrics["top1"] == pytest.approx(history(report.run)[-1]["val_top1"])


def test_best_and_last_weights_can_be_chosen(
    make_single: CacheMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"schedule": ScheduleConfig(shape="constant"), "lr": 1.0, "epochs": 8}
    report = train.run(config(make_single(noise=4.0), tmp_path / "run", optim=options))
    curve = [line["val_top1"] for line in history(report.run)]
    assert curve[-1] < max(curve), "the last epoch is the best: nothing to tell apart"
    for weights, expected in (("best", max(curve)), ("last", curve[-1])):
        asked = EvaluateConfig(run=report.run, split="val", weights=weights, device="cpu")
        assert evaluate.run(asked).metrics["top1"] == pytest.approx(expected)
    for name in ("metrics_val.json", "metrics_val_last.json"):
        assert (report.run / name).is_file()
    (report.run / "head_last.safetensors").unlink()
    with pytest.raises(RunError, match=r"head_last\.safetensors: no such file; train again"):
        load_run(report.run, weights="last")


def test_f42_the_best_weights_do_not_move_with_later_steps(
    make_single: CacheMaker, tmp_path: Path
) -> None:
    options = {"schedule": ScheduleConfig(shape="constant"), "lr": 1.0, "epochs": 8}
    cache = make_single(noise=4.0)
    report = train.run(config(cache, tmp_path / "run", optim=options))
    best = report.metrics["best_epoch"]
    assert best < 8
    train.run(config(cache, tmp_path / "shorter", optim=options | {"epochs": best}))
    assert biggest_difference(tensors(report.run), tensors(tmp_path / "shorter", "head_last")) == 0


def test_early_stopping_and_plateau_can_look_at_the_loss(
    make_single: CacheMaker, tmp_path: Path
) -> None:
    schedule = ScheduleConfig(shape="plateau", factor=0.5, patience=1, min_lr=0.2)
    options = {"schedule": schedule, "lr": 1.0, "epochs": 40}
    more = {"stop_on": "loss", "patience": 6}
    asked = config(make_single(noise=4.0), tmp_path / "run", optim=options, **more)
    train.run(asked)
    curve = history(tmp_path / "run")
    losses = [line["val_loss"] for line in curve]
    assert len(curve) < 40
    assert len(curve) == losses.index(min(losses)) + 1 + 6
    rates = [line["lr"] for line in curve]
    assert rates[0] == 1.0
    assert set(rates) == {1.0, 0.5, 0.25, 0.2}
    loaded = load_run(tmp_path / "run", weights="last")
    features, labels = rows_of(asked.cache, "val")
    logits = loaded.head(features).detach().double()
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert losses[-1] == pytest.approx(float(expected), rel=1e-5)


def rows_of(cache: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    opened = open_cache(cache)
    rows = opened.rows(split)
    features = torch.from_numpy(opened.array("image/projected").read(rows)).float()
    return features, torch.from_numpy(opened.labels(rows))


class Staged(Linear):
    """Trains its offset alone for two validations, then the weights alone; picks only then."""

    seen: torch.Tensor

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("seen", torch.zeros(()))
        self.told: list[Mapping[str, float]] = []

    @property
    def selectable(self) -> bool:  # type: ignore[override]
        return int(self.seen) >= 2

    def after_epoch(self, scores: Mapping[str, float]) -> None:
        self.told.append(dict(scores))
        self.seen += 1

    def lr_factors(self) -> Mapping[str, float]:
        early = int(self.seen) < 2
        return {"weights": 0.0 if early else 1.0, "biases": 1.0 if early else 0.0}

    def monitors(self, *features: torch.Tensor) -> Any:
        yield "upside down", -self.forward(*features)

    def param_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        return [
            {"params": [*self.weights], "lr": 0.1, "weight_decay": 0.0, "name": "weights"},
            {"params": [*self.biases], "lr": 0.1, "weight_decay": 0.0, "name": "biases"},
        ]


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> list[Staged]:
    """Every linear head is a staged one; those that are built are listed."""
    built: list[Staged] = []

    def build(self: LinearConfig, spec: FeatureSpec) -> Staged:
        head = Staged(
            spec.feature_dim,
            spec.num_classes,
            scaling="none",
            criterion=spec.criterion,
            pairs=[(0.1, 0.0)],
        )
        built.append(head)
        return head

    monkeypatch.setattr(LinearConfig, "build", build)
    return built


def staged_config(cache: Path, run: Path, **options: Any) -> TrainConfig:
    head = LinearConfig(lrs=(0.1,), weight_decays=(0.0,), scaling="none")
    optim = {"lr": None, "weight_decay": None, **options.pop("optim", {})}
    return config(cache, run, head=head, optim=optim, **options)


def test_stages_are_frozen_watched_and_picked_as_the_head_says(
    make_single: CacheMaker, tmp_path: Path, staged: list[Staged]
) -> None:
    report = train.run(staged_config(make_single(), tmp_path / "run", optim={"epochs": 5}))
    assert report.metrics["best_epoch"] >= 3
    head = staged[0]
    assert len(head.told) == 5
    assert head.told[0].keys() == {"lr 0.1, weight decay 0", "upside down"}
    curve = history(tmp_path / "run")
    assert curve[1]["monitors"] == {"upside down": head.told[1]["upside down"]}
    assert curve[1]["val_top1"] == head.told[1]["lr 0.1, weight decay 0"]
    with pytest.raises(RunError, match=r"none of 2 epochs ended with a model to pick.*epochs"):
        train.run(staged_config(make_single("b"), tmp_path / "short", optim={"epochs": 2}))


def test_frozen_groups_do_not_move(
    make_single: CacheMaker,
    tmp_path: Path,
    staged: list[Staged],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = Staged.after_epoch

    def after_epoch(self: Staged, scores: Mapping[str, float]) -> None:
        seen.append((self.weights[0].detach().clone(), self.biases[0].detach().clone()))
        original(self, scores)

    monkeypatch.setattr(Staged, "after_epoch", after_epoch)
    train.run(staged_config(make_single(), tmp_path / "run", optim={"epochs": 4}))
    weights, biases = zip(*seen, strict=True)
    assert (weights[1] == 0).all()
    assert (weights[2] != 0).any()
    assert (biases[0] != biases[1]).any()
    assert torch.equal(biases[1], biases[3])


def interrupted(options: TrainConfig, after_epochs: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        original, calls = fitting.score_candidates, []

        def stopping(*arguments: Any, **named: Any) -> Validation:
            calls.append(1)
            if len(calls) > after_epochs:
                raise KeyboardInterrupt
            return original(*arguments, **named)

        patch.setattr(fitting, "score_candidates", stopping)
        with pytest.raises(KeyboardInterrupt):
            train.run(options)


@pytest.mark.parametrize(
    "optim",
    [
        {"ema_decay": 0.95, "accumulate": 2, "clip_norm": 0.5},
        {"precision": "fp16", "schedule": ScheduleConfig(shape="one_cycle")},
        {"schedule": ScheduleConfig(shape="plateau", patience=0, factor=0.5), "optimizer": "sgd"},
        {"optimizer": "lazy_adamw", "state_dtype": "bfloat16", "accumulate": 2},
    ],
    ids=["average", "fp16", "plateau", "lazy"],
)
def test_a_resumed_training_is_the_uninterrupted_one_with_everything_on(
    make_single: CacheMaker, tmp_path: Path, staged: list[Staged], optim: dict[str, Any]
) -> None:
    cache = make_single(noise=3.0)
    more = {"save_every": 1, "stop_on": "loss", "patience": 5, "min_delta": 0.001}
    optim = optim | {"epochs": 9}
    straight = staged_config(cache, tmp_path / "straight", optim=optim, **more)
    train.run(straight)
    broken = straight.model_copy(update={"run": tmp_path / "broken"})
    for after_epochs in (1, 3):  # in the first stage, and in the last
        interrupted(broken, after_epochs)
    train.run(broken)
    assert len(staged) == 6  # one each time, and the final form of those that finished
    curves = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in history(tmp_path / run)]
        for run in ("straight", "broken")
    ]
    assert curves[0] == curves[1]
    for weights in ("head", "head_last"):
        one, other = (tensors(tmp_path / run, weights) for run in ("straight", "broken"))
        assert biggest_difference(one, other) == 0


def test_a_compiled_training_is_the_plain_one(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []
    original = torch.compile

    def compile_eagerly(function: Any) -> Any:
        compiled.append(function)
        return original(function, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    cache = make_single(splits={"train": 100, "val": 40})
    for choice in (False, True):
        train.run(config(cache, tmp_path / str(choice), optim={"compile": choice, "epochs": 2}))
    assert [function.__name__ for function in compiled] == ["loss"]
    assert biggest_difference(tensors(tmp_path / "True"), tensors(tmp_path / "False")) < 1e-6


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: 9 bytes")],
)
def test_a_batch_that_does_not_fit_is_refused_with_a_way_out(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def loss(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(Linear, "loss", loss)
    asked = config(make_single(), tmp_path / "run", optim={"batch_size": "all", "accumulate": 2})
    with pytest.raises(RunError, match=r"a batch of 300 rows in 2 piece.*optim.accumulate to 4"):
        train.run(asked)


def test_event_files_hold_the_curves(make_single: CacheMaker, tmp_path: Path) -> None:
    asked = config(make_single(), tmp_path / "run", tensorboard=True, save_every=1)
    interrupted(asked, 2)
    train.run(asked)
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert file.name.startswith("events.out.tfevents.")
    events = [_message(record) for record in _records(file.read_bytes())]
    assert events[0][3] == [b"brain.Event:2"]
    curve = history(tmp_path / "run")
    assert len(events) == 1 + len(curve)
    for event, line in zip(events[1:], curve, strict=True):
        assert event[2] == [line["step"]]
        assert event[1][0] > 1.6e9
        values = {}
        for content in _message(event[5][0])[1]:
            value = _message(content)
            values[value[1][0].decode()] = value[2][0]
        assert values.keys() == line.keys() - {"epoch", "step"}
        for name, value in values.items():
            assert value == pytest.approx(line[name], rel=1e-6), name


def _records(content: bytes) -> list[bytes]:
    """The payloads of a TFRecord file, checksums verified."""

    def checked(data: bytes, stored: bytes) -> bytes:
        crc = google_crc32c.value(data)
        masked = (((crc >> 15) | (crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32
        assert struct.unpack("<I", stored) == (masked,)
        return data

    result = []
    while content:
        (length,) = struct.unpack("<Q", checked(content[:8], content[8:12]))
        result.append(checked(content[12 : 12 + length], content[12 + length : 16 + length]))
        content = content[16 + length :]
    return result


def _message(content: bytes) -> dict[int, list[Any]]:
    """Fields of a protocol buffer by number."""
    fields: dict[int, list[Any]] = {}
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = content[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(content):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            value: Any = varint()
        elif wire == 2:
            size = varint()
            value = content[position : position + size]
            position += size
        else:
            size = {1: 8, 5: 4}[wire]
            form = {1: "<d", 5: "<f"}[wire]
            (value,) = struct.unpack(form, content[position : position + size])
            position += size
        fields.setdefault(number, []).append(value)
    return fields


def test_a_loss_that_is_not_finite_names_its_step(
    make_single: CacheMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Linear.loss

    def loss(self: Linear, features: Any, targets: Any, progress: float) -> Any:
        parts = original(self, features, targets, progress)
        step = round(progress * 16)
        return {**parts, "loss": parts["loss"] * (math.nan if step == 6 else 1.0)}

    monkeypatch.setattr(Linear, "loss", loss)
    options = {"batch_size": 80, "accumulate": 3}
    with pytest.raises(RunError, match="the loss is nan at optimiser step 7"):
        train.run(config(make_single(), tmp_path / "run", optim=options))
