"""Label graph and GAT: the equations as plain loops, and what the graph is for."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from featcache.errors import ConfigError
from heads.base import FeatureSpec
from heads.label_graph import GraphAttention, adjacency
from heads.losses.base import ClassStatistics
from heads.losses.binary_cross_entropy import BinaryCrossEntropyConfig
from heads.models.gat import Gat, GatConfig

DIM = 7
Array = npt.NDArray[np.float64]


def counts_of(hot: Array) -> npt.NDArray[np.int64]:
    return (hot.T @ hot).astype(np.int64)


def labels(num_classes: int = 5, rows: int = 40, seed: int = 0) -> Array:
    hot = (np.random.default_rng(seed).random((rows, num_classes)) < 0.3).astype(float)
    hot[:, 4] = 0.0
    hot[0] = [0, 0, 0, 0, 1]  # a label that is only ever alone
    return hot


def head_of(task: str = "multi_label", hot: Array | None = None, **options: Any) -> Gat:
    hot = labels() if hot is None else hot
    num_classes = hot.shape[1]
    rng = np.random.default_rng(1)
    counts = hot.sum(0).astype(np.int64)
    spec = FeatureSpec(
        feature_dim=DIM,
        num_classes=num_classes,
        task=task,  # type: ignore[arg-type]
        class_counts=counts,
        classes=pd.DataFrame({"name": [f"c{i}" for i in range(num_classes)], "count": counts}),
        prompts=torch.from_numpy(rng.normal(size=(2, num_classes, 6))).float(),
        logit_scale=1.0,
        mean=torch.from_numpy(rng.normal(size=DIM)).float(),
        std=torch.from_numpy(rng.uniform(0.5, 2, DIM)).float(),
        criterion=BinaryCrossEntropyConfig().build(ClassStatistics(counts, len(hot))),
        cooccurrence=counts_of(hot),
    )
    torch.manual_seed(0)
    return GatConfig.model_validate({"width": 8, "num_heads": 2} | options).build(spec).eval()


def slow_adjacency(hot: Array, threshold: float) -> Array:
    num_classes = hot.shape[1]
    result = np.eye(num_classes)
    for i in range(num_classes):
        company = [sum(row[i] * row[k] for row in hot) for k in range(num_classes)]
        total = sum(company) - company[i]
        for j in range(num_classes):
            if j != i and total and company[j] / total >= threshold:
                result[i, j] = company[j] / total
    return result


def test_an_edge_as_strong_as_the_threshold_stays() -> None:
    met = np.array([[0, 1, 3], [1, 0, 0], [3, 0, 0]])
    assert adjacency(met, 0.25)[0].tolist() == [1, 0.25, 0.75]
    assert adjacency(met, 0.26)[0].tolist() == [1, 0, 0.75]


@pytest.mark.parametrize("threshold", [0.0, 0.24])
def test_edges_are_shares_of_a_labels_company(threshold: float) -> None:
    hot = labels()
    found = adjacency(counts_of(hot), threshold)
    np.testing.assert_allclose(found, slow_adjacency(hot, threshold))
    assert found[4].tolist() == [0, 0, 0, 0, 1]
    if not threshold:
        np.testing.assert_allclose(found[:4].sum(1), 2)


def slow_layer(layer: GraphAttention, nodes: Array, graph: Array) -> Array:
    weight, left, right = (
        part.detach().double().numpy() for part in (layer.weight, layer.left, layer.right)
    )
    outputs = []
    for head in range(len(weight)):
        inner = [node @ weight[head] for node in nodes]
        rows = []
        for i in range(len(nodes)):
            neighbours = [j for j in range(len(nodes)) if graph[i, j] > 0]
            scores = []
            for j in neighbours:
                score = np.concatenate([left[head], right[head]]) @ np.concatenate(
                    [inner[i], inner[j]]
                )
                scores.append((score if score > 0 else 0.2 * score) + math.log(graph[i, j]))
            weights = np.exp(np.asarray(scores) - max(scores))
            weights /= weights.sum()
            rows.append(sum(w * inner[j] for w, j in zip(weights, neighbours, strict=True)))
        outputs.append(np.asarray(rows))
    return np.mean(outputs, 0) if layer.average else np.concatenate(outputs, 1)


@pytest.mark.parametrize("nodes", ["learned", "text"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_logits_are_those_of_the_equation(nodes: str, threshold: float) -> None:
    head = head_of(nodes=nodes, threshold=threshold)
    features = torch.randn(3, DIM)
    graph = slow_adjacency(labels(), threshold)
    start = head.text if head.labels is None else head.labels.detach()
    inner = slow_layer(head.first, start.double().numpy(), graph)
    vectors = slow_layer(head.second, np.where(inner > 0, inner, np.expm1(inner)), graph)
    scaled = (features.double() - head.scale.mean) / head.scale.std
    rows = head.project.double()(scaled).detach().numpy()
    head.project.float()
    expected = rows @ vectors.T / math.sqrt(8) + head.bias.detach().numpy()
    np.testing.assert_allclose(head(features).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_f38_a_label_listens_to_its_company_and_to_nobody_else() -> None:
    head = head_of()
    assert head.labels is not None
    head.label_vectors()[0].sum().backward()
    assert head.labels.grad is not None
    reached = head.labels.grad.abs().sum(1) > 0
    assert reached.tolist() == [True, True, True, True, False]
    head.labels.grad = None
    head.label_vectors()[4].sum().backward()
    assert (head.labels.grad.abs().sum(1) > 0).tolist() == [False] * 4 + [True]


def test_f38_nodes_are_labels_so_that_a_row_does_not_see_its_batch() -> None:
    head = head_of()
    features = torch.randn(6, DIM)
    whole = head(features)
    torch.testing.assert_close(head(features[2:3]), whole[2:3])
    torch.testing.assert_close(head(features.flip(0)), whole.flip(0))


def test_the_graph_is_in_the_run_and_need_not_be_counted_again() -> None:
    head = head_of(threshold=0.1)
    blank = Gat(head.scale, head.project, 5, 8, num_heads=2)
    assert torch.equal(blank.label_graph(), torch.eye(5))
    blank.load_trained_state(head.trained_state())
    assert torch.equal(blank.eval().label_graph(), head.label_graph())
    features = torch.randn(4, DIM)
    torch.testing.assert_close(blank(features), head(features))


def test_what_has_no_graph_is_refused() -> None:
    with pytest.raises(ConfigError, match="task is single_label, expected multi_label"):
        head_of("single_label")
    with pytest.raises(ConfigError, match=r"no two labels .* \(threshold 0\.05\)"):
        head_of(hot=np.eye(5))
    with pytest.raises(ConfigError, match=r"lower head\.threshold"):
        head_of(threshold=0.99)
    with pytest.raises(ValidationError, match="width 10 is no multiple of num_heads 4"):
        GatConfig(width=10)


def test_a_rare_label_borrows_from_its_company() -> None:
    """One gradient step on a row with label 0 moves the logit of a label it is seen with."""
    hot = np.zeros((30, 5))
    hot[:, 0] = 1
    hot[:3, 1] = 1  # label 1 never occurs without label 0
    hot[5:, 2] = 1
    hot[2:4, 3] = 1
    hot[7:9, 4] = 1
    head = head_of(hot=hot, dropout=0.0)
    features = torch.randn(1, DIM)
    before = head.label_vectors().detach()
    assert head.labels is not None
    (moved,) = torch.autograd.grad(head(features)[0, 0], head.labels)
    with torch.no_grad():
        head.labels += 0.5 * moved
    change = (head.label_vectors() - before).norm(dim=1)
    assert change[1] > 1e-3


def test_mixed_precision_gives_nearly_the_same_gradients() -> None:
    head = head_of(dropout=0.0, width=32).train()
    features = torch.randn(40, DIM)
    targets = torch.from_numpy(labels()).float()
    found = {}
    for mixed in (False, True):
        head.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = head.loss((features,), targets, 0.0)["loss"]
        loss.backward()
        found[mixed] = torch.cat(
            [p.grad.flatten() for p in head.parameters() if p.grad is not None]
        )
    difference = (found[True] - found[False]).norm() / found[False].norm()
    assert 0 < difference < 0.03
