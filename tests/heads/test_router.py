"""Router and ensemble: the equation, the weights, and rows that lack a modality."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from heads.base import HeadConfig
from heads.mlp import present
from heads.models.ensemble import EnsembleConfig
from heads.models.naive import NaiveConfig
from heads.models.router import Router, RouterConfig, routing_weights

from .conftest import toy_spec

WIDTHS = {
    "image/projected": 6,
    "image/pooled": 9,
    "text/projected": 4,
    "image/multimodal_pooled": 7,
}
Array = NDArray[np.float64]


def build(config: HeadConfig, seed: int = 0) -> Router:
    torch.manual_seed(seed)
    head = config.build(toy_spec(WIDTHS))
    assert isinstance(head, Router)
    return head


def rows(config: HeadConfig, count: int = 12) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    return tuple(3 * torch.randn(count, WIDTHS[name]) + 1 for name in config.arrays())


def slow_logits(head: Router, features: tuple[Tensor, ...]) -> tuple[Array, Array]:
    """Logits and weights, row by row in float64 as the equation has them."""
    state = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}

    def network(prefix: str, vector: Array) -> Array:
        first, second = f"{prefix}.0", f"{prefix}.3"
        hidden = state[f"{first}.weight"] @ vector + state[f"{first}.bias"]
        hidden = np.where(hidden > 0, hidden, 0)
        return state[f"{second}.weight"] @ hidden + state[f"{second}.bias"]

    logits, weights = [], []
    for row in range(len(features[0])):
        said, trust = {}, {}
        for name, part in zip(head.modalities, features, strict=True):
            vector = part[row].double().numpy()
            if not vector.any():
                continue
            vector = vector / np.linalg.norm(vector) * np.sqrt(len(vector))
            if f"branches.{name}.project.weight" in state:
                vector = state[f"branches.{name}.project.weight"] @ vector
                vector = vector + state[f"branches.{name}.project.bias"]
            said[name] = network(f"branches.{name}.classifier", vector)
            trust[name] = np.exp(network(f"branches.{name}.trust", vector)[0])
        total = sum(trust.values())
        weights.append([trust.get(name, 0.0) / total for name in head.modalities])
        logits.append(sum(trust[name] / total * said[name] for name in said))
    return np.asarray(logits), np.asarray(weights)


CONFIGS = [
    RouterConfig(),
    RouterConfig(image_feature="pooled", hidden=5),
    RouterConfig(modalities=("image", "text", "multimodal")),
    RouterConfig(modalities=("multimodal", "text")),
    EnsembleConfig(common_width=8),
    EnsembleConfig(modalities=("image", "text"), common_width=5),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_and_weights_are_those_of_a_loop_over_the_equation(config: HeadConfig) -> None:
    head, features = build(config).eval(), rows(config)
    for index, part in enumerate(features):
        part[index] = 0.0  # row m lacks modality m
    expected, weights = slow_logits(head, features)
    np.testing.assert_allclose(head(*features).detach().numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(head.weights(*features).detach().numpy(), weights, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_f37_weights_are_one_scalar_a_modality_and_sum_to_one(config: HeadConfig) -> None:
    head, features = build(config).eval(), rows(config)
    weights = head.weights(*features)
    assert weights.shape == (12, len(features))
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(12))
    for index, part in enumerate(features):  # each modality's own vector moves the weights
        changed = list(features)
        changed[index] = part.flip(0)
        assert (head.weights(*changed) - weights).abs().max() > 1e-3


@pytest.mark.parametrize("config", CONFIGS[:4:2])
def test_f37_every_modality_is_in_the_logits(config: HeadConfig) -> None:
    head, features = build(config).eval(), rows(config)
    for branch in head.branches.values():
        torch.nn.init.zeros_(branch.trust[-1].weight)
        torch.nn.init.zeros_(branch.trust[-1].bias)
    mean = sum(logits for _, logits in head.monitors(*features)) / len(features)
    torch.testing.assert_close(head(*features), mean)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_missing_modality_changes_nothing_but_its_absence(config: HeadConfig) -> None:
    """A row with one modality left scores as that modality's classifier alone."""
    head, features = build(config).eval(), rows(config)
    for index, name in enumerate(head.modalities):
        alone = [torch.zeros_like(part) for part in features]
        alone[index] = features[index]
        weights = head.weights(*alone)
        assert torch.equal(weights, F.one_hot(torch.tensor(index), len(features)).expand(12, -1))
        torch.testing.assert_close(head(*alone), dict(head.monitors(*features))[name])


