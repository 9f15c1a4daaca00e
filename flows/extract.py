"""Flow `extract-features`: a dataset's images through a frozen encoder into a cache.

`python -m flows.extract --dataset.root data/birds --cache cache/birds`, or
`prefect deployment run extract-features --watch`.

The same job as `python -m featcache.extract`, with a task per shard: progress, retries and a report
on the run's page. Running it again continues what a killed or failed run left.
"""

from flows.server import run_flow, start_early

if __name__ == "__main__":
    start_early()  # the server takes as long as the imports below

import sys
from collections import Counter
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.utilities.annotations import quote

from featcache.errors import UserError
from featcache.extract import ExtractConfig, Extraction, ExtractReport, plan
from featcache.store import Shard
from flows.artifacts import Row, markdown_table, post_report
from flows.outcomes import one_line, refused, worth_a_retry


@task(
    name="extract-shard",
    task_run_name="{key}",
    retries=2,
    retry_delay_seconds=[10, 60],
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,  # the cache itself knows which shards are done
    persist_result=False,
    log_prints=not sys.stdout.isatty(),  # a terminal's progress line is rewritten in place
)
def extract_shard(key: str, session: Extraction, shard: Shard) -> Any:
    """Counts and rates of one shard, which is on disk and marked done when this returns."""
    try:
        report = session.extract(shard)
    except UserError as error:
        return refused(error)
    return {
        "shard": key,
        "rows": report.rows,
        "invalid": len(report.invalid),
        "seconds": report.seconds,
        **{f"{part}/s": rate for part, rate in report.per_second.items()},
    }


@flow(
    name="extract-features", flow_run_name="{config.cache}", persist_result=False, log_prints=True
)
def extract_features(config: ExtractConfig) -> State[Any]:
    """Extracts what is missing of a feature cache, and declares it complete.

    Args:
        config: options of featcache.extract; `dataset` and `backbone` name their `kind`.
    """
    try:
        with plan(config) as session:
            session.check_invalid()
            rows, failure = _extract_pending(session)
            if failure is not None:
                return Failed(message=f"{failure}; running it again continues")
            report, invalid = session.finish(), session.invalid()
    except UserError as error:
        return Failed(message=one_line(error))
    message = f"{report.cache}: {report.num_rows} rows, {report.num_invalid} of them unreadable"
    if rows:
        post_report(config.cache.name, f"Cache {report.cache}", rows, _summary(report, invalid))
        rate = report.images_per_second["total"]
        message += f"; {report.num_extracted} extracted at {rate} images/s"
        if report.num_copied:
            message += f", {report.num_copied} taken over from its earlier state"
    else:
        message += "; it was complete, nothing was extracted"
    return Completed(message=message, data=report.record())


def _extract_pending(session: Extraction) -> tuple[list[Row], str | None]:
    """A row for each shard extracted, and what the one that failed says.

    One shard after the other: inside a shard reading, encoding and writing overlap already, and two
    at a time would share the encoder, and both be lost when the run is killed.
    """
    logger = get_run_logger()
    shards, total = session.pending(), len(session.store.shards())
    logger.info("%s: %d of %d shards to extract", session.path, len(shards), total)
    whole: Any = quote(session)  # Prefect would look into it for other tasks' results
    rows: list[Row] = []
    for shard in shards:
        state = extract_shard(shard.key, whole, shard, return_state=True)
        if not state.is_completed():
            return rows, state.message
        rows.append(state.result())
        logger.info("%(shard)s: %(rows)d rows, %(invalid)d unreadable, %(total/s)s/s", rows[-1])
    return rows, None


def _summary(report: ExtractReport, invalid: list[dict[str, Any]]) -> str:
    """A run's counts, rates and unreadable images as markdown."""
    counts = {
        "images": report.num_rows,
        "captions": report.num_captions,
        "unreadable": report.num_invalid,
        "extracted by this run": report.num_extracted,
        "taken over": report.num_copied,
        "seconds": report.seconds,
        **{f"{part}, images/s": rate for part, rate in report.images_per_second.items()},
        "precision": report.precision,
        "fingerprint": report.fingerprint,
    }
    text = markdown_table([{"": name, "value": value} for name, value in counts.items()])
    if invalid:
        reasons = Counter(item["reason"] for item in invalid).most_common()
        text += "\n\n### Unreadable images\n\n" + markdown_table(
            [{"reason": reason, "images": count} for reason, count in reasons]
        )
        shown = [{"path": item["path"], "reason": item["reason"]} for item in invalid[:100]]
        text += "\n\nThe first ones:\n\n" + markdown_table(shown)
    return text


if __name__ == "__main__":
    run_flow(ExtractConfig, lambda config: extract_features(config, return_state=True))
