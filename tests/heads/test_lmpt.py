import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from featcache.class_text import ensemble
from featcache.errors import BackboneError
from heads.base import FeatureSpec
from heads.losses import LOSSES, default_loss
from heads.losses.base import ClassStatistics
from heads.losses.class_specific_embedding import MARGINS
from heads.models.lmpt import Lmpt, LmptConfig

DIM, COUNTS = 12, np.asarray([300, 60, 7, 2])


def spec(task: str = "multi_label") -> FeatureSpec:
    generator = torch.Generator().manual_seed(1)
    return FeatureSpec(
        feature_dim=DIM,
        num_classes=len(COUNTS),
        task=task,
        class_counts=COUNTS,
        classes=pd.DataFrame({"name": list("abcd")}),
        prompts=torch.randn(3, len(COUNTS), DIM, generator=generator),
        logit_scale=20.0,
        mean=torch.zeros(DIM),
        std=torch.ones(DIM),
        num_rows=320,
        criterion=default_loss(task).build(ClassStatistics(COUNTS, 320)),
    )


def batch(num_rows: int = 50) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    targets = (torch.rand(num_rows, len(COUNTS), generator=generator) < 0.3).float()
    captions = torch.randn(num_rows, DIM, generator=generator)
    captions[::5] = 0.0  # no caption
    return (7 * torch.randn(num_rows, DIM, generator=generator), captions), targets


def build(task: str = "multi_label", **options: Any) -> Lmpt:
    return LmptConfig(**options).build(spec(task))


def test_training_starts_from_the_zero_shot_classifier() -> None:
    head = build(threshold=False)
    (image, _), _ = batch()
    prompts = spec().prompts
    assert prompts is not None
    expected = 20 * F.normalize(image, dim=-1) @ ensemble(prompts).T
    torch.testing.assert_close(head(image), expected)


def test_small_steps_of_the_threshold_count_in_half_precision() -> None:
    """A learning rate of 1e-3 moves θ by less than bfloat16 tells apart near 0.25."""
    head = build()
    (image, captions), _ = batch()
    found = []
    for theta in (0.25, 0.2503):
        assert head.threshold is not None
        torch.nn.init.constant_(head.threshold, theta)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(head(image))
    torch.testing.assert_close(
        found[0] - found[1], torch.full_like(found[0], 20 * 3e-4), atol=1e-4, rtol=0
    )
    with torch.autocast("cpu", torch.bfloat16):
        distances = head.caption_distances(captions, head.class_vectors())
    assert distances.values.dtype == torch.float32


