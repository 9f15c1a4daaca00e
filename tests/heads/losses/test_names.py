"""Losses by name: on the command line, by names of earlier programs, and where they do not fit."""

import pytest

from featcache.errors import ConfigError
from heads.losses import LOSSES
from heads.losses.asymmetric import AsymmetricConfig
from heads.losses.base import LossConfig
from heads.losses.distribution_balanced import DistributionBalancedConfig
from heads.losses.focal import FocalConfig
from heads.losses.rebalanced import RebalancedConfig
from heads.models.naive import NaiveConfig
from heads.specification import build_loss
from heads.train import TrainConfig, _require_whole_batches

from .problem import STATISTICS

EARLIER = [
    "bce",
    "mls",
    "asl",
    "dbl",
    "FL",
    "CBloss",
    "R-BCE-Focal",
    "NTR-Focal",
    "DBloss-noFocal",
    "CBloss-ntr",
    "DBloss",
    "smooth",
    "zlpr",
    "aam",
    "focal",
]


@pytest.mark.parametrize("name", EARLIER)
def test_f17_f43_every_name_of_the_earlier_programs_is_a_loss(name: str) -> None:
    config = TrainConfig.from_command_line(["--cache", "c", "--loss", name])
    assert config.loss is not None
    assert config.loss.kind in LOSSES
    config.loss.build(STATISTICS)
    again = TrainConfig.model_validate(config.record())
    assert again == config, "the record names the loss's own kind"


def test_other_names_stand_for_options_that_flags_still_change() -> None:
    flags = ["--cache", "c", "--loss", "DBloss-noFocal", "--loss.map_gamma", "0.3"]
    assert TrainConfig.from_command_line(flags).loss == DistributionBalancedConfig(
        focal=False, loss_weight=0.5, map_gamma=0.3
    )
    flags = ["--cache", "c", "--loss.kind", "FL", "--loss.alpha", "0.75"]
    assert TrainConfig.from_command_line(flags).loss == FocalConfig(alpha=0.75)
    flags = ["--cache", "c", "--loss", "R-BCE-Focal"]
    assert TrainConfig.from_command_line(flags).loss == RebalancedConfig(focal=True)


def test_f17_flags_of_a_loss_reach_it() -> None:
    flags = [
        "--cache",
        "c",
        "--loss",
        "asl",
        "--loss.gamma_neg",
        "2",
        "--loss.clip",
        "0",
        "--loss.reduction",
        "sum",
    ]
    assert TrainConfig.from_command_line(flags).loss == AsymmetricConfig(
        gamma_neg=2, clip=0, reduction="sum"
    )


def test_other_names_are_of_one_loss_each() -> None:
    names = [alias for member in LOSSES.values() for alias in member.aliases]
    assert len(names) == len(set(names))
    assert not set(names) & set(LOSSES)


def test_an_unknown_loss_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"loss: unknown kind 'dice'; known: .*zlpr"):
        TrainConfig.from_command_line(["--cache", "c", "--loss", "dice"])


def test_options_of_a_loss_without_its_kind_are_named() -> None:
    with pytest.raises(
        ConfigError, match=r"^loss: found loss\.gamma without loss\.kind.* --loss KIND$"
    ):
        TrainConfig.from_command_line(["--cache", "c", "--loss.gamma", "1"])


def test_a_loss_on_cosines_needs_a_head_that_has_them() -> None:
    config = TrainConfig(cache="c", head=NaiveConfig(), loss="aam")
    with pytest.raises(ConfigError, match=r"loss=aam takes cosines.*--head\.cosine"):
        build_loss(config.head, config.loss, "multi_label", STATISTICS)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (AsymmetricConfig(reduction="sum"), "loss.reduction=sum"),
        (RebalancedConfig(weight_norm="by_batch"), "loss.weight_norm=by_batch"),
    ],
)
def test_a_loss_of_whole_batches_is_refused_where_batches_come_in_pieces(
    loss: LossConfig, reason: str
) -> None:
    built = loss.build(STATISTICS)
    for pieces, processes, divided in ((4, 1, "optim.accumulate=4"), (1, 2, "2 processes")):
        with pytest.raises(ConfigError, match=f"{reason} depends .* {divided} would"):
            _require_whole_batches(built, pieces, processes)
    _require_whole_batches(built, 1, 1)
    _require_whole_batches(RebalancedConfig().build(STATISTICS), 4, 2)
