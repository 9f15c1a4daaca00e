"""All deployments of `prefect.yaml` from one process, without a work pool: for a workstation.

`python -m flows.serve` runs until Ctrl-C and needs a server (`prefect server start`).
"""

import importlib
from pathlib import Path
from typing import Any

import yaml
from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import Flow
from prefect.schedules import Schedule
from prefect.settings import get_current_settings
from prefect.types.entrypoint import EntrypointType
from pydantic import PositiveInt

from featcache.config import Config, run_job
from featcache.errors import ConfigError
from flows.server import require_answer


class ServeConfig(Config):
    """Serves the deployments of a `prefect.yaml` to the configured Prefect server."""

    file: Path = Path("prefect.yaml")
    """File that declares the deployments."""
    limit: PositiveInt = 1
    """Most flow runs at a time; further ones wait. Two extractions share the same device."""


def run(config: ServeConfig) -> None:
    """Registers the deployments and runs their flows in subprocesses, until interrupted.

    Raises:
        ConfigError: if no server is configured, or there is no such file.
        FlowError: if the server does not answer.
    """
    api_url = get_current_settings().api.url
    if api_url is None:
        raise ConfigError(
            "no Prefect server to serve for: start one with `prefect server start` and set its "
            "address with `prefect config set PREFECT_API_URL=http://127.0.0.1:4200/api`"
        )
    require_answer(api_url)
    if not config.file.is_file():
        raise ConfigError(f"file: {config.file} does not exist; run this in the project's folder")
    declared = yaml.safe_load(config.file.read_text(encoding="utf-8"))["deployments"]
    # Left running on purpose: a schedule that pauses with the process stays paused when it is back.
    serve(*map(deployment, declared), pause_on_shutdown=False, limit=config.limit)


def deployment(declared: dict[str, Any]) -> RunnerDeployment:
    """What `prefect deploy` would make of one entry of `prefect.yaml`, for a served flow."""
    module, name = declared["entrypoint"].split(":")
    flow: Flow[..., Any] = getattr(importlib.import_module(module), name)
    schedules: Any = [Schedule(**schedule) for schedule in declared.get("schedules") or []]
    limit = declared.get("concurrency_limit")
    if isinstance(limit, dict):
        limit = ConcurrencyLimitConfig(**limit)
    made = flow.to_deployment(
        declared["name"],
        schedules=schedules,
        concurrency_limit=limit,
        parameters=declared.get("parameters"),
        description=declared.get("description"),
        tags=declared.get("tags"),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)
    return made


if __name__ == "__main__":
    run_job(ServeConfig, run)
