import math

import numpy as np
import pytest
import torch

from heads.losses.class_specific_embedding import (
    ClassSpecificEmbedding,
    Distances,
    Variant,
    sentence_distances,
    token_distances,
)

COUNTS = np.asarray([775, 120, 40, 4, 0])


def written_out(
    distances: np.ndarray, targets: np.ndarray, variant: Variant, margin: float, power: float
) -> np.ndarray:
    """The equations, one element at a time in float64."""
    counts = [max(int(n), 1) for n in COUNTS]
    total = sum(n**-power for n in counts)
    terms = np.zeros_like(distances)
    for i, c in np.ndindex(*distances.shape):
        own = margin / counts[c] ** 0.25 if variant == "softmargin" else margin
        weight = 1.0
        if variant in ("weighted", "softmargin"):
            weight = len(counts) * counts[c] ** -power / total
        near, far = distances[i, c], max(0.0, own - distances[i, c])
        terms[i, c] = weight * (targets[i, c] * near + (1 - targets[i, c]) * far)
    return terms


def distances_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    distances = 0.4 * torch.rand(30, len(COUNTS), generator=generator)
    targets = (torch.rand(30, len(COUNTS), generator=generator) < 0.3).float()
    targets[0] = 0.0  # a row without a label
    return distances, targets


@pytest.mark.parametrize(
    ("variant", "margin"),
    [("nn_hinge", 1.0), ("hinge", 0.2), ("weighted", 0.2), ("softmargin", 0.2)],
)
@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_terms_follow_the_equations(variant: Variant, margin: float, power: float) -> None:
    distances, targets = distances_and_targets()
    loss = ClassSpecificEmbedding(COUNTS, variant=variant, count_power=power)
    expected = written_out(distances.double().numpy(), targets.numpy(), variant, margin, power)
    found = loss.terms(distances, targets)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=1e-7)
    valid = torch.rand(30, len(COUNTS), generator=torch.Generator().manual_seed(1)) < 0.5
    valid[4] = False  # a row without a caption
    rows = [
        row[held].mean() if held.any() else 0.0
        for row, held in zip(expected, valid.numpy(), strict=True)
    ]
    mean = loss(Distances(distances, valid), targets)
    assert mean.item() == pytest.approx(np.mean(rows), rel=1e-5)


def test_another_margin_and_class_indices_as_targets() -> None:
    loss = ClassSpecificEmbedding(COUNTS, variant="hinge", margin=0.5)
    distances = torch.full((1, 5), 0.2)
    torch.testing.assert_close(
        loss.terms(distances, torch.tensor([1])), torch.tensor([[0.3, 0.2, 0.3, 0.3, 0.3]])
    )


def test_f09_margins_and_weights_come_from_counts_not_from_their_softmax() -> None:
    loss = ClassSpecificEmbedding(COUNTS, variant="softmargin", count_power=2.0)
    assert torch.isfinite(loss.margins).all()
    assert torch.isfinite(loss.weights).all()
    assert loss.margins.tolist() == sorted(loss.margins.tolist()), "rarer means a larger margin"
    assert loss.margins[3].item() == pytest.approx(0.2 / math.sqrt(2), rel=1e-6)
    assert loss.weights.mean().item() == pytest.approx(1.0, rel=1e-6)
    assert loss.weights[0] > 0


def test_f10_weights_are_one_number_a_class() -> None:
    distances, targets = distances_and_targets()
    loss = ClassSpecificEmbedding(COUNTS, variant="weighted", count_power=1.0)
    assert loss.weights.shape == (len(COUNTS),)
    plain = ClassSpecificEmbedding(COUNTS, variant="hinge").terms(distances, targets)
    torch.testing.assert_close(loss.terms(distances, targets), plain * loss.weights)


def test_f11_a_step_draws_positives_near_and_pushes_negatives_away() -> None:
    distances = torch.full((2, 5), 0.02, requires_grad=True)
    targets = torch.zeros(2, 5)
    targets[0] = 1.0
    loss = ClassSpecificEmbedding(COUNTS)
    loss(Distances(distances, torch.ones(2, 1, dtype=torch.bool)), targets).backward()
    assert distances.grad is not None
    assert (distances.grad[0] > 0).all(), "the distance of a positive must fall"
    assert (distances.grad[1] < 0).all(), "that of a negative within its margin must grow"


def slow_token_distances(
    captions: np.ndarray, lengths: list[int], prompts: np.ndarray, sizes: list[int], shift: int
) -> tuple[np.ndarray, np.ndarray]:
    values = np.zeros((len(captions), len(prompts)))
    counts = np.zeros((len(captions), len(prompts)), int)
    for i, c in np.ndindex(*values.shape):
        for t in range(captions.shape[1] - shift):
            if t >= lengths[i] or t + shift >= sizes[c]:
                continue
            a, b = captions[i, t], prompts[c, t + shift]
            values[i, c] += 1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            counts[i, c] += 1
    return values / np.maximum(counts, 1), counts


