"""What a cache holds, field by field, and the fingerprint over it.

An `Identity` covers everything that changes the numbers or their meaning: dataset rows, class
list, backbone weights, preprocessing, precision, kept features, views. It does not cover what only
changes the speed: batch size, number of readers, shard size, device.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from pydantic import Field

from featcache.config import Config, canonical_json
from featcache.errors import CacheMismatchError

Precision = Literal["fp32", "bf16", "fp16"]
"""Arithmetic of the towers' weights and activations."""

StorageDtype = Literal["float16", "float32"]
"""Type of the feature arrays on disk."""

TokenDtype = Literal["float16", "float32", "int8"]
"""Type of the tokens on disk; int8 has a float32 scale for each token."""

Multimodal = Literal["none", "pooled", "states"]
"""What is kept of a joint encoder of image and caption: nothing, its first token, or all."""


class DatasetIdentity(Config):
    """Which rows, labels, classes and captions a cache was made from."""

    kind: str
    """Dataset kind (folder, table, …)."""
    task: str
    """single_label, multi_label or unlabelled."""
    num_rows: int
    """Number of images, unreadable ones included."""
    rows: str
    """Hash over ids, relative paths and splits, in order."""
    labels: str
    """Hash over the labels, in order."""
    classes: str
    """Hash over the class names, in index order."""
    captions: str
    """Hash over the captions, in order."""


class BackboneIdentity(Config):
    """Which frozen encoder wrote a cache."""

    kind: str
    """Backbone kind (open_clip, …)."""
    name: str
    """Architecture name."""
    weights: str
    """Hash over names, types, shapes and bytes of all tensors of the state dict."""
    architecture: str
    """Hash over the architecture's configuration (activation, depth, widths, …)."""
    options: dict[str, bool | int | str] = Field(default_factory=dict)
    """Options of the backbone kind that change its numbers."""


class PreprocessIdentity(Config):
    """How a file becomes the pixels that the encoder sees."""

    size: tuple[int, int]
    """Height and width in pixels."""
    mean: tuple[float, ...]
    """Per-channel mean, in units of 0..1."""
    std: tuple[float, ...]
    """Per-channel standard deviation, in units of 0..1."""
    interpolation: str
    """Resize filter."""
    resize_mode: str
    """shortest (then centre crop), squash or longest (then padding)."""
    fill_color: int
    """Padding grey level 0..255; only read by `longest`."""
    crop_pct: float = 1.0
    """The resize goes to `size / crop_pct`, rounded down, and the centre is cut out; (0, 1]."""
    convert_first: bool = False
    """Whether an image becomes RGB before the resize instead of after it."""
    on_white: bool = False
    """Whether transparent parts then become white instead of what lies below them."""
    mode: Literal["fast", "scaled", "reference"]
    """How files are decoded and resized; see `featcache.images`."""


class FeatureIdentity(Config):
    """Which features are kept, and how they are stored."""

    projected: bool
    """(N, P) image features after the projection, not normalised."""
    pooled: bool
    """(N, D) image features before the projection, not normalised."""
    tokens: str
    """"none"; "all" or "grid:K": patch tokens of `token_layer`, K×K average-pooled; or
    "before_last:n": the whole sequence that enters the last n blocks."""
    token_layer: int
    """Block whose output the tokens are, counted from 1; -1 = the last one."""
    text: bool
    """(M, P) caption features after the projection, not normalised."""
    storage_dtype: StorageDtype
    """Type on disk, tokens aside."""
    num_views: int
    """Views per image; 1 = no view axis. View 0 is the plain one."""
    view_seed: int
    """Seed of the augmented views' crops and flips; 0 when there is one view."""
    view_scale: float
    """Smallest share of the area that an augmented view's crop keeps; 1 when there is one view."""
    token_dtype: TokenDtype | None = None
    """Type of the tokens on disk; None when there are none."""
    multimodal: Multimodal = "none"
    """What is kept of the joint encoder over each image and its first caption."""
    itm: bool = False
    """(N, 2) matching logits of each image and its first caption."""
    text_policy: str = "raw"
    """How captions become the text tower's input; "raw" where no caption is used."""

    @property
    def token_pool(self) -> int | None:
        """K of "grid:K", else None."""
        kind, _, side = self.tokens.partition(":")
        return int(side) if kind == "grid" else None

    @property
    def before_last(self) -> int:
        """The n of "before_last:n", else 0."""
        kind, _, blocks = self.tokens.partition(":")
        return int(blocks) if kind == "before_last" else 0

    def dtype_of(self, name: str) -> TokenDtype:
        """Type on disk of a feature (projected, pooled, tokens, …)."""
        return self.token_dtype or self.storage_dtype if name == "tokens" else self.storage_dtype


