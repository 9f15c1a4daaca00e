"""Options of `finetune.pretrain`."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from featcache.config import Config
from featcache.datasets import AnyDataset
from featcache.datasets.garden import GardenConfig
from finetune.images.augmentation import AugmentationConfig
from finetune.images.loading import LoadingConfig
from finetune.losses import AnyPairLoss
from finetune.losses.info_nce import InfoNceConfig
from finetune.optim import AdamWConfig
from finetune.parallel import Strategy


class PretrainConfig(Config):
    """Train a CLIP-like dual encoder on image-caption pairs."""

    dataset: AnyDataset = Field(default=GardenConfig(), discriminator="kind")
    """Images with captions."""
    train_split: str = "train"
    """Split that is trained on."""
    val_split: str = "val"
    """Split that is only looked at; empty = no validation."""
    architecture: str | None = None
    """demo-rn or demo-vit (64 pixels), rn50-6, an open_clip name (RN50, ViT-B-32, …), or a .json
    file; unset = demo-rn, or that of the folder in `init`."""
    init: str = ""
    """Weights to start from: a folder (open_clip's local-dir, a checkpoint's, or an adapted
    backbone that can be merged), or a weights file or open_clip tag of `architecture`; empty =
    random ones."""
    image_size: PositiveInt | None = None
    """Side of the images in pixels; unset = the architecture's."""
    context_length: int | None = Field(default=None, ge=3)
    """Longest caption in tokens, start and end included; unset = the architecture's."""
    out: Path = Path("backbones/garden")
    """Folder for the result; opens as `local-dir:FOLDER`."""
    restart: bool = False
    """Train anew: replace a finished result in `out`, or forget an interrupted run."""
    epochs: PositiveInt = 9
    """Passes over the training split."""
    steps: PositiveInt | None = None
    """Optimizer steps; unset = all of `epochs`, otherwise as many epochs as it takes."""
    batch_size: PositiveInt = 128
    """Distinct images a step over all processes; the number of negatives is one less."""
    accumulate: PositiveInt = 1
    """Pieces in which a process encodes its images of a step, 1 or more: as much less memory, all
    negatives and the same gradient, for one more forward pass (gradient caching). With batch
    normalisation a piece is normalised by itself."""
    loss: AnyPairLoss = Field(default=InfoNceConfig(), discriminator="kind")
    """Loss on the pairs of a batch: info_nce or siglip."""
    optim: AdamWConfig = AdamWConfig()
    """Optimizer and schedule."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """How training images are varied."""
    loading: LoadingConfig = LoadingConfig()
    """How images are read."""
    normalization: Literal["clip", "coco", "dataset"] = "clip"
    """Channel mean and deviation: CLIP's own (or what the weights in `init` were trained with),
    those of COCO's images, or those of the training images."""
    prompt: str = "a photo of a {name}."
    """Zero-shot prompt of validation, over the class table's columns, as `featcache.prompts` reads
    one."""
    validate_every: NonNegativeInt = 3
    """Epochs between validations; 0 = only at the end."""
    validate_steps: PositiveInt | None = None
    """Steps between further validations; unset = none."""
    save_every: PositiveInt | None = None
    """Steps between checkpoints, of which the latest stay in the result, the end's among them;
    unset = one a minute or less often, only to go on from after an interruption."""
    keep_checkpoints: PositiveInt = 2
    """Checkpoints that stay, the latest ones."""
    log_every: PositiveInt = 20
    """Steps between log lines."""
    device: str = "auto"
    """auto = the first GPU if there is one, else the CPU; or cpu, cuda, cuda:N."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the towers; weights stay float32, and fp16 scales the loss. auto = bf16 where
    the device has it, fp16 on older GPUs."""
    gradient_checkpointing: bool = False
    """Keep only the input of each block for backward and compute the rest again: less memory, one
    more forward pass."""
    strategy: Strategy = "ddp"
    """How several processes hold the weights: ddp = all of them each; fsdp = a share each."""
    seed: NonNegativeInt = 0
    """Fixes initial weights, order, captions and crops."""

    @model_validator(mode="after")
    def _more_than_one(self) -> "PretrainConfig":
        if self.batch_size < 2:
            raise ValueError(f"batch_size is {self.batch_size}; negatives need 2 or more images")
        return self
