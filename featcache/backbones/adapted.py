"""A backbone changed by training: a folder with the base's name and the trained tensors.

Opened, it is the base with the tensors in place; whatever reads a backbone reads it like any other.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from featcache.backbones.base import Backbone, BackboneConfig
from featcache.errors import BackboneError
from featcache.identity import Precision


class AdaptedConfig(BackboneConfig):
    """Backbones that finetune.train wrote."""

    kind: Literal["adapted"] = "adapted"
    """Backbone kind."""
    model: str
    """Folder with adapter.json and adapter.safetensors."""
    base_model: str = ""
    """What the base's own option `model` is now, if it is not where it was in training."""

    @property
    def default_text_policy(self) -> str:
        """The base's."""
        return self._base().default_text_policy

    @property
    def image_only(self) -> bool:
        """Whether the base is."""
        return self._base().image_only

    def _base(self) -> BackboneConfig:
        """Options that open the base.

        Raises:
            BackboneError: damaged folder.
        """
        # Here: adapters import backbones.base, and the union of all kinds holds this one.
        from featcache import adapter_folder
        from featcache.backbones import AnyBackbone

        recorded = adapter_folder.read_record(Path(self.model))["base"]
        options = recorded | ({"model": self.base_model} if self.base_model else {})
        base: BackboneConfig = TypeAdapter(AnyBackbone).validate_python(options)
        return base

    def open(self, device: str = "cpu", precision: Precision = "fp32") -> Backbone:
        """The adapted encoder, in evaluation mode, gradients off.

        Raises:
            BackboneError: damaged folder, or a base that is missing or has other weights.
        """
        from featcache import adapter_folder  # here for the same reason

        held = adapter_folder.read_adapter(Path(self.model))
        try:
            backbone = self._base().open("cpu", "fp32")
        except BackboneError as error:
            raise BackboneError(
                f"base of {self.model}: {error}; if the base is elsewhere now, set "
                "backbone.base_model"
            ) from None
        adapter = adapter_folder.attach(held, backbone)
        adapter.fold()
        adapter.requires_grad_(False)
        adapter.eval()
        backbone = adapter.finish(backbone)
        backbone.spec = replace(backbone.spec, identity=held.identity())
        backbone.move(device, precision)
        return backbone