def test_a_row_with_nothing_scores_zero_and_gives_no_gradient() -> None:
    trust = torch.randn(3, 2, requires_grad=True)
    usable = torch.tensor([[True, True], [True, False], [False, False]])
    weights = routing_weights(trust, usable)
    assert weights[2].tolist() == [0.0, 0.0]
    weights[:, 0].sum().backward()
    assert trust.grad is not None
    assert torch.isfinite(trust.grad).all()
    assert trust.grad[1:].abs().max() == 0.0


def test_extreme_trust_of_half_precision_stays_finite() -> None:
    trust = torch.tensor([[6e4, -6e4], [-6e4, -6e4]], dtype=torch.float16)
    weights = routing_weights(trust, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    only = routing_weights(trust, torch.tensor([[False, True], [False, True]]))
    torch.testing.assert_close(only, torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


def test_hiding_takes_one_modality_of_the_drawn_rows_and_never_the_last() -> None:
    head = build(RouterConfig(modalities=("image", "text", "multimodal"), hide_share=0.4))
    usable = torch.ones(6000, 3, dtype=torch.bool)
    usable[:2000, 1:] = False
    torch.manual_seed(0)
    left = head._hide(usable)
    assert torch.equal(left[:2000], usable[:2000])
    missing = (~left[2000:]).float()
    assert set(missing.sum(1).tolist()) == {0.0, 1.0}
    torch.testing.assert_close(missing.mean(0), torch.full((3,), 0.4 / 3), atol=0.02, rtol=0)


def test_a_hidden_modality_gets_no_gradient_from_its_row() -> None:
    config = RouterConfig(hide_share=0.99)
    head, features = build(config), rows(config, 1)
    torch.manual_seed(0)
    head.loss(features, torch.tensor([1]), 0.0)["loss"].backward()
    norms = [
        float(branch.classifier[0].weight.grad.abs().sum()) for branch in head.branches.values()
    ]
    assert sorted(norm > 0 for norm in norms) == [False, True]


def test_f39_widths_differ_and_every_branch_works_at_the_common_one() -> None:
    """The joint vector is wider than the contrastive ones; heads fit what they receive."""
    config = EnsembleConfig()
    widths = {**WIDTHS, "image/multimodal_pooled": 768, "image/projected": 256}
    head = config.build(toy_spec(widths))
    assert isinstance(head, Router)
    for branch in head.branches.values():
        assert branch.classifier[0].in_features == config.common_width == 256
        assert branch.trust[0].in_features == 256
    logits = head(torch.randn(2, 256), torch.randn(2, 4), torch.randn(2, 768))
    assert logits.shape == (2, 3)


def test_f40_each_pooling_is_another_array() -> None:
    for config in (RouterConfig, EnsembleConfig):
        one, other = (config(image_feature=name).arrays()[0] for name in ("projected", "pooled"))
        assert (one, other) == ("image/projected", "image/pooled")
    names = ("projected", "pooled", "multimodal", "text")
    assert len({NaiveConfig(feature=name).arrays() for name in names}) == len(names)


def test_a_modality_named_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="image, image name one twice"):
        RouterConfig(modalities=("image", "image"))


def test_the_loss_is_the_one_chosen_and_weights_are_logged() -> None:
    config = RouterConfig()
    head, features = build(config), rows(config)
    targets = torch.arange(12) % 3
    parts = head.loss(features, targets, 0.0)
    torch.testing.assert_close(parts["loss"], F.cross_entropy(head(*features), targets))
    torch.testing.assert_close(parts["weight_image"] + parts["weight_text"], torch.tensor(1.0))


def test_a_vector_with_some_zeros_is_there() -> None:
    rows = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 2.0, 3.0]])
    assert present(rows).tolist() == [True, False, True]
