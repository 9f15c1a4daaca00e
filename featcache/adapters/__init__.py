"""What changes a frozen backbone, by `kind`: one file each; see `base` for what one must offer."""

from typing import TYPE_CHECKING

from featcache.adapters.base import Adapter, AdapterConfig
from featcache.config import one_of, union_of

ADAPTERS = one_of(__name__, __path__, AdapterConfig)
"""Config class of every adapter by kind."""

if TYPE_CHECKING:
    AnyAdapter = AdapterConfig
else:
    AnyAdapter = union_of(ADAPTERS)

__all__ = ["ADAPTERS", "Adapter", "AdapterConfig", "AnyAdapter"]
