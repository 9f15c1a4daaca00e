"""ML-Decoder: its equation as plain loops, group order, masks, and classes by name alone."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from featcache.class_text import ensemble
from heads.base import FeatureSpec
from heads.losses.base import ClassStatistics
from heads.losses.binary_cross_entropy import BinaryCrossEntropyConfig
from heads.models import ml_decoder
from heads.models.ml_decoder import MlDecoder, MlDecoderConfig

DIM = 6


def head_of(num_classes: int, seed: int = 0, **options: Any) -> MlDecoder:
    rng = np.random.default_rng(seed)
    counts = np.full(num_classes, 3)
    spec = FeatureSpec(
        feature_dim=DIM,
        num_classes=num_classes,
        task="multi_label",
        class_counts=counts,
        classes=pd.DataFrame({"name": [f"c{i}" for i in range(num_classes)], "count": counts}),
        prompts=torch.from_numpy(rng.normal(size=(2, num_classes, 5))).float(),
        logit_scale=1.0,
        mean=torch.from_numpy(rng.normal(size=DIM)).float(),
        std=torch.from_numpy(rng.uniform(0.5, 2, DIM)).float(),
        criterion=BinaryCrossEntropyConfig().build(ClassStatistics(counts, 3 * num_classes)),
    )
    torch.manual_seed(seed)
    small = {"width": 8, "num_heads": 2, "hidden": 12}
    head = MlDecoderConfig.model_validate(small | options).build(spec)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return head.eval()


def norm(vector: np.ndarray, layer: torch.nn.Module) -> np.ndarray:
    centred = vector - vector.mean()
    unit = centred / np.sqrt((centred**2).mean() + 1e-5)
    return unit * layer.weight.detach().double().numpy() + layer.bias.detach().double().numpy()


def affine(vector: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
    result = layer.weight.detach().double().numpy() @ vector
    return result if layer.bias is None else result + layer.bias.detach().double().numpy()


def slow_logits(head: MlDecoder, tokens: Tensor, mask: Tensor | None) -> np.ndarray:
    """One query, head and token at a time, from the paper's equation, in float64."""
    decoder, heads = head.decoder, head.decoder.num_heads
    width = decoder.embed.out_features
    part = width // heads
    assert head.scale is not None
    rows = []
    for b, row in enumerate(tokens.double().numpy()):
        scaled = (row - head.scale.mean.double().numpy()) / head.scale.std.double().numpy()
        seen = range(len(row)) if mask is None else np.flatnonzero(mask[b].numpy())
        memory = [np.maximum(affine(scaled[place], decoder.embed), 0) for place in seen]
        logits = []
        for k, query in enumerate(head.queries.double().numpy()):
            first = norm(2 * query, decoder.norms[0])
            asked = affine(first, decoder.query)
            joined = np.zeros(width)
            for h in range(heads):
                own = slice(h * part, (h + 1) * part)
                scores = np.asarray(
                    [asked[own] @ affine(m, decoder.key)[own] / np.sqrt(part) for m in memory]
                )
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                for weight, m in zip(weights, memory, strict=True):
                    joined[own] += weight * affine(m, decoder.value)[own]
            second = norm(first + affine(joined, decoder.out), decoder.norms[1])
            inner = np.maximum(affine(second, decoder.expand), 0)
            third = norm(second + affine(inner, decoder.contract), decoder.norms[2])
            logits += (third @ head.weight[k].detach().double().numpy()).tolist()
        rows.append(np.asarray(logits)[: head.num_classes])
    return np.asarray(rows) + head.bias.detach().double().numpy()


