"""Retrieval recall against a loop over sorted lists."""

import numpy as np
import pytest
import torch

from heads import retrieve


def slow_rank(scores: np.ndarray, right: set[int]) -> int:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return next(place for place, i in enumerate(order) if i in right)


def test_recalls_equal_sorted_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(40), rng.integers(1, 5, 40))
    # Few directions on a grid, so that many cosines are equal.
    images = rng.integers(-1, 2, (40, 4)).astype(np.float32) + np.float32([2, 0, 0, 0])
    captions = images[owner] + rng.integers(-1, 2, (len(owner), 4)).astype(np.float32)
    captions[:, 0] += 2
    unit = [torch.nn.functional.normalize(torch.from_numpy(x), dim=1) for x in (images, captions)]
    cosines = (unit[0] @ unit[1].T).numpy()
    back = (unit[1] @ unit[0].T).numpy()
    to_text = [slow_rank(cosines[i], set(np.flatnonzero(owner == i))) for i in range(40)]
    to_image = [slow_rank(back[j], {int(owner[j])}) for j in range(len(owner))]
    monkeypatch.setattr(retrieve, "_SCORES_AT_A_TIME", 7 * len(owner))
    found = retrieve.recalls(
        torch.from_numpy(images), torch.from_numpy(captions), torch.from_numpy(owner), (1, 5, 10)
    )
    for direction, ranks in (("image_to_text", to_text), ("text_to_image", to_image)):
        for k in (1, 5, 10):
            expected = np.mean(np.asarray(ranks) < k)
            assert found[f"{direction}_recall_{k}"] == pytest.approx(expected)
        assert found[f"num_{direction}_median_rank"] == np.median(ranks) + 1
    assert 0 < found["image_to_text_recall_1"] < found["image_to_text_recall_10"] <= 1
