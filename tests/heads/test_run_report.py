"""Calibration, confidence intervals, comparison and the page of trained runs."""

import json
import re
import shutil
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from featcache.errors import CacheMismatchError, ConfigError
from featcache.reader import open_cache
from featcache.submission import labels_of
from heads import compare, evaluate, metrics, predict, report, train, visualise
from heads.base import Head
from heads.calibration import fit_multi_label, read_calibration
from heads.compare import CompareConfig
from heads.evaluate import EvaluateConfig
from heads.models.linear import LinearConfig
from heads.models.one_vs_rest import OneVsRestConfig
from heads.optim import OptimConfig
from heads.parts import Part
from heads.predictions import rule_of
from heads.report import ReportConfig
from heads.reporting import sections
from heads.run_folder import RunError, load_run
from heads.scoring import MetricsConfig, Outputs
from heads.train import TrainConfig
from heads.visualise import VisualiseConfig

from .conftest import class_table, multi_label_cache, single_label_cache


@pytest.fixture(autouse=True)
def no_pages() -> None:
    """Here pages are written."""


def fitted(cache: Path, run: Path, epochs: int = 4, **options: Any) -> Path:
    head = LinearConfig(lrs=(0.1,), weight_decays=(0.0,))
    optim = OptimConfig(epochs=epochs)
    config = TrainConfig(cache=cache, run=run, head=head, optim=optim, quiet=True, **options)
    return train.run(config).run


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a cache, and two runs on it: good and poor."""
    folder = tmp_path_factory.mktemp("single")
    classes = class_table(5).assign(name=["c0", "<b>bold</b>", "c2", "c3", "c4"])
    cache = single_label_cache(folder / "cache", noise=2.5, classes=classes)
    fitted(cache, folder / "good", epochs=8)
    fitted(cache, folder / "poor", epochs=1, report=False)
    return folder


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a cache and a run on it."""
    folder = tmp_path_factory.mktemp("multi")
    fitted(multi_label_cache(folder / "cache"), folder / "run", val_fraction=0.3)
    return folder


def scores_of(folder: Path, run: Path, rows: np.ndarray) -> np.ndarray:
    features = open_cache(folder / "cache").array("image/projected").read(rows)
    return load_run(run).head(torch.from_numpy(features.astype(np.float32))).detach().numpy()


def test_f44_thresholds_come_from_held_out_rows_alone(multi: Path) -> None:
    cache, run = open_cache(multi / "cache"), multi / "run"
    config = TrainConfig.from_yaml(run / "config.yaml")
    _, parts, _ = train.resolve(config, cache, lambda: None)
    assert not set(parts.val.rows) & set(parts.train.rows)
    assert not set(parts.val.rows) & set(cache.rows("test"))
    found = read_calibration(run)
    assert found is not None
    assert found.split == "train (held out)"
    expected = fit_multi_label(scores_of(multi, run, parts.val.rows), parts.val.targets, "")
    assert found.temperature == pytest.approx(expected.temperature, rel=1e-3)
    np.testing.assert_allclose(found.thresholds, expected.thresholds)


def test_searched_thresholds_reach_metrics_predictions_and_submissions(
    multi: Path, tmp_path: Path
) -> None:
    cache, run = open_cache(multi / "cache"), multi / "run"
    rows = cache.rows("test")
    found = read_calibration(run)
    assert found is not None
    scores = scores_of(multi, run, rows)
    probabilities = 1 / (1 + np.exp(-scores / found.temperature))
    chosen = probabilities >= found.threshold_array()
    options = MetricsConfig(threshold="searched")
    values = evaluate.run(EvaluateConfig(run=run, metrics=options)).metrics
    expected = metrics.threshold_metrics(chosen, cache.multi_hot(rows))
    assert values["micro_f1"] == pytest.approx(expected["micro_f1"])
    assert values["micro_f1_searched"] == values["micro_f1"]
    loaded = load_run(run)
    for scaled in (True, False):
        rule = rule_of(loaded, 3, "searched", scaled)
        frame, _ = predict.predict_cache(loaded, cache, rows, rule)
        names = np.asarray(loaded.class_names, dtype=object)
        assert frame["classes"].tolist() == [names[row].tolist() for row in chosen]
    best = probabilities.max(1)
    frame, _ = predict.predict_cache(loaded, cache, rows, rule_of(loaded, 3, "searched"))
    np.testing.assert_allclose(frame["probability_1"], best, rtol=1e-5)
    gap = (probabilities - found.threshold_array()).argmax(1)
    assert frame["nearest"].tolist() == names[gap].tolist()
    ids = pd.DataFrame({"name": names, "label_id": [str(10 + c) for c in range(len(names))]})
    labels = labels_of(frame, ids)
    for row, number in zip(range(len(rows)), rows, strict=True):
        wanted = (10 + np.flatnonzero(chosen[row])).tolist() or [10 + gap[row]]
        assert labels[cache.ids[number]] == wanted


