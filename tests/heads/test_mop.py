import dataclasses
import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from featcache.errors import ConfigError
from featcache.prompts import TEMPLATES
from heads import optim as optimisation
from heads.base import FeatureSpec
from heads.models.mop import Mop, MopConfig, base_prompts
from heads.optim import OptimConfig
from heads.train import _warn_of_pieces

C, D = 6, 16


def spec(prompts: Tensor | None = None, task: Any = "single_label") -> FeatureSpec:
    torch.manual_seed(1)
    return FeatureSpec(
        feature_dim=D,
        num_classes=C,
        task=task,
        class_counts=np.full(C, 4, dtype=np.int64),
        classes=pd.DataFrame({"name": [f"kind {c}" for c in range(C)]}),
        prompts=torch.randn(3, C, D) * 5.0 if prompts is None else prompts,
        logit_scale=100.0,
    )


def batch(num_rows: int = 24) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    targets = torch.randint(0, C, (num_rows,))
    centres = base_prompts(spec().prompts)  # type: ignore[arg-type]
    return 7.0 * (centres[targets] + 0.3 * torch.randn(num_rows, D)), targets


def loss_batch() -> tuple[tuple[Tensor], Tensor]:
    features, targets = batch()
    return (features,), targets


def test_init_gives_distinct_offsets_around_the_text() -> None:
    head = MopConfig(num_prompts=4, init="semantic").build(spec())
    assert head.offsets.shape == (C, 4, D)
    assert 0.005 < float(head.offsets.detach().std()) < 0.02
    assert float(MopConfig(init_std=0.5).build(spec()).offsets.detach().std()) > 0.4


def test_forward_is_the_scaled_best_cosine() -> None:
    head = MopConfig(num_prompts=4, init_std=0.3, scale=7.0).build(spec())
    features, _ = batch()
    prompts = F.normalize(head.base.unsqueeze(1) + head.offsets, dim=-1)
    cosines = torch.einsum("bd,ckd->bck", F.normalize(features, dim=1), prompts)
    expected = 7.0 * cosines.amax(dim=-1)
    torch.testing.assert_close(head(features), expected)
    with torch.no_grad():
        torch.testing.assert_close(head(features), expected)
    assert head(features[:1]).shape == (1, C)


@pytest.mark.parametrize("preset", ["default", "seed"])
def test_training_steps_lower_the_loss_and_move_only_offsets(preset: Any) -> None:
    head = MopConfig(preset=preset, num_prompts=4).build(spec())
    before = head.base.clone()
    features, targets = batch()
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        parts = head.loss((features,), targets, 0.5)
        optimizer.zero_grad()
        parts["loss"].backward()
        optimizer.step()
        losses.append(float(parts["loss"].detach()))
    assert losses[-1] < losses[0]
    assert [name for name, _ in head.named_parameters()] == ["offsets"]
    assert torch.equal(head.base, before)


def test_parts_add_up() -> None:
    head = MopConfig(num_prompts=4, mixture_weight=0.3).build(spec())
    parts = head.loss(*loss_batch(), 0.0)
    total = 0.3 * parts["loss_mixture"] + 0.7 * parts["loss_cls"] + parts["loss_reg"]
    torch.testing.assert_close(parts["loss"].detach(), total)
    assert not parts["loss_cls"].requires_grad


def test_tau_goes_linearly_and_can_stay() -> None:
    head = MopConfig(tau_start=1.0, tau_end=0.2).build(spec())
    assert [head.tau(p) for p in (0.0, 0.5, 1.0, 2.0)] == pytest.approx([1.0, 0.6, 0.2, 0.2])
    held = MopConfig(tau_start=1.0, tau_end=0.2, anneal_tau=False).build(spec())
    assert held.tau(1.0) == 1.0
    assert float(head.loss(*loss_batch(), 0.5)["tau"]) == pytest.approx(0.6)


def test_lower_temperature_gives_sharper_assignments() -> None:
    head = MopConfig(num_prompts=4, init_std=0.3).build(spec())
    features, _ = batch()
    soft = head.assignments(features, class_index=2, temperature=20.0)
    sharp = head.assignments(features, class_index=2, temperature=0.5)
    assert soft.shape == (len(features), 4)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(len(features)))
    assert bool((sharp.amax(dim=1) > soft.amax(dim=1)).all())
    assert torch.equal(sharp.argmax(dim=1), soft.argmax(dim=1))


def test_trained_state_holds_offsets_only_and_comes_back() -> None:
    first = MopConfig(num_prompts=4).build(spec())
    state = first.trained_state()
    assert list(state) == ["offsets"]
    second = MopConfig(num_prompts=4, init_std=0.5).build(spec())
    features, _ = batch()
    assert not torch.equal(first.offsets, second.offsets)
    second.load_trained_state(state)
    torch.testing.assert_close(second(features), first(features))


