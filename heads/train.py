"""Job: train a head on cached features.

python -m heads.train --cache cache/inat2021
"""

import functools
import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from featcache.backbones.prompt_tower import PromptTower
from featcache.class_text import open_prompt_tower
from featcache.config import Config, run_job
from featcache.errors import ConfigError
from featcache.identity import differences, fingerprint
from featcache.join import open_one_or_joined
from featcache.joined_cache import JoinedCache
from featcache.reader import Cache
from featcache.storage import CachePath
from heads import event_file, run_folder
from heads import optim as optimisation
from heads.base import FeatureSpec, Head, HeadConfig
from heads.checkpoint import CHECKPOINT
from heads.data import FeatureTables, HeadArrays, open_arrays
from heads.distributed import Group, ending_at_once, group_for
from heads.evaluate import main_metric
from heads.fitting import Material, fit, memory_advice, untrained
from heads.losses import AnyLoss
from heads.losses.base import Loss
from heads.models import AnyHead
from heads.models.linear import LinearConfig
from heads.optim import OptimConfig
from heads.parts import (
    IntArray,
    Parts,
    choose_parts,
    require_labels,
)
from heads.progress import duration, silenced
from heads.results import write_results
from heads.run_folder import WEIGHTS, RunError
from heads.scoring import MetricsConfig, metrics_table
from heads.shots import few_shot_parts
from heads.specification import feature_spec
from heads.threads import enough_threads
from heads.watch import EarlyStop

logger = logging.getLogger(__name__)

TableMaker = Callable[[HeadArrays, IntArray, torch.device], FeatureTables]
"""Reads chosen rows of a head's arrays for a device; see `FeatureTables`."""

_FREE = {
    "cache",
    "join",
    "run",
    "resume",
    "restart",
    "save_every",
    "device",
    "quiet",
    "tensorboard",
    "report",
}
"""Options that may differ between the runs of one training: they do not change what is computed."""


