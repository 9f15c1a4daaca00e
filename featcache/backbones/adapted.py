"""A backbone changed by training: a folder with the base's name and the trained tensors.

Opened, it is the base with the tensors in place; whatever reads a backbone reads it like any other.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from featcache.backbones.base import Backbone, BackboneConfig
from featcache.identity import Precision


class AdaptedConfig(BackboneConfig):
    """Backbones that finetune.train wrote."""

    kind: Literal["adapted"] = "adapted"
    """Backbone kind."""
    model: str
    """Folder with adapter.json and adapter.safetensors."""
    base_model: str = ""
    """What the base's own option `model` is now, if it is not where it was in training."""

    def open(self, device: str = "cpu", precision: Precision = "fp32") -> Backbone:
        """The adapted encoder, in evaluation mode, gradients off.

        Raises:
            BackboneError: damaged folder, or a base that is missing or has other weights.
        """
        # Here: adapters import backbones.base, and the union of all kinds holds this one.
        from featcache import adapter_folder
        from featcache.backbones import AnyBackbone

        held = adapter_folder.read_adapter(Path(self.model))
        options = held.base | ({"model": self.base_model} if self.base_model else {})
        base: BackboneConfig = TypeAdapter(AnyBackbone).validate_python(options)
        backbone = base.open("cpu", "fp32")
        adapter = adapter_folder.attach(held, backbone)
        adapter.fold()
        adapter.requires_grad_(False)
        adapter.eval()
        backbone = adapter.finish(backbone)
        backbone.spec = replace(backbone.spec, identity=held.identity())
        backbone.move(device, precision)
        return backbone
