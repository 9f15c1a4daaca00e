"""Adapting a backbone where its frozen features fall short: the whole way in a few minutes.

    make adapt          (python -m flows.adapt)

Pretrains a small CLIP on pictures of a garden by day, and classifies pictures taken at night: with
the backbone as it is, and adapted by LoRA and by visual prompts (flow `finetune-backbone`). Each
backbone extracts a cache of its own, and a head is trained on it. One table compares them. All that
is written is found again: an interrupted run goes on where it stopped.
"""

from flows.server import complete, start_early

if __name__ == "__main__":
    start_early()  # the server takes as long as the imports below

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from featcache.adapters import AnyAdapter
from featcache.adapters.lora import LoraConfig
from featcache.adapters.vpt import VptConfig
from featcache.backbones.base import BackboneConfig
from featcache.backbones.open_clip import OpenClipConfig
from featcache.config import Config, run_job
from featcache.datasets import AnyDataset
from featcache.datasets.garden import GardenConfig
from featcache.extract import ExtractConfig
from featcache.extract_config import FeatureOptions
from featcache.pictures import contact_sheet
from finetune import pretrain
from finetune.pretrain import PretrainConfig
from finetune.train import TrainConfig
from finetune.tuning.side_by_side import Line, Stage, measure, picture, table, write_page
from flows.finetune_backbone import AdaptedExtraction, finetune_backbone
from flows.steps import step
from flows.train_heads import HeadTraining
from flows.two_stage import two_stage

FROZEN = "frozen"

IMAGES = FeatureOptions(text=False)
"""What the caches hold: captions are for the pretraining alone."""

NIGHT = GardenConfig(domain="night", num_images=8000, test_fraction=0.4)
"""Rather many test pictures, so that small gains can be told from luck."""


class Method(Config):
    """One way to adapt the backbone, and how it is trained."""

    adapter: AnyAdapter = Field(default=LoraConfig(), discriminator="kind")
    """What of the backbone is trained."""
    lr: PositiveFloat = 2e-3
    """Peak learning rate of the adapter, > 0."""
    epochs: PositiveInt = 10
    """Passes over the training images."""
    warmup_steps: NonNegativeInt = 40
    """Optimiser steps of 64 images in which the rate rises to its peak, 0 or more."""


class AdaptConfig(Config):
    """Adapt a backbone to another domain than it was pretrained on, and compare."""

    pretraining: AnyDataset = Field(default=GardenConfig(), discriminator="kind")
    """Images with captions that the backbone is pretrained on."""
    dataset: AnyDataset = Field(default=NIGHT, discriminator="kind")
    """Images with labels of the other domain."""
    backbone: Path = Path("backbones/garden-vit")
    """Folder of the pretrained CLIP."""
    pretraining_epochs: PositiveInt = PretrainConfig.model_fields["epochs"].default
    """Passes of the pretraining over its training split."""
    methods: list[Method] = Field(
        default=[
            Method(),
            Method(adapter=VptConfig(deep=True), lr=2e-2),
        ],
        min_length=1,
    )
    """Ways to adapt it, of different kinds."""
    cache: Path = Path("cache/garden-night")
    """Folder of the frozen backbone's cache; an adapted one's is this with its kind behind."""
    runs: Path = Path("runs/garden-night")
    """Folder of heads, adapted backbones, table, picture and page."""
    pages: bool = True
    """Write a page about every head and adapted backbone too, `report.html` in its folder."""
    seed: NonNegativeInt = 0
    """Fixes adapters and heads; the pretraining has seed 0."""

    @model_validator(mode="after")
    def _distinct(self) -> "AdaptConfig":
        kinds = [method.adapter.kind for method in self.methods]
        if len(set(kinds)) < len(kinds) or FROZEN in kinds:
            raise ValueError(f"methods of kinds {', '.join(kinds)}: expected each kind once")
        return self


@dataclass(frozen=True)
class AdaptReport:
    """What the comparison found.

    Attributes:
        lines: the frozen backbone, then the methods, in numbers.
        table: the same as text.
        page: report to open in a browser.
    """

    lines: list[Line]
    table: str
    page: Path


