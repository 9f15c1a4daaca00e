"""Metrics against scikit-learn and slow loops."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as reference

from featcache.shot_groups import group_names, stated_groups
from heads import metrics

RNG = np.random.default_rng


def tied_logits(num_rows: int, num_classes: int, seed: int) -> np.ndarray:
    """Scores on a coarse grid, so that many are equal."""
    return RNG(seed).integers(0, 6, (num_rows, num_classes)).astype(np.float32) / 2


def test_rank_counts_equal_scores_of_lower_index_first() -> None:
    logits, labels = tied_logits(200, 7, 0), RNG(1).integers(0, 7, 200)
    rank = metrics.target_rank(torch.from_numpy(logits), torch.from_numpy(labels)).numpy()
    slow = [
        sorted(range(7), key=lambda c: (-row[c], c)).index(label)
        for row, label in zip(logits, labels, strict=True)
    ]
    assert rank.tolist() == slow
    rows = metrics.score_rows(torch.from_numpy(logits), torch.from_numpy(labels))
    assert ((rows.rank == 0) == (rows.predicted == rows.label)).all()


def test_single_label_metrics_against_scikit_learn() -> None:
    rng = RNG(2)
    labels = rng.integers(0, 9, 500)
    logits = rng.normal(size=(500, 9)).astype(np.float32)
    logits[np.arange(500), labels] += 1
    counts = np.asarray([500, 100, 99, 50, 20, 19, 3, 1, 0])
    parts = [
        metrics.score_rows(torch.from_numpy(logits[i]), torch.from_numpy(labels[i]))
        for i in (slice(0, 123), slice(123, 500))
    ]
    rows = metrics.RowScores.concatenate(parts)
    found = metrics.single_label_metrics(rows, counts)
    predicted = logits.argmax(1)
    assert found["top1"] == pytest.approx(reference.accuracy_score(labels, predicted))
    assert found["top5"] == pytest.approx(reference.top_k_accuracy_score(labels, logits, k=5))
    assert found["balanced_accuracy"] == pytest.approx(
        reference.balanced_accuracy_score(labels, predicted)
    )
    accuracy = [(predicted[labels == c] == c).mean() for c in range(9)]
    assert found["top1_head"] == pytest.approx(np.mean(accuracy[:2]))
    assert found["top1_medium"] == pytest.approx(np.mean(accuracy[2:5]))
    assert found["top1_tail"] == pytest.approx(np.mean(accuracy[5:]))
    assert [found[f"num_{g}_classes"] for g in ("head", "medium", "tail")] == [2, 3, 4]
    exp = np.exp(logits - logits.max(1, keepdims=True))
    top = np.sort(exp / exp.sum(1, keepdims=True), 1)
    assert found["mean_margin"] == pytest.approx((top[:, -1] - top[:, -2]).mean(), abs=1e-6)


def test_stated_groups_win_over_counts() -> None:
    logits, labels = tied_logits(300, 4, 5), RNG(6).integers(0, 4, 300)
    rows = metrics.score_rows(torch.from_numpy(logits), torch.from_numpy(labels))
    counts, groups = np.asarray([500, 500, 5, 5]), ["tail", "head", "medium", "tail"]
    found = metrics.single_label_metrics(rows, counts, groups=groups)
    hits = rows.rank == 0
    accuracy = [hits[labels == c].mean() for c in range(4)]
    assert found["top1_head"] == pytest.approx(accuracy[1])
    assert found["top1_medium"] == pytest.approx(accuracy[2])
    assert found["top1_tail"] == pytest.approx((accuracy[0] + accuracy[3]) / 2)
    targets = np.eye(4, dtype=np.uint8)[labels]
    found = metrics.multi_label_metrics(logits, targets, counts, groups=groups)
    ap = reference.average_precision_score(targets, logits, average=None)
    assert found["map_tail"] == pytest.approx((ap[0] + ap[3]) / 2)
    assert found["num_tail_classes"] == 2


def test_only_the_groups_names_state_groups() -> None:
    table = pd.DataFrame({"name": ["a", "b"], "group": ["head", "tail"]})
    assert stated_groups(table) == ["head", "tail"]
    assert stated_groups(table.assign(group=["head", "fish"])) is None
    assert stated_groups(table[["name"]]) is None
    assert group_names(np.asarray([100, 99, 20, 19, 0])) == [
        "head",
        "medium",
        "medium",
        "tail",
        "tail",
    ]


def test_classes_without_rows_do_not_enter_the_balanced_accuracy() -> None:
    logits = torch.eye(3)[[0, 0, 1]]
    rows = metrics.score_rows(logits, torch.tensor([0, 1, 1]))
    found = metrics.single_label_metrics(rows, np.asarray([5, 5, 5]))
    assert found["balanced_accuracy"] == pytest.approx(0.75)
    assert "top1_head" not in found


def test_calibration_error_against_a_loop_over_bins() -> None:
    rng = RNG(3)
    confidence = rng.uniform(0, 1, 400).astype(np.float32)
    correct = rng.uniform(0, 1, 400) < 0.6
    slow = 0.0
    for low in np.arange(10) / 10:
        inside = (confidence > low) & (confidence <= low + 0.1)
        if inside.any():
            slow += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    found = metrics.expected_calibration_error(confidence, correct, 10)
    assert found == pytest.approx(slow, abs=1e-6)


def taxonomy_table() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "name": list("abcde"),
            "species": list("abcde"),
            "genus": ["g", "g", "h", "h", ""],
            "family": ["f", "f", "f", "f", "k"],
            "order": ["", "", "", "", ""],
        }
    )


def test_taxonomy_levels_against_a_loop() -> None:
    classes = taxonomy_table()
    taxonomy = metrics.Taxonomy.from_classes(classes)
    assert list(taxonomy.codes) == ["genus", "family"]
    rng = RNG(4)
    logits, labels = rng.normal(size=(300, 5)).astype(np.float32), rng.integers(0, 5, 300)
    rows = metrics.score_rows(torch.from_numpy(logits), torch.from_numpy(labels), taxonomy)
    found = metrics.single_label_metrics(rows, np.ones(5, int), taxonomy=taxonomy)
    probabilities = torch.from_numpy(logits).softmax(1).numpy()
    for level in ("genus", "family"):
        names = classes[level].tolist()
        mapped, summed = [], []
        for row, label in zip(probabilities, labels, strict=True):
            if not names[label]:
                continue
            mapped.append(names[row.argmax()] == names[label])
            taxa = sorted({n for n in names if n})
            mass = [sum(p for p, n in zip(row, names, strict=True) if n == t) for t in taxa]
            summed.append(taxa[int(np.argmax(mass))] == names[label])
        assert found[level] == pytest.approx(np.mean(mapped))
        assert found[f"{level}_summed"] == pytest.approx(np.mean(summed))


def test_unknown_taxonomy_level_is_refused() -> None:
    with pytest.raises(KeyError, match="tribe"):
        metrics.Taxonomy.from_classes(taxonomy_table(), ["tribe"])


@pytest.mark.parametrize("num_rows", [150, 700])
@pytest.mark.parametrize("tied", [False, True])
def test_average_precision_equals_scikit_learn(tied: bool, num_rows: int) -> None:
    rng = RNG(5)
    scores = tied_logits(num_rows, 12, 6) if tied else rng.normal(size=(num_rows, 12))
    targets = (rng.uniform(size=(num_rows, 12)) < 0.15).astype(np.uint8)
    targets[:, 3] = 0
    targets[:, 4] = 1
    found = metrics.average_precision(scores, targets)
    assert np.isnan(found[3])
    for c in (c for c in range(12) if c != 3):
        expected = reference.average_precision_score(targets[:, c], scores[:, c])
        assert found[c] == pytest.approx(expected)


def test_multi_label_metrics_against_scikit_learn() -> None:
    rng = RNG(7)
    targets = (rng.uniform(size=(200, 8)) < 0.2).astype(np.uint8)
    targets[:, 5] = 0
    scores = (rng.normal(size=(200, 8)) + 2 * targets - 1).astype(np.float32)
    scores[:, 6] = -3
    counts = np.asarray([200, 100, 60, 30, 19, 5, 2, 1])
    found = metrics.multi_label_metrics(scores, targets, counts)
    predicted = scores > 0
    for average in ("micro", "macro", "weighted"):
        expected = reference.precision_recall_fscore_support(
            targets, predicted, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), expected, strict=False):
            assert found[f"{average}_{name}"] == pytest.approx(value)
    ap = [reference.average_precision_score(targets[:, c], scores[:, c]) for c in (0, 1)]
    assert found["map_head"] == pytest.approx(np.mean(ap))
    assert found["num_classes_skipped"] == 1
    kept = [c for c in range(8) if c != 5]
    assert found["map"] == pytest.approx(
        reference.average_precision_score(targets[:, kept], scores[:, kept])
    )
    assert found["cf1"] == pytest.approx(
        2 * found["cp"] * found["cr"] / (found["cp"] + found["cr"])
    )
    assert found["cf1"] != pytest.approx(found["macro_f1"])
    labelled = targets.any(1)
    by_row = [
        reference.average_precision_score(t, s)
        for t, s in zip(targets[labelled], scores[labelled], strict=True)
    ]
    assert found["map_rows"] == pytest.approx(np.mean(by_row))


def test_threshold_is_a_probability() -> None:
    scores = np.asarray([[1.0], [2.0], [3.0]], np.float32)
    targets = np.asarray([[0], [1], [1]], np.uint8)
    sigmoid = 1 / (1 + np.exp(-1.5))
    found = metrics.multi_label_metrics(scores, targets, np.ones(1, int), threshold=sigmoid)
    assert found["micro_f1"] == 1.0
    # From the threshold on, as heads.predict lists classes.
    even = metrics.multi_label_metrics(scores - 2, targets, np.ones(1, int), threshold=0.5)
    assert even["micro_f1"] == 1.0


def test_predictions_by_threshold_and_by_rank() -> None:
    scores = np.asarray([[2.0, 0.1, -1.0], [-3.0, -0.5, -0.5]], np.float32)
    assert metrics.predictions(scores, 0.5).tolist() == [[1, 1, 0], [0, 0, 0]]
    own = np.asarray([0.9, 0.5, 0.3])  # sigmoid(2) = 0.88, sigmoid(-0.5) = 0.38
    assert metrics.predictions(scores, own).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert metrics.predictions(scores, own, 0.5).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert metrics.best_classes(scores, 2).tolist() == [[1, 1, 0], [0, 1, 1]]
    assert metrics.best_classes(scores[1:], 1).tolist() == [[0, 1, 0]]  # equal: lower index
    assert metrics.best_classes(scores, 9).all()


def test_multi_label_calibration_error_against_a_loop() -> None:
    rng = RNG(8)
    scores, targets = rng.normal(size=(50, 6)) * 3, (rng.uniform(size=(50, 6)) < 0.3).astype(int)
    slow = 0.0
    p = 1 / (1 + np.exp(-scores / 2))
    for low in np.arange(15) / 15:
        inside = (p > low) & (p <= low + 1 / 15)
        if inside.any():
            slow += inside.mean() * abs(targets[inside].mean() - p[inside].mean())
    found = metrics.multi_label_calibration_error(scores, targets.astype(np.uint8), 2.0)
    assert found == pytest.approx(slow, abs=1e-6)


def test_f24_classes_without_a_positive_do_not_poison_the_mean() -> None:
    targets = np.asarray([[1, 0, 0], [1, 1, 0]], np.uint8)
    scores = np.asarray([[1.0, 0.0, 3.0], [2.0, 1.0, 4.0]])
    found = metrics.multi_label_metrics(scores, targets, np.asarray([200, 200, 1]))
    assert found["map"] == 1.0
    assert found["num_classes_skipped"] == 1
    assert "map_tail" not in found


def test_f13_f41_scores_are_ranked_class_by_class_and_counted_over_the_whole_split() -> None:
    """A softmax over classes would change the ranking; F1 of batches has another mean."""
    scores = np.asarray([[5.0, 9.0], [4.0, 0.0], [0.0, 0.0], [-9.0, -9.0]])
    targets = np.asarray([[1, 1], [1, 0], [0, 0], [0, 0]], np.uint8)
    softmax = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    counts = np.asarray([5, 5])
    assert metrics.multi_label_metrics(scores, targets, counts)["map"] == 1.0
    assert metrics.multi_label_metrics(softmax, targets, counts)["map"] < 0.9
    whole = metrics.multi_label_metrics(scores, targets, counts, predicted=scores > -1)
    halves = [
        metrics.threshold_metrics(scores[half] > -1, targets[half])["micro_f1"]
        for half in (slice(0, 2), slice(2, 4))
    ]
    assert whole["micro_f1"] == pytest.approx(2 * 3 / (6 + 3))
    assert whole["micro_f1"] != pytest.approx(np.mean(halves), abs=0.1)
