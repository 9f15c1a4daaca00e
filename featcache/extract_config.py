"""Options and reports of the extraction job."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, model_validator

from featcache.backbones import AnyBackbone
from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import Config
from featcache.datasets import AnyDataset
from featcache.errors import ConfigError
from featcache.identity import Multimodal, Precision, StorageDtype, TokenDtype
from featcache.images import PixelMode
from featcache.precision import PrecisionChoice
from featcache.storage import CachePath
from featcache.text_input import AUTO, TextPolicy, check_name, open_policy


class FeatureOptions(Config):
    """Which features are kept, and how they are stored."""

    projected: bool | None = None
    """Keep image features after the projection, (N, P): what is compared with text; unset = if the
    backbone has a projection."""
    pooled: bool | None = None
    """Keep pooled image features before the projection, (N, D); unset = if the backbone has no
    projection (timm)."""
    tokens: str = Field(
        default="none", pattern=r"^(none|all|grid:[1-9][0-9]*|before_last:[1-9][0-9]*)$"
    )
    """Keep tokens, (N, L, W): none; all = patch tokens before the last norm; grid:K = their K x K
    averages; before_last:n = the whole sequence that enters the last n blocks, prefix included."""
    token_dtype: Literal["auto"] | TokenDtype = "auto"
    """Type of the tokens on disk: float16, float32, or int8 with one scale per token (half of
    float16, its error is measured and printed); auto = as storage_dtype."""
    token_layer: int = Field(default=-1, ge=-1)
    """Block whose output the tokens are, from 1; -1 = the last."""
    text: bool | None = None
    """Keep caption features, (M, P); unset = if the dataset has captions and the backbone reads
    text."""
    multimodal: Multimodal = "none"
    """Keep what the joint encoder (blip) makes of each image and its first caption: none; pooled =
    its first token, (N, W); states = all T text tokens, (N, T, W), with their mask, and pooled."""
    itm: bool = False
    """Keep matching logits of each image and its first caption (blip), (N, 2): no match, match."""
    text_policy: Annotated[str, AfterValidator(check_name)] = AUTO
    """How a caption becomes the text tower's input: raw; picture_of = "a picture of " before it;
    MODULE:FUNCTION of yours; contains:MODULE:FUNCTION = "The photo contains a, b." of the phrases
    that it finds; auto = the backbone's own (picture_of for blip, otherwise raw)."""
    storage_dtype: Literal["auto"] | StorageDtype = "auto"
    """Type on disk: float16 or float32; auto = float16, or float32 with `reference`."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        joint = self.multimodal != "none" or self.itm
        if self.projected is False and not self.pooled and self.tokens == "none" and not joint:
            raise ValueError(
                "projected False, pooled False, tokens none, multimodal none and itm False keep "
                "nothing; set one of them"
            )
        if self.tokens.startswith("before_last:") and self.token_layer != -1:
            raise ValueError(
                f"token_layer {self.token_layer} contradicts tokens {self.tokens}, which already "
                "names the place; drop one of them"
            )
        if self.token_layer == 0:
            raise ValueError("token_layer 0 does not exist; layers count from 1, -1 = the last")
        return self


class ViewOptions(Config):
    """Augmented views: random resized crops, flipped half of the time, next to the plain view."""

    num_views: PositiveInt = 1
    """Views per image; 1 = the plain one only, and no view axis in the arrays."""
    seed: NonNegativeInt = 0
    """Seed of crops and flips."""
    scale: float = Field(default=0.5, gt=0, le=1)
    """Smallest share of the image's area that a crop keeps, in (0, 1]."""