def test_calibration_is_of_the_best_weights_and_the_trained_classes(multi: Path) -> None:
    run = multi / "run"
    with pytest.raises(RunError, match="no searched thresholds"):
        rule_of(load_run(run, weights="last"), 5, "searched")
    options = MetricsConfig(threshold="searched")
    with pytest.raises(RunError, match="no searched thresholds"):
        evaluate.run(EvaluateConfig(run=run, weights="last", metrics=options))
    with pytest.raises(ValueError, match=r"threshold is 1\.5; it has to be between 0 and 1"):
        MetricsConfig(threshold=1.5)


def test_rows_decided_on_test_fit_nothing(tmp_path: Path) -> None:
    cache = multi_label_cache(tmp_path / "cache")
    run = fitted(cache, tmp_path / "run", epochs=1, select_on="test", report=False)
    assert read_calibration(run) is None


def test_thresholds_that_nothing_may_fit_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="searched needs validation rows"):
        TrainConfig.from_values(
            {"cache": tmp_path, "select_on": "test", "metrics": {"threshold": "searched"}}
        )


def test_training_anew_leaves_nothing_of_the_run_before(tmp_path: Path) -> None:
    cache = single_label_cache(tmp_path / "cache")
    run, other = tmp_path / "run", fitted(cache, tmp_path / "other", epochs=1, report=False)
    fitted(cache, run, epochs=1, report=False, tensorboard=True)
    before = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    evaluate.run(EvaluateConfig(run=run, split="val"))
    compare.run(CompareConfig(run=run, other=other, metrics=MetricsConfig(bootstrap=100)))
    report.run(ReportConfig(run=run, metrics=MetricsConfig()))
    (run / "prompts").mkdir()
    (run / "prompts" / "class0_rose_all_k.png").touch()
    fitted(cache, run, epochs=1, report=False, tensorboard=True, restart=True)
    after = {file.relative_to(run).as_posix() for file in run.rglob("*") if file.is_file()}
    assert {re.sub(r"tfevents\..*", "", name) for name in after} == {
        re.sub(r"tfevents\..*", "", name) for name in before
    }


def test_the_best_classes_of_a_row_can_count_as_predicted(multi: Path) -> None:
    cache = open_cache(multi / "cache")
    rows = cache.rows("test")
    targets = cache.multi_hot(rows)
    values = evaluate.run(EvaluateConfig(run=multi / "run", metrics=MetricsConfig(top_k=2))).metrics
    chosen = np.zeros_like(targets, bool)
    for row, scores in enumerate(scores_of(multi, multi / "run", rows)):
        chosen[row, sorted(range(6), key=lambda c: (-scores[c], c))[:2]] = True
    labelled = targets.any(1)
    hits = (chosen & (targets > 0))[labelled].sum()
    assert values["micro_precision"] == pytest.approx(hits / (2 * labelled.sum()))
    assert values["micro_recall"] == pytest.approx(hits / targets.sum())


