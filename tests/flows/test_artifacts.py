import logging
from typing import Any

import httpx
import pytest

from flows import artifacts


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(artifacts, "create_table_artifact", lambda **kw: calls.append(kw))
    monkeypatch.setattr(artifacts, "create_markdown_artifact", lambda **kw: calls.append(kw))
    return calls


def test_table_and_summary_share_rows_and_a_legal_key(posted: list[dict[str, Any]]) -> None:
    rows = [{"head": "linear", "val top1": 0.51234, "test top1": None}]
    artifacts.post_report("heads-My Cache_2", "Heads", rows, "3 invalid")
    table, summary = posted
    assert table["key"] == "heads-my-cache-2"
    assert table["table"] == rows
    assert summary["key"] == "heads-my-cache-2-summary"
    assert "3 invalid" in summary["markdown"]


def test_numbers_that_json_does_not_have_become_empty(posted: list[dict[str, Any]]) -> None:
    artifacts.post_report("x", "X", [{"a": float("nan"), "b": float("inf"), "c": 1}], "")
    assert posted[0]["table"] == [{"a": None, "b": None, "c": 1}]


def test_markdown_table_rounds_and_leaves_nothing_empty_out() -> None:
    rows = [{"head": "linear", "val": 0.51234, "test": None}, {"head": "mop", "val": 1, "test": 2}]
    assert artifacts.markdown_table(rows).splitlines() == [
        "| head | val | test |",
        "| --- | --- | --- |",
        "| linear | 0.5123 |  |",
        "| mop | 1 | 2 |",
    ]


def test_cells_cannot_break_the_markdown_table() -> None:
    table = artifacts.markdown_table([{"reason": "a|b\nc"}])
    assert table.splitlines()[2] == "| a\\|b c |"


def test_report_that_cannot_be_posted_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise httpx.ConnectError("connection refused")

    monkeypatch.setattr(artifacts, "create_table_artifact", refuse)
    monkeypatch.setattr(artifacts, "get_run_logger", lambda: logging.getLogger("run"))
    artifacts.post_report("x", "X", [{"a": 1}], "")
    assert "'x' was not posted: connection refused" in caplog.text


def test_mistake_in_a_report_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(artifacts, "create_table_artifact", refuse)
    with pytest.raises(TypeError, match="a bug"):
        artifacts.post_report("x", "X", [{"a": 1}], "")
