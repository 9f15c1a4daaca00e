"""Flow `train-heads`: several heads on one cache, and a table that compares them.

`python -m flows.train_heads --cache cache/birds --heads '{"head": {"kind": "linear"}}'`, or
`prefect deployment run train-heads -p cache=cache/birds --watch`. Every head is the job `python -m
heads.train` in a task of its own; its run folder is the same.
"""

from flows.server import run_flow, start_early

if __name__ == "__main__":
    start_early()  # the server takes as long as the imports below

from typing import TYPE_CHECKING, Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field, create_model

from featcache.config import Config
from featcache.errors import UserError
from featcache.storage import CachePath
from flows.artifacts import Row, markdown_table, post_report
from flows.outcomes import refused, worth_a_retry
from heads import train
from heads.train import TrainConfig

if TYPE_CHECKING:
    HeadTraining = Config
else:
    HeadTraining = create_model(
        "HeadTraining",
        __base__=Config,
        __doc__="One head: the options of heads.train without `cache`, which all heads share.",
        **{
            name: (field.annotation, field)
            for name, field in TrainConfig.model_fields.items()
            if name != "cache"
        },
    )


class TrainHeadsConfig(Config):
    """Train several heads on one feature cache and compare them."""

    cache: CachePath
    """Feature cache that featcache.extract wrote."""
    heads: list[HeadTraining] = Field(default=[HeadTraining()], min_length=1)
    """Heads to train, in this order: the options of heads.train each."""


@task(
    name="train-head",
    task_run_name="{kind}",
    retries=1,
    retry_delay_seconds=30,
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,
    persist_result=False,
    log_prints=True,
)
def train_head(kind: str, config: TrainConfig) -> Any:
    """One row of the comparison; the head is in its run folder when this returns."""
    try:
        report = train.run(config)
    except UserError as error:
        return refused(error)
    values = report.metrics
    metric = values["metric"]
    return {
        "head": kind,
        "candidate": values["candidate"] or None,
        f"val {metric}": values["val"][metric],
        f"test {metric}": values["test"][metric] if "test" in values else None,
        "parameters": values["num_parameters"],
        "epochs": values["epochs"],
        "seconds": values["seconds"],
        "reused": report.reused,
        "run": str(report.run),
    }


@flow(name="train-heads", flow_run_name="{cache}", persist_result=False)
def train_heads(cache: CachePath, heads: list[HeadTraining]) -> State[Any]:
    """Trains heads on one feature cache and compares them.

    Args:
        cache: feature cache that extract-features wrote.
        heads: heads to train, in this order: the options of heads.train each, without `cache`.
    """
    logger = get_run_logger()
    rows: list[Row] = []
    failures = []
    for number, options in enumerate(heads, 1):
        config = TrainConfig(cache=cache, **dict(options))
        kind = config.head.kind
        state = train_head(kind, config, return_state=True)
        if state.is_completed():
            rows.append(state.result())
        else:
            failures.append(f"{kind}: {state.message}")
        logger.info("%d of %d heads done", number, len(heads))
    if rows:
        post_report(f"heads-{cache.name}", f"Heads on {cache}", rows, markdown_table(rows))
    if failures:
        return Failed(message=f"{len(failures)} of {len(heads)} heads failed; {failures[0]}")
    reused = [row["head"] for row in rows if row["reused"]]
    message = f"{len(rows)} of {len(heads)} heads trained on {cache}"
    if reused:
        message += f"; {', '.join(reused)} earlier, with the same options"
    return Completed(message=message, data=rows)


if __name__ == "__main__":
    run_flow(
        TrainHeadsConfig,
        lambda config: train_heads(config.cache, config.heads, return_state=True),
    )
