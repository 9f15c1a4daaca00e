"""The demonstration of adapting, whole, on a garden of four species."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.logging.handlers import APILogHandler
from prefect.settings import temporary_settings
from pydantic import ValidationError

from flows.adapt import AdaptConfig, run


@pytest.mark.flows
@pytest.mark.timeout(600)  # it starts the server as well, maybe on a busy machine
class TestWholeWay:
    @pytest.fixture(autouse=True)
    def _on_our_server(self, prefect: Any) -> Iterator[None]:
        with temporary_settings({"api.url": prefect.environment["PREFECT_API_URL"]}):
            yield
            APILogHandler().flush()  # while the server is there

    def test_table_says_what_the_run_folders_say_and_nothing_is_done_twice(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        garden = {"kind": "garden", "root": tmp_path / "data", "num_species": 4, "num_images": 240}
        config = AdaptConfig.model_validate(
            {
                "pretraining": garden,
                "dataset": {**garden, "domain": "night", "num_images": 80, "test_fraction": 0.4},
                "backbone": tmp_path / "clip",
                "pretraining_epochs": 1,
                "methods": [
                    {"adapter": {"kind": "vpt", "num_tokens": 2}, "epochs": 1, "warmup_steps": 0},
                ],
                "pages": False,
                "cache": tmp_path / "cache" / "night",
                "runs": tmp_path / "runs",
            }
        )
        report = run(config)
        assert [line.name for line in report.lines] == ["frozen", "vpt"]
        frozen = report.lines[0]
        assert frozen.gain is None
        assert frozen.end_to_end is None
        for line in report.lines:
            values = json.loads((config.runs / f"{line.name}-linear/metrics.json").read_text())
            assert line.linear == values["test"]["top1"]
            values = json.loads((config.runs / f"{line.name}-zero_shot/metrics.json").read_text())
            assert line.zero_shot == values["test"]["top1"]
        for line in report.lines[1:]:
            values = json.loads((config.runs / line.name / "metrics.json").read_text())
            assert line.end_to_end == values["test_acc_cls"]
            assert line.gain is not None
            assert line.gain.difference == pytest.approx(line.linear - frozen.linear)
            assert line.gain.low <= line.gain.difference <= line.gain.high
            assert (tmp_path / "cache" / f"night-{line.name}").is_dir()
        assert (config.runs / "comparison.png").read_bytes()[:4] == b"\x89PNG"
        assert "gain over frozen" in report.page.read_text()
        assert (config.runs / "table.md").read_text() == report.table + "\n"

        written = {
            file: file.stat().st_mtime_ns
            for pattern in ("clip/*", "runs/*/*.safetensors", "cache/*/shards/*")
            for file in tmp_path.glob(pattern)
        }
        assert len(written) > 4
        capsys.readouterr()
        assert run(config).table == report.table
        assert {file: file.stat().st_mtime_ns for file in written} == written
        assert "trained earlier with the same options" in capsys.readouterr().out


def test_methods_of_one_kind_would_share_a_folder() -> None:
    with pytest.raises(ValidationError, match="expected each kind once"):
        AdaptConfig.model_validate({"methods": [{"adapter": "lora"}, {"adapter": "lora"}]})
