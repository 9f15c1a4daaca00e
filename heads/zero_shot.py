"""Job: what a dual encoder sees in images by the names of classes alone, and how often it is right.

python -m heads.zero_shot --images photos --backbone.model ViT-B-32 --backbone.pretrained openai
python -m heads.zero_shot --cache cache/photos
python -m heads.zero_shot --dataset torchvision --dataset.name cifar10 --dataset.root data \
    --backbone.model local-dir:runs/clip

With `images` a demonstration: classes are printed and drawn. Otherwise an evaluation of a cache, in
seconds, or of any dataset's images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import pandas as pd
from pydantic import AliasChoices, Field, PositiveFloat, PositiveInt, model_validator

from featcache.backbones import AnyBackbone
from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.images import PixelMode
from featcache.precision import PrecisionChoice
from featcache.prompts import choose_zero_shot, expand
from featcache.storage import CachePath
from heads.scoring import MetricsConfig
from heads.text_lines import text_lines

_OWN_SETS = {"cifar10": "plain", "cifar100": "plain", "wordnet_folder": "imagenet"}
"""Sets that published zero-shot evaluations of these kinds take instead of the heads' usual one."""


class ZeroShotJobConfig(Config):
    """Zero-shot classes of images, drawn; or zero-shot accuracy on a dataset or a cache."""

    images: Path | None = Field(
        default=None, validation_alias=AliasChoices("images", "img_path", "img_dir")
    )
    """Image file, or folder that is searched with its sub-folders: predicted and drawn."""
    dataset: AnyDataset | None = Field(default=None, discriminator="kind")
    """Images with labels to be right about; with `images` only the classes are taken."""
    cache: CachePath | None = None
    """Cache with image/projected, in the dataset's place; its own backbone is the one measured."""
    split: str | None = None
    """Split that is evaluated; unset = test if it has labels, otherwise val, otherwise the first
    that has."""
    backbone: AnyBackbone = Field(default=OpenClipConfig(), discriminator="kind")
    """Encoder of images and texts; with `cache` it is the cache's own and must not be given."""
    classes: str | None = None
    """Class names: cifar100 or cifar10 (built in), or a file with one name a line, or a .csv or
    .tsv with a column `name`. Unset = the dataset's or the cache's own, otherwise cifar100. In an
    evaluation they rename the classes, in index order."""
    templates: str | list[str] | None = None
    """Names of template sets, templates such as "a photo of a {name}.", and .txt files with one a
    line; one or several. Unset = `plain` (one template) for the demonstration and CIFAR, `imagenet`
    (80) for WordNet folders, otherwise the set that suits the dataset."""
    scale: PositiveFloat | None = None
    """Multiplier of the cosines before the softmax, > 0; unset = 35 for the demonstration, where
    100 would leave nothing to the second class, and 100 in an evaluation."""
    top_k: PositiveInt = 5
    """Classes shown for each image, 1 or more."""
    figure: bool = Field(
        default=True, validation_alias=AliasChoices("figure", "show_prediction", "show_predictions")
    )
    """Draw the images with their classes."""
    max_drawn: PositiveInt = 240
    """Most images that are drawn, the first of them, 1 or more; all are in predictions.csv."""
    out: Path | None = None
    """Folder for what is written; unset = demo_output, or zero_shot_eval_output."""
    name: str | None = None
    """What the files of an evaluation are called; unset = the kind of the dataset, its folder, and
    the split."""
    metrics: MetricsConfig = MetricsConfig()
    """How metrics of an evaluation are counted."""
    mode: PixelMode = "fast"
    """Decode and resize: fast, scaled or reference, as in extraction; with `cache` its own."""
    precision: PrecisionChoice = "auto"
    """Arithmetic: fp32, bf16, fp16; auto = the device's fastest that agrees with fp32 on the first
    images; a cache's own with `cache`."""
    batch_size: PositiveInt | None = None
    """Images encoded at a time, 1 or more; unset = 32 on a CPU, 256 on a GPU. Changes no figure."""
    num_readers: PositiveInt | Literal["auto"] = "auto"
    """Threads that read and decode; auto = one per processor this job may use."""
    max_unreadable: float = Field(default=0.01, ge=0, le=1)
    """Largest share of unreadable images in an evaluation, 0..1; past it the job fails."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu or cuda:N."""
    quiet: bool = False
    """Print nothing but errors."""

    @model_validator(mode="before")
    @classmethod
    def _folder_unless_said(cls, values: Any) -> Any:
        dataset = values.get("dataset") if isinstance(values, Mapping) else None
        if isinstance(dataset, Mapping) and "kind" not in dataset:
            return {**values, "dataset": {"kind": "folder", **dataset}}
        return values

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset is not None and self.cache is not None:
            raise ValueError(
                f"dataset={self.dataset.kind} and cache={self.cache} both say what is evaluated; "
                "give one of them"
            )
        if self.images is None and self.dataset is None and self.cache is None:
            raise ValueError(
                "give images (to see their classes), or dataset or cache (to measure accuracy)"
            )
        if self.images is not None and self.split is not None:
            raise ValueError(
                f"split={self.split} is of an evaluation, images={self.images} of a demonstration; "
                "leave one of them out"
            )
        if self.cache is not None and self.backbone != OpenClipConfig():
            raise ValueError(
                f"backbone={self.backbone.kind} and cache={self.cache}: a cache is measured with "
                "the backbone that wrote it; leave backbone out, or give the dataset"
            )
        return self

    def template_list(self, kind: str, classes: pd.DataFrame) -> list[str]:
        """The templates that the options mean for a class table.

        Args:
            kind: of the dataset; "" = a plain list of names.
            classes: class table.

        Raises:
            ConfigError: for an unknown set, or a file that is missing or empty.
        """
        if self.templates is None:
            columns = [str(column) for column in classes.columns]
            plain = not kind and set(columns) <= {"name", "count"}
            chosen = "plain" if plain else _OWN_SETS.get(kind) or choose_zero_shot(kind, columns)
            return expand(chosen)
        return expand(text_lines(self.templates, "templates") or [])


def run(config: ZeroShotJobConfig) -> Any:
    """A `heads.zero_shot_demo.Demonstration`, or a `heads.zero_shot_evaluation.Evaluation`.

    Raises:
        ConfigError: options that contradict each other, or a split that is not there.
        BackboneError: a backbone that cannot be opened or reads no text.
        DatasetError: a dataset that is not what its options say, or has no labels.
        UnreadableImagesError: too many images that cannot be read.
    """
    if config.images is not None:
        from heads.zero_shot_demo import demonstrate  # matplotlib takes a second

        return demonstrate(config, config.images)
    from heads.zero_shot_evaluation import evaluate

    return evaluate(config)


if __name__ == "__main__":
    run_job(ZeroShotJobConfig, run)
