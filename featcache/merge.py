r"""Job: an adapted backbone as a model of its own library, its adapter merged into the weights.

    python -m featcache.merge --backbone adapted --backbone.model tuned/lora --out merged/lora

The result needs neither the base nor this package: open_clip opens it as `local-dir:merged/lora`
(timm likewise, transformers as a folder). Its features are those of the adapted backbone; to a
cache it is another backbone, as its weights are.
"""

import secrets
import shutil
from dataclasses import replace
from pathlib import Path

from pydantic import Field, TypeAdapter

from featcache.adapter_folder import attach, read_adapter
from featcache.backbones import AnyBackbone
from featcache.backbones.adapted import AdaptedConfig
from featcache.backbones.base import Backbone, BackboneConfig
from featcache.backbones.weights import weights_hash
from featcache.config import Config, run_job
from featcache.errors import BackboneError


class MergeConfig(Config):
    """Write an adapted backbone as an ordinary model, its adapter merged into the weights."""

    backbone: AnyBackbone = Field(discriminator="kind")
    """The adapted backbone: kind adapted, its folder as model."""
    out: Path
    """Folder to write; must not exist."""


def run(config: MergeConfig) -> BackboneConfig:
    """Writes the merged model, opens it once, and prints the options that open it.

    Returns:
        Those options.

    Raises:
        BackboneError: not an adapted backbone, one that no weights can hold, a base that is missing
            or another one, or `out` exists.
    """
    if not isinstance(config.backbone, AdaptedConfig):
        raise BackboneError(
            f"backbone.kind {config.backbone.kind} has no adapter to merge; give kind adapted and "
            "the folder that finetune.train wrote as backbone.model"
        )
    if config.out.exists():
        raise BackboneError(f"{config.out}: exists already; delete it or choose another --out")
    base, backbone = _folded(config.backbone)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    building = config.out.with_name(f"{config.out.name}.partial-{secrets.token_hex(4)}")
    building.mkdir()
    try:
        backbone.save(building)
        found = _merged(base, building).open().spec.identity.weights
        if found != weights_hash(backbone.trainable().model):
            raise BackboneError(
                f"{config.out}: what {base.kind} reads back is not what was written; "
                "is the disk full or damaged?"
            )
        building.rename(config.out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    merged = _merged(base, config.out)
    print("merged:", " ".join(f"--backbone.{name} {v}" for name, v in merged.record().items() if v))
    return merged


def _folded(config: AdaptedConfig) -> tuple[BackboneConfig, Backbone]:
    """The backbone with every adapter on the way folded, and the options of the one at its root."""
    held = read_adapter(Path(config.model))
    options = held.base | ({"model": config.base_model} if config.base_model else {})
    base: BackboneConfig = TypeAdapter(AnyBackbone).validate_python(options)
    root, backbone = (
        _folded(base) if isinstance(base, AdaptedConfig) else (base, base.open("cpu", "fp32"))
    )
    adapter = attach(held, backbone)
    if not adapter.mergeable:
        raise BackboneError(
            f"{config.model}: adapter {held.adapter.kind} adds parts that no weight of "
            f"{held.base_identity.name} can hold, so it cannot be merged; open it as "
            "backbone.kind adapted"
        )
    adapter.fold()
    backbone = adapter.finish(backbone)
    backbone.spec = replace(backbone.spec, identity=held.identity())
    return root, backbone


def _merged(base: BackboneConfig, folder: Path) -> BackboneConfig:
    """Options that open what was written of a base."""
    dropped = {"model", "pretrained", "image_size"}  # the folder says
    options = {name: value for name, value in base.record().items() if name not in dropped}
    merged: BackboneConfig = TypeAdapter(AnyBackbone).validate_python(
        options | {"model": f"local-dir:{folder}"}
    )
    return merged


if __name__ == "__main__":
    run_job(MergeConfig, run)
