"""Runs through a real server: the commands of docs/prefect.md, as a user types them."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import validate

from featcache.reader import open_cache
from flows.extract import extract_features

pytestmark = pytest.mark.flows


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder dataset: 48 PNGs of two classes that differ in brightness; one is not an image."""
    root = tmp_path_factory.mktemp("data") / "images"
    generator = np.random.default_rng(0)
    for number in range(48):
        split = "train" if number < 32 else "val"
        file = root / split / ("dark", "light")[number % 2] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 128, (32, 32, 3)) + 127 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    (root / "train" / "dark" / "04.png").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def options(images: Path, tiny_clip: Path) -> Callable[[Path], dict[str, Any]]:
    """`options(cache)`: an extraction's configuration as JSON values."""

    def make(cache: Path) -> dict[str, Any]:
        return {
            "dataset": {"kind": "folder", "root": str(images)},
            "backbone": {"kind": "open_clip", "model": f"local-dir:{tiny_clip}"},
            "cache": str(cache),
            "max_invalid": 0.1,
            "batch_size": 4,
            "shard_rows": 4,
            "precision": "fp32",
            "device": "cpu",
        }

    return make


def flags(options: dict[str, Any], prefix: str = "--") -> list[str]:
    """The same configuration as command-line flags."""
    result = []
    for name, value in options.items():
        if isinstance(value, dict):
            result += flags(value, f"{prefix}{name}.")
        else:
            result += [prefix + name, str(value)]
    return result


def files(folder: Path) -> list[Path]:
    """Finished files of a folder that need not exist yet."""
    return sorted(file for file in folder.glob("*") if file.name.isdigit())


def servers(shell: Any) -> list[str]:
    """Processes that still work on the shell's database."""
    mark = f"PREFECT_HOME={shell.environment['PREFECT_HOME']}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # gone, or somebody else's
    return found


def api(shell: Any, path: str, body: dict[str, Any]) -> Any:
    """The answer of the server's REST API."""
    request = urllib.request.Request(
        shell.environment["PREFECT_API_URL"] + path,
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_short_name_runs_the_deployment(
    prefect: Any, options: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    config = options(tmp_path / "birds")
    out = prefect.run(
        *["prefect", "deployment", "run", "extract-features", "--watch", "--watch-interval", "1"],
        *("--params", json.dumps({"config": config})),
    )
    assert "Completed" in out
    cache = open_cache(tmp_path / "birds")
    assert len(cache.rows("train")) == 31  # one of 32 is not an image
    assert np.isfinite(cache.array("image/projected").read(cache.rows("train"))).all()
    wanted = {"artifacts": {"key": {"any_": ["birds", "birds-summary"]}}}
    table, summary = sorted(api(prefect, "/artifacts/filter", wanted), key=lambda a: a["key"])
    assert len(json.loads(table["data"])) == 12, "one row a shard"
    assert "04.png" in summary["data"]
    wanted = {"flow_runs": {"name": {"any_": [str(tmp_path / "birds")]}}}
    (run,) = api(prefect, "/flow_runs/filter", wanted)
    assert run["state"]["name"] == "Completed"
    assert "48 rows, 1 of them unreadable; 48 extracted" in run["state"]["message"]
    logs = prefect.run("prefect", "flow-run", "logs", run["id"])
    assert "12 of 12 shards to extract" in logs
    assert "image/00000: 4 rows, 1 unreadable" in logs


def test_full_name_and_inspect(
    prefect: Any, options: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    prefect.run(
        *["prefect", "deployment", "run", "extract-features/extract-features", "--start-in"],
        "in 2 hours",
        *("-p", f"config={json.dumps(options(tmp_path / 'later'))}"),
    )
    wanted = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    (run,) = api(prefect, "/flow_runs/filter", wanted)
    assert run["parameters"]["config"]["cache"] == str(tmp_path / "later")
    inspected = prefect.run(*["prefect", "deployment", "inspect", "extract-features"])
    assert "flows.extract:extract_features" in inspected


def test_server_refuses_illegal_parameters_before_there_is_a_run(
    prefect: Any, options: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    params = json.dumps({"config": options(tmp_path / "never") | {"batch_size": 0}})
    command = ["prefect", "deployment", "run", "extract-features", "--params"]
    out = prefect.run(*command, params, status=1)
    assert "Validation failed for field 'config.batch_size'" in out


@pytest.mark.parametrize(
    "change",
    [
        {"batch_sise": 8},
        {"dataset": {"kind": "foldr", "root": "x"}},
        {"dataset": {"kind": "table"}},
    ],
    ids=["misspelt", "unknown kind", "missing"],
)
def test_schema_of_the_parameters_is_strict(
    options: Callable[[Path], dict[str, Any]], change: dict[str, Any], tmp_path: Path
) -> None:
    schema = parameter_schema(extract_features).model_dump_for_openapi()
    assert validate({"config": options(tmp_path)}, schema) == []
    assert validate({"config": options(tmp_path) | change}, schema)


def test_two_stages_end_in_one_table(
    prefect: Any, options: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    heads = [
        {"head": {"kind": "linear"}, "optim": {"epochs": 2}, "run": str(tmp_path / "a")},
        {"head": {"kind": "linear", "bias": False}, "run": str(tmp_path / "b")},
    ]
    out = prefect.run(
        *["prefect", "deployment", "run", "two-stage", "--watch", "--watch-interval", "1"],
        *("-p", f"extract={json.dumps(options(tmp_path / 'newts'))}"),
        *("-p", f"heads={json.dumps(heads)}"),
    )
    assert "Completed" in out
    wanted = {"artifacts": {"key": {"any_": ["two-stage-newts"]}}}
    (table,) = api(prefect, "/artifacts/filter", wanted)
    rows = json.loads(table["data"])
    assert [Path(row["run"]) for row in rows] == [tmp_path / "a", tmp_path / "b"]
    assert all(row["val top1"] > 0.9 for row in rows), "brightness separates the classes"
    assert (tmp_path / "a" / "head.safetensors").is_file()


def test_flow_needs_no_server_and_continues_what_was_killed(
    shell: Any, options: Callable[[Path], dict[str, Any]], tmp_path: Path
) -> None:
    command = ("flows.extract", *flags(options(tmp_path / "newts")))
    run = shell.start(*command, log="killed.log")
    done = tmp_path / "newts" / "shards" / "image" / "c"
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline and len(files(done)) < 2:
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    before = {file: file.stat().st_mtime_ns for file in files(done)}
    assert 2 <= len(before) < 12, (shell.folder / "killed.log").read_text()
    while servers(shell) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not servers(shell), "a server outlived its flow"

    out = shell.run(*command)
    assert f"{12 - len(before)} of 12 shards" in out
    assert "Traceback" not in out
    assert {file: file.stat().st_mtime_ns for file in before} == before, "done shards stay"
    cache = open_cache(tmp_path / "newts")
    assert cache.num_rows == 48
