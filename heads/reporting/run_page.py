"""The page of one run: everything that its folder and its scores say, in one HTML file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from featcache.reporting import page
from featcache.reporting.page import Fact, Section
from heads.base import Head
from heads.calibration import Calibration
from heads.data import FeatureTables
from heads.progress import duration
from heads.reporting import sections
from heads.run_folder import members_of, write_atomic
from heads.scoring import Intervals, MetricsConfig, Scored

FILE = "report.html"
"""Name in a run folder."""

_TITLES = {"top1": "top-1", "map": "mAP"}


@runtime_checkable
class WeighsModalities(Protocol):
    """A head that gives each row weights of its modalities."""

    modalities: Sequence[str]

    def weights(self, *features: Tensor) -> Tensor:
        """(B, M) 0..1."""


@runtime_checkable
class HasLabelGraph(Protocol):
    """A head that passes messages between labels."""

    def label_graph(self) -> Tensor:
        """(C, C) weight of the edge between two labels, 0 = none."""


@dataclass(frozen=True)
class RunPage:
    """What a page shows.

    Attributes:
        folder: run folder.
        record: `head.json`. values: `metrics.json`. config: the resolved configuration.
        history: one record an epoch; empty for heads that are not trained.
        classes: class table.
        main: the rows that classes, confusions and calibration are shown on.
        others: further columns of the table of metrics: name, metrics, intervals.
        calibration: None = the head's scores only rank.
        options: how `main` was counted.
        extra: sections of the head itself, and of pictures.
        taxa: draw confusions level by level too.
    """

    folder: Path
    record: Mapping[str, Any]
    values: Mapping[str, Any]
    config: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]
    classes: pd.DataFrame
    main: Scored
    others: Sequence[tuple[str, Mapping[str, float], Intervals]]
    calibration: Calibration | None
    options: MetricsConfig
    extra: Sequence[Section] = ()
    taxa: bool = True

    def write(self, out: Path | None = None) -> Path:
        """Writes the page, by default `report.html` in the run folder; returns its path."""
        out = out or self.folder / FILE
        write_atomic(out, self.html().encode())
        return out

    def html(self) -> str:
        """The whole page; it needs no other file and no network."""
        name = Path(self.record["cache"]["path"]).name
        return page.page(
            f"{self.record['kind']} on {name}", self._subtitle(), self._facts(), [*self._sections()]
        )

    def _sections(self) -> Iterator[Section]:
        main, boundaries = self.main, self.options.shot_boundaries
        columns = [*self.others, (main.name, main.scores.metrics, main.scores.intervals)]
        draws = main.scores.draws
        yield sections.metric_section(columns, self.options.confidence, draws)
        if self.history:
            metric, best = self.values["metric"], self.values["best_epoch"]
            yield sections.curve_section(self.history, metric, best)
        if "monitors" in self.values:
            yield sections.monitor_section(self.values["monitors"], self.values["metric"])
        yield sections.class_section(main, self.classes, boundaries)
        if main.outputs.rows is not None:
            yield sections.confusion_section(main, self.classes, self.taxa)
        if self.calibration is not None:
            yield sections.calibration_section(main, self.calibration)
        yield from self.extra
        yield sections.option_section(self.config, self.record)

    def _subtitle(self) -> str:
        backbones = [one.identity.backbone for one in members_of(self.record)]
        names = [f"{one.kind} {one.name}" for one in backbones]
        task = str(self.record["task"]).replace("_", " ")
        return f"{self.folder.name}; {task}; features of {', '.join(names)}"

    def _facts(self) -> list[Fact]:
        metric, scores = str(self.values["metric"]), self.main.scores
        label = f"{_TITLES.get(metric, metric)}, {self.main.name}"
        if metric in scores.intervals:
            low, high = scores.intervals[metric]
            label += f" ({low:.1%} .. {high:.1%})"
        facts = [
            Fact(f"{scores.metrics[metric]:.2%}", label),
            Fact(f"{len(self.classes):,}", "classes"),
            Fact(f"{self.values['num_train_rows']:,}", "rows trained on"),
            Fact(f"{self.values['num_parameters']:,}", "numbers trained"),
        ]
        if self.history:
            label = f"training, {self.values['epochs']:,} epochs"
            facts.append(Fact(duration(self.values["seconds"]), label))
        if self.values["selected_on"] == "test":
            facts.append(Fact("test", "rows decided: figures are optimistic", bad=True))
        return facts


@torch.inference_mode()
def head_sections(
    head: Head, table: FeatureTables, where: str, classes: pd.DataFrame, options: MetricsConfig
) -> Iterator[Section]:
    """What a head can show of itself: weights of modalities, a graph of labels.

    Args:
        head: on the table's device, in evaluation mode.
        table: features of the rows shown.
        where: their name.
        classes: class table.
        options: its boundaries group the labels.
    """
    if isinstance(head, WeighsModalities) and callable(head.weights):
        spans = table.spans(len(head.modalities))
        weights = [head.weights(*table.slice(*span)).float().cpu().numpy() for span in spans]
        yield sections.modality_section(np.concatenate(weights), list(head.modalities), where)
    if isinstance(head, HasLabelGraph):
        edges = head.label_graph().float().cpu().numpy()
        yield sections.graph_section(edges, classes, options.shot_boundaries)
