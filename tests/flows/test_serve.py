import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from featcache.errors import ConfigError
from flows import plugin, serve

FILE = Path(__file__).parents[2] / "prefect.yaml"
DECLARED: list[dict[str, Any]] = yaml.safe_load(FILE.read_text())["deployments"]


@pytest.mark.parametrize("declared", DECLARED, ids=lambda declared: declared["name"])
def test_deployment_has_its_flows_name_and_legal_parameters(declared: dict[str, Any]) -> None:
    module, name = declared["entrypoint"].split(":")
    flow = getattr(importlib.import_module(module), name)
    assert flow.name == declared["name"]
    assert declared["concurrency_limit"]["limit"] == 1
    assert declared["description"]
    flow.validate_parameters(declared["parameters"])


def test_plugin_knows_exactly_the_declared_names() -> None:
    assert {declared["name"] for declared in DECLARED} == plugin.DEPLOYMENTS


def test_there_is_one_cron_schedule_with_a_time_zone_and_it_is_off() -> None:
    schedules = [each for declared in DECLARED for each in declared.get("schedules", [])]
    assert len(schedules) == 1
    assert schedules[0]["cron"]
    assert schedules[0]["timezone"]
    assert schedules[0]["active"] is False


@pytest.mark.parametrize("declared", DECLARED, ids=lambda declared: declared["name"])
def test_served_deployment_says_what_the_declared_one_does(declared: dict[str, Any]) -> None:
    made = serve.deployment(declared)
    assert made.name == declared["name"]
    assert made.flow_name == declared["name"]
    assert made.entrypoint == declared["entrypoint"].replace(":", ".")
    assert made.parameters == declared["parameters"]
    assert made.tags == declared["tags"]
    assert made.concurrency_limit == 1
    assert len(made.schedules or []) == len(declared.get("schedules", []))
    for schedule, said in zip(made.schedules or [], declared.get("schedules", []), strict=True):
        assert (schedule.slug, schedule.active) == (said["slug"], said["active"])
        assert schedule.schedule.cron == said["cron"]
        assert schedule.schedule.timezone == said["timezone"]


def test_serving_needs_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = serve.get_current_settings().copy_with_update(restore_defaults={"api.url"})
    monkeypatch.setattr(serve, "get_current_settings", lambda: settings)
    with pytest.raises(ConfigError, match="prefect server start"):
        serve.run(serve.ServeConfig())
