import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from heads.losses import mixture_of_prompts as module
from heads.losses import prompt_chunks, prompt_gradient, prompt_scores
from heads.losses.mixture_of_prompts import max_cosines, mixture_of_prompts_loss
from heads.losses.prompt_collapse import Collapse

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from plain_mop import plain_collapse_terms, plain_mop_loss

METHODS = ["screen", "float32", "dense"]
OPTIONS: dict[str, dict[str, Any]] = {
    "seed": {},
    "late": {"tau": 0.05},
    "hard": {"hard": True, "penalty_reduction": "sum_per_prompt", "offset_penalty": 0.1},
    "only classification": {"mixture_weight": 0.0},
    "only mixture": {"mixture_weight": 1.0},
    "flat": {"scale": 1.0, "classification_temperature": 1.0},
    "moderate": {"scale": 100.0, "classification_temperature": 1.0},
    "no penalty": {"offset_penalty": 0.0, "scale": 20.0, "tau": 3.0},
}
# (B, C, K, D)
SHAPES = [(7, 13, 4, 32), (40, 101, 8, 64), (1, 5, 1, 16), (6, 1, 3, 8), (150, 90, 32, 48)]


def problem(shape: tuple[int, int, int, int], spread: float = 0.1) -> tuple[Tensor, ...]:
    """Unit features near their class text, repeated classes, offsets without ties."""
    num_rows, num_classes, num_prompts, dim = shape
    torch.manual_seed(sum(shape))
    base = F.normalize(torch.randn(num_classes, dim), dim=1)
    offsets = torch.randn(num_classes, num_prompts, dim) * spread
    targets = torch.randint(0, max(1, num_classes // 2), (num_rows,))
    features = F.normalize(base[targets] + 2.0 * torch.randn(num_rows, dim) / dim**0.5, dim=1)
    return features, base, offsets, targets


def plain(
    features: Tensor, base: Tensor, offsets: Tensor, targets: Tensor, **options: Any
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Loss parts and gradient of the written-out form, in float64."""
    exact = offsets.double().requires_grad_()
    parts = plain_mop_loss(features.double(), base.double(), exact, targets, **options)
    parts[0].backward()
    assert exact.grad is not None
    return tuple(part.detach() for part in parts), exact.grad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_written_out_form(
    shape: tuple[int, int, int, int], options: dict[str, Any], method: Any
) -> None:
    features, base, offsets, targets = problem(shape)
    expected, expected_gradient = plain(features, base, offsets, targets, **options)
    offsets.requires_grad_()
    found = mixture_of_prompts_loss(features, base, offsets, targets, method=method, **options)
    found.loss.backward()
    assert offsets.grad is not None
    for one, other in zip(found[:4], expected, strict=True):
        torch.testing.assert_close(one.detach().double(), other, rtol=1e-5, atol=1e-4)
    error = (offsets.grad - expected_gradient).norm() / expected_gradient.norm()
    assert error < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_many_small_ragged_chunks_change_nothing(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, base, offsets, targets = problem((40, 101, 8, 64))
    for where in (module, prompt_chunks, prompt_gradient):
        monkeypatch.setattr(where, "chunk_classes", lambda *_: 7)
    expected, expected_gradient = plain(features, base, offsets, targets)
    offsets.requires_grad_()
    loss = mixture_of_prompts_loss(features, base, offsets, targets, method=method).loss
    loss.backward()
    assert offsets.grad is not None
    torch.testing.assert_close(loss.detach().double(), expected[0], rtol=1e-5, atol=1e-5)
    assert (offsets.grad - expected_gradient).norm() < 1e-4 * expected_gradient.norm()


def test_without_sparse_products_the_gradient_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, base, offsets, targets = problem((40, 101, 8, 64))
    monkeypatch.setattr(prompt_scores, "sparse_products", lambda _: False)
    _, expected = plain(features, base, offsets, targets)
    offsets.requires_grad_()
    mixture_of_prompts_loss(features, base, offsets, targets, method="screen").loss.backward()
    assert offsets.grad is not None
    assert (offsets.grad - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("factor", [3.0, 1e-6])
def test_gradient_follows_the_outer_gradient(method: Any, factor: float) -> None:
    features, base, offsets, targets = problem((7, 13, 4, 32))
    _, expected = plain(features, base, offsets, targets)
    offsets.requires_grad_()
    loss = mixture_of_prompts_loss(features, base, offsets, targets, method=method).loss
    (factor * loss).backward()
    assert offsets.grad is not None
    assert (offsets.grad / factor - expected).norm() < 1e-4 * expected.norm()


def test_more_than_256_prompts_a_class() -> None:
    features, base, offsets, targets = problem((5, 3, 300, 16))
    _, expected = plain(features, base, offsets, targets)
    offsets.requires_grad_()
    mixture_of_prompts_loss(features, base, offsets, targets, method="dense").loss.backward()
    assert offsets.grad is not None
    assert (offsets.grad - expected).norm() < 1e-4 * expected.norm()


def test_too_many_pairs_turn_the_sparse_way_dense() -> None:
    features, base, offsets, targets = problem((40, 101, 8, 64))
    terms = prompt_scores.Terms(20.0, 1.0, 1.0, 0.5, 0.0, False)
    assert prompt_scores.sparse_scores(features, base, offsets, targets, terms, screen=True) is None
    terms = prompt_scores.Terms(50.0, 1.0, 0.001, 0.5, 0.0, False)
    scores = prompt_scores.sparse_scores(features, base, offsets, targets, terms, screen=True)
    assert scores is not None
    assert len(scores.pairs) == 3
    assert scores.pairs[0].numel() < 0.1 * 40 * 101


def test_screening_error_bound_holds() -> None:
    torch.manual_seed(0)
    features = F.normalize(torch.randn(200, 64), dim=1)
    prompts = F.normalize(torch.randn(300, 64), dim=1)
    rough = (features.bfloat16() @ prompts.bfloat16().t()).float()
    exact = features.double() @ prompts.double().t()
    bound = prompt_scores._factors_error(features) + prompt_scores._ROUNDING * (
        exact.abs().max() + 0.02
    )
    assert (rough - exact).abs().max() < bound
    assert bound < 0.01


@pytest.mark.parametrize("which", ["features", "base"])
def test_refuses_to_drop_a_gradient(which: str) -> None:
    features, base, offsets, targets = problem((7, 13, 4, 32))
    {"features": features, "base": base}[which].requires_grad_()
    with pytest.raises(ValueError, match="only the offsets get a gradient"):
        mixture_of_prompts_loss(features, base, offsets, targets)


def test_not_a_number_reaches_the_loss() -> None:
    features, base, offsets, targets = problem((7, 13, 4, 32))
    features[3] = float("nan")
    for method in METHODS:
        found = mixture_of_prompts_loss(features, base, offsets, targets, method=method)  # type: ignore[arg-type]
        assert found.loss.isnan()


class LargestTensor(TorchDispatchMode):
    """Records how many elements the largest tensor has that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1.0, 714.0])
def test_f03_never_holds_rows_x_classes_x_prompts(
    method: Any, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F-03: memory grew with B x C x K and with a normalised copy of all prompts."""
    shape = num_rows, num_classes, num_prompts, dim = (64, 120, 16, 8)
    for where in (module, prompt_chunks, prompt_gradient):
        monkeypatch.setattr(where, "chunk_classes", lambda *_: 10)
    features, base, offsets, targets = problem(shape)
    offsets.requires_grad_()
    options = {"classification_temperature": 1.0, "scale": scale}
    with LargestTensor() as seen:
        found = mixture_of_prompts_loss(
            features,
            base,
            offsets,
            targets,
            method=method,
            **options,  # type: ignore[arg-type]
        )
        found.loss.backward()
        fused = seen.numel
        scores = max_cosines(features, base, offsets.detach())
    assert scores.shape == (num_rows, num_classes)
    assert seen.numel == fused == num_classes * num_prompts * dim  # the gradient itself
    with LargestTensor() as plainly:
        plain_mop_loss(features, base, offsets, targets)
    assert plainly.numel >= num_rows * num_classes * num_prompts


def test_max_cosines_with_and_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (module, prompt_chunks, prompt_gradient):
        monkeypatch.setattr(where, "chunk_classes", lambda *_: 4)
    features, base, offsets, _ = problem((7, 13, 4, 32))
    prompts = F.normalize(base.unsqueeze(1) + offsets, dim=-1)
    expected = torch.einsum("bd,ckd->bck", features, prompts).amax(dim=-1)
    torch.testing.assert_close(max_cosines(features, base, offsets), expected)
    offsets.requires_grad_()
    found = max_cosines(features, base, offsets)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), offsets)
    prompts = F.normalize(base.unsqueeze(1) + offsets, dim=-1)
    again = torch.einsum("bd,ckd->bck", features, prompts).amax(dim=-1)
    (wanted,) = torch.autograd.grad(again.square().sum(), offsets)
    torch.testing.assert_close(gradient, wanted)


COLLAPSE = Collapse(diversity=3.0, entropy=0.7, min_usage=0.4, usage_threshold=0.3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(20, 6, 3, 16), (40, 101, 8, 64), (4, 3, 1, 8)], ids=str)
@pytest.mark.parametrize("tau", [2.0, 0.1])
def test_collapse_terms_and_gradient_equal_the_written_out_form(
    shape: tuple[int, int, int, int], method: Any, tau: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (module, prompt_chunks, prompt_gradient):
        monkeypatch.setattr(where, "chunk_classes", lambda *_: 7)
    features, base, offsets, targets = problem(shape, spread=0.3)
    exact = offsets.double().requires_grad_()
    terms = plain_collapse_terms(
        features.double(), base.double(), exact, targets, scale=10.0, tau=tau, usage_threshold=0.3
    )
    expected = plain_mop_loss(
        features.double(), base.double(), exact, targets, scale=10.0, tau=tau
    )[0]
    expected = expected + 3.0 * terms[0] + 0.7 * terms[1] + 0.4 * terms[2]
    expected.backward()  # type: ignore[no-untyped-call]
    offsets.requires_grad_()
    found = mixture_of_prompts_loss(
        features, base, offsets, targets, scale=10.0, tau=tau, collapse=COLLAPSE, method=method
    )
    found.loss.backward()
    assert offsets.grad is not None
    assert exact.grad is not None
    for one, other in zip(found[4:], terms, strict=True):
        torch.testing.assert_close(one.double(), other.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.loss.detach().double(), expected.detach(), rtol=1e-5, atol=1e-4
    )
    assert (offsets.grad - exact.grad).norm() < 1e-4 * exact.grad.norm()


def test_collapse_terms_equal_a_slow_loop() -> None:
    features, base, offsets, targets = problem((20, 6, 3, 16), spread=0.5)
    found = mixture_of_prompts_loss(
        features, base, offsets, targets, scale=10.0, tau=2.0, collapse=COLLAPSE
    )
    diversity, entropy, shortfall = [], [], []
    for index in targets.unique().tolist():
        prompts = F.normalize(base[index] + offsets[index], dim=-1)
        diversity += [
            float(prompts[k] @ prompts[other]) ** 2
            for k in range(3)
            for other in range(3)
            if k != other
        ]
        rows = features[targets == index]
        usage = torch.softmax(10.0 * rows @ prompts.t() / 2.0, dim=1).mean(dim=0)
        entropy.append(float((usage * usage.log()).sum()))
        shortfall.append(sum(max(0.0, 0.3 - float(u)) for u in usage))
    assert float(found.diversity) == pytest.approx(sum(diversity) / len(diversity), rel=1e-5)
    assert float(found.entropy) == pytest.approx(sum(entropy) / len(entropy), rel=1e-5)
    assert float(found.min_usage) == pytest.approx(sum(shortfall) / len(shortfall), rel=1e-4)


@pytest.mark.parametrize("method", ["screen", "float32"])
def test_a_row_sparse_gradient_is_the_whole_one_of_the_touched_classes(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (module, prompt_chunks, prompt_gradient):
        monkeypatch.setattr(where, "chunk_classes", lambda *_: 7)
    features, base, offsets, targets = problem((20, 101, 8, 64))
    options: dict[str, Any] = {"collapse": COLLAPSE, "method": method, "offset_penalty": 5.0}
    offsets.requires_grad_()
    mixture_of_prompts_loss(features, base, offsets, targets, **options).loss.backward()
    assert offsets.grad is not None
    whole = offsets.grad
    offsets.grad = None
    mixture_of_prompts_loss(
        features, base, offsets, targets, touched_share=1e-6, **options
    ).loss.backward()
    part = offsets.grad
    assert part is not None
    assert part.is_sparse
    touched = part.coalesce().indices()[0]
    assert set(targets.tolist()) <= set(touched.tolist())
    assert len(touched) < 101
    scale = whole.abs().max()
    torch.testing.assert_close(
        part.coalesce().values(), whole[touched], rtol=1e-4, atol=float(1e-5 * scale)
    )


def test_a_flat_softmax_touches_every_class() -> None:
    features, base, offsets, targets = problem((7, 13, 4, 32))
    offsets.requires_grad_()
    mixture_of_prompts_loss(
        features, base, offsets, targets, scale=1.0, touched_share=1e-6
    ).loss.backward()
    assert offsets.grad is not None
    assert not offsets.grad.is_sparse


def test_a_flat_softmax_is_seen_before_any_chunk_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, base, offsets, targets = problem((40, 101, 8, 64))
    monkeypatch.setattr(prompt_scores, "Chunks", None)  # would be called for the first chunk
    terms = prompt_scores.Terms(20.0, 1.0, 1.0, 0.5, 0.0, False)
    assert prompt_scores.sparse_scores(features, base, offsets, targets, terms, screen=True) is None
    terms = prompt_scores.Terms(50.0, 1.0, 0.001, 0.5, 0.0, False)
    with pytest.raises(TypeError):
        prompt_scores.sparse_scores(features, base, offsets, targets, terms, screen=True)
