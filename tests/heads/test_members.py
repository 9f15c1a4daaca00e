"""Heads made of trained heads: boost and average, their equations, and runs that stand alone."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from featcache.errors import CacheMismatchError, ConfigError
from featcache.reader import open_cache
from heads import train
from heads.base import HeadConfig
from heads.members import Member, MemberConfig, tensor_hash
from heads.mlp import Mlp, RowScale
from heads.models.average import Average, AverageConfig, mixture_name
from heads.models.boost import Boost, BoostConfig
from heads.models.linear import LinearConfig
from heads.models.naive import Naive, NaiveConfig
from heads.run_folder import RunError, load_run
from heads.train import TrainConfig, TrainReport

from .conftest import toy_spec

Maker = Callable[..., Path]
WEAK = LinearConfig(lrs=(1e-4,), weight_decays=(0.0,))


def fit(cache: Path, run: Path, head: HeadConfig, **options: Any) -> TrainReport:
    values: dict[str, Any] = {"optim": {"epochs": 3}, "quiet": True, "device": "cpu"}
    return train.run(TrainConfig(cache=cache, run=run, head=head, **(values | options)))


def test_rows(cache: Path) -> Tensor:
    opened = open_cache(cache)
    rows = opened.rows("test")
    return torch.from_numpy(opened.array("image/projected").read(rows)).float()


test_rows.__test__ = False  # type: ignore[attr-defined]


def member(arrays: dict[str, int], seed: int, num_classes: int = 3) -> Member:
    torch.manual_seed(seed)
    (width,) = arrays.values()
    return Member(Naive(RowScale(width, "none"), Mlp(width, num_classes, dropout=0.5)), arrays)


class TestBoost:
    def test_f39_the_residual_adds_to_logits_and_the_base_stays_as_it_was(
        self, make_single: Maker, tmp_path: Path
    ) -> None:
        cache, base = make_single(noise=0.5), tmp_path / "base"
        fit(cache, base, NaiveConfig(hidden=1))  # too narrow for five classes
        report = fit(cache, tmp_path / "boost", BoostConfig(base=base), optim={"epochs": 10})
        loaded, features = load_run(tmp_path / "boost"), test_rows(cache)
        head, alone = loaded.head, load_run(base).head
        assert isinstance(head, Boost)
        own = head.residual(head.scale(features))
        torch.testing.assert_close(head(features), alone(features) + own)
        for name, tensor in load_file(base / "head.safetensors").items():
            assert torch.equal(tensor, head.base.head.state_dict()[name]), name
        assert report.metrics["monitors"]["test"]["base"] < report.score - 0.05
        base_metrics = json.loads((base / "metrics.json").read_text())
        assert report.metrics["monitors"]["test"]["base"] == base_metrics["test"]["top1"]

    def test_only_the_residual_learns_and_the_base_never_drops_units(self) -> None:
        base = member({"image/projected": 6}, 0)
        head = Boost(
            base,
            Mlp(4, 3),
            RowScale(4),
            names=("image/projected", "text/projected"),
            feature="text/projected",
            criterion=toy_spec({"image/projected": 6}).criterion,
        ).train()
        image, text = torch.randn(9, 6), torch.randn(9, 4)
        assert torch.equal(head(image, text), head(image, text)), "the base drops units"
        head.loss((image, text), torch.arange(9) % 3, 0.0)["loss"].backward()
        assert all(p.grad is None for p in head.base.parameters())
        assert all(p.grad is not None for p in head.residual.parameters())
        text[0] = 0.0  # no caption: the base alone
        found = head(image, text)
        torch.testing.assert_close(found[0], base.head(image)[0])
        assert (found[1:] - base.head(image)[1:]).abs().min() > 0

    def test_the_run_stands_alone(self, make_single: Maker, tmp_path: Path) -> None:
        cache, base = make_single(noise=2.0), tmp_path / "base"
        fit(cache, base, WEAK)
        twice = BoostConfig(base=tmp_path / "boost", hidden=4)
        fit(cache, tmp_path / "boost", BoostConfig(base=base))
        report = fit(cache, tmp_path / "twice", twice)
        shutil.rmtree(base)
        shutil.rmtree(tmp_path / "boost")
        head, features = load_run(tmp_path / "twice").head, test_rows(cache)
        labels = open_cache(cache).labels(open_cache(cache).rows("test"))
        top1 = (head(features).argmax(1).numpy() == labels).mean()
        assert top1 == pytest.approx(report.metrics["test"]["top1"])

    def test_another_base_is_another_training(self, make_single: Maker, tmp_path: Path) -> None:
        cache, base = make_single(), tmp_path / "base"
        fit(cache, base, WEAK)
        asked = BoostConfig(base=base)
        fit(cache, tmp_path / "boost", asked)
        assert fit(cache, tmp_path / "boost", asked).reused
        fit(cache, base, WEAK, restart=True, optim={"epochs": 4})
        with pytest.raises(RunError, match=r"head\.member\.weights differs"):
            fit(cache, tmp_path / "boost", asked)

    def test_a_base_of_other_classes_is_refused(self, make_single: Maker, tmp_path: Path) -> None:
        fit(make_single("five"), tmp_path / "base", WEAK)
        asked = BoostConfig(base=tmp_path / "base")
        with pytest.raises(CacheMismatchError, match="the cache has 6, the head 5; the head in"):
            fit(make_single("six", num_classes=6), tmp_path / "boost", asked)
        with pytest.raises(RunError, match=r"nowhere: no such run folder"):
            fit(make_single("s"), tmp_path / "boost", BoostConfig(base=tmp_path / "nowhere"))


def average(
    space: str, mixtures: list[tuple[float, ...]], multi_label: bool
) -> tuple[Average, dict[str, Tensor]]:
    arrays = {"image/projected": 6, "text/projected": 4, "image/pooled": 5}
    members = [member({name: width}, seed) for seed, (name, width) in enumerate(arrays.items())]
    head = Average(
        members,
        names=tuple(arrays),
        space=space,  # type: ignore[arg-type]
        multi_label=multi_label,
        mixtures=mixtures,
        titles=["a", "b", "c"],
    )
    torch.manual_seed(9)
    return head.eval(), {name: 4 * torch.randn(8, width) for name, width in arrays.items()}


class TestAverage:
    @pytest.mark.parametrize("multi_label", [False, True])
    @pytest.mark.parametrize("space", ["probabilities", "logits"])
    def test_rows_are_mixed_as_a_loop_in_float64_mixes_them(
        self, space: str, multi_label: bool
    ) -> None:
        weights = (0.5, 0.2, 0.3)
        head, features = average(space, [weights], multi_label)
        features["text/projected"][2] = 0.0
        features["image/projected"][3] = features["image/pooled"][3] = 0.0
        logits = [one(features).double().numpy() for one in head.members]
        found = head(*features.values()).double()
        for row in range(8):
            seen = [float(part[row].any()) for part in features.values()]
            shares = np.asarray(weights) * seen
            shares /= shares.sum()
            if space == "logits":
                expected = sum(s * z[row] for s, z in zip(shares, logits, strict=True))
                np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-5)
                continue
            expected = np.zeros(3)
            for share, z in zip(shares, logits, strict=True):
                if multi_label:
                    expected += share / (1 + np.exp(-z[row]))
                else:
                    expected += share * np.exp(z[row]) / np.exp(z[row]).sum()
            turned = found[row].sigmoid() if multi_label else found[row].softmax(0)
            np.testing.assert_allclose(turned.numpy(), expected, atol=1e-6)

    def test_a_row_seen_only_by_members_without_a_share_is_still_scored(self) -> None:
        head, features = average("probabilities", [(1.0, 0.0, 0.0)], False)
        features["image/projected"][0] = 0.0
        probabilities = head(*features.values()).softmax(1)
        others = [one(features).softmax(1) for one in head.members]
        torch.testing.assert_close(probabilities[0], (others[1][0] + others[2][0]) / 2)
        torch.testing.assert_close(probabilities[1:], others[0][1:])

    @pytest.mark.parametrize("multi_label", [False, True])
    def test_certain_members_and_rows_without_anything_stay_finite(self, multi_label: bool) -> None:
        head, features = average("probabilities", [(0.5, 0.0, 0.5)], multi_label)
        for one in head.members:
            one.head.classifier[3].weight.mul_(1e4)
        for part in features.values():
            part[0] = 0.0
        assert torch.isfinite(head(*features.values())).all()

    @pytest.mark.parametrize(("count", "steps"), [(2, 10), (3, 4), (4, 3)])
    def test_the_grid_is_all_of_the_simplex(self, count: int, steps: int) -> None:
        config = AverageConfig(
            runs=("r",) * count,
            weigh="validation",
            weight_steps=steps,  # type: ignore[arg-type]
        )
        every = itertools.product(range(steps + 1), repeat=count)
        expected = {tuple(p / steps for p in parts) for parts in every if sum(parts) == steps}
        found = config.mixtures()
        assert len(found) == len(expected)
        assert set(found) == expected
        names = [mixture_name(weights) for weights in found]
        assert len(set(names)) == len(names)
        assert config.only(names[1]).mixtures() == [found[1]]

    def test_validation_picks_the_shares_and_the_run_stands_alone(
        self, make_single: Maker, tmp_path: Path
    ) -> None:
        cache = make_single(noise=2.5)
        fit(cache, tmp_path / "a", WEAK)
        fit(cache, tmp_path / "b", NaiveConfig(hidden=3), seed=1)
        runs = (tmp_path / "a", tmp_path / "b")
        report = fit(cache, tmp_path / "both", AverageConfig(runs=runs, weigh="validation"))
        values = report.metrics
        assert len(values["by_candidate"]) == 11
        assert values["val"]["top1"] == max(values["by_candidate"].values())
        for run, end in zip(runs, ("1 0", "0 1"), strict=True):
            alone = json.loads((run / "metrics.json").read_text())
            assert values["by_candidate"][f"shares {end}"] == alone["val"]["top1"]
            shutil.rmtree(run)
        assert set(values["monitors"]["test"]) == {"member 1 (a)", "member 2 (b)"}
        loaded = load_run(tmp_path / "both")
        assert isinstance(loaded.config, AverageConfig)
        assert mixture_name(loaded.config.weights or ()) == values["candidate"]
        labels = open_cache(cache).labels(open_cache(cache).rows("test"))
        top1 = (loaded.head(test_rows(cache)).argmax(1).numpy() == labels).mean()
        assert top1 == pytest.approx(values["test"]["top1"])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": (1, 2, 3)}, "3 shares for 2 runs"),
            ({"weights": (0, 0)}, "at least one has to be above 0"),
            ({"weights": (1, 2), "weigh": "validation"}, "both weigh the runs"),
            ({"weigh": "validation", "weight_steps": 10**4}, "10,001 mixtures"),
        ],
    )
    def test_impossible_weights_are_refused(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            AverageConfig(runs=("a", "b"), **options)

    def test_scores_that_only_rank_have_no_probabilities_to_average(self) -> None:
        record = MemberConfig(
            run=Path("ranker"),
            kind="zero_shot",
            options={},
            arrays={"image/projected": 6},
            prompt_shape=(1, 3, 6),
            templates=("a {name}",),
            logit_scale=10.0,
            weights="w",
        )
        spec = toy_spec({"image/projected": 6}, task="multi_label")
        config = AverageConfig(runs=("ranker", "other"), members=(record, record))
        with pytest.raises(ConfigError, match="ranker: its scores only rank"):
            config.build(spec)
        ranked = config.model_copy(update={"space": "logits"}).build(spec)
        assert not ranked.has_probabilities


def test_a_hash_sees_values_names_and_types() -> None:
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(True)}
    hashes = {
        tensor_hash(one),
        tensor_hash({**one, "a": torch.tensor([1.0, 2.5])}),
        tensor_hash({**one, "a": torch.tensor([[1.0, 2.0]])}),
        tensor_hash({**one, "a": torch.tensor([1.0, 2.0], dtype=torch.float16)}),
        tensor_hash({"c": one["a"], "b": one["b"]}),
    }
    assert len(hashes) == 5
    assert tensor_hash({"b": one["b"], "a": one["a"].clone()}) in hashes
