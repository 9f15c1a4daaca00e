"""What a dataset must offer: a `kind`, its options, and a manifest.

Adding a dataset is one new file in this folder: subclass `DatasetConfig`, give `kind` a Literal
type and a default, and implement `manifest`.
"""

from abc import abstractmethod

from pydantic import PositiveInt

from featcache.config import Config
from featcache.manifest import Manifest


class DatasetConfig(Config):
    """Options that every dataset shares."""

    kind: str
    """Dataset kind."""
    limit: PositiveInt | None = None
    """Keep only the first `limit` images of each split; unset = all."""

    def open(self) -> Manifest:
        """The dataset as a checked manifest, cut to `limit`.

        Raises:
            DatasetError: one line with what was found, what was expected and what to do.
        """
        manifest = self.manifest()
        return manifest if self.limit is None else manifest.limited(self.limit)

    @abstractmethod
    def manifest(self) -> Manifest:
        """The whole dataset as a checked manifest."""