class TrainConfig(Config):
    """Train a head on cached features."""

    cache: CachePath
    """Feature cache that featcache.extract wrote."""
    join: tuple[CachePath, ...] = ()
    """Further caches of the same dataset (other backbones, other layers): rows are joined by id and
    the head reads their features side by side, each brought to length 1."""
    head: AnyHead = Field(default=LinearConfig(), discriminator="kind")
    """Which head, by kind."""
    loss: AnyLoss | None = Field(default=None, discriminator="kind")
    """Loss on the logits, by kind, for heads that take one; unset = softmax cross-entropy (single
    label) or sigmoid cross-entropy (multi label)."""
    optim: OptimConfig = OptimConfig()
    """How it is trained; unset fields take the head's own defaults."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str | None = None
    """Split that picks epoch and candidate; `carve` = hold rows of the training split out; unset =
    val if the cache has one, otherwise carve."""
    val_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of each class's training rows that `carve` holds out, 0..1; by a hash of their ids, so
    that most rows keep their side when the cache grows."""
    test_split: str | None = None
    """Split that is only reported, never decided on; unset = test if the cache has one."""
    select_on: Literal["val", "test"] = "val"
    """val; test makes the reported figures optimistic and is for comparison with papers only."""
    shots: PositiveInt | None = None
    """Train on this many rows a class, 1 or more, drawn by their ids; unset = on all."""
    shots_seed: NonNegativeInt = 0
    """Seed of that draw, 0 or more."""
    val_shots: PositiveInt = 4
    """With shots: most validation rows a class, 1 or more; min(shots, this) decide."""
    metrics: MetricsConfig = MetricsConfig()
    """How metrics are counted."""
    seed: NonNegativeInt = 0
    """Seed of initial values, row order and held-out rows, 0 or more."""
    patience: PositiveInt | None = None
    """Stop after this many epochs in a row without a better validation; unset = run all epochs."""
    min_delta: NonNegativeFloat = 0.0
    """How much above the best so far counts as better for `patience`, in units of the metric (0..1)
    or of the loss, 0 or more."""
    stop_on: Literal["metric", "loss"] = "metric"
    """What `patience` and the plateau schedule look at: metric = top-1 or mAP, loss = cross-entropy
    of the validation rows. The kept model is always the one with the best metric."""
    save_every: PositiveInt | None = None
    """Epochs between two saved states, 1 or more: what an interruption can lose; unset = the first
    epoch that ends 10 seconds after the last save (later where a save takes long itself)."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    run: Path | None = None
    """Run folder; unset = runs/<cache>-<head>-<hash of this configuration>."""
    resume: bool = True
    """Go on where an interrupted training in the run folder stopped, bit for bit; otherwise begin
    that training anew."""
    restart: bool = False
    """Train anew even if the run folder holds a finished or interrupted training."""
    tensorboard: bool = False
    """Write the curves as TensorBoard event files too, into `tensorboard/` of the run folder."""
    report: bool = True
    """Write `report.html` into the run folder: metrics, curves, classes, confusions, and more."""
    quiet: bool = False
    """Print nothing but warnings and errors."""

    @model_validator(mode="after")
    def _thresholds_can_be_searched(self) -> "TrainConfig":
        if self.select_on == "test" and self.metrics.threshold == "searched":
            raise ValueError(
                "metrics.threshold=searched needs validation rows, and select_on=test has none; "
                "give a probability such as 0.5, or leave select_on out"
            )
        return self


@dataclass(frozen=True)
class TrainReport:
    """What a training came to.

    Attributes:
        run: run folder.
        metrics: `metrics.json`.
        reused: whether a finished run of the same configuration was found and nothing was trained.
    """

    run: Path
    metrics: dict[str, Any]
    reused: bool = False

    @property
    def score(self) -> float:
        """The main metric (top-1 or mAP, 0..1) on test rows, or on validation rows without any."""
        name = self.metrics["metric"]
        return float((self.metrics.get("test") or self.metrics["val"])[name])


def run(config: TrainConfig) -> TrainReport:
    """Trains, evaluates and fills the run folder; the same call resumes what was interrupted."""
    with group_for(config.device) as group:
        cache = open_one_or_joined(config.cache, config.join)
        if isinstance(cache, JoinedCache) and not config.quiet and group.leads:
            print(cache.describe())
        require_labels(cache)
        return train_on(cache, config, group)


def train_on(
    cache: Cache, config: TrainConfig, group: Group, load: TableMaker = FeatureTables
) -> TrainReport:
    """`run` on a labelled cache that is open.

    Args:
        cache: the one that `config` names.
        config: what to train.
        group: the processes that train it together, and the device; the first of them writes.
        load: reads rows of arrays for a device; those who train often keep what they read.
    """
    device = group.device
    tower = functools.cache(partial(open_prompt_tower, cache, str(device)))
    config, parts, arrays = resolve(config, cache, tower)
    if not group.leads:
        config = config.model_copy(update={"quiet": True})
    if not config.quiet and (lost := without_caption(parts)):
        print(f"left out, head {config.head.kind} reads nothing but captions: {lost}")
    folder = config.run
    assert folder is not None, "not resolved"
    with run_folder.exclusive(folder) if group.leads else nullcontext():
        finished = group.follow(_finished(folder, config, cache) if group.leads else None)
        if finished is not None:
            report = TrainReport(folder, finished, True)
            if not config.quiet:
                print(f"{folder}: trained already with this configuration (--restart trains anew)")
                print(summary(report))
            return report
        started = time.perf_counter()
        train = load(arrays, parts.train.rows, device)
        spec = feature_spec(cache, config.head, config.loss, train, parts.train, tower)
        _require_whole_batches(spec.criterion, config.optim.accumulate, group.size)
        record = run_folder.describe_head(cache, config.head, spec)
        if group.leads:
            run_folder.write_json(folder / "head.json", record)
            run_folder.write_atomic(folder / "config.yaml", config.to_yaml().encode())
            if spec.prompts is not None:
                run_folder.write_tensors(folder / "prompts.safetensors", {"prompts": spec.prompts})
        torch.manual_seed(config.seed)
        building = time.perf_counter()
        with silenced(config.quiet):
            head = config.head.build(spec).to(device)
        built = time.perf_counter() - building
        if group.leads:
            _warn_of_pieces(head, config.optim.accumulate, group.size)
        arrays = arrays.only(config.head.arrays())
        val = load(arrays, parts.val.rows, device)
        material = Material(train, parts.train, val, parts.val)
        if head.trainable:
            assert isinstance(config.optim.batch_size, int), "not resolved"
            trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
            with enough_threads(config.optim.batch_size * trained), memory_advice(config.optim):
                fitted = fit(
                    head,
                    material,
                    config.optim,
                    folder=folder,
                    fingerprint=cache.fingerprint,
                    metric=main_metric(cache.task),
                    seed=config.seed,
                    group=group,
                    stop=EarlyStop(config.patience, config.min_delta),
                    stop_on=config.stop_on,
                    save_every=config.save_every,
                    events=config.tensorboard,
                    quiet=config.quiet,
                )
        else:
            fitted = untrained(head.eval(), material)
        if not group.leads:  # the first process evaluates and writes
            return TrainReport(folder, group.follow({}))
        best, history = fitted.best, fitted.history
        chosen = config.head.only(best.candidate)
        final = chosen.build(replace(spec, support=None)).to(device).eval()  # fitted already
        final.load_trained_state({name: t.to(device) for name, t in best.state.items()})
        record |= {"config": chosen.record()} | _keep_prompts(folder, chosen, spec, cache)
        run_folder.write_json(folder / "head.json", record)
        run_folder.write_tensors(folder / WEIGHTS["best"], best.state)
        run_folder.write_tensors(folder / WEIGHTS["last"], fitted.last)
        reported = [(parts.val, val)]
        if parts.test is not None:
            reported.append((parts.test, load(arrays, parts.test.rows, device)))
        values: dict[str, Any] = {
            "metric": main_metric(cache.task),
            "selected_on": config.select_on,
            "best_epoch": best.epoch,
            "candidate": best.candidate,
            "by_candidate": best.by_candidate,
            "val_rows_from": parts.val.name,
            "num_train_rows": len(parts.train),
            "num_parameters": sum(t.numel() for t in best.state.values()),
            "epochs": len(history),
            # A head that is made of its training rows is fitted when it is built.
            "seconds": sum(line["seconds"] for line in history) if head.trainable else built,
            "device": str(device),
        }
        values |= write_results(
            folder,
            final,
            reported,
            options=config.metrics,
            calibrating=config.select_on == "val",  # reported rows must not fit anything
            seed=config.seed,
            classes=cache.classes,
            values=values,
            history=history,
            record=record,
            config=config.record(),
            page=config.report,
        )
        values["seconds_total"] = time.perf_counter() - started
        run_folder.write_json(folder / "metrics.json", values)
        (folder / CHECKPOINT).unlink(missing_ok=True)
        group.follow(values)
    report = TrainReport(folder, values)
    if not config.quiet:
        print(summary(report))
    return report


def resolve(
    config: TrainConfig, cache: Cache, tower: Callable[[], PromptTower]
) -> tuple[TrainConfig, Parts, HeadArrays]:
    """The configuration with every unset field filled in, the rows it means, and the head's arrays.

    Args:
        config: what the user asked for.
        cache: trained on.
        tower: opens the text tower of the cache's backbone.

    Raises:
        ConfigError: options that contradict each other or the cache.
        CacheError: rows or an array are missing.
    """

    def open_run(path: Path) -> run_folder.LoadedRun:
        run = run_folder.load_run(path)
        run.require_fits(cache)
        return run

    head = config.head.prepared(open_run)
    head = head.with_optim(config.optim.lr, config.optim.weight_decay)
    arrays = open_arrays(cache, head, training=True, tower=tower)
    parts = choose_parts(
        cache,
        train_split=config.train_split,
        val_split=config.val_split,
        val_fraction=config.val_fraction,
        test_split=config.test_split,
        select_on=config.select_on,
        seed=config.seed,
        readable=arrays.only(head.arrays()).readable,
    )
    if config.shots is not None:
        parts = few_shot_parts(
            cache, parts, shots=config.shots, val_shots=config.val_shots, seed=config.shots_seed
        )
    optim = optimisation.resolve(config.optim, head.own_optim(), len(parts.train))
    config = config.model_copy(update={"head": head, "optim": optim})
    if config.run is None:
        kept = {k: v for k, v in config.record().items() if k not in _FREE}
        digest = fingerprint(kept | {"cache": cache.fingerprint})[:6]
        folder = Path("runs") / f"{cache.path.name}-{head.kind}-{digest}"
        config = config.model_copy(update={"run": folder})
    return config, parts, arrays


def without_caption(parts: Parts) -> str:
    """How many rows of each part have no caption and were left out for it; "" = none."""
    given = [part for part in (parts.train, parts.val, parts.test) if part is not None]
    lost = {part.name: part.without_caption for part in given}
    return ", ".join(
        f"{count:,} row{'s' * (count > 1)} of {name} without a caption"
        for name, count in lost.items()
        if count
    )


def _require_whole_batches(criterion: Loss | None, pieces: int, processes: int) -> None:
    """Refuses a loss that looks at a batch as one where batches come in pieces.

    Raises:
        ConfigError: naming what divides the batch.
    """
    if criterion is None or criterion.is_mean_over_rows or pieces * processes == 1:
        return
    reason = "loss.reduction=sum" if criterion.reduction == "sum" else "loss.weight_norm=by_batch"
    divided = f"optim.accumulate={pieces}" if pieces > 1 else f"{processes} processes"
    raise ConfigError(
        f"{reason} depends on which rows share a batch, and {divided} would divide it; leave one "
        "of the two out"
    )


def _warn_of_pieces(head: Head, pieces: int, processes: int) -> None:
    """Says which options of a head mean something else where batches come in pieces."""
    if head.batch_options and pieces * processes > 1:
        logger.warning(
            "head.%s: a mean over the classes of a batch is taken in each of its %d parts "
            "(optim.accumulate=%d, %d process%s), which is not that of the whole batch",
            " and head.".join(head.batch_options),
            pieces * processes,
            pieces,
            processes,
            "es" if processes > 1 else "",
        )


def summary(report: TrainReport) -> str:
    """The result of a training in a few lines."""
    values = report.metrics
    lines = []
    if values["epochs"]:
        chosen = f", {values['candidate']}" if values["candidate"] else ""
        lines.append(
            f"trained {values['epochs']} epochs of {values['num_train_rows']:,} rows in "
            f"{duration(values['seconds'])}; best epoch {values['best_epoch']}{chosen}"
        )
    for part in ("val", "test"):
        if part in values:
            source = values["val_rows_from"] if part == "val" else part
            lines += [f"{source}:", metrics_table(values[part])]
            lines += [
                f"  {values['metric']} of {name} alone: {value:.2%}"
                for name, value in values.get("monitors", {}).get(part, {}).items()
            ]
    return "\n".join([*lines, f"run folder: {report.run}"])


def _keep_prompts(
    folder: Path, chosen: HeadConfig, spec: FeatureSpec, cache: Cache
) -> dict[str, list[str]]:
    """Writes the class text features of the chosen head's templates alone; returns their record."""
    kept = run_folder.template_list(cache, chosen)
    if spec.prompts is None or kept == list(spec.templates):
        return {}
    prompts = spec.prompts[[list(spec.templates).index(template) for template in kept]]
    run_folder.write_tensors(folder / "prompts.safetensors", {"prompts": prompts.contiguous()})
    return {"templates": kept}


