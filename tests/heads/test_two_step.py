"""The router in two stages: who learns when, on which loss, and what decides."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heads.losses.asymmetric import Asymmetric
from heads.models.router import RouterConfig
from heads.models.two_step import TwoStep, TwoStepConfig

from .conftest import toy_spec

WIDTHS = {"image/projected": 6, "text/projected": 4}


def build(seed: int = 0, **options: object) -> TwoStep:
    torch.manual_seed(seed)
    options = {"stage_patience": 1, **options}
    return TwoStepConfig(**options).build(toy_spec(WIDTHS))  # type: ignore[arg-type]


def rows(count: int = 40) -> tuple[tuple[Tensor, Tensor], Tensor]:
    torch.manual_seed(5)
    targets = torch.arange(count) % 3
    features = tuple(
        torch.randn(count, width) + torch.randn(3, width)[targets] for width in WIDTHS.values()
    )
    return features, targets  # type: ignore[return-value]


def after(head: TwoStep, *scores: tuple[float, float]) -> None:
    for image, text in scores:
        head.after_epoch({"": 0.99, "image": image, "text": text})


def test_a_classifier_is_done_when_it_stops_gaining_and_the_router_when_all_are() -> None:
    head = build()
    assert head.lr_factors() == {"image": 1.0, "text": 1.0, "router": 0.0}
    after(head, (0.30, 0.10), (0.40, 0.105))
    assert head.lr_factors() == {"image": 1.0, "text": 0.0, "router": 0.0}
    assert not head.selectable
    after(head, (0.411, 0.90))  # 0.01 is enough, and text has stopped for good
    assert head.lr_factors() == {"image": 1.0, "text": 0.0, "router": 0.0}
    after(head, (0.415, 0.90))
    assert head.lr_factors() == {"image": 0.0, "text": 0.0, "router": 1.0}
    assert head.selectable
    after(head, (0.9, 0.9))
    assert head.selectable, "stage 2 is the last"


def test_gain_is_measured_from_the_best_so_far() -> None:
    head = build(stage_patience=2)
    after(head, (0.50, 0.1), (0.40, 0.2), (0.45, 0.3))  # image rises again, but not above 0.50
    assert head.lr_factors()["image"] == 0.0
    assert head.lr_factors()["text"] == 1.0


def test_a_lower_rate_instead_of_frozen_classifiers() -> None:
    head = build(head_lr_factor=0.1)
    after(head, (0.5, 0.5), (0.5, 0.5))
    assert head.lr_factors() == {"image": 0.1, "text": 0.1, "router": 1.0}
    features, targets = rows()
    head.loss(features, targets, 0.5)["loss"].backward()
    assert all(p.grad is not None for p in head.parameters())


@pytest.mark.parametrize(("epochs", "steps", "longest"), [(10, 16, 0.5), (2, 16, 0.5), (7, 3, 0.3)])
def test_the_second_stage_begins_at_its_latest_epoch(
    epochs: int, steps: int, longest: float
) -> None:
    head = build(longest_first_stage=longest)
    features, targets = rows(2)
    switched = []
    for epoch in range(epochs):
        for step in range(steps):
            head.loss(features, targets, (epoch * steps + step) / (epochs * steps))
        after(head, (0.02 * epoch, 0.02 * epoch))
        switched.append(head.selectable)
    assert switched.index(True) + 1 == math.ceil(longest * epochs)


def test_f41_each_classifier_learns_from_its_own_loss_in_one_step() -> None:
    head, (features, targets) = build(), rows()
    text = features[1].clone()
    text[::3] = 0.0  # rows without a caption
    parts = head.loss((features[0], text), targets, 0.0)
    parts["loss"].backward()
    for name, part in (("image", features[0]), ("text", text)):
        branch = head.branches[name]
        kept = part.any(1)
        expected = F.cross_entropy(branch.classifier(branch.scale(part[kept])), targets[kept])
        expected = expected * kept.float().mean()  # a mean over all rows, for any share of a batch
        torch.testing.assert_close(parts[f"loss_{name}"], expected.detach())
        wanted = torch.autograd.grad(expected, [*branch.classifier.parameters()])
        for parameter, gradient in zip(branch.classifier.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        assert all(p.grad is None for p in branch.trust.parameters())


def test_a_summed_loss_is_summed_in_both_stages() -> None:
    """Learning rates that fit one stage would be far too low for the other."""
    features, targets = rows()
    hot = F.one_hot(targets, 3).float()
    found = {}
    for reduction in ("mean", "sum"):
        head = build()
        head.criterion = Asymmetric(reduction=reduction)  # type: ignore[arg-type]
        first = head.loss(features, hot, 0.0)["loss"]
        after(head, (0.5, 0.5), (0.5, 0.5))
        found[reduction] = torch.stack([first, head.loss(features, hot, 0.5)["loss"]]).detach()
    torch.testing.assert_close(found["sum"], found["mean"] * hot.numel())


def test_f41_a_classifier_that_is_done_is_not_stepped_again() -> None:
    """Neither by gradients of an earlier step, nor by momentum or weight decay."""
    head, (features, targets) = build(), rows()
    optimizer = torch.optim.AdamW(head.param_groups(1e-2, 0.1))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        head.loss(features, targets, 0.1)["loss"].backward()
        optimizer.step()

    def copy(name: str) -> list[Tensor]:
        return [p.detach().clone() for p in head.branches[name].classifier.parameters()]

    step()
    after(head, (0.5, 0.5), (0.5, 0.6))
    image, words = copy("image"), copy("text")
    step()
    assert all(map(torch.equal, image, copy("image")))
    assert not any(map(torch.equal, words, copy("text")))
    after(head, (0.5, 0.6))
    words, trust = copy("text"), head.branches["text"].trust[0].weight.detach().clone()
    step()
    assert all(map(torch.equal, image + words, copy("image") + copy("text")))
    assert not torch.equal(trust, head.branches["text"].trust[0].weight)


def test_f41_the_metric_of_training_rows_decides_nothing() -> None:
    """Only `after_epoch` moves a stage: no number of steps with a settled loss does."""
    head, (features, targets) = build(), rows(3)
    for _ in range(50):
        head.loss(features, targets, 0.2)
    assert head.lr_factors() == {"image": 1.0, "text": 1.0, "router": 0.0}


def test_scores_are_those_of_a_router_with_the_same_weights() -> None:
    torch.manual_seed(0)
    router = RouterConfig().build(toy_spec(WIDTHS)).eval()
    head, (features, targets) = build(seed=1).eval(), rows()
    head.load_trained_state(router.trained_state())
    assert torch.equal(head(*features), router(*features))
    after(head, (0.5, 0.5), (0.5, 0.5))
    two, one = (other.loss(features, targets, 0.5)["loss"] for other in (head, router))
    torch.testing.assert_close(two, one)


def test_both_stages_report_the_same_parts() -> None:
    head, (features, targets) = build(), rows()
    first = head.loss(features, targets, 0.1)
    after(head, (0.5, 0.5), (0.5, 0.5))
    assert head.loss(features, targets, 0.6).keys() == first.keys()
