"""The same checks over every member of every folder: adding a file adds it to these tests."""

import copy
import importlib
import inspect
import pkgutil
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from featcache.adapters import ADAPTERS
from featcache.backbones import BACKBONES
from featcache.config import Config
from featcache.datasets import DATASETS
from featcache.errors import ConfigError
from heads.base import Features, FeatureSpec, Head, HeadConfig
from heads.losses import LOSSES, default_loss
from heads.losses.base import ClassStatistics, Loss
from heads.members import Member, MemberConfig
from heads.models import HEADS
from heads.run_folder import load_run

from .toy_tower import ToyTower

NUM_CLASSES, DIM, NUM_TOKENS = 5, 16, 4
TASKS = ("single_label", "multi_label")

MEMBERS = {
    f"{folder}/{kind}": member
    for folder, members in (
        ("datasets", DATASETS),
        ("backbones", BACKBONES),
        ("heads", HEADS),
        ("losses", LOSSES),
        ("adapters", ADAPTERS),
    )
    for kind, member in members.items()
}


TRAINED = {
    "run": "x",
    "kind": "naive",
    "options": {},
    "arrays": {"image/projected": DIM},
    "logit_scale": 100.0,
    "weights": "w",
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "heads/boost": {"member": TRAINED, "feature": "text"},
    "heads/average": {
        "runs": ["x", "y"],
        "members": [TRAINED, {**TRAINED, "arrays": {"image/pooled": DIM}}],
        "weigh": "validation",
        "weight_steps": 2,
    },
}
"""Options without which a member cannot be built: what other run folders would state."""


def member_of(name: str, **options: Any) -> Config:
    """A member with its defaults; required paths and names get a made-up value."""
    cls = MEMBERS[name]
    required = {
        key: get_args(field.annotation)[0] if get_origin(field.annotation) is Literal else "x"
        for key, field in cls.model_fields.items()
        if field.is_required()
    }
    return cls.model_validate({**required, **EXAMPLES.get(name, {}), **options})


@pytest.mark.parametrize("name", MEMBERS)
class TestConfigs:
    def test_record_and_yaml_round_trip(self, name: str, tmp_path: Path) -> None:
        config = member_of(name)
        assert type(config).model_validate(config.record()) == config
        file = tmp_path / "config.yaml"
        file.write_text(config.to_yaml())
        assert type(config).from_yaml(file) == config
        assert yaml.safe_load(config.to_yaml())["kind"] == name.split("/")[1]

    def test_every_field_says_what_it_is(self, name: str) -> None:
        for field, info in MEMBERS[name].model_fields.items():
            assert info.description, f"{field} has no docstring"

    def test_unknown_options_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match="no_such_option"):
            member_of(name, no_such_option=1)

    def test_class_and_module_are_described(self, name: str) -> None:
        member = MEMBERS[name]
        assert member.__doc__
        assert inspect.getmodule(member).__doc__


def spec(task: str, seed: int = 0) -> FeatureSpec:
    generator = torch.Generator().manual_seed(seed)
    counts = np.asarray([200, 150, 50, 10, 3])
    classes = pd.DataFrame(
        {
            "name": [f"c{i}" for i in range(NUM_CLASSES)],
            "count": counts,
            "genus": ["g", "g", "h", "h", "h"],
        }
    )
    return FeatureSpec(
        feature_dim=DIM,
        num_classes=NUM_CLASSES,
        task=task,
        class_counts=counts,
        classes=classes,
        prompts=torch.randn(3, NUM_CLASSES, DIM, generator=generator),
        logit_scale=100.0,
        mean=torch.zeros(DIM),
        std=torch.ones(DIM),
        num_rows=413,
        criterion=default_loss(task).build(ClassStatistics(counts, 413)),
        cooccurrence=np.diag(counts) + 2 - np.eye(NUM_CLASSES, dtype=np.int64),
        text_tower=lambda: ToyTower(DIM),
        support=lambda: support(task),
    )