def _finished(folder: Path, config: TrainConfig, cache: Cache) -> dict[str, Any] | None:
    """Metrics of a finished training in the folder; None, and a folder made ready, without one.

    Raises:
        RunError: if the folder holds another training.
    """
    if config.restart:
        _clear(folder)
    if _require_same(folder, config, cache) and (folder / "metrics.json").is_file():
        return run_folder.read_json(folder / "metrics.json")
    if not config.resume:
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return None


def _require_same(folder: Path, config: TrainConfig, cache: Cache) -> bool:
    """Whether the folder holds this very training, finished or not; False if it is empty.

    Raises:
        RunError: if it holds another one, naming the first option that differs.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return False
    try:
        found = TrainConfig.from_yaml(file).record()
    except ConfigError as error:
        raise RunError(f"{error}; choose another --run, or --restart") from None
    expected = config.record()
    for name, have, want in differences(found, expected):
        if name.split(".")[0] not in _FREE:
            raise RunError(
                f"{folder}: {name} differs: trained there with {have!r}, now {want!r}; choose "
                "another --run, or --restart to replace it"
            )
    record = run_folder.read_json(folder / "head.json")
    held = record["cache"]["fingerprint"]
    if held != cache.fingerprint:
        grown = run_folder.steps_since(run_folder.members_of(record), cache.parts)
        if grown:  # rows have other numbers now: a half-done epoch cannot go on
            steps = "; ".join(f"an earlier state of {path}; {steps}" for path, steps in grown)
            raise RunError(
                f"{folder}: trained there on {steps}; --restart trains anew on all rows, another "
                "--run keeps this one"
            )
    if held != cache.fingerprint:
        raise RunError(
            f"{folder}: trained there on cache {held}, {cache.path} is {cache.fingerprint}; choose "
            "another --run, or --restart to replace it"
        )
    return True


def _clear(folder: Path) -> None:
    # config.yaml last: a folder without it counts as empty, one with it must be whole.
    for pattern in (
        "metrics*.json",
        "classes_*.csv",
        "calibration.json",
        "report.html",
        "history.jsonl",
        "curves.png",
        "comparisons/*/comparison.json",
        "comparisons/*/classes.csv",
        "prompts/class*.png",
        "*.safetensors",
        "config.yaml",
    ):
        for file in folder.glob(pattern):
            file.unlink()
    for file in (folder / event_file.FOLDER).glob("events.out.tfevents.*"):
        file.unlink()


if __name__ == "__main__":
    with ending_at_once():
        run_job(TrainConfig, run)