@pytest.mark.parametrize("shift", [0, 2, 4])
def test_f12_token_distance_is_a_mean_over_real_tokens(shift: int) -> None:
    generator = torch.Generator().manual_seed(3)
    captions = torch.randn(6, 9, 8, generator=generator)
    prompts = torch.randn(4, 9, 8, generator=generator)
    lengths, sizes = [9, 5, 3, 1, 0, 7], [9, 6, 4, 3]
    masks = [torch.arange(9) < torch.tensor(held)[:, None] for held in (lengths, sizes)]
    found = token_distances(captions, masks[0], prompts, masks[1], shift)
    expected, counts = slow_token_distances(
        captions.double().numpy(), lengths, prompts.double().numpy(), sizes, shift
    )
    np.testing.assert_allclose(found.values.numpy(), expected, atol=2e-6)
    np.testing.assert_array_equal(found.valid.numpy(), counts > 0)
    # Padding has no say, whatever stands there.
    captions[torch.arange(9) >= torch.tensor(lengths)[:, None]] = 1e4
    again = token_distances(captions, masks[0], prompts, masks[1], shift)
    torch.testing.assert_close(again.values, found.values)


def test_a_prompt_that_is_the_caption_has_distance_zero() -> None:
    tokens = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(5))
    mask = torch.ones(3, 6, dtype=torch.bool)
    found = token_distances(tokens, mask, tokens, mask)
    torch.testing.assert_close(found.values.diagonal(), torch.zeros(3), atol=1e-6, rtol=0)
    assert (found.values > 0.1).sum() == 6


def test_a_shift_beyond_the_prompts_leaves_nothing_to_compare() -> None:
    tokens = torch.randn(2, 3, 4)
    mask = torch.ones(2, 3, dtype=torch.bool)
    found = token_distances(tokens, mask, tokens, mask, shift=7)
    assert not found.valid.any()
    assert ClassSpecificEmbedding(np.asarray([3, 4]))(found, torch.ones(2, 2)) == 0


def test_sentence_distance_is_one_minus_cosine_and_skips_rows_without_caption() -> None:
    generator = torch.Generator().manual_seed(4)
    captions = 5 * torch.randn(4, 6, generator=generator)
    captions[2] = 0.0
    vectors = torch.nn.functional.normalize(torch.randn(5, 6, generator=generator), dim=1)
    found = sentence_distances(captions, vectors)
    a, b = captions.double().numpy(), vectors.double().numpy()
    for i, c in [(0, 0), (1, 4), (3, 2)]:
        expected = 1 - a[i] @ b[c] / np.linalg.norm(a[i])
        assert found.values[i, c].item() == pytest.approx(expected, abs=1e-6)
    assert found.valid[:, 0].tolist() == [True, True, False, True]
    loss = ClassSpecificEmbedding(COUNTS)
    targets = torch.ones(4, 5)
    without = sentence_distances(captions[[0, 1, 3]], vectors)
    torch.testing.assert_close(4 * loss(found, targets), 3 * loss(without, targets[:3]))


def test_the_loss_of_a_batch_is_the_mean_of_its_parts() -> None:
    distances, targets = distances_and_targets()
    valid = torch.rand(30, len(COUNTS), generator=torch.Generator().manual_seed(1)) < 0.3
    loss = ClassSpecificEmbedding(COUNTS)
    parts = [
        loss(Distances(distances[rows], valid[rows]), targets[rows])
        for rows in (slice(0, 10), slice(10, 30))
    ]
    whole = loss(Distances(distances, valid), targets)
    torch.testing.assert_close(whole, (10 * parts[0] + 20 * parts[1]) / 30)


def test_gradients_of_both_distances_are_those_of_finite_differences() -> None:
    torch.manual_seed(6)
    loss = ClassSpecificEmbedding(COUNTS, margin=1.2).double()
    targets = (torch.rand(3, 5) < 0.4).double()
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 4, 3])[:, None]
    captions = torch.randn(3, 4, 5, dtype=torch.float64)

    def of_tokens(prompts: torch.Tensor) -> torch.Tensor:
        return loss(token_distances(captions, mask[:3], prompts, mask, 1), targets)

    prompts = torch.randn(5, 4, 5, requires_grad=True)
    of_tokens(prompts).backward()
    assert prompts.grad is not None
    step = 1e-2
    for place in [(0, 1, 2), (3, 3, 0), (4, 2, 4)]:
        shift = torch.zeros_like(prompts)
        shift[place] = step
        with torch.no_grad():
            slope = (of_tokens(prompts + shift) - of_tokens(prompts - shift)) / (2 * step)
        assert prompts.grad[place].item() == pytest.approx(slope.item(), abs=2e-4)
    assert prompts.grad[:, 0].abs().sum() == 0, "shifted out: no caption token meets it"