@pytest.mark.parametrize(("num_classes", "groups"), [(5, -1), (5, 5), (7, 3), (4, 1), (10, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_logits_are_those_of_the_equation(num_classes: int, groups: int, masked: bool) -> None:
    head = head_of(num_classes, groups=groups, feature="multimodal" if masked else "tokens")
    tokens = torch.randn(3, 4, DIM)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool() if masked else None
    expected = slow_logits(head, tokens, mask)
    np.testing.assert_allclose(head(tokens, mask).detach().numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("num_classes", "groups", "shape"),
    [(20, -1, (20, 1)), (1000, -1, (100, 10)), (101, 100, (51, 2)), (8142, 100, (100, 82))],
)
def test_f47_groups_are_a_whole_number_rounded_up(
    num_classes: int, groups: int, shape: tuple[int, int]
) -> None:
    head = head_of(num_classes, groups=groups)
    assert (head.weight.shape[0], head.weight.shape[2]) == shape
    tokens = torch.randn(2, 3, DIM)
    before = head(tokens)
    chosen = num_classes - 1
    with torch.no_grad():  # class c lives in group c // g, at place c % g
        head.weight[chosen // shape[1], :, chosen % shape[1]] += 1.0
    changed = (head(tokens) - before).abs().amax(0) > 1e-6
    assert changed.nonzero().flatten().tolist() == [chosen]


def test_groups_of_a_hundred_thousand_classes_hold_each_class_once() -> None:
    for num_classes in (99_999, 100_000, 100_001, 1_000_003):
        per_group = -(-num_classes // 100)
        assert (-(-num_classes // per_group) - 1) * per_group < num_classes
        assert -(-num_classes // per_group) * per_group >= num_classes


def test_f40_what_stands_at_padding_is_never_read() -> None:
    head = head_of(5, feature="multimodal")
    tokens = torch.randn(3, 4, DIM)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]]).bool()
    other = torch.where(mask[..., None], tokens, 100 * torch.randn_like(tokens))
    torch.testing.assert_close(head(tokens, mask), head(other, mask))
    short = head(tokens[1:2, :1], mask[1:2, :1])
    torch.testing.assert_close(short, head(tokens, mask)[1:2])
    assert not torch.allclose(head(tokens, None), head(other, None))


def test_predicting_a_few_rows_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of(5, feature="multimodal")
    tokens, mask = torch.randn(11, 4, DIM), torch.rand(11, 4) < 0.6
    whole = head(tokens, mask).detach()
    monkeypatch.setattr(ml_decoder, "_ELEMENTS", 3 * 12 * 5)
    with torch.no_grad():
        torch.testing.assert_close(head(tokens, mask), whole)
        assert head(tokens[:0], mask[:0]).shape == (0, 5)


def test_random_queries_are_never_trained_and_move_with_the_state() -> None:
    head, other = head_of(5, seed=0), head_of(5, seed=1)
    assert "queries" in head.trained_state()
    assert "queries" not in dict(head.named_parameters())
    tokens = torch.randn(2, 3, DIM)
    assert not torch.allclose(head(tokens), other(tokens))
    other.load_trained_state(head.trained_state())
    torch.testing.assert_close(head(tokens), other(tokens))


class TestTextQueries:
    def test_logits_do_not_depend_on_the_order_of_the_classes(self) -> None:
        head = head_of(6, queries="text")
        tokens = torch.randn(4, 3, DIM)
        before = head(tokens)
        order = torch.tensor([3, 1, 5])
        head.replace_classes(head.text[order][None])
        torch.testing.assert_close(head(tokens), before[:, order])
        head.replace_classes(torch.randn(2, 9, 5))
        assert head(tokens).shape == (4, 9)

    def test_a_class_is_the_mean_of_its_templates(self) -> None:
        head = head_of(6, queries="text")
        text = torch.randn(3, 4, 5)
        head.replace_classes(text)
        unit = text / text.norm(dim=-1, keepdim=True)
        mean = unit.mean(0)
        torch.testing.assert_close(head.text, mean / mean.norm(dim=-1, keepdim=True))
        torch.testing.assert_close(head.text, ensemble(text))

    def test_noise_is_for_training_only(self) -> None:
        head = head_of(6, queries="text", query_noise=0.5, dropout=0.0)
        tokens = torch.randn(4, 3, DIM)
        assert torch.equal(head(tokens), head(tokens))
        assert not torch.equal(head.train()(tokens), head(tokens))

    def test_random_queries_know_the_trained_classes_only(self) -> None:
        head = head_of(6)
        assert not head.any_classes
        with pytest.raises(TypeError, match="use queries=text"):
            head.replace_classes(torch.randn(1, 3, 5))

    def test_trained_on_seen_classes_it_finds_unseen_ones(self) -> None:
        """Each token shows one class by a fixed rotation of its text; 10 of 60 are held back."""
        torch.manual_seed(0)
        num_classes, seen = 60, 50
        text = torch.nn.functional.normalize(torch.randn(num_classes, 5), dim=1)
        turn = torch.linalg.qr(torch.randn(DIM, 5)).Q
        shown = torch.randint(0, num_classes, (2500, 4))
        tokens = 3 * (text @ turn.t())[shown] + 0.1 * torch.randn(2500, 4, DIM)
        hot = torch.zeros(2500, num_classes).scatter_(1, shown, 1.0)
        options = {"width": 32, "hidden": 64, "scaling": "none", "dropout": 0.0}
        head = head_of(seen, queries="text", **options).train()
        head.replace_classes(text[None, :seen])
        head.text_center.copy_(text[:seen].mean(0))
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        for _ in range(120):
            index = torch.randint(0, 2000, (128,))
            optimizer.zero_grad()
            head.loss((tokens[index],), hot[index, :seen], 0.0)["loss"].backward()
            optimizer.step()
        head.eval().replace_classes(text[None, seen:])
        with torch.no_grad():
            scores, wanted = head(tokens[2000:]), hot[2000:, seen:] > 0
        above = (scores[wanted][:, None] > scores[~wanted][None]).float().mean()
        assert above > 0.7  # area under the ROC curve; guessing gives 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "groups is 0; expected 1 or more"),
        ({"width": 100}, "width 100 is no multiple of num_heads 8"),
        ({"query_noise": 0.1}, "query_noise 0.1 needs queries=text"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MlDecoderConfig(**options)


def test_mixed_precision_gives_nearly_the_same_logits_and_gradients() -> None:
    head = head_of(7, groups=3, dropout=0.0, width=32, hidden=64)
    tokens, targets = torch.randn(40, 4, DIM), (torch.rand(40, 7) < 0.3).float()
    found = {}
    for mixed in (False, True):
        head.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = head.train().loss((tokens,), targets, 0.0)["loss"]
        loss.backward()
        gradients = [p.grad.flatten() for p in head.parameters() if p.grad is not None]
        found[mixed] = torch.cat([loss.detach().reshape(1), torch.cat(gradients)])
    assert found[True].dtype == torch.float32
    difference = (found[True] - found[False]).norm() / found[False].norm()
    assert 0 < difference < 0.03
