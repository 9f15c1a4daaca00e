"""Flow `two-stage`: extraction, then heads on the new cache, then one table.

`python -m flows.two_stage --config FILE`, or `prefect deployment run two-stage --watch`.
"""

from flows.server import run_flow, start_early

if __name__ == "__main__":
    start_early()  # the server takes as long as the imports below

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import Field

from featcache.config import Config
from featcache.extract import ExtractConfig
from flows.artifacts import markdown_table, post_report
from flows.extract import extract_features
from flows.train_heads import HeadTraining, train_heads


class TwoStageConfig(Config):
    """Extract a feature cache, then train several heads on it and compare them."""

    extract: ExtractConfig
    """Options of featcache.extract."""
    heads: list[HeadTraining] = Field(default=[HeadTraining()], min_length=1)
    """Heads to train, in this order: the options of heads.train each, without `cache`."""


@flow(name="two-stage", flow_run_name="{extract.cache}", persist_result=False)
def two_stage(extract: ExtractConfig, heads: list[HeadTraining]) -> State[Any]:
    """Extracts a feature cache, or completes it, then trains heads on it and compares them.

    Args:
        extract: options of featcache.extract.
        heads: heads to train, in this order: the options of heads.train each, without `cache`.
    """
    extraction = extract_features(extract, return_state=True)
    if not extraction.is_completed():
        return Failed(message=f"extraction: {extraction.message}")
    training = train_heads(extract.cache, heads, return_state=True)
    if not training.is_completed():
        return Failed(message=f"training: {training.message}")
    rows: Any = training.result()
    title = f"Two stages on {extract.cache}"
    summary = f"{extraction.message}\n\n{markdown_table(rows)}"
    post_report(f"two-stage-{extract.cache.name}", title, rows, summary)
    return Completed(message=f"{extraction.message}; {training.message}", data=rows)


if __name__ == "__main__":
    run_flow(
        TwoStageConfig,
        lambda config: two_stage(config.extract, config.heads, return_state=True),
    )