def support(task: str) -> tuple[Features, torch.Tensor]:
    """Training rows, for heads that are made of them."""
    rows = torch.randn(3 * NUM_CLASSES, DIM, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(len(rows)) % NUM_CLASSES
    if task == "single_label":
        return (rows,), labels
    return (rows,), torch.nn.functional.one_hot(labels, NUM_CLASSES).float()


def array_of(name: str, size: int, generator: torch.Generator) -> torch.Tensor:
    """Made-up rows of an array of a cache, in the form in which heads get them."""
    if name == "text/token_ids":
        ids = torch.randint(98, 124, (size, 2 * NUM_TOKENS), generator=generator)
        ids[:, NUM_TOKENS:] = 0  # padding
        return ids
    if name.endswith("_mask"):
        mask = torch.arange(NUM_TOKENS) < torch.randint(
            1, NUM_TOKENS + 1, (size, 1), generator=generator
        )
        return mask.expand(size, -1).clone()
    tokens = (NUM_TOKENS,) if name in ("image/tokens", "image/multimodal") else ()
    return torch.randn(size, *tokens, DIM, generator=generator)


def batch(kind: str, task: str, size: int = 40) -> tuple[Features, torch.Tensor]:
    """What the kind's loss reads: its arrays, and targets in which every class occurs."""
    generator = torch.Generator().manual_seed(1)
    config = member_of(f"heads/{kind}")
    assert isinstance(config, HeadConfig)
    names = [*config.arrays(), *config.training_arrays()]
    features = tuple(array_of(name, size, generator) for name in names)
    labels = torch.arange(size) % NUM_CLASSES
    if task == "single_label":
        return features, labels
    return features, torch.nn.functional.one_hot(labels, NUM_CLASSES).float()


def inputs(kind: str, task: str) -> Features:
    """What the kind's `forward` reads."""
    config = member_of(f"heads/{kind}")
    assert isinstance(config, HeadConfig)
    return batch(kind, task)[0][: len(config.arrays())]


def build(kind: str, task: str, seed: int = 0) -> Head:
    config = member_of(f"heads/{kind}")
    assert isinstance(config, HeadConfig)
    torch.manual_seed(seed)
    try:
        return config.build(spec(task))
    except ConfigError as error:
        refusal = str(error)
    assert task in refusal, "a refused task is named"
    pytest.skip(f"{kind} does not do {task}")


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_does_at_least_one_task(kind: str) -> None:
    def does(task: str) -> bool:
        try:
            member_of(f"heads/{kind}").build(spec(task))  # type: ignore[attr-defined]
        except ConfigError:
            return False
        return True

    assert any(map(does, TASKS)), "every check of this head would be skipped"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", HEADS)
class TestHeads:
    def test_logits_have_a_row_each_and_a_column_a_class(self, kind: str, task: str) -> None:
        head = build(kind, task).eval()
        features = inputs(kind, task)
        logits = head(*features)
        assert logits.shape == (len(features[0]), NUM_CLASSES)
        assert logits.dtype == torch.float32
        assert torch.isfinite(logits).all()

    def test_one_row_is_scored_as_in_a_batch(self, kind: str, task: str) -> None:
        head = build(kind, task).eval()
        features = inputs(kind, task)
        first = [part[:1] for part in features]
        with torch.no_grad():
            torch.testing.assert_close(head(*first), head(*features)[:1], atol=1e-4, rtol=1e-4)

    def test_gradients_reach_what_trains_and_nothing_else(self, kind: str, task: str) -> None:
        head = build(kind, task).train()
        features, targets = batch(kind, task)
        if not head.trainable:
            assert not [p for p in head.parameters() if p.requires_grad]
            return
        losses = head.loss(features, targets, 0.0)
        assert losses["loss"].shape == ()
        losses["loss"].backward()
        factors = head.lr_factors()
        resting = {  # a stage leaves them as they are
            id(p)
            for group in head.param_groups(0.1, 0.0)
            if factors.get(group.get("name", ""), 1.0) == 0.0
            for p in group["params"]
        }
        assert len(resting) < sum(p.requires_grad for p in head.parameters())
        for name, parameter in head.named_parameters():
            if parameter.requires_grad and id(parameter) not in resting:
                assert parameter.grad is not None, f"{name} gets no gradient"
                assert parameter.grad.abs().sum() > 0, f"the gradient of {name} is zero"
            else:
                assert parameter.grad is None, f"{name} is frozen and gets a gradient"

    def test_bfloat16_changes_loss_and_gradient_little(self, kind: str, task: str) -> None:
        head = build(kind, task).train()
        if not head.trainable:
            return
        features, targets = batch(kind, task)
        losses, gradients = [], []
        for mixed in (False, True):
            head.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = head.loss(features, targets, 0.0)["loss"]
            loss.backward()
            assert loss.dtype == torch.float32
            losses.append(loss.detach())
            parts = [p.grad.flatten() for p in head.parameters() if p.grad is not None]
            gradients.append(torch.cat(parts))
        torch.testing.assert_close(losses[1], losses[0], atol=1e-3, rtol=0.02)
        assert (gradients[1] - gradients[0]).norm() < 0.1 * gradients[0].norm()

    def test_one_row_can_be_trained_on(self, kind: str, task: str) -> None:
        head = build(kind, task).train()
        features, targets = batch(kind, task)
        first = tuple(part[:1] for part in features)
        if head.trainable:
            assert torch.isfinite(head.loss(first, targets[:1], 1.0)["loss"])

    def test_a_step_lowers_the_loss(self, kind: str, task: str) -> None:
        head = build(kind, task).train()
        if not head.trainable:
            return
        features, targets = batch(kind, task)
        optimizer = torch.optim.SGD(head.param_groups(1e-3, 0.0), lr=1e-3)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        torch.manual_seed(0)
        before = head.loss(features, targets, 0.0)["loss"]
        before.backward()
        optimizer.step()
        torch.manual_seed(0)
        assert head.loss(features, targets, 0.0)["loss"] < before

    def test_groups_hold_every_trained_parameter_once(self, kind: str, task: str) -> None:
        head = build(kind, task)
        if not head.trainable:
            return
        grouped = [p for group in head.param_groups(0.1, 0.0) for p in group["params"]]
        assert len(grouped) == len({id(p) for p in grouped})
        assert {id(p) for p in grouped} == {id(p) for p in head.parameters() if p.requires_grad}

    def test_named_groups_are_those_whose_rate_the_head_moves(self, kind: str, task: str) -> None:
        head = build(kind, task)
        if not head.trainable:
            return
        names = {group.get("name") for group in head.param_groups(0.1, 0.0)}
        factors = head.lr_factors()
        assert set(factors) <= names, "a factor of a group that does not exist"
        assert all(factor >= 0 for factor in factors.values())

    def test_monitors_are_scores_beside_the_candidates(self, kind: str, task: str) -> None:
        head, features = build(kind, task).eval(), inputs(kind, task)
        candidates = dict(head.candidates(*features))
        monitors = dict(head.monitors(*features))
        assert not candidates.keys() & monitors.keys()
        for name, logits in monitors.items():
            assert logits.shape == (len(features[0]), NUM_CLASSES), name

    def test_what_a_validation_tells_the_head_is_in_its_state_dict(
        self, kind: str, task: str
    ) -> None:
        head, other = build(kind, task), build(kind, task)
        features = inputs(kind, task)
        names = [name for name, _ in (*head.candidates(*features), *head.monitors(*features))]
        for value in (0.5, 0.6, 0.6, 0.6):
            head.after_epoch(dict.fromkeys(names, value))
        other.load_state_dict(head.state_dict())
        assert other.lr_factors() == head.lr_factors()
        assert other.selectable == head.selectable
        for value in (0.6, 0.7):  # and they go on alike
            for one in (head, other):
                one.after_epoch(dict.fromkeys(names, value))
            assert other.lr_factors() == head.lr_factors()
            assert other.selectable == head.selectable
        for name, tensor in head.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name

    def test_a_config_that_names_no_other_run_is_prepared_as_it_is(
        self, kind: str, task: str
    ) -> None:
        config = member_of(f"heads/{kind}")
        assert isinstance(config, HeadConfig)
        if "base" not in type(config).model_fields and "runs" not in type(config).model_fields:
            assert config.prepared(load_run) == config

    def test_the_seed_fixes_the_result(self, kind: str, task: str) -> None:
        features, targets = batch(kind, task)
        results = []
        for _ in range(2):
            head = build(kind, task, seed=3).train()
            if head.trainable:
                results.append(head.loss(features, targets, 0.5)["loss"].detach())
            else:
                results.append(head(*inputs(kind, task)))
        assert torch.equal(*results)

    def test_trained_state_moves_to_another_head(self, kind: str, task: str) -> None:
        features = inputs(kind, task)
        head = build(kind, task, seed=0).eval()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            for name, logits in head.candidates(*features):
                config = member_of(f"heads/{kind}").only(name)  # type: ignore[attr-defined]
                other = config.build(spec(task, seed=0)).eval()
                other.load_trained_state(copy.deepcopy(dict(head.trained_state(name))))
                torch.testing.assert_close(other(*features), logits)

    def test_it_can_be_part_of_another_head(self, kind: str, task: str) -> None:
        head, features = build(kind, task).eval(), inputs(kind, task)
        with torch.no_grad():
            candidate, expected = next(iter(head.candidates(*features)))
        config = member_of(f"heads/{kind}").only(candidate)  # type: ignore[attr-defined]
        untrained = {"criterion": None, "support": None, "text_tower": None, "mean": None}
        loaded = config.build(replace(spec(task), **untrained, std=None, cooccurrence=None))
        loaded.load_trained_state(head.trained_state(candidate))
        record = MemberConfig(
            run="x",
            kind=kind,
            options=config.record(),
            arrays=dict.fromkeys(config.arrays(), DIM),
            prompt_shape=(3, NUM_CLASSES, DIM) if config.wants_prompts() else None,
            logit_scale=100.0,
            weights="w",
        )
        copied = record.build(spec(task, seed=1))
        copied.load_state(Member(loaded, config.arrays()).state())
        by_name = dict(zip(config.arrays(), features, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(copied.train()(by_name), expected)
        assert not [p for p in copied.parameters() if p.requires_grad]

    def test_a_wrong_state_is_refused(self, kind: str, task: str) -> None:
        head = build(kind, task)
        with pytest.raises(ValueError, match="not in both"):
            head.load_trained_state({**head.trained_state(), "surplus": torch.zeros(1)})

    def test_every_trained_tensor_is_in_the_state_dict(self, kind: str, task: str) -> None:
        head = build(kind, task)
        other = build(kind, task, seed=9)
        other.load_state_dict(head.state_dict())
        features = inputs(kind, task)
        torch.testing.assert_close(other.eval()(*features), head.eval()(*features))


STATISTICS = ClassStatistics(np.asarray([200, 150, 50, 10, 3]), 413)
WHOLE_GRADIENT = {"asl": {"detach_focusing": False}}
"""Options of losses that by default leave a part out of the gradient on purpose."""


@pytest.mark.parametrize("kind", LOSSES)
class TestLosses:
    @staticmethod
    def logits_and_targets(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(4)
        labels = torch.arange(12) % NUM_CLASSES
        if "multi_label" not in LOSSES[kind].tasks:
            return 3 * torch.randn(12, NUM_CLASSES), labels
        hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
        hot[:, 0] = 1.0
        hot[-1] = 0.0  # a row without a label
        return 3 * torch.randn(12, NUM_CLASSES), hot

    @staticmethod
    def build(kind: str) -> Loss:
        return LOSSES[kind]().build(STATISTICS)

    def test_the_loss_is_the_mean_of_its_terms(self, kind: str) -> None:
        loss, (logits, targets) = self.build(kind), self.logits_and_targets(kind)
        terms = loss.terms(logits, targets)
        assert terms.shape in (logits.shape, logits.shape[:1])
        assert terms.dtype == torch.float32
        torch.testing.assert_close(loss(logits, targets), terms.mean())

    def test_class_indices_are_rows_with_one_label(self, kind: str) -> None:
        if "single_label" not in LOSSES[kind].tasks:
            return
        labels = torch.arange(12) % NUM_CLASSES
        logits, loss = self.logits_and_targets(kind)[0], self.build(kind)
        value = loss(logits, labels)
        assert torch.isfinite(value)
        if "multi_label" in LOSSES[kind].tasks:
            hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
            torch.testing.assert_close(value, loss(logits, hot))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_extreme_logits_of_any_dtype_give_finite_losses_and_gradients(
        self, kind: str, dtype: torch.dtype
    ) -> None:
        logits, targets = self.logits_and_targets(kind)
        reach = 0.9 if LOSSES[kind].needs_cosines else 3e4
        wild = (reach * logits.sign()).to(dtype).requires_grad_()
        value = self.build(kind)(wild, targets)
        value.backward()
        assert torch.isfinite(value)
        assert value.dtype == torch.float32
        assert wild.grad is not None
        assert torch.isfinite(wild.grad).all()

    def test_gradients_are_those_of_finite_differences(self, kind: str) -> None:
        logits, targets = self.logits_and_targets(kind)
        scale = 0.2 if LOSSES[kind].needs_cosines else 1.0
        wanted = (scale * logits).clamp(-0.95, 0.95) if LOSSES[kind].needs_cosines else logits
        wanted = wanted.clone().requires_grad_()
        loss = LOSSES[kind](**WHOLE_GRADIENT.get(kind, {})).build(STATISTICS)
        loss(wanted, targets).backward()
        assert wanted.grad is not None
        step = 1e-2
        for row, column in [(0, 0), (3, 3), (5, 1), (11, 2)]:
            shift = torch.zeros_like(logits)
            shift[row, column] = step
            with torch.no_grad():
                slope = (
                    loss(wanted + shift, targets).double() - loss(wanted - shift, targets).double()
                ) / (2 * step)
            torch.testing.assert_close(
                wanted.grad[row, column].double(), slope, atol=2e-4, rtol=3e-2
            )

    def test_one_row_has_a_loss(self, kind: str) -> None:
        logits, targets = self.logits_and_targets(kind)
        assert torch.isfinite(self.build(kind)(logits[:1], targets[:1]))

    def test_the_module_names_its_source(self, kind: str) -> None:
        assert "Reference:" in (inspect.getmodule(LOSSES[kind]).__doc__ or "")


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_names_its_source(kind: str) -> None:
    text = inspect.getmodule(HEADS[kind]).__doc__ or ""
    assert "Reference:" in text, f"heads/models of {kind}: the module text names no source"


@pytest.mark.parametrize("folder", ["heads", "losses"])
def test_every_head_and_loss_has_its_place_in_the_pages(folder: str) -> None:
    page = (Path(__file__).parents[1] / "docs" / f"{folder}.md").read_text(encoding="utf-8")
    kinds = [name.partition("/")[2] for name in MEMBERS if name.startswith(f"{folder}/")]
    assert [kind for kind in kinds if not re.search(rf"\b{kind}\b", page)] == []


def _jobs_and_parts() -> dict[str, type[Config]]:
    """Every Config class of the three lower layers."""
    found: dict[str, type[Config]] = {}
    for package in ("featcache", "heads", "finetune"):
        module = importlib.import_module(package)
        for info in pkgutil.walk_packages(module.__path__, package + "."):
            for value in vars(importlib.import_module(info.name)).values():
                if inspect.isclass(value) and issubclass(value, Config) and value is not Config:
                    found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


@pytest.mark.parametrize("name", CONFIGS := _jobs_and_parts())
def test_every_option_of_every_job_has_a_help_text(name: str) -> None:
    for field, info in CONFIGS[name].model_fields.items():
        assert info.description, f"{field} of {name} has no docstring under it"