def test_anti_collapse_terms_join_the_loss() -> None:
    features, targets = batch()
    torch.manual_seed(0)
    head = MopConfig(
        num_prompts=4, diversity_weight=0.1, entropy_weight=0.01, min_usage_weight=0.2
    ).build(spec())
    parts = head.loss((features,), targets, 0.0)
    without = Mop(head.base, num_prompts=4, offset_penalty=head.offset_penalty)
    without.load_trained_state(head.trained_state())
    extra = (
        0.1 * parts["loss_diversity"] + 0.01 * parts["loss_entropy"] + 0.2 * parts["loss_min_usage"]
    )
    torch.testing.assert_close(
        parts["loss"].detach(), without.loss((features,), targets, 0.0)["loss"].detach() + extra
    )
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    start = float(parts["loss_diversity"])
    for _ in range(5):
        optimizer.zero_grad()
        head.loss((features,), targets, 0.0)["loss"].backward()
        optimizer.step()
    assert float(head.loss((features,), targets, 0.0)["loss_diversity"]) < start


def test_preset_fills_what_is_not_given() -> None:
    seed = MopConfig.model_validate({"preset": "seed", "scale": 20})
    assert (seed.scale, seed.classification_temperature, seed.penalty_reduction) == (
        20.0,
        0.07,
        "mean",
    )
    assert MopConfig(preset="seed").scale == 50.0
    assert MopConfig() == MopConfig(preset="default")
    assert MopConfig.model_validate(seed.record()) == seed


def test_the_seed_preset_brings_its_learning_rate() -> None:
    """Scale, temperature, penalty and learning rate belong together; a flag still wins."""
    chosen = MopConfig(preset="seed").own_optim()
    assert optimisation.resolve(OptimConfig(), chosen, 50_000).lr == 5e-4
    assert optimisation.resolve(OptimConfig(lr=1e-2), chosen, 50_000).lr == 1e-2
    default = MopConfig().own_optim()
    assert default == MopConfig.optim_defaults
    assert dataclasses.replace(chosen, lr=default.lr) == default


def test_penalties_of_a_batch_in_pieces_are_said_to_be_of_each_piece(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = MopConfig(num_prompts=4, diversity_weight=0.1, entropy_weight=0.01).build(spec())
    for pieces, processes, found in ((1, 1, 0), (4, 1, 1), (1, 2, 2)):
        _warn_of_pieces(head, pieces, processes)
        assert len(caplog.records) == found
    assert "head.diversity_weight and head.entropy_weight" in caplog.text
    assert "optim.accumulate=4, 1 process)" in caplog.text
    _warn_of_pieces(MopConfig(num_prompts=4).build(spec()), 4, 2)
    assert len(caplog.records) == 2, "the other terms are means over rows"


@pytest.mark.parametrize(("rows", "prompts"), [(1, 1), (16, 1), (40, 2), (100_000, 32)])
def test_more_rows_of_a_class_bring_more_prompts(rows: int, prompts: int) -> None:
    counted = dataclasses.replace(spec(), class_counts=np.full(C, rows, dtype=np.int64))
    assert MopConfig().build(counted).offsets.shape == (C, prompts, D)
    assert MopConfig(preset="seed").build(counted).offsets.shape == (C, 32, D)


def test_penalty_per_row_is_that_of_a_prior() -> None:
    """Twice the rows halve it; the number of prompts does not thin it out."""
    for rows, num_prompts in ((4, 2), (8, 2), (4, 6)):
        counted = dataclasses.replace(spec(), class_counts=np.full(C, rows, dtype=np.int64))
        head = MopConfig(num_prompts=num_prompts, offset_penalty=7.0).build(counted)
        squares = float(head.offsets.detach().double().square().sum())
        found = float(head.loss(*loss_batch(), 0.0)["loss_reg"])
        assert found == pytest.approx(7.0 * squares / (rows * C), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": 0}, "greater than 0"),
        ({"mixture_weight": 1.5}, "less than or equal to 1"),
        ({"preset": "mine"}, "'default' or 'seed'"),
        ({"min_usage_weight": 1.0, "min_usage": 0.05, "num_prompts": 32}, "at most 0.03125"),
        ({"kappa": 1}, "Extra inputs"),
    ],
)
def test_illegal_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MopConfig.model_validate(values)


def test_templates_by_name_by_list_and_by_dataset() -> None:
    classes = spec().classes
    assert MopConfig(templates=["a {name}"]).template_names(classes, "x") == ["a {name}"]
    assert MopConfig(templates="plain").template_names(classes, "x") == list(TEMPLATES["plain"])
    assert MopConfig().template_names(classes, "x")
    with pytest.raises(ConfigError, match="no template set 'nope'"):
        MopConfig(templates="nope").template_names(classes, "x")


def test_refuses_multi_label_and_missing_text() -> None:
    with pytest.raises(ConfigError, match="multi_label, expected single_label"):
        MopConfig().build(spec(task="multi_label"))
    empty = FeatureSpec(D, C, "single_label", np.ones(C, np.int64), spec().classes, None, 100.0)
    with pytest.raises(ValueError, match="class text features"):
        MopConfig().build(empty)


def test_f01_text_features_move_with_the_head() -> None:
    """F-01: base text features stayed on the CPU, copied to the device every step."""
    head = MopConfig().build(spec())
    assert "base" in dict(head.named_buffers())
    assert head.to("meta").base.device.type == "meta"


