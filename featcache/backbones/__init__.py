"""Frozen encoders by `kind`: one file per family; see `base` for what a backbone must offer."""

from typing import TYPE_CHECKING

from featcache.backbones.base import Backbone, BackboneConfig
from featcache.config import one_of, union_of

BACKBONES = one_of(__name__, __path__, BackboneConfig)
"""Config class of every backbone by kind."""

if TYPE_CHECKING:
    AnyBackbone = BackboneConfig
else:
    AnyBackbone = union_of(BACKBONES, default="open_clip")

__all__ = ["BACKBONES", "AnyBackbone", "Backbone", "BackboneConfig"]
