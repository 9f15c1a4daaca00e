"""Heads by `kind`: one file each; see `heads.base` for what a head must offer."""

from typing import TYPE_CHECKING

from featcache.config import one_of, union_of
from heads.base import HeadConfig

HEADS = one_of(__name__, __path__, HeadConfig)
"""Config class of every head by kind."""

if TYPE_CHECKING:
    AnyHead = HeadConfig
else:
    AnyHead = union_of(HEADS, default="linear")

__all__ = ["HEADS", "AnyHead"]