def test_the_loss_follows_the_equations_in_float64() -> None:
    head = build(classification_weight=0.3, count_power=2.0)
    torch.manual_seed(0)
    assert head.threshold is not None
    with torch.no_grad():
        head.offsets += 0.2 * torch.randn_like(head.offsets)
        head.threshold += 0.05
    (image, captions), targets = batch()
    found = head.loss((image, captions), targets, 0.0)

    x, t, y = (part.double().numpy() for part in (image, captions, targets))
    base, offsets = head.base.double().numpy(), head.offsets.detach().double().numpy()
    theta = head.threshold.item()
    weights = [len(COUNTS) * n**-2.0 / sum(m**-2.0 for m in COUNTS.astype(float)) for n in COUNTS]
    classification, embedding = 0.0, 0.0
    for i in range(len(x)):
        for c, count in enumerate(COUNTS):
            vector = base[c] + offsets[c]
            vector /= np.linalg.norm(vector)
            z = 20 * (x[i] @ vector / np.linalg.norm(x[i]) - theta)
            classification += np.log1p(np.exp(z)) - y[i, c] * z
            if not t[i].any():
                continue
            distance = 1 - t[i] @ vector / np.linalg.norm(t[i])
            margin = 0.2 / count**0.25
            embedding += weights[c] * (distance if y[i, c] else max(0.0, margin - distance))
    expected = 0.3 * classification / y.size + 0.7 * embedding / y.size
    assert found["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert found["cse_loss"].item() == pytest.approx(embedding / y.size, rel=1e-5)


@pytest.mark.parametrize("csc", [True, False])
def test_f17_csc_can_be_switched(csc: bool) -> None:
    head = build(csc=csc)
    assert head.offsets.shape == ((4, DIM) if csc else (1, DIM))
    before = head.class_vectors().detach()
    with torch.no_grad():
        head.offsets[0] += 1.0
    moved = (head.class_vectors() - before).abs().sum(1) > 1e-3
    assert moved.tolist() == [True, *[not csc] * 3]


@pytest.mark.parametrize("loss", [kind for kind in LOSSES if not LOSSES[kind].needs_cosines])
def test_f17_every_loss_on_logits_trains_the_offsets(loss: str) -> None:
    task = LOSSES[loss].tasks[-1]
    criterion = LOSSES[loss]().build(ClassStatistics(COUNTS, 320))
    head = LmptConfig().build(dataclasses.replace(spec(task), criterion=criterion))
    features, targets = batch()
    parts = head.loss(features, targets if task == "multi_label" else targets.argmax(1), 0.0)
    parts["classification_loss"].item()
    parts["loss"].backward()  # type: ignore[no-untyped-call]
    assert head.offsets.grad is not None
    assert torch.isfinite(head.offsets.grad).all()
    assert head.offsets.grad.abs().sum() > 0


def test_f11_the_embedding_loss_draws_class_vectors_to_their_captions() -> None:
    head = build(classification_weight=0.0, cse="hinge", cse_margin=1.5)
    (image, captions), targets = batch()
    optimizer = torch.optim.Adam([head.offsets], lr=0.05)

    def gap() -> float:
        """How much closer captions are to their own classes than to others."""
        cosines = F.normalize(captions, dim=-1) @ head.class_vectors().detach().T
        read = captions.abs().sum(1) > 0
        own, other = targets[read].bool(), ~targets[read].bool()
        return (cosines[read][own].mean() - cosines[read][other].mean()).item()

    before = gap()
    for _ in range(30):
        optimizer.zero_grad()
        head.loss((image, captions), targets, 0.0)["loss"].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert gap() > before + 0.1


def test_f09_a_class_without_rows_keeps_the_loss_finite() -> None:
    counts = np.asarray([1_000_000, 60, 0, 1])
    head = LmptConfig(count_power=2.0).build(dataclasses.replace(spec(), class_counts=counts))
    features, targets = batch()
    parts = head.loss(features, targets, 0.0)
    parts["loss"].backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(parts["loss"])
    assert head.offsets.grad is not None
    assert torch.isfinite(head.offsets.grad).all()


def test_captions_are_read_only_where_they_have_a_weight() -> None:
    assert LmptConfig().training_arrays() == ("text/projected",)
    assert LmptConfig(classification_weight=1).training_arrays() == ()
    head = build(classification_weight=1.0)
    (image, _), targets = batch()
    parts = head.loss((image,), targets, 0.0)
    expected = F.binary_cross_entropy_with_logits(head(image), targets)
    torch.testing.assert_close(parts["loss"], expected)


def test_rows_without_any_caption_still_train_by_their_labels() -> None:
    head = build()
    (image, captions), targets = batch()
    parts = head.loss((image, torch.zeros_like(captions)), targets, 0.0)
    assert parts["cse_loss"] == 0
    assert parts["loss"] == 0.5 * parts["classification_loss"]


def test_margins_are_the_variants_own_unless_given() -> None:
    for variant, margin in MARGINS.items():
        losses = LmptConfig(cse=variant).losses(spec())
        assert losses.cse is not None
        assert losses.cse.margins.max().item() == pytest.approx(
            margin / (2**0.25 if variant == "softmargin" else 1)
        )
    losses = LmptConfig(cse="nn_hinge", cse_margin=0.4).losses(spec())
    assert losses.cse is not None
    assert losses.cse.margins.tolist() == pytest.approx([0.4] * 4)


def test_a_softmax_set_has_no_threshold() -> None:
    head = build("single_label")
    assert head.threshold is None
    (image, captions), targets = batch()
    loss = head.loss((image, captions), targets.argmax(1), 0.0)["classification_loss"]
    torch.testing.assert_close(loss, F.cross_entropy(head(image), targets.argmax(1)).detach())


def test_features_outside_the_shared_space_are_refused() -> None:
    with pytest.raises(BackboneError, match="text features have width 12, image features 20"):
        LmptConfig().build(dataclasses.replace(spec(), feature_dim=20))
