"""Bootstrap replicates against metrics of rows that are really copied."""

import numpy as np
import pytest
import torch

from heads import bootstrap, metrics

NUM = 7


def drawn_rows(num_rows: int, seed: int) -> list[np.ndarray]:
    """Row numbers of each draw, from the weights alone."""
    weights = np.concatenate(list(bootstrap.draws(num_rows, NUM, seed)), 1)
    return [np.repeat(np.arange(num_rows), column.astype(int)) for column in weights.T]


def test_draws_hold_as_many_rows_whatever_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.concatenate(list(bootstrap.draws(50, 20, 3)), 1)
    assert (whole.sum(0) == 50).all()
    assert whole.std() == pytest.approx(1.0, abs=0.1)  # Poisson in the limit
    monkeypatch.setattr(bootstrap, "_BLOCK_VALUES", 150)
    blocks = list(bootstrap.draws(50, 20, 3))
    assert len(blocks) == 7
    np.testing.assert_array_equal(np.concatenate(blocks, 1), whole)


@pytest.mark.parametrize("tied", [False, True])
def test_multi_label_replicates_equal_metrics_of_copied_rows(tied: bool) -> None:
    rng = np.random.default_rng(4)
    targets = (rng.uniform(size=(90, 6)) < 0.2).astype(np.uint8)
    targets[:, 4] = 0
    targets[1:, 5] = 0
    targets[0, 5] = 1  # its only positive is missing from some draws
    scores = (rng.normal(size=(90, 6)) + targets).astype(np.float32)
    if tied:
        scores = np.round(scores)
    counts = np.asarray([200, 150, 50, 30, 5, 1])
    predicted = scores > 0.3
    found = bootstrap.multi_label_replicates(
        scores, targets, counts, predicted=predicted, num=NUM, seed=2
    )
    names = ("map", "map_head", "map_medium", "map_tail", "map_rows", "micro_f1", "macro_f1")
    for index, rows in enumerate(drawn_rows(90, 2)):
        expected = metrics.multi_label_metrics(
            scores[rows], targets[rows], counts, predicted=predicted[rows]
        )
        for name in (*names, "micro_precision", "macro_recall"):
            value = expected.get(name, np.nan)
            assert found[name][index] == pytest.approx(value, abs=1e-6, nan_ok=True), name
    assert np.isnan(found["map_tail"]).any()
    assert not np.isnan(found["map_tail"]).all()


def test_single_label_replicates_equal_metrics_of_copied_rows() -> None:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 8, 120)
    labels[labels == 7] = 0  # a class without rows
    logits = torch.from_numpy(rng.normal(size=(120, 8)).astype(np.float32))
    logits[np.arange(120), labels] += 1
    codes = {"genus": np.asarray([0, 0, 1, 1, 2, 2, -1, -1])}
    taxonomy = metrics.Taxonomy(codes)
    counts = np.asarray([150, 100, 50, 30, 20, 9, 3, 1])
    rows = metrics.score_rows(logits, torch.from_numpy(labels), taxonomy, temperature=2.0)
    found = bootstrap.single_label_replicates(rows, counts, taxonomy=taxonomy, num=NUM, seed=9)
    for index, drawn in enumerate(drawn_rows(120, 9)):
        copied = metrics.score_rows(
            logits[drawn], torch.from_numpy(labels[drawn]), taxonomy, temperature=2.0
        )
        expected = metrics.single_label_metrics(copied, counts, taxonomy=taxonomy)
        expected["ece_calibrated"] = metrics.expected_calibration_error(
            copied.calibrated, copied.rank == 0
        )
        assert set(found) == {name for name in expected if not name.startswith("num_")}
        for name, values in found.items():
            assert values[index] == pytest.approx(expected[name], abs=1e-5), name


def test_intervals_of_a_share_are_those_of_the_normal_approximation() -> None:
    """Percentile interval of a mean of 0/1 against 1.96 standard errors."""
    labels = torch.zeros(2000, dtype=torch.int64)
    logits = torch.zeros(2000, 2)
    logits[:1400, 0] = logits[1400:, 1] = 1.0
    rows = metrics.score_rows(logits, labels)
    found = bootstrap.single_label_replicates(rows, np.asarray([5, 5]), num=2000, seed=0)
    low, high = bootstrap.percentile_intervals(found)["top1"]
    error = 1.96 * np.sqrt(0.7 * 0.3 / 2000)
    assert (low, high) == pytest.approx((0.7 - error, 0.7 + error), abs=0.15 * error)
    narrow = bootstrap.percentile_intervals(found, 0.5)["top1"]
    assert narrow[1] - narrow[0] == pytest.approx((high - low) * 0.6745 / 1.96, rel=0.1)


def test_intervals_leave_undefined_draws_out() -> None:
    values = {"a": np.asarray([1.0, np.nan, 1.0]), "b": np.full(3, np.nan)}
    assert bootstrap.percentile_intervals(values) == {"a": (1.0, 1.0)}


def test_p_value_is_that_of_a_normal_statistic_and_never_0() -> None:
    rng = np.random.default_rng(0)
    assert bootstrap.two_sided_p(rng.normal(1.96, 1.0, 40_000)) == pytest.approx(0.05, abs=0.005)
    assert bootstrap.two_sided_p(np.full(999, 0.3)) == pytest.approx(2 / 1000)
    assert bootstrap.two_sided_p(np.zeros(100)) == 1.0
