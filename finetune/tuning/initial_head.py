"""A linear head that was trained on frozen features, as the start of fine-tuning."""

from pathlib import Path

import torch
from torch import Tensor

from featcache.backbones.base import Backbone
from featcache.errors import CacheMismatchError, ConfigError
from featcache.identity import differences
from finetune.tuning.examples import Material
from heads.models.linear import Linear, LinearConfig
from heads.run_folder import LoadedRun, load_run
from heads.train import TrainConfig as HeadTrainConfig


def initial_head(
    path: Path, material: Material, backbone: Backbone, device: torch.device
) -> tuple[Linear, LinearConfig]:
    """The head of a finished run with its classes brought into the dataset's order.

    Args:
        path: run folder of heads.train.
        material: what is trained on.
        backbone: as it is before training.
        device: where the head goes.

    Raises:
        ConfigError: if it is no linear head on one cache of image features, or has other classes.
        CacheMismatchError: if it was trained on features of another backbone or of other pixels.
        RunError: if the folder is unfinished or damaged.
    """
    run = load_run(path, device)
    head, config = run.head, run.config
    if not isinstance(head, Linear) or not isinstance(config, LinearConfig):
        raise ConfigError(
            f"init_head: {path} holds a head of kind {config.kind}; give one of kind linear "
            "(python -m heads.train --head linear)"
        )
    feature = "projected" if backbone.spec.projected_dim else "pooled"
    if len(run.members) > 1 or list(run.features) != [f"image/{feature}"]:
        raise ConfigError(
            f"init_head: the head in {path} reads {', '.join(run.features)} of "
            f"{len(run.members)} cache(s); fine-tuning needs one on image/{feature} of one cache"
        )
    if run.task != material.task:
        raise ConfigError(
            f"init_head: the head in {path} is {run.task}, the dataset {material.task}; train a "
            "head on a cache of this dataset"
        )
    trained = run.members[0].identity
    found, expected = backbone.spec.identity.record(), trained.backbone.record()
    for name, have, want in differences(found, expected):
        raise CacheMismatchError(
            f"init_head: backbone.{name} differs: the head in {path} was trained on {want!r}, the "
            f"backbone to adapt has {have!r}; give the same backbone, or another head"
        )
    order = class_order(run, [str(name) for name in material.classes["name"]])
    state = {
        name: t[order] if name.startswith(("weights.", "biases.")) and t.ndim else t
        for name, t in head.trained_state().items()
    }
    head.load_trained_state(state)
    return head, config


def carving_seed(path: Path, own: int) -> int:
    """The seed by which a head's training held rows out, so that the same rows stay unseen.

    Args:
        path: run folder of heads.train.
        own: this training's, for folders that do not say.
    """
    file = path / "config.yaml"
    return HeadTrainConfig.from_yaml(file).seed if file.is_file() else own


def class_order(run: LoadedRun, names: list[str]) -> Tensor:
    """(C,) int64 the run's class index of each of the dataset's classes, by name.

    Raises:
        ConfigError: if a class is in one of both only.
    """
    if list(run.class_names) == names:  # in which two may be of one name
        return torch.arange(len(names))
    own = {name: index for index, name in enumerate(run.class_names)}
    if len(own) < len(run.class_names) or len(set(names)) < len(names):
        raise ConfigError(
            f"init_head: classes of {run.path} or of the dataset share a name and are in another "
            "order; train a head on a cache of this dataset"
        )
    missing = [name for name in names if name not in own]
    foreign = [name for name in own if name not in set(names)]
    if missing or foreign:
        problem = f"{missing[0]!r} is not in the head" if missing else f"{foreign[0]!r} is only"
        where = "" if missing else " in the head"
        raise ConfigError(
            f"init_head: classes differ: {problem}{where}; {run.path} has {len(own)} classes, the "
            f"dataset {len(names)}; train a head on a cache of this dataset"
        )
    return torch.tensor([own[name] for name in names], dtype=torch.int64)