def run(config: AdaptConfig) -> AdaptReport:
    """The comparison, step by step.

    Raises:
        UserError: one line that says what to do.
    """
    began = time.monotonic()
    total = 4 + len(config.methods)
    config.runs.mkdir(parents=True, exist_ok=True)
    with step(f"1/{total}  pictures: what the backbone learns from, and what it then meets"):
        sheets = []
        for name, dataset in (("known", config.pretraining), ("new", config.dataset)):
            manifest = dataset.open()
            sheets.append(config.runs / f"{name}.png")
            contact_sheet(manifest, sheets[-1], num_rows=6)
            print(f"{name}: {len(manifest)} pictures of {manifest.num_classes} classes")
    with step(f"2/{total}  a CLIP with a vision transformer, pretrained on captions"):
        pretrain.run(
            PretrainConfig(
                dataset=config.pretraining,
                architecture="demo-vit",
                out=config.backbone,
                epochs=config.pretraining_epochs,
            )
        )
    base = OpenClipConfig(model=f"local-dir:{config.backbone}")
    with step(f"3/{total}  frozen: extraction, heads on the cache (flow two-stage)"):
        extraction = ExtractConfig(
            dataset=config.dataset, backbone=base, cache=config.cache, features=IMAGES
        )
        heads = _heads(config, FROZEN)
        print(complete(lambda: two_stage(extraction, heads, return_state=True)).message)
    stages = [_stage(config, FROZEN)]
    for number, method in enumerate(config.methods, 4):
        kind = method.adapter.kind
        with step(f"{number}/{total}  {kind}: training on images, then the same again"):
            training = _training(config, base, method)
            again = AdaptedExtraction.model_validate(
                {"cache": _cache(config, kind), "features": IMAGES}
            )
            flow = partial(finetune_backbone, training, again, _heads(config, kind))
            print(complete(partial(flow, return_state=True)).message)
        stages.append(_stage(config, kind, training.out))
    with step(f"{total}/{total}  comparison on the test split"):
        lines = measure(stages)
        text = table(lines)
        report = _write(config, lines, stages, text)
    print(text)
    print("\npictures  " + "\n          ".join(map(str, [*sheets, config.runs / "comparison.png"])))
    print(f"page      {report}")
    for stage in stages[1:]:
        print(f"backbone  --backbone adapted --backbone.model {stage.adapted}")
    print(f"\ndone in {time.monotonic() - began:.0f} s")
    return AdaptReport(lines, text, report)


def _cache(config: AdaptConfig, name: str) -> Path:
    return config.cache.with_name(f"{config.cache.name}-{name}")


def _heads(config: AdaptConfig, name: str) -> list[HeadTraining]:
    return [
        HeadTraining.model_validate(
            {
                "head": {"kind": kind},
                "run": config.runs / f"{name}-{kind}",
                "seed": config.seed,
                "quiet": True,
                "report": config.pages,
            }
        )
        for kind in ("linear", "zero_shot")
    ]


def _training(config: AdaptConfig, base: BackboneConfig, method: Method) -> TrainConfig:
    """The head begins as the one on frozen features; the rate falls over all epochs."""
    return TrainConfig.model_validate(
        {
            "dataset": config.dataset,
            "backbone": base,
            "adapter": method.adapter,
            "out": config.runs / method.adapter.kind,
            "init_head": config.runs / f"{FROZEN}-linear",
            "optim": {
                "lr": method.lr,
                "batch_size": 64,
                "epochs": method.epochs,
                "schedule": {"shape": "cosine", "warmup_steps": method.warmup_steps},
            },
            "stop": {"patience": None},
            "report": config.pages,
            "seed": config.seed,
        }
    )


def _stage(config: AdaptConfig, name: str, adapted: Path | None = None) -> Stage:
    zero_shot, linear = (config.runs / f"{name}-{kind}" for kind in ("zero_shot", "linear"))
    return Stage(name, zero_shot, linear, adapted)


def _write(config: AdaptConfig, lines: list[Line], stages: list[Stage], text: str) -> Path:
    """Table, picture and page in the folder of the runs."""
    title = f"{config.backbone.name} on {config.cache.name}, test split"
    picture(lines, title).savefig(config.runs / "comparison.png")
    (config.runs / "table.md").write_text(text + "\n", encoding="utf-8")
    report = config.runs / "report.html"
    subtitle = f"{config.backbone}, frozen and adapted, seed {config.seed}"
    write_page(report, lines, stages, title, subtitle)
    return report


if __name__ == "__main__":
    run_job(AdaptConfig, run)