def test_f02_small_noise_is_not_zero_and_prompts_separate() -> None:
    """F-02: offsets that start at zero get equal gradients and stay one prompt for ever."""
    head = MopConfig(init="small_noise", num_prompts=4).build(spec())
    assert 0.0 < float(head.offsets.detach().std()) < 0.005
    head.loss(*loss_batch(), 0.0)["loss"].backward()
    assert head.offsets.grad is not None
    used = head.offsets.grad[batch()[1].unique()]
    assert bool((used[:, 0] != used[:, 1]).any(dim=-1).all())


def test_f04_saturating_product_is_said_once_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """F-04: scale 50 and temperature 0.07 multiply cosines by 714."""
    with caplog.at_level(logging.WARNING):
        head = MopConfig(preset="seed").build(spec())
        head.loss(*loss_batch(), 0.0)
        head.loss(*loss_batch(), 0.5)
    (record,) = caplog.records
    assert "multiplies cosines by 714" in record.getMessage()
    assert "\n" not in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        MopConfig().build(spec())
    assert not caplog.records


def test_f05_an_offset_is_not_held_less_the_more_classes_there_are() -> None:
    """F-05: a mean over all classes' offsets pulls at each of them with 1/C of the strength."""

    def hold(num_classes: int, reduction: Any) -> float:
        """Penalty of one offset of length 1, all others 0, with 600 training rows."""
        given = dataclasses.replace(
            spec(torch.randn(3, num_classes, D)),
            num_classes=num_classes,
            class_counts=np.full(num_classes, 600 // num_classes, dtype=np.int64),
        )
        head = MopConfig(num_prompts=2, offset_penalty=1.0, penalty_reduction=reduction).build(
            given
        )
        with torch.no_grad():
            head.offsets.zero_()[0, 0, 0] = 1.0
        features, targets = batch()
        return float(head.loss((features,), targets % 5, 0.0)["loss_reg"])

    assert hold(5, "per_row") == pytest.approx(1 / 600)
    assert hold(300, "per_row") == pytest.approx(1 / 600)
    for reduction, width in (("sum_per_prompt", 1), ("mean", D)):
        assert hold(5, reduction) == pytest.approx(1 / (5 * 2 * width))
        assert hold(300, reduction) == pytest.approx(1 / (300 * 2 * width))


def test_f52_each_template_is_normalised_before_the_mean() -> None:
    """F-52: a longer template's feature outweighed the others."""
    prompts = torch.zeros(2, 1, D)
    prompts[0, 0, 0], prompts[1, 0, 1] = 100.0, 1.0
    found = base_prompts(prompts)
    assert float(found[0, 0]) == pytest.approx(float(found[0, 1]))
    assert float(found.norm()) == pytest.approx(1.0)


def test_lazy_rows_train_as_all_rows_where_the_softmax_is_sharp() -> None:
    """Only classes that a row's softmax looks at get a gradient; the scores come out alike."""
    torch.manual_seed(0)
    prompts = F.normalize(torch.randn(1, 40, D), dim=-1)
    targets = torch.randint(0, 8, (30,))
    features = prompts[0, targets] + 0.2 * torch.randn(30, D)
    results, touched = {}, set()
    for optimizer in ("adamw", "lazy_adamw"):
        torch.manual_seed(1)
        head = Mop(base_prompts(prompts), num_prompts=3, scale=50.0, offset_penalty=0.0)
        head.classification_temperature, head.method = 0.2, "float32"
        built = optimisation.build(
            OptimConfig.from_values({"optimizer": optimizer, "lr": 1e-3, "weight_decay": 0.0}), head
        )
        start = head.offsets.detach().clone()
        for step in range(10):
            built.zero_grad()
            head.loss((features,), targets, step / 10)["loss"].backward()
            assert head.offsets.grad is not None
            assert head.offsets.grad.is_sparse == (optimizer == "lazy_adamw")
            optimisation.clip(head, 5.0)
            built.step()
        if optimizer == "lazy_adamw":
            moved = (head.offsets.detach() != start).flatten(1).any(dim=1)
            touched = set(moved.nonzero().squeeze(1).tolist())
        results[optimizer] = head(features).detach()
    assert set(targets.tolist()) <= touched
    assert len(touched) < 40
    change = (results["adamw"] - results["lazy_adamw"]).abs().max()
    assert change < 0.05 * results["adamw"].abs().max()


def test_clipping_takes_sparse_gradients_for_what_they_are() -> None:
    weight = torch.nn.Linear(3, 4, bias=False)
    dense = torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 4.0], [0.0, 0.0, 0.0], [0.0, 12.0, 0.0]])
    weight.weight.grad = dense.to_sparse(1)
    optimisation.clip(weight, 1.3)
    torch.testing.assert_close(weight.weight.grad.to_dense(), dense / 10, rtol=1e-5, atol=1e-6)
    optimisation.clip(weight, 100.0)
    torch.testing.assert_close(weight.weight.grad.to_dense(), dense / 10, rtol=1e-5, atol=1e-6)
