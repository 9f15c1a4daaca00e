"""The demo: the whole pipeline on pictures drawn by code, in a few minutes on two cores.

    make demo          (python -m flows.demo)

Pretrains a small CLIP on captioned pictures of a garden, extracts features into a cache and trains
heads on it with the `two-stage` flow, then compares them on the test split. Everything it writes is
reused when it runs again: the pictures, the backbone, the cache and the heads.
"""

from flows.server import complete, start_early

if __name__ == "__main__":
    start_early()  # the server takes as long as the imports below

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt

from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.datasets.garden import GardenConfig
from featcache.extract import ExtractConfig
from featcache.pictures import contact_sheet
from featcache.storage import CachePath
from finetune import pretrain
from finetune.pretrain import PretrainConfig
from flows.steps import step
from flows.train_heads import HeadTraining
from flows.two_stage import two_stage
from heads.pictures import compare_runs, comparison_table


class DemoConfig(Config):
    """Pretrain a small CLIP, extract a feature cache, train heads on it, compare them."""

    dataset: AnyDataset = Field(default=GardenConfig(), discriminator="kind")
    """Pictures with labels and captions."""
    backbone: Path = Path("backbones/garden")
    """Folder of the pretrained CLIP."""
    cache: CachePath = Path("cache/garden")
    """Folder of the feature cache."""
    runs: Path = Path("runs/garden")
    """Folder of the heads' run folders and of the pictures."""
    heads: list[str] = Field(default=["zero_shot", "linear", "mop"], min_length=1)
    """Heads to compare, by kind, each with its defaults."""
    epochs: PositiveInt = PretrainConfig.model_fields["epochs"].default
    """Passes of the pretraining over the training split."""
    seed: NonNegativeInt = 0
    """Fixes the pretraining and the heads."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo made.

    Attributes:
        runs: run folder of every head.
        pictures: pictures worth opening.
        table: head × metric on the test split, as text.
    """

    runs: list[Path]
    pictures: list[Path]
    table: str


def run(config: DemoConfig) -> DemoReport:
    """The pipeline, step by step.

    Raises:
        UserError: one line that says what to do.
    """
    began = time.monotonic()
    config.runs.mkdir(parents=True, exist_ok=True)
    with step("1/4  pictures"):
        manifest = config.dataset.open()
        sheet = config.runs / "pictures.png"
        contact_sheet(manifest, sheet)
        print(f"{len(manifest)} pictures of {manifest.num_classes} classes in {manifest.root}")
    with step("2/4  a CLIP, pretrained on their captions"):
        pretrained = pretrain.run(
            PretrainConfig(
                dataset=config.dataset, out=config.backbone, epochs=config.epochs, seed=config.seed
            )
        )
    with step("3/4  features into a cache, heads on the cache (flow two-stage)"):
        extraction = ExtractConfig(
            dataset=config.dataset,
            backbone=OpenClipConfig(model=f"local-dir:{config.backbone}"),
            cache=config.cache,
        )
        runs = [config.runs / kind for kind in config.heads]
        trainings = [
            HeadTraining.model_validate(
                {"head": {"kind": kind}, "run": folder, "seed": config.seed, "quiet": True}
            )
            for kind, folder in zip(config.heads, runs, strict=True)
        ]
        state = complete(lambda: two_stage(extraction, trainings, return_state=True))
        print(state.message)
    with step("4/4  comparison on the test split"):
        picture = config.runs / "comparison.png"
        compare_runs(runs, picture, title=f"Heads on {config.cache}, test split")
        table = comparison_table(runs)
    pictures = [sheet, pretrained.folder / "curves.png", picture]
    pictures += [folder / "curves.png" for folder in runs if (folder / "curves.png").is_file()]
    print(table)
    print("\npictures     " + "\n             ".join(map(str, pictures)))
    print("run folders  " + "\n             ".join(map(str, runs)))
    print("pages        " + "\n             ".join(str(folder / "report.html") for folder in runs))
    print(f"cache        {config.cache}  (python -m featcache.info --cache {config.cache})")
    print(f"\ndone in {time.monotonic() - began:.0f} s")
    return DemoReport(runs, pictures, table)


if __name__ == "__main__":
    run_job(DemoConfig, run)