class ExtractConfig(Config):
    """Extract features of a dataset's images (and captions) into a cache. Resumes by itself."""

    dataset: AnyDataset = Field(discriminator="kind")
    """Images, labels, classes and captions; kind folder unless said otherwise."""
    backbone: AnyBackbone = Field(default=OpenClipConfig(), discriminator="kind")
    """Frozen encoder and its weights."""
    cache: CachePath
    """Folder of the cache, or s3://bucket/prefix: created, resumed, or found complete."""
    features: FeatureOptions = FeatureOptions()
    """What is kept."""
    views: ViewOptions = ViewOptions()
    """Augmented views."""
    mode: PixelMode = "fast"
    """Decode and resize: fast (within 1/255 of the source library), scaled (big JPEGs faster) or
    reference (the source library's own transform)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: PrecisionChoice = "auto"
    """Arithmetic of the towers: fp32, bf16, fp16; auto = bf16 where it is native and agrees with
    fp32 on real images, fp16 on older GPUs; a cache keeps the one it began with."""
    min_cosine: float = Field(default=0.999, gt=0, le=1)
    """Smallest cosine between features of a fast precision and of fp32, on the first images."""
    reference: bool = False
    """Bit-faithful to the source library: mode reference, fp32, stored as float32."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Images per forward pass; auto = 32 on a CPU, 256 on a GPU, or what the cache began with."""
    num_readers: PositiveInt | Literal["auto"] = "auto"
    """Threads that read and decode; auto = one per processor this job may use."""
    shard_rows: PositiveInt | Literal["auto"] = "auto"
    """Rows written and marked done together, a multiple of batch_size: what a crash can cost;
    auto = 2048 on a CPU, 65536 on a GPU, or what the cache began with."""
    max_invalid: float = Field(default=0.01, ge=0, le=1)
    """Largest share of unreadable images; past it the job fails, and keeps what is done."""
    retry_invalid: bool = False
    """Extract again the shards that hold unreadable images."""
    repair: bool = False
    """Verify every checksum first, and extract damaged shards again."""
    recheck: bool = False
    """Look for changed image files and class metadata even if no path, label or caption changed."""
    max_lost: float = Field(default=0.5, ge=0, le=1)
    """Largest share of the cached images that a changed dataset may drop; past it the job fails."""
    restart: bool = False
    """Delete the cache and start anew."""
    dry_run: bool = False
    """Print what would be written, its size and the tokens' error, and stop."""

    @model_validator(mode="before")
    @classmethod
    def _folder_unless_said(cls, values: Any) -> Any:
        dataset = values.get("dataset") if isinstance(values, Mapping) else None
        if isinstance(dataset, Mapping) and "kind" not in dataset:
            return {**values, "dataset": {"kind": "folder", **dataset}}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reference:
            for name, value, legal in (
                ("mode", self.mode, ("fast", "reference")),
                ("precision", self.precision, ("auto", "fp32")),
                ("features.storage_dtype", self.features.storage_dtype, ("auto", "float32")),
                ("features.token_dtype", self.features.token_dtype, ("auto", "float32")),
            ):
                if value not in legal:
                    raise ValueError(f"reference true contradicts {name} {value}; drop one of them")
        if isinstance(self.batch_size, int) and isinstance(self.shard_rows, int):
            check_whole_batches(self.shard_rows, self.batch_size)
        return self

    @property
    def pixel_mode(self) -> PixelMode:
        """How files are decoded and resized, `reference` taken into account."""
        return "reference" if self.reference else self.mode

    @property
    def text_policy(self) -> TextPolicy:
        """How captions become texts, `auto` resolved.

        Raises:
            ConfigError: if it names a function that cannot be imported.
        """
        name = self.features.text_policy
        return open_policy(self.backbone.default_text_policy if name == AUTO else name)

    @property
    def reader_threads(self) -> int:
        """Threads that read and decode."""
        return len(os.sched_getaffinity(0)) if self.num_readers == "auto" else self.num_readers


class ExtractReport(Config):
    """What an extraction did; kept in the cache as its summary."""

    cache: str
    """The cache's folder."""
    fingerprint: str
    """Fingerprint of what it holds."""
    num_rows: int
    """Images."""
    num_captions: int
    """Captions."""
    num_invalid: int
    """Images that cannot be read."""
    num_extracted: int
    """Images encoded by this run."""
    num_copied: int = 0
    """Images whose features were taken over from an earlier state of the cache."""
    precision: Precision
    """Arithmetic of the towers."""
    seconds: float
    """Wall-clock time of this run's shards."""
    images_per_second: dict[str, float]
    """Rates of reader, encoder, writer, and of all together (total), over this run."""


class ShardReport(Config):
    """What became of one shard; kept in the cache's done-list."""

    rows: int
    """Images or captions."""
    copied: int = 0
    """Those of them that were taken over from an earlier state of the cache."""
    invalid: list[dict[str, Any]]
    """Unreadable images: row, id, path, reason."""
    seconds: float
    """Wall-clock time."""
    per_second: dict[str, float]
    """Rates of reader, encoder, writer, and of all together (total)."""


def check_whole_batches(shard_rows: int, batch_size: int) -> None:
    """Checks that shards can be cut into batches.

    Raises:
        ConfigError: naming both values.
    """
    if shard_rows % batch_size:
        raise ConfigError(
            f"shard_rows {shard_rows} is not a multiple of batch_size {batch_size}; a shard holds "
            "whole batches"
        )
