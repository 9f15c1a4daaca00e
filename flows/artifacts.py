"""Tables and summaries on a flow run's page.

Posting one needs the API. The work it reports is already on disk then, so a report that cannot be
posted is a warning in the log, never the failure of a run.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger

Row = Mapping[str, Any]


def post_report(name: str, title: str, rows: Sequence[Row], summary: str) -> None:
    """Puts a table and a markdown summary on the page of the running flow.

    Args:
        name: what the report is about, e.g. a cache's folder name; successive reports of one name
            are versions of one artifact.
        title: heading of the summary.
        rows: table rows, all with the same columns; numbers, strings or None.
        summary: markdown under the heading.
    """
    key = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "report"
    text = f"## {title}\n\n{summary}"
    try:
        create_table_artifact(key=key, table=[_json_row(row) for row in rows], description=title)
        create_markdown_artifact(key=f"{key}-summary", markdown=text, description=title)
    except (httpx.HTTPError, PrefectException) as error:
        get_run_logger().warning("report %r was not posted: %s", key, error)


def markdown_table(rows: Sequence[Row]) -> str:
    """`rows` as a markdown table; empty without rows."""
    if not rows:
        return ""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[_cell(row[column]) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _json_row(row: Row) -> dict[str, Any]:
    """A row without NaN and infinities, which JSON does not have."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