def test_intervals_are_written_beside_the_metrics(
    single: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = MetricsConfig(bootstrap=300, confidence=0.8)
    scores = evaluate.run(EvaluateConfig(run=single / "good", metrics=options))
    written = json.loads((single / "good" / "metrics_test.json").read_text())
    assert written["bootstrap"] == {"draws": 300, "confidence": 0.8}
    low, high = written["intervals"]["top1"]
    assert low < scores.metrics["top1"] < high
    again = evaluate.run(EvaluateConfig(run=single / "good", metrics=options))
    assert again.intervals == scores.intervals
    assert f"{low:7.2%} ..{high:8.2%}" in capsys.readouterr().out


def test_f32_classes_are_told_apart_by_number_not_by_name(tmp_path: Path) -> None:
    table = class_table(5).assign(name=["a_b", "a b", "c", "d", "e"])
    cache = single_label_cache(tmp_path / "cache", classes=table)
    run = fitted(cache, tmp_path / "run", epochs=3, report=False)
    scores = evaluate.run(EvaluateConfig(run=run))
    assert scores.per_class["name"].tolist() == table["name"].tolist()
    assert scores.per_class["num_rows"].sum() == 80
    right = scores.per_class["accuracy"] * scores.per_class["num_rows"]
    assert right.sum() / 80 == pytest.approx(scores.metrics["top1"])
    with pytest.raises(ConfigError, match="is that of classes 0, 1; give class_index"):
        visualise.class_number(["a_b", "a b"], "a b", None)


def test_page_of_a_training_is_whole_and_safe(single: Path) -> None:
    text = (single / "good" / "report.html").read_text()
    assert not (single / "poor" / "report.html").exists()
    assert "<b>bold</b>" not in text
    assert "&lt;b&gt;bold&lt;/b&gt;" in text
    links = re.findall(r'(?:src|href)="([^"]+)', text)
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert "<script" not in text
    for name in ("metrics", "training", "classes", "confusion", "calibration", "options"):
        assert f'<section id="{name}">' in text
    values = json.loads((single / "good" / "metrics.json").read_text())
    assert f"{values['test']['top1']:.2%}" in text
    assert f"{values['val']['top1']:.2%}" in text
    assert "95% interval" in text


def test_page_of_the_job_has_more(single: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "x.html"
    options = MetricsConfig(bootstrap=200)
    assert report.run(ReportConfig(run=single / "good", out=out, metrics=options)) == out
    text = out.read_text()
    assert "By genus" in text
    assert "200 draws" in text
    assert "By genus" not in (single / "good" / "report.html").read_text()
    with pytest.raises(ConfigError, match=r"has to end with \.html"):
        report.run(ReportConfig(run=single / "good", out=tmp_path / "x.pdf"))


class Showing(Head):
    """Another head's scores, weights of two modalities, and a ring of labels."""

    modalities = ("image", "text")

    def __init__(self, inner: Head) -> None:
        super().__init__()
        self.forward = inner.forward

    def weights(self, features: torch.Tensor) -> torch.Tensor:
        share = features[:, 0].sigmoid()
        return torch.stack([share, 1 - share], 1)

    def label_graph(self) -> torch.Tensor:
        return torch.eye(6) + torch.eye(6).roll(1, 0) * 0.5


def test_page_of_a_head_that_weighs_modalities_and_has_a_graph(
    multi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(multi / "run")
    run = replace(run, head=Showing(run.head).eval())
    monkeypatch.setattr(report, "load_run", lambda *_: run)
    values = json.loads((multi / "run" / "metrics.json").read_text())
    values["monitors"] = {"val": {"image alone": 0.123}, "test": {"image alone": 0.456}}
    monkeypatch.setattr(report, "read_json", lambda _: values)
    options = MetricsConfig(bootstrap=100)
    out = report.run(ReportConfig(run=multi / "run", out=tmp_path / "x.html", metrics=options))
    text = out.read_text()
    assert "Weight of each modality in each of the 100 rows of test" in text
    assert "6 edges between 6 labels" in text
    assert "Thresholds searched there" in text
    assert "<td>image alone</td><td class=n>12.30%</td><td class=n>45.60%</td>" in text


def test_mcnemar_is_the_binomial_tail() -> None:
    for first, second in ((0, 0), (3, 9), (9, 3), (5, 5)):
        n, k = first + second, min(first, second)
        tail = sum(comb(n, i) for i in range(k + 1)) / 2**n
        assert compare.mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_comparison_of_two_heads_on_the_same_rows(
    single: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = MetricsConfig(bootstrap=200)
    good, poor = single / "good", single / "poor"
    found = compare.run(CompareConfig(run=good, other=poor, metrics=options))
    values = [json.loads((run / "metrics.json").read_text())["test"] for run in (good, poor)]
    top1 = found.differences["top1"]
    assert (top1.first, top1.second) == (values[0]["top1"], values[1]["top1"])
    assert top1.difference == pytest.approx((found.only_first - found.only_second) / 80)
    assert top1.low <= top1.difference <= top1.high
    assert found.mcnemar_p == compare.mcnemar(found.only_first, found.only_second)
    table = pd.read_csv(good / "comparisons" / "poor" / "classes.csv")
    assert (table["difference"] > 0).sum() == found.wins
    assert found.wins + found.losses + found.ties == 5
    written = json.loads((good / "comparisons" / "poor" / "comparison.json").read_text())
    assert written["mcnemar_p"] == found.mcnemar_p
    assert "exact McNemar p" in capsys.readouterr().out
    same = compare.run(CompareConfig(run=good, other=good, metrics=options))
    assert same.mcnemar_p == 1.0
    for one in same.differences.values():
        assert (one.difference, one.low, one.high, one.p) == (0, 0, 0, 1)


def test_differences_of_multi_label_heads_are_paired(multi: Path, tmp_path: Path) -> None:
    other = fitted(multi / "cache", tmp_path / "other", epochs=1, report=False, seed=3)
    found = compare.run(
        CompareConfig(run=multi / "run", other=other, metrics=MetricsConfig(bootstrap=200))
    )
    gap = found.differences["map"]
    assert gap.low <= gap.difference <= gap.high
    assert gap.difference == pytest.approx(found.classes["difference"].mean())
    assert found.mcnemar_p is None
    assert {"micro_f1", "map_rows"} <= found.differences.keys()


def test_a_head_of_one_class_is_compared_in_that_class(multi: Path, tmp_path: Path) -> None:
    cache = multi / "cache"
    one = train.run(
        TrainConfig(
            cache=cache,
            run=tmp_path / "one",
            head=OneVsRestConfig(class_index=2),
            optim=OptimConfig(epochs=3),
            val_fraction=0.3,
            quiet=True,
        )
    ).run
    options = MetricsConfig(bootstrap=200)
    found = compare.run(CompareConfig(run=one, other=multi / "run", metrics=options))
    expected = [
        pd.read_csv(run / "classes_test.csv")["average_precision"][2]
        for run in (one, multi / "run")
    ]
    gap = found.differences["map"]
    assert [gap.first, gap.second] == pytest.approx(expected)
    assert gap.low <= gap.difference <= gap.high
    assert (found.wins + found.losses + found.ties) == 1
    outputs = replace(outputs_of_run(one, cache), columns=[2])
    probabilities, right = sections.statements(outputs, read_calibration(one))
    assert len(right) == len(outputs.targets) == len(probabilities["as trained"])


def outputs_of_run(run: Path, cache: Path) -> Outputs:
    loaded = load_run(run)
    device = torch.device("cpu")
    return evaluate.outputs_of(loaded, open_cache(cache), "test", MetricsConfig(), device)[0]


def test_rows_are_compared_by_id_where_heads_leave_some_out(
    single: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = compare.outputs_of, []

    def leaving_one_out(*arguments: Any) -> tuple[Outputs, Part]:
        outputs, part = original(*arguments)
        calls.append(part)
        # As many rows with the same labels, of which one is another.
        rows = part.rows + (np.arange(len(part)) == 0) if len(calls) == 2 else part.rows
        return outputs, replace(part, rows=rows)

    monkeypatch.setattr(compare, "outputs_of", leaving_one_out)
    with pytest.raises(CacheMismatchError, match=r"80 and 80 rows .* not the same ones"):
        compare.run(CompareConfig(run=single / "good", other=single / "poor"))


def test_different_rows_labels_or_tasks_are_refused(
    single: Path, multi: Path, tmp_path: Path
) -> None:
    options = MetricsConfig(bootstrap=100)
    with pytest.raises(RunError, match=r"is single_label, .* is multi_label"):
        compare.run(CompareConfig(run=single / "good", other=multi / "run", metrics=options))
    classes = class_table(5).assign(name=["c0", "<b>bold</b>", "c2", "c3", "c4"])
    caches = {
        r"rows of split 'test' have other labels": {"seed": 5},
        r"80 readable rows in .* and 79 in .*differ first in r361": {"invalid": [361]},
    }
    for number, (message, changes) in enumerate(caches.items()):
        cache = single_label_cache(tmp_path / str(number), noise=2.5, classes=classes, **changes)
        config = CompareConfig(
            run=single / "good", other=single / "poor", other_cache=cache, metrics=options
        )
        with pytest.raises(CacheMismatchError, match=message):
            compare.run(config)
    with pytest.raises(ValueError, match="bootstrap is 10"):
        CompareConfig(run=tmp_path, other=tmp_path, metrics=MetricsConfig(bootstrap=10))


def test_grids_of_sub_prompts_are_drawn(
    single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = load_run(single / "good")
    with pytest.raises(RunError, match="head linear has no sub-prompts"):
        visualise.run(VisualiseConfig(run=single / "good", class_index=1))
    taus = []

    def assignments(features: torch.Tensor, number: int, temperature: float) -> torch.Tensor:
        taus.append((number, temperature))
        return features[:, :3].softmax(1)

    run.head.assignments = assignments
    monkeypatch.setattr(visualise, "load_run", lambda *_: run)
    config = VisualiseConfig(
        run=single / "good",
        class_name="<B>bold</b>",
        top_n=20,
        tile=32,
        temperature=2.0,
        per_prompt=True,
        out_dir=tmp_path,
    )
    files = visualise.run(config)
    endings = ["all_k", "k0", "k1", "k2"]
    assert [file.name for file in files] == [f"class1__b_bold_b__{end}.png" for end in endings]
    assert taus == [(1, 2.0)]
    with Image.open(files[0]) as sheet:
        size = sheet.size
    assert size == (132 + 20 * 36 + 4, 44 + 3 * 36 + 4)
    cache = open_cache(single / "cache")
    rows = cache.rows("test")
    rows = rows[cache.labels(rows) == 1]
    features = cache.array("image/projected").read(rows).astype(np.float32)
    shares = torch.from_numpy(features)[:, :3].softmax(1).numpy()
    out = capsys.readouterr().out
    best = rows[shares[:, 2].argmax()]
    assert f"prompt   2  mean share {shares[:, 2].mean():.3f}  highest: {cache.ids[best]}" in out
    assert "cannot be read now" in out  # the cache's images were never there


def test_class_is_named_or_numbered() -> None:
    names = ["red_fox", "hen"]
    assert visualise.class_number(names, "Red fox", None) == 0
    assert visualise.class_number(names, None, 1) == 1
    with pytest.raises(ConfigError, match=r"classes are 0\.\.1"):
        visualise.class_number(names, None, 2)
    with pytest.raises(ConfigError, match="no class 'cat'"):
        visualise.class_number(names, "cat", None)
    with pytest.raises(ValueError, match="either class_name or class_index"):
        VisualiseConfig(run=Path("x"))


def test_curves_show_validation_loss_and_what_was_watched() -> None:
    from heads import pictures

    history = [
        {
            "epoch": e,
            "loss": 1.0 / e,
            "lr": 0.1,
            "val_top1": 1 - 1 / e,
            "val_loss": 0.5,
            "monitors": {"image": 0.3, "text": 0.2},
        }
        for e in range(1, 6)
    ]
    made = pictures.curves(history, "", "top1", best_epoch=2)
    left, middle, _ = made.axes
    assert [line.get_label() for line in left.lines] == ["training", "validation"]
    assert [line.get_label() for line in middle.lines][:3] == ["image", "text", "whole head"]
    assert middle.texts[0].get_text() == "50.00% at epoch 2"


def test_pages_can_be_made_where_older_runs_have_no_calibration(
    single: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "old"
    shutil.copytree(single / "good", copied)
    (copied / "calibration.json").unlink()
    out = report.run(ReportConfig(run=copied, metrics=MetricsConfig(bootstrap=100)))
    assert out == copied.resolve() / "report.html"
    assert '<section id="calibration">' not in out.read_text()
