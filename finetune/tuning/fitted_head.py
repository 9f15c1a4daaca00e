"""A linear head that is fitted to the backbone's features before both are trained together.

Training both from a head of zeros moves good features about to suit a poor head; and at the small
steps that suit a backbone, a head needs far more epochs than a fine-tuning has. So the head is
fitted first, by the same search and on the same rows as `python -m heads.train --head linear`, to
the features of the training images as they are: one pass over them, then seconds.

Reference: Kumar et al., Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution, 2022 (linear probing, then fine-tuning).
"""

import time
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from featcache.backbones.base import Backbone
from finetune.tuning.examples import Material
from finetune.tuning.head_folder import tables
from finetune.tuning.loop import encoded
from finetune.tuning.options import ClassifierConfig
from finetune.tuning.sources import Source
from heads import optim
from heads.base import FeatureSpec
from heads.distributed import Group
from heads.evaluate import main_metric
from heads.fitting import Material as HeadMaterial
from heads.fitting import fit
from heads.losses.base import ClassStatistics, LossConfig
from heads.models.linear import Linear, LinearConfig
from heads.optim import OptimConfig
from heads.parts import Part, Parts, class_counts
from heads.progress import duration
from heads.run_folder import read_tensors, write_tensors
from heads.specification import build_loss
from heads.threads import enough_threads

FILE = "fitted.safetensors"
"""The fitted head, kept beside the state of a training that may be interrupted."""


def fitted_head(
    options: ClassifierConfig,
    loss: LossConfig | None,
    material: Material,
    source: Source,
    parts: Parts,
    backbone: Backbone,
    group: Group,
    *,
    folder: Path,
    batch_size: int,
    mixed: AbstractContextManager[None],
    seed: int,
    quiet: bool,
) -> tuple[Linear, LinearConfig]:
    """The head, and options that build it again; the leading process fits it.

    Args:
        options: of the head.
        loss: on its logits, chosen by the user.
        material: what is trained on.
        source: of inputs; its towers in evaluation mode, with the adapter as it begins.
        parts: rows; those that decide are left out of those that train.
        backbone: as it is before training.
        group: processes that train together.
        folder: where an interrupted training finds the head again.
        batch_size: rows encoded at a time.
        mixed: context of the encoder.
        seed: of the order of rows.
        quiet: say nothing.
    """
    feature = "projected" if backbone.spec.projected_dim else "pooled"
    config = LinearConfig(feature=feature, scaling=options.scaling or "standard", bias=options.bias)
    path = folder / FILE
    if group.leads and not path.is_file():
        _fit(
            config,
            loss,
            material,
            source,
            parts,
            backbone,
            group,
            path,
            batch_size,
            mixed,
            seed,
            quiet,
        )
    found = group.follow(read_tensors(path) if group.leads else None)
    assert found is not None, "the leading process has fitted it"
    config = config.only(found.record["candidate"])
    head = Linear(
        backbone.spec.projected_dim or backbone.spec.pooled_dim,
        material.num_classes,
        bias=options.bias,
        scaling=config.scaling,
        pairs=config.pairs(1),
    )
    head.load_trained_state(found.tensors)
    return head.to(group.device), config


def _apart(parts: Parts) -> Part:
    """Training rows without those that decide: `val_split none` has these among them."""
    own = ~np.isin(parts.train.rows, parts.val.rows)
    return parts.train.subset(own, parts.train.name)


def _fit(
    config: LinearConfig,
    loss: LossConfig | None,
    material: Material,
    source: Source,
    parts: Parts,
    backbone: Backbone,
    group: Group,
    path: Path,
    batch_size: int,
    mixed: AbstractContextManager[None],
    seed: int,
    quiet: bool,
) -> None:
    """Fits all candidates and writes the best one's tensors."""
    started, device = time.perf_counter(), group.device
    name = f"image/{config.feature}"
    held = [
        encoded(source, source.encode, part, batch_size, mixed)
        for part in (_apart(parts), parts.val)
    ]
    (train, train_part), (val, val_part) = (
        (tables(name, features, device), part) for features, part, _ in held
    )
    counts = class_counts(train_part, material.num_classes)
    mean, std = train.statistics()
    spec = FeatureSpec(
        feature_dim=len(mean),
        num_classes=material.num_classes,
        task=material.task,
        class_counts=counts,
        classes=material.classes,
        prompts=None,
        logit_scale=backbone.spec.logit_scale,
        mean=mean.cpu(),
        std=std.cpu(),
        feature_dims={name: len(mean)},
        num_rows=len(train_part),
        criterion=build_loss(config, loss, material.task, ClassStatistics(counts, len(train_part))),
    )
    head = config.build(spec).to(device)
    chosen = optim.resolve(OptimConfig(), config.own_optim(), len(train_part))
    assert isinstance(chosen.batch_size, int), "not resolved"
    metric = main_metric(material.task)
    size = sum(p.numel() for p in head.parameters())
    with enough_threads(chosen.batch_size * size), TemporaryDirectory() as scratch:
        best = fit(
            head,
            HeadMaterial(train, train_part, val, val_part),
            chosen,
            folder=Path(scratch),
            fingerprint="",
            metric=metric,
            seed=seed,
        ).best
    write_tensors(path, best.state, {"candidate": best.candidate})
    if not quiet:
        print(
            f"head fitted first, to the features as they are: val {metric} {best.value:.2%} "
            f"({best.candidate}), {duration(time.perf_counter() - started)}"
        )
