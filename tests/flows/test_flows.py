"""What flows do with sessions and heads that fail, against a server but without any model."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import httpx
import pytest
from prefect.logging.handlers import APILogHandler
from prefect.settings import temporary_settings

from featcache.datasets.folder import FolderConfig
from featcache.errors import CacheError, DatasetError
from featcache.extract import ExtractConfig, ExtractReport, Shard, ShardReport
from flows import artifacts, extract, train_heads
from flows.server import FlowError, complete, run_flow
from flows.two_stage import two_stage
from heads.train import TrainConfig, TrainReport

pytestmark = pytest.mark.flows


@pytest.fixture(autouse=True)
def _on_our_server(prefect: Any) -> Iterator[None]:
    with temporary_settings({"api.url": prefect.environment["PREFECT_API_URL"]}):
        yield
        APILogHandler().flush()  # while the server is there


class Session:
    """Stands in for an extraction of three shards; `troubles` are raised, each once, by key."""

    def __init__(self, troubles: dict[str, list[Exception]]) -> None:
        self.troubles = troubles
        self.calls: list[str] = []
        self.closed = False
        self.shards = [Shard("image", index, 4 * index, 4 * index + 4) for index in range(3)]
        self.path = Path("cache/x")
        self.store = SimpleNamespace(shards=lambda: self.shards)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def __deepcopy__(self, memo: object) -> Self:
        raise AssertionError("Prefect copied the session")

    def check_invalid(self) -> None:
        pass

    def invalid(self) -> list[dict[str, Any]]:
        return [{"row": 3, "id": "c", "path": "c.jpg", "reason": "truncated"}]

    def pending(self) -> list[Shard]:
        return list(self.shards)

    def extract(self, shard: Shard) -> ShardReport:
        assert not self.closed
        self.calls.append(shard.key)
        if self.troubles.get(shard.key):
            raise self.troubles[shard.key].pop(0)
        return ShardReport(rows=4, invalid=[], seconds=1.0, per_second={"total": 4.0})

    def finish(self) -> ExtractReport:
        return ExtractReport(
            cache="cache/x",
            fingerprint="f" * 32,
            num_rows=12,
            num_captions=0,
            num_invalid=1,
            num_extracted=12,
            precision="fp32",
            seconds=3.0,
            images_per_second={"total": 4.0},
        )


@pytest.fixture
def config(tmp_path: Path) -> ExtractConfig:
    return ExtractConfig(dataset=FolderConfig(root=tmp_path), cache=tmp_path / "x")


def run(monkeypatch: pytest.MonkeyPatch, config: ExtractConfig, session: Session) -> Any:
    monkeypatch.setattr(extract, "plan", lambda _: session)
    quick = extract.extract_shard.with_options(retry_delay_seconds=0)
    monkeypatch.setattr(extract, "extract_shard", quick)
    return extract.extract_features(config, return_state=True)


def test_passing_trouble_is_retried(monkeypatch: pytest.MonkeyPatch, config: ExtractConfig) -> None:
    session = Session({"image/00001": [OSError("stale file handle"), OSError("again")]})
    state = run(monkeypatch, config, session)
    assert state.is_completed()
    assert state.message == "cache/x: 12 rows, 1 of them unreadable; 12 extracted at 4.0 images/s"
    assert session.calls == ["image/00000", *3 * ["image/00001"], "image/00002"]
    assert session.closed


def test_users_trouble_is_not_retried_and_ends_the_run_in_one_line(
    monkeypatch: pytest.MonkeyPatch, config: ExtractConfig
) -> None:
    session = Session({"image/00001": [CacheError("disk full:\n  make room")]})
    state = run(monkeypatch, config, session)
    assert state.is_failed()
    assert state.message == "disk full: make room; running it again continues"
    assert session.calls == ["image/00000", "image/00001"]
    assert session.closed


def test_lasting_trouble_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, config: ExtractConfig
) -> None:
    session = Session({"image/00000": [OSError("gone")] * 3})
    state = run(monkeypatch, config, session)
    assert state.is_failed()
    assert "gone" in state.message
    assert session.calls == ["image/00000"] * 3


def test_dataset_that_cannot_be_opened_is_one_line(
    monkeypatch: pytest.MonkeyPatch, config: ExtractConfig
) -> None:
    def refuse(_: ExtractConfig) -> None:
        raise DatasetError("no images below data/x")

    monkeypatch.setattr(extract, "plan", refuse)
    state = extract.extract_features(config, return_state=True)
    assert state.is_failed()
    assert state.message == "no images below data/x"


def test_command_ends_as_its_flow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: ExtractConfig) -> None:
        raise DatasetError("no images below data/x")

    monkeypatch.setattr(extract, "plan", refuse)
    monkeypatch.setattr(sys, "argv", ["extract", "--dataset.root", "data/x", "--cache", "c"])
    with pytest.raises(SystemExit) as ended:
        run_flow(ExtractConfig, lambda config: extract.extract_features(config, return_state=True))
    assert ended.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: no images below data/x"


def test_server_that_does_not_answer_is_named() -> None:
    with (
        temporary_settings({"api.url": "http://127.0.0.1:9/api"}),
        pytest.raises(FlowError, match=r"no Prefect server answers at http://127\.0\.0\.1:9/api"),
    ):
        complete(lambda: pytest.fail("the flow was called"))


def test_extraction_completes_when_its_report_cannot_be_posted(
    monkeypatch: pytest.MonkeyPatch, config: ExtractConfig
) -> None:
    def refuse(**_: Any) -> None:
        raise httpx.ReadTimeout("no answer")

    monkeypatch.setattr(artifacts, "create_table_artifact", refuse)
    assert run(monkeypatch, config, Session({})).is_completed()


def test_heads_after_a_failed_one_are_still_trained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fake(config: TrainConfig) -> TrainReport:
        if config.seed == 0:
            raise CacheError("no array image/pooled")
        metrics = {"metric": "top1", "candidate": "", "val": {"top1": 0.5}, "seconds": 1.0}
        return TrainReport(tmp_path, {**metrics, "num_parameters": 10, "epochs": 2})

    monkeypatch.setattr(train_heads.train, "run", fake)
    two = [train_heads.HeadTraining(seed=seed) for seed in (0, 1)]
    state = train_heads.train_heads(tmp_path / "x", two, return_state=True)
    assert state.is_failed()
    assert state.message == "1 of 2 heads failed; linear: no array image/pooled"
    state = train_heads.train_heads(tmp_path / "x", two[1:], return_state=True)
    assert state.is_completed()
    (row,) = state.result()
    assert row["val top1"] == 0.5
    assert row["test top1"] is None


def test_two_stages_on_a_dataset_that_grew(
    image_folder: Path,
    tiny_clip: Path,
    make_jpeg: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    values = {
        "dataset": {"root": image_folder},
        "backbone": {"model": f"local-dir:{tiny_clip}"},
        "cache": tmp_path / "cache/pets",
        "device": "cpu",
        "precision": "fp32",
    }
    config = ExtractConfig.model_validate(values)
    heads = [train_heads.HeadTraining.model_validate({"optim": {"epochs": 1}})]
    messages = []
    for number in range(3):
        state = two_stage(config, heads, return_state=True)
        assert state.is_completed()
        messages.append(state.message)
        if number == 0:
            (image_folder / "train/dog/new.jpg").write_bytes(make_jpeg(40, 40, 77))
    assert "14 rows, 0 of them unreadable; 14 extracted at" in messages[0]
    assert "15 rows, 0 of them unreadable; 1 extracted at" in messages[1]
    assert "14 taken over from its earlier state" in messages[1]
    assert "it was complete, nothing was extracted" in messages[2]
    assert len(list((tmp_path / "runs").glob("*/metrics.json"))) == 2
