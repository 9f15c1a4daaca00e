"""One-vs-rest heads: independent networks, one class alone, and what is reported of it."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_score, recall_score

from featcache.errors import ConfigError
from heads.base import FeatureSpec
from heads.losses import LOSSES
from heads.losses.base import ClassStatistics
from heads.losses.focal import Focal
from heads.members import MemberConfig
from heads.models import one_vs_rest
from heads.models.one_vs_rest import UNSCORED, OneVsRest, OneVsRestConfig
from heads.optim import OptimConfig
from heads.run_folder import LoadedRun, load_run
from heads.train import TrainConfig, run

from .conftest import write_cache

COUNTS = np.array([60, 30, 10])


def spec(task: str = "multi_label", loss: str = "focal") -> FeatureSpec:
    classes = pd.DataFrame({"name": ["rose", "tulip", "fern"], "count": COUNTS})
    criterion = LOSSES[loss]().build(ClassStatistics(COUNTS, 100))
    return FeatureSpec(
        5,
        3,
        task,
        COUNTS,
        classes,
        None,
        100.0,
        mean=torch.zeros(5),
        std=torch.ones(5),
        criterion=criterion,
    )


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(20, 5, generator=generator)
    return features, (torch.rand(20, 3, generator=generator) < 0.4).float()


@pytest.mark.parametrize("chunk", [1, 10**9])
def test_each_class_is_a_network_of_its_own(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(one_vs_rest, "CHUNK_ELEMENTS", chunk)
    torch.manual_seed(0)
    head = OneVsRestConfig(hidden=4).build(spec())
    assert head.first is not None
    features, targets = rows()
    logits = head(features)
    for c in range(3):
        for i in range(20):
            hidden = (head.first[0][c] @ features[i] + head.first[1][c]).clamp(min=0)
            expected = head.weight[c] @ hidden + head.bias[c]
            assert logits[i, c].item() == pytest.approx(expected.item(), abs=1e-5)
    head.loss((features,), targets, 0.0)["loss"].backward()
    found = [p.grad.clone() for p in head.parameters() if p.grad is not None]
    head.zero_grad()
    for c in range(3):  # a class's parameters learn from that class's labels alone
        Focal().terms(head(features)[:, c : c + 1], targets[:, c : c + 1]).sum().div(60).backward()
    for one, parameter in zip(found, head.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-6)


def test_one_class_is_trained_as_among_all() -> None:
    """Its weights in a long-tailed loss depend on a row's other labels: they are not forgotten."""
    features, targets = rows()
    options: list[tuple[str, dict[str, object]]] = [
        ("focal", {}),
        ("asl", {}),
        ("distribution_balanced", {}),
        ("rebalanced", {"weight_norm": "by_instance"}),
        ("class_balanced", {}),
        ("class_balanced", {"mode": "average_n"}),
        ("class_balanced_ntr", {"mode": "min_n"}),
    ]
    for loss, values in options:
        criterion = LOSSES[loss](**values).build(ClassStatistics(COUNTS, 100))
        given = dataclasses.replace(spec(), criterion=criterion)
        head = OneVsRestConfig(class_index=1, hidden=0).build(given)
        with torch.no_grad():
            head.weight.normal_()
        expected = criterion.terms(head(features), targets)[:, 1].mean()
        torch.testing.assert_close(head.loss((features,), targets, 0.0)["loss"], expected)
    for loss in ("zlpr", "mls"):  # one term a row: of this class alone
        head = OneVsRestConfig(class_index=1, hidden=0).build(spec(loss=loss))
        with torch.no_grad():
            head.weight.normal_()
        kind = LOSSES[loss]().build(ClassStatistics(COUNTS[1:2], 100))
        expected = kind(head(features)[:, 1:2], targets[:, 1:2])
        torch.testing.assert_close(head.loss((features,), targets, 0.0)["loss"], expected)


def test_other_classes_are_never_predicted() -> None:
    head = OneVsRestConfig(class_name="tulip").build(spec())
    logits = head(rows()[0])
    assert (logits[:, [0, 2]] == UNSCORED).all()
    assert (torch.sigmoid(logits[:, [0, 2]]) == 0).all()
    assert logits[:, 1].abs().max() < 100
    assert head.scored_classes == [1]


def test_a_head_of_one_class_is_no_member_of_another(tmp_path: Path) -> None:
    """What it says of the other classes is no logit that anything could be added to."""
    config = OneVsRestConfig(class_index=1)
    run = LoadedRun(tmp_path / "one", config.build(spec()), config, spec().classes, {})
    with pytest.raises(ConfigError, match="one: its head one_vs_rest scores 1 of 3 classes"):
        MemberConfig.of(run)


def test_f43_a_class_that_is_not_there_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="class_index=3: the cache has classes 0 to 2"):
        OneVsRestConfig(class_index=3).build(spec())
    with pytest.raises(ConfigError, match=r"class_name='oak': the cache has no class.*rose"):
        OneVsRestConfig(class_name="oak").build(spec())
    twice = dataclasses.replace(spec(), classes=pd.DataFrame({"name": ["a", "a", "b"], "count": 1}))
    with pytest.raises(ConfigError, match="more than one class of that name"):
        OneVsRestConfig(class_name="a").build(twice)
    with pytest.raises(ConfigError, match="class_index is for multi_label data"):
        OneVsRestConfig(class_index=0).build(spec("single_label"))
    with pytest.raises(ValueError, match="both choose"):
        OneVsRestConfig(class_index=0, class_name="rose")


def test_f43_the_run_reports_precision_and_recall_of_its_class(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((300, 3)) < [0.5, 0.3, 0.1]
    features = labels @ rng.normal(size=(3, 6)) + 0.7 * rng.normal(size=(300, 6))
    splits = ["train"] * 200 + ["val"] * 50 + ["test"] * 50
    classes = pd.DataFrame({"name": ["rose", "tulip", "fern"], "count": labels[:200].sum(0)})
    path = write_cache(
        tmp_path / "cache",
        features.astype(np.float32),
        [list(np.flatnonzero(row)) for row in labels],
        splits,
        classes=classes,
        task="multi_label",
    )
    report = run(
        TrainConfig(
            cache=path,
            head=OneVsRestConfig(class_name="tulip"),
            optim=OptimConfig(epochs=30, lr=1e-2),
            run=tmp_path / "run",
            quiet=True,
        )
    )
    assert TrainConfig.from_yaml(tmp_path / "run" / "config.yaml").loss is None
    table = pd.read_csv(tmp_path / "run" / "classes_test.csv")
    assert table["average_precision"].notna().tolist() == [False, True, False]
    assert table["num_predicted"].tolist()[::2] == [0, 0]
    head = load_run(tmp_path / "run").head
    assert isinstance(head, OneVsRest)
    scores = head(torch.from_numpy(features[250:]).float())[:, 1].detach().numpy()
    wanted = labels[250:, 1]
    test = report.metrics["test"]
    assert test["map"] == pytest.approx(average_precision_score(wanted, scores))
    assert test["micro_precision"] == pytest.approx(precision_score(wanted, scores >= 0))
    assert test["micro_recall"] == pytest.approx(recall_score(wanted, scores >= 0))
    assert table["precision"][1] == pytest.approx(test["micro_precision"])
    assert test["map"] == pytest.approx(table["average_precision"][1])
    assert test["map"] > 0.7
