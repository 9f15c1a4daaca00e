import dataclasses
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from featcache.errors import ConfigError
from heads.base import Features, FeatureSpec
from heads.models import tip_adapter as module
from heads.models.tip_adapter import TipAdapter, TipAdapterConfig, pair_name

C, D, N = 5, 12, 17


def support() -> tuple[Features, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, C, (N,), generator=generator)
    return (3.0 * torch.randn(N, D, generator=generator),), labels


def spec(task: Any = "single_label") -> FeatureSpec:
    return FeatureSpec(
        feature_dim=D,
        num_classes=C,
        task=task,
        class_counts=np.full(C, 3, dtype=np.int64),
        classes=pd.DataFrame({"name": [f"kind {c}" for c in range(C)]}),
        prompts=torch.randn(2, C, D, generator=torch.Generator().manual_seed(1)),
        logit_scale=20.0,
        support=support,
    )


def queries(num_rows: int = 9) -> Tensor:
    return 5.0 * torch.randn(num_rows, D, generator=torch.Generator().manual_seed(2))


def written_out(features: Tensor, alpha: float, beta: float) -> np.ndarray[Any, Any]:
    """The paper's equation, one query, one key at a time, in float64."""
    prompts = spec().prompts
    assert prompts is not None
    (keys,), labels = support()

    def unit(rows: Tensor) -> np.ndarray[Any, Any]:
        values = rows.double().numpy()
        return np.asarray(values / np.linalg.norm(values, axis=-1, keepdims=True))

    weights = unit(torch.from_numpy(unit(prompts).mean(axis=0)))
    result = np.zeros((len(features), C))
    for row, query in enumerate(unit(features)):
        for c in range(C):
            result[row, c] = 20.0 * query @ weights[c]
        for key, label in zip(unit(keys), labels.tolist(), strict=True):
            result[row, label] += alpha * np.exp(-beta * (1.0 - query @ key))
    return result


def test_every_candidate_equals_the_written_out_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HELD", 9 * 4)  # keys in parts of four
    config = TipAdapterConfig(alphas=(0.5, 4.0), betas=(2.0, 30.0))
    head = config.build(spec())
    found = dict(head.candidates(queries()))
    assert len(found) == 4
    for alpha in (0.5, 4.0):
        for beta in (2.0, 30.0):
            expected = torch.from_numpy(written_out(queries(), alpha, beta)).float()
            name = pair_name(alpha, beta)
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
            alone = config.only(name).build(spec())
            torch.testing.assert_close(alone(queries()), expected, rtol=1e-5, atol=1e-5)


def test_a_training_row_votes_for_its_own_class() -> None:
    (keys,), labels = support()
    head = TipAdapterConfig(alphas=(1e4,), betas=(200.0,)).build(spec())
    assert torch.equal(head(keys).argmax(dim=1), labels)
    assert not list(head.parameters())


def test_without_votes_it_is_the_zero_shot_classifier() -> None:
    head = TipAdapterConfig(alphas=(0.0,)).build(spec())
    expected = torch.from_numpy(written_out(queries(), 0.0, 1.0)).float()
    torch.testing.assert_close(head(queries()), expected, rtol=1e-5, atol=1e-5)


def test_trained_keys_start_as_the_rows_and_lower_the_loss() -> None:
    config = TipAdapterConfig(
        train_keys=True, train_alpha=2.0, train_beta=3.0, alphas=(2.0,), betas=(3.0,)
    )
    head = config.build(spec())
    expected = torch.from_numpy(written_out(queries(), 2.0, 3.0)).float()
    torch.testing.assert_close(head(queries()), expected, rtol=1e-5, atol=1e-5)
    targets = torch.arange(9) % C
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = head.loss((queries(),), targets, 0.0)["loss"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = head.loss((queries(),), targets, 0.0)["loss"]
    torch.testing.assert_close(
        mixed, head.loss((queries(),), targets, 0.0)["loss"], rtol=0.02, atol=0.0
    )
    assert [name for name, _ in head.named_parameters()] == ["keys"]


@pytest.mark.parametrize("train_keys", [False, True])
def test_a_loaded_head_has_its_keys_from_the_state_alone(train_keys: bool) -> None:
    config = TipAdapterConfig(train_keys=train_keys, alphas=(3.0,), betas=(5.0,))
    head = config.build(spec())
    loaded = config.build(dataclasses.replace(spec(), support=None))
    assert len(loaded.keys) == 0
    loaded.load_trained_state(head.trained_state())
    torch.testing.assert_close(loaded(queries()), head(queries()))
    narrow = {"keys": torch.zeros(3, D - 1), "labels": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"keys has shape \(3, 11\), expected \(3, 12\)"):
        loaded.load_trained_state(narrow)


def test_refuses_multi_label_and_missing_text() -> None:
    with pytest.raises(ConfigError, match="multi_label, expected single_label"):
        TipAdapterConfig().build(spec("multi_label"))
    with pytest.raises(ValueError, match="class text features"):
        TipAdapterConfig().build(dataclasses.replace(spec(), prompts=None))
    with pytest.raises(TypeError, match="nothing to train"):
        TipAdapter(torch.eye(3), torch.eye(3), torch.arange(3)).loss(
            (torch.eye(3),), torch.arange(3), 0.0
        )
