"""Flow `finetune-backbone`: adapt a backbone, then, if asked for, extract with it and train heads.

`python -m flows.finetune_backbone --train.dataset garden --train.adapter lora --train.out adapted/a
--extract.cache cache/a`, or `prefect deployment run finetune-backbone --watch`. The adapted folder
is the one that `python -m finetune.train` writes; an interrupted run goes on where it stopped.
"""

from flows.server import run_flow, start_early

if __name__ == "__main__":
    start_early()  # the server takes as long as the imports below

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field, create_model, model_validator

from featcache.backbones.adapted import AdaptedConfig
from featcache.config import Config
from featcache.errors import UserError
from featcache.extract import ExtractConfig
from finetune import train as training_job
from finetune.train import TrainConfig
from flows.artifacts import Row, markdown_table, post_report
from flows.outcomes import refused, worth_a_retry
from flows.train_heads import HeadTraining
from flows.two_stage import two_stage
from heads.run_folder import read_json

if TYPE_CHECKING:
    AdaptedExtraction = ExtractConfig
else:
    AdaptedExtraction = create_model(
        "AdaptedExtraction",
        __base__=Config,
        __doc__="Options of featcache.extract without `dataset` and `backbone`, known by then.",
        **{
            name: (field.annotation, field)
            for name, field in ExtractConfig.model_fields.items()
            if name not in ("dataset", "backbone")
        },
    )


_NO_CACHE_FOR_HEADS = (
    "heads: {} given, but extract names no cache to train them on; set extract.cache, or leave "
    "heads out"
)


class FinetuneBackboneConfig(Config):
    """Adapt a backbone, then extract a cache with it and train heads on that."""

    train: TrainConfig
    """Options of finetune.train."""
    extract: AdaptedExtraction | None = None
    """Options of featcache.extract, without `dataset` and `backbone`: the cache that the adapted
    backbone makes of the same dataset; unset = none, and no heads."""
    heads: list[HeadTraining] | None = Field(default=None, min_length=1)
    """Heads to train on that cache: the options of heads.train each, without `cache`; unset = one
    linear head."""

    @model_validator(mode="after")
    def _heads_need_a_cache(self) -> "FinetuneBackboneConfig":
        if self.heads is not None and self.extract is None:
            raise ValueError(_NO_CACHE_FOR_HEADS.format(len(self.heads)))
        return self


@task(
    name="finetune",
    task_run_name="{kind}",
    retries=1,
    retry_delay_seconds=30,
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,  # the job itself knows what is finished
    persist_result=False,
    log_prints=True,
)
def finetune(kind: str, config: TrainConfig) -> Any:
    """Folder and metrics of the adapted backbone, which is on disk when this returns."""
    try:
        report = training_job.run(config)
    except UserError as error:
        return refused(error)
    return {"folder": str(report.folder), "metrics": report.metrics, "reused": report.reused}


@flow(name="finetune-backbone", flow_run_name="{train.out}", persist_result=False)
def finetune_backbone(
    train: TrainConfig,
    extract: AdaptedExtraction | None = None,
    heads: list[HeadTraining] | None = None,
) -> State[Any]:
    """Adapts a backbone; its folder is the result.

    Args:
        train: options of finetune.train.
        extract: options of featcache.extract without `dataset` and `backbone`; None = stop after
            the training.
        heads: heads to train on the new cache; None = one linear head.
    """
    if heads is not None and extract is None:
        return Failed(message=_NO_CACHE_FOR_HEADS.format(len(heads)))
    kind = train.adapter.kind
    tuned = finetune(kind, train, return_state=True)
    if not tuned.is_completed():
        return Failed(message=f"fine-tuning: {tuned.message}")
    done: Any = tuned.result()
    rows = comparison(train, done["metrics"])
    name = f"adapted-{train.out.name}"
    title = f"Backbone {train.out}"
    post_report(name, title, rows, f"{markdown_table(rows)}\n\n{costs(done['metrics'])}")
    message = f"{train.out}: {outcome(done['metrics'])}"
    if done["reused"]:
        message += ", trained earlier with the same options"
    get_run_logger().info(message)
    if extract is None:
        return Completed(message=message, data={"folder": done["folder"], "rows": rows})
    dataset = TrainConfig.from_yaml(
        train.out / "config.yaml"
    ).dataset  # that of its cache, if unset
    assert dataset is not None, "finetune.train records the dataset"
    extraction = ExtractConfig(
        dataset=dataset, backbone=AdaptedConfig(model=str(train.out)), **dict(extract)
    )
    stages = two_stage(extraction, heads or [HeadTraining()], return_state=True)
    if not stages.is_completed():
        return Failed(message=f"{message}; {stages.message}")
    trained: Any = stages.result()
    rows += [head_row(f"{row['head']} on {extraction.cache}", row["run"]) for row in trained]
    post_report(name, title, rows, f"{markdown_table(rows)}\n\n{costs(done['metrics'])}")
    return Completed(
        message=f"{message}; {stages.message}", data={"folder": done["folder"], "rows": rows}
    )


def comparison(config: TrainConfig, values: Row) -> list[Row]:
    """The head on frozen features that the training was compared with, if any, and the adapted."""
    rows: list[Row] = []
    frozen = values.get("frozen")
    if frozen is not None:
        rows.append(
            {
                "what": f"linear head on {frozen['cache']}",
                "metric": values["metric"],
                "val": frozen["accuracy"].get("val"),
                "test": frozen["accuracy"].get("test"),
                "test by text": None,
                "trained": frozen["num_parameters"],
                "seconds": frozen["seconds"],
                "folder": frozen["run"],
            }
        )
    rows.append(
        {
            "what": f"{config.adapter.kind}, trained on images",
            "metric": values["metric"],
            "val": values.get("val_acc_cls", values.get("val_acc_txt")),
            "test": values.get("test_acc_cls", values.get("test_acc_txt")),
            "test by text": values.get("test_acc_txt"),
            "trained": values["num_parameters"],
            "seconds": values["seconds"],
            "folder": str(config.out),
        }
    )
    return rows


def head_row(what: str, run: str | Path) -> Row:
    """The row of a head's run folder."""
    values = read_json(Path(run) / "metrics.json")
    metric = values["metric"]
    return {
        "what": what,
        "metric": metric,
        "val": values.get("val", {}).get(metric),
        "test": values.get("test", {}).get(metric),
        "test by text": None,
        "trained": values["num_parameters"],
        "seconds": values["seconds"],
        "folder": str(run),
    }


def outcome(values: Row) -> str:
    """Epochs and accuracies in one line."""
    parts = [
        f"{role} {values['metric']} {100 * values[f'{role}_acc_{name}']:.1f} % {label}"
        for role in ("val", "test")
        for name, label in (("cls", "by the head"), ("txt", "by text"))
        if f"{role}_acc_{name}" in values
    ]
    return f"best epoch {values['best_epoch']} of {values['epochs']}; " + ", ".join(parts)


def costs(values: Row) -> str:
    """What training took, as markdown."""
    counts = {
        "epochs": values["epochs"],
        "seconds": values["seconds"],
        "images/s in training": values["images_per_second"],
        "share of the time waiting for images": values["waiting"],
        "parameters of the adapter": values["num_adapter_parameters"],
        "parameters of the head": values["num_head_parameters"],
        "device": values["device"],
    }
    return markdown_table([{"": name, "value": value} for name, value in counts.items()])


if __name__ == "__main__":
    run_flow(
        FinetuneBackboneConfig,
        lambda config: finetune_backbone(
            config.train, config.extract, config.heads, return_state=True
        ),
    )