class Identity(Config):
    """Everything that changes the numbers of a cache."""

    format: Literal[1] = 1
    """Version of the on-disk layout."""
    dataset: DatasetIdentity
    """The rows."""
    backbone: BackboneIdentity
    """The frozen encoder."""
    preprocess: PreprocessIdentity
    """From file to pixels."""
    precision: Precision
    """Arithmetic of the towers."""
    features: FeatureIdentity
    """What is kept."""

    def fingerprint(self) -> str:
        """32 hexadecimal digits over all fields."""
        return fingerprint(self.record())


def fingerprint(value: Any) -> str:
    """XXH3-128 of a JSON value in canonical form, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(canonical_json(value).encode())


class ListHash:
    """XXH3-128 over lists that come in pieces, in constant memory.

    It covers the digest of all lengths (int64) and the digest of all content bytes, so moving a
    boundary changes it, and cutting the same lists into other pieces does not.
    """

    def __init__(self) -> None:
        self._lengths = xxhash.xxh3_128()
        self._content = xxhash.xxh3_128()

    def update(self, lengths: npt.NDArray[np.int64], content: Any) -> None:
        """Takes the next lists.

        Args:
            lengths: (n,) length of each.
            content: their content as bytes or anything with a contiguous buffer.
        """
        self._lengths.update(np.ascontiguousarray(lengths, "<i8").data)
        self._content.update(content)

    def update_strings(self, strings: list[str] | pa.Array | pa.ChunkedArray) -> None:
        """Takes the next strings; their lengths count in bytes of UTF-8."""
        if isinstance(strings, list):
            strings = pa.array(strings, pa.large_string())
        chunks = strings.chunks if isinstance(strings, pa.ChunkedArray) else [strings]
        for chunk in chunks:
            if not len(chunk):
                continue
            assert chunk.null_count == 0, "strings of a dataset are never null"
            array = chunk.cast(pa.large_string())
            _, starts, data = array.buffers()
            offsets = np.frombuffer(starts, np.int64)[array.offset :][: len(array) + 1]
            content = memoryview(data or b"")[offsets[0] : offsets[-1]]
            self.update(np.diff(offsets), content)

    def hexdigest(self) -> str:
        """32 hexadecimal digits over everything taken so far."""
        parts = self._lengths.digest() + self._content.digest()
        return xxhash.xxh3_128_hexdigest(parts)


def hash_strings(strings: list[str] | pa.Array | pa.ChunkedArray) -> str:
    """XXH3-128 over a list of strings; lengths count, so moving a boundary changes it."""
    digest = ListHash()
    digest.update_strings(strings)
    return digest.hexdigest()


def require_equal(found: Identity, expected: Identity, where: str) -> None:
    """Checks that a cache holds what a job wants.

    Raises:
        CacheMismatchError: naming the first differing field with both values.
    """
    for name, have, want in differences(found.record(), expected.record()):
        raise CacheMismatchError(
            f"{where}: {name} differs: the cache holds {have!r}, this job wants {want!r}; "
            "use another cache path, or delete this cache to extract anew"
        )


def differences(
    found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Differing leaves of two records as (dotted name, found, expected), in field order."""
    for name in [*expected, *(key for key in found if key not in expected)]:
        have, want = found.get(name), expected.get(name)
        if isinstance(have, Mapping) and isinstance(want, Mapping):
            yield from differences(have, want, f"{prefix}{name}.")
        elif have != want:
            yield prefix + name, have, want
