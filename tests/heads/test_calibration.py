"""Temperature and thresholds from validation rows, against slow searches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import f1_score, log_loss

from heads import calibration
from heads.calibration import fit_multi_label, fit_single_label, fit_temperature, read_calibration
from heads.thresholds import CANDIDATES, nearest_class, search_thresholds


def overconfident(num_rows: int = 3000, num_classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose labels were drawn from softmax(logits / 2.5)."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(num_rows, num_classes, generator=generator)
    labels = torch.multinomial((logits / 2.5).softmax(1), 1, generator=generator)[:, 0]
    return logits, labels


def test_temperature_is_where_the_likelihood_is_best() -> None:
    logits, labels = overconfident()

    def nll(temperature: float) -> float:
        probabilities = (logits.double() / temperature).softmax(1).numpy()
        return float(log_loss(labels.numpy(), probabilities, labels=range(6)))

    found, before, after = fit_temperature(logits, labels)
    expected = minimize_scalar(nll, bounds=(0.1, 10), method="bounded", options={"xatol": 1e-6})
    assert found == pytest.approx(expected.x, rel=1e-3)
    assert found == pytest.approx(2.5, rel=0.1)
    assert before == pytest.approx(nll(1.0), rel=1e-5)
    assert after == pytest.approx(expected.fun, rel=1e-5)


def test_single_label_calibration_lowers_the_calibration_error() -> None:
    logits, labels = overconfident()
    found = fit_single_label(logits, labels, "val")
    assert found.ece_before > 0.15
    assert found.ece_after < 0.03
    assert found.thresholds is None


def test_multi_label_temperature_is_that_of_sigmoids() -> None:
    rng = np.random.default_rng(1)
    scores = (5 * rng.normal(size=(2000, 4)) - 1).astype(np.float32)
    targets = (rng.uniform(size=scores.shape) < 1 / (1 + np.exp(-scores / 3))).astype(np.uint8)
    found = fit_multi_label(scores, targets, "val")
    assert found.temperature == pytest.approx(3.0, rel=0.1)
    assert found.ece_after < 0.3 * found.ece_before
    flat = log_loss(targets.ravel(), 1 / (1 + np.exp(-scores.astype(float).ravel())))
    assert found.nll_before == pytest.approx(flat, rel=1e-5)


def test_rows_that_are_all_right_and_constant_scores_have_a_finite_temperature() -> None:
    labels = torch.arange(50) % 5
    found, before, after = fit_temperature(torch.eye(5)[labels], labels)
    assert 1e-3 <= found < 1
    assert after < before
    assert fit_temperature(torch.zeros(10, 3), torch.zeros(10, dtype=torch.int64))[0] == 1.0


def test_calibration_is_read_back(tmp_path: Path) -> None:
    found = fit_multi_label(
        np.asarray([[2.0, -1.0], [-2.0, 1.0]], np.float32), np.eye(2, dtype=np.uint8), "val"
    )
    assert read_calibration(tmp_path) is None
    found.write(tmp_path)
    assert read_calibration(tmp_path) == found


def test_rows_for_a_temperature_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_SCORES", 1000)
    assert calibration.chosen_rows(90, 10, 0).tolist() == list(range(90))
    some = calibration.chosen_rows(500, 10, 0)
    assert len(some) == len(set(some.tolist())) == 100
    assert (np.diff(some) > 0).all()
    assert some.tolist() == calibration.chosen_rows(500, 10, 0).tolist()
    assert some.tolist() != calibration.chosen_rows(500, 10, 1).tolist()


def slow_search(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The search as it is described, with scikit-learn's F1 of every candidate."""
    thresholds = np.full(targets.shape[1], 0.5)

    def f1(values: np.ndarray) -> float:
        return float(f1_score(targets, probabilities >= values, average="micro", zero_division=0))

    while True:
        before = thresholds.copy()
        for c in range(targets.shape[1]):
            best = f1(thresholds)
            for value in sorted(CANDIDATES, key=lambda v: abs(v - 0.5)):
                tried = thresholds.copy()
                tried[c] = value
                if f1(tried) > best + 1e-12:
                    best, thresholds = f1(tried), tried
        if (thresholds == before).all():
            return thresholds


def test_threshold_search_equals_the_slow_search() -> None:
    rng = np.random.default_rng(3)
    targets = (rng.uniform(size=(60, 4)) < [0.5, 0.3, 0.1, 0.05]).astype(np.uint8)
    probabilities = np.clip(0.25 + 0.3 * targets + 0.15 * rng.normal(size=(60, 4)), 0, 1)
    found = search_thresholds(probabilities, targets)
    np.testing.assert_allclose(found.thresholds, slow_search(probabilities, targets))
    for value, thresholds in ((found.before, 0.5), (found.after, found.thresholds)):
        expected = f1_score(targets, probabilities >= thresholds, average="micro")
        assert value == pytest.approx(expected)
    assert found.after > found.before


def test_f45_classes_that_gain_nothing_keep_a_threshold() -> None:
    probabilities = np.full((20, 3), 0.9)
    probabilities[:, 0] = 0.001  # never reaches any candidate
    targets = np.zeros((20, 3), np.uint8)
    found = search_thresholds(probabilities, targets)
    np.testing.assert_array_equal(found.thresholds, 0.5)
    assert found.before == found.after == 0.0
    targets[:, 0] = 1
    found = search_thresholds(probabilities, targets)
    assert np.isfinite(found.thresholds).all()
    assert found.thresholds[0] == 0.5


def test_nearest_class_is_the_one_closest_to_its_own_threshold() -> None:
    probabilities = np.asarray([[0.30, 0.10, 0.05], [0.2, 0.2, 0.2]])
    assert nearest_class(probabilities, np.asarray([0.6, 0.12, 0.5])).tolist() == [1, 1]
    assert nearest_class(probabilities, 0.5).tolist() == [0, 0]
