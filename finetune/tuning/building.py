"""From options to what is trained: head, class text, losses, source of inputs, parts."""

from dataclasses import replace
from pathlib import Path

import torch

from featcache.adapters.base import Adapter, AdapterConfig
from featcache.backbones.base import Backbone
from featcache.errors import ConfigError
from featcache.prompts import choose_zero_shot, expand, format_prompts
from finetune.tuning.examples import Material
from finetune.tuning.initial_head import initial_head
from finetune.tuning.objective import ClassText, Objective, ObjectiveName
from finetune.tuning.options import ClassifierConfig, TextConfig
from finetune.tuning.sources import Source
from heads.losses.base import ClassStatistics, LossConfig
from heads.models.linear import Linear, LinearConfig
from heads.parts import CARVE, Parts, choose_parts, class_counts, labelled_part
from heads.specification import build_loss

NO_SPLIT = "none"
"""Name of the validation split of a training without validation."""


def choose(
    material: Material,
    *,
    train_split: str,
    val_split: str | None,
    val_fraction: float,
    test_split: str | None,
    seed: int,
) -> tuple[Parts, bool]:
    """Which rows train, decide and are reported, and whether any decide at all.

    Args: as `heads.parts.choose_parts` takes them; `val_split` may be `NO_SPLIT` too.
    """
    without = val_split == NO_SPLIT
    parts = choose_parts(
        material.rows,
        train_split=train_split,
        val_split=CARVE if without else val_split,
        val_fraction=val_fraction,
        test_split=test_split,
        select_on="val",
        seed=seed,
    )
    if without:
        parts = replace(parts, train=labelled_part(material.rows, train_split))
    return parts, not without


def build_head(
    options: ClassifierConfig,
    init_head: Path | None,
    objective: ObjectiveName,
    material: Material,
    backbone: Backbone,
    device: torch.device,
) -> tuple[Linear | None, LinearConfig]:
    """The head of zeros or of `init_head`, None without one, and options that build it again."""
    if objective == "image_text":
        return None, LinearConfig(scaling="unit", bias=False, lrs=(1e-3,), weight_decays=(0.0,))
    if init_head is not None:
        return initial_head(init_head, material, backbone, device)
    config = LinearConfig(
        feature="projected" if backbone.spec.projected_dim else "pooled",
        scaling=options.scaling or "unit",
        bias=options.bias,
        lrs=(options.lr,),
        weight_decays=(options.weight_decay,),
    )
    head = Linear(
        backbone.spec.projected_dim or backbone.spec.pooled_dim,
        material.num_classes,
        bias=options.bias,
        scaling=config.scaling,
        pairs=((options.lr, options.weight_decay),),
    )
    return head.to(device), config


def build_objective(
    name: ObjectiveName,
    head: Linear | None,
    loss: LossConfig | None,
    options: TextConfig,
    material: Material,
    backbone: Backbone,
    adapter: Adapter,
    adapter_config: AdapterConfig,
    parts: Parts,
    pieces: int,
) -> Objective:
    """Head and class text with their losses.

    Args:
        name: what is minimised.
        head: see `build_head`.
        loss: on the head's logits, chosen by the user.
        options: of class text.
        material: what is trained on.
        backbone: as it is before training.
        adapter: attached to its towers.
        adapter_config: its options.
        parts: rows; those that train count the classes.
        pieces: that a batch is computed in, over all processes.

    Raises:
        ConfigError: if text is wanted of a backbone without any, or the loss does not fit.
    """
    spec = backbone.spec
    alone, reads_text = name == "image_text", spec.has_text and spec.projected_dim > 0
    weight = options.weight
    if weight is None:
        weight = 0.3 if reads_text else 0.0
    if (alone or weight > 0) and not reads_text:
        needs, advice = f"text.weight {weight:g}", "set text.weight 0"
        if alone:
            needs, advice = "objective image_text", "choose another backbone"
        raise ConfigError(f"{spec.identity.name} has no text tower, which {needs} needs; {advice}")
    text = None
    if reads_text:
        prompts = format_prompts(material.classes, templates_of(options, material))
        text = ClassText(prompts, adapter.towers, adapter_config.trains_text)
    counts = class_counts(parts.train, material.num_classes)
    statistics = ClassStatistics(counts, len(parts.train))
    criterion = build_loss(LinearConfig(), loss, material.task, statistics)
    assert criterion is not None, "linear heads take a loss"
    if not criterion.is_mean_over_rows and pieces > 1:
        raise ConfigError(
            f"loss {loss.kind if loss else ''} depends on which rows share a batch, which is "
            f"computed in {pieces} pieces; leave out optim.accumulate and further processes, or "
            "choose another loss"
        )
    scale = options.scale or (100.0 if alone else spec.logit_scale)
    return Objective(head, criterion, material.task, text, weight, scale)


def templates_of(options: TextConfig, material: Material) -> list[str]:
    """The prompt templates that the options mean for a dataset."""
    usual = choose_zero_shot(material.kind, [str(column) for column in material.classes.columns])
    if material.kind.startswith("flowers102"):
        usual = "flowers"
    return expand(options.templates or usual, "text.templates")


@torch.no_grad()
def start_offset(objective: Objective, source: Source, parts: Parts) -> None:
    """Begins the offset of a multi-label alignment where the first training images stand."""
    if objective.offset is not None:
        inputs, _ = next(iter(source.plain(parts.train, 256)))
        objective.start_offset(source.encode(inputs))
