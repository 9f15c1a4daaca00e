"""A cache in an object store beside one on disk: writing it, fetching it, reading it again.

    python benchmarks/stores.py                            # a server on loopback, about a minute
    python benchmarks/stores.py --cache s3://bucket/bench  # a real store; the cache is deleted

The loopback server is moto, in a process of its own. It answers at once, as no distant store does:
`latency_ms` is added to every request, which uploads and downloads side by side make up for.
Goals: writing several at a time >= 2x as fast as one at a time; a fetched cache is opened and read
in ten requests' time more than a local one (it asks the store for changes first).
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveInt

from cache import random_features, write_cache
from featcache import mirror
from featcache.config import Config, run_job
from featcache.errors import ConfigError
from featcache.reader import open_cache
from featcache.remote import object_store
from featcache.remote.object_store import ObjectFolder
from featcache.storage import CachePath, StoreUrl
from featcache.store import delete_cache

_SERVER = """
import logging, sys, time
from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
logging.getLogger("werkzeug").setLevel(logging.ERROR)
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class BenchmarkConfig(Config):
    """Measures a cache in an object store."""

    cache: CachePath | None = None
    """Address of a cache to write and delete; unset = a server on loopback."""
    latency_ms: NonNegativeFloat = 50
    """Milliseconds added to each request; 0 for a real store."""
    rows: PositiveInt = 200_000
    """Images."""
    dim: PositiveInt = 512
    """Width of a feature."""
    chunk_rows: PositiveInt = 4096
    """Rows of a chunk."""
    shard_chunks: PositiveInt = 16
    """Chunks of a shard."""
    repeats: PositiveInt = 5
    """Times that opening and reading are measured; the figure is the median."""
    out: Path = Path("benchmarks/results/stores.json")
    """JSON file for the figures."""


def run(config: BenchmarkConfig) -> dict[str, Any]:
    """Writes and reads temporary caches, prints the table and writes the JSON."""
    source = random_features(config.rows, config.dim)
    layout = (config.chunk_rows, config.chunk_rows * config.shard_chunks)
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, _store(config.cache) as url:
        os.environ["FEATCACHE_MIRROR"] = f"{folder}/mirror"
        _slow_down(config.latency_ms / 1000)
        local = Path(folder) / "cache"
        seconds["write, disk"] = write_cache(local, source, *layout)
        object_store.PARALLEL_REQUESTS = 1
        seconds["write, store, one at a time"] = write_cache(url, source, *layout)
        delete_cache(url)
        object_store.PARALLEL_REQUESTS = mirror.PARALLEL
        seconds["write, store"] = write_cache(url, source, *layout)
        seconds["open for the first time, store"] = _timed(lambda: _read(url))
        rounds: dict[str, list[float]] = {}
        for _ in range(config.repeats):
            rounds.setdefault("open and read, disk", []).append(_timed(lambda: _read(local)))
            rounds.setdefault("open and read, store", []).append(_timed(lambda: _read(url)))
        seconds |= {name: statistics.median(values) for name, values in rounds.items()}
        delete_cache(url)
    several = seconds["write, store, one at a time"] / seconds["write, store"]
    more = seconds["open and read, store"] - seconds["open and read, disk"]
    asked = 10 * config.latency_ms / 1000
    goals = [
        ("writing, times one at a time", several, ">= 2", several >= 2),
        ("reading again, seconds more", more, f"<= {asked}", more <= asked),
    ]
    result = {
        "config": config.record(),
        "num_bytes": source.nbytes,
        "seconds": seconds,
        "all_seconds": rounds,
        "goals": [
            {"what": what, "reached": reached, "goal": goal, "met": met}
            for what, reached, goal, met in goals
        ],
    }
    for name, value in seconds.items():
        print(f"{name:<34} {value:>9.3f} s {source.nbytes / value / 1e6:>9.0f} MB/s")
    for goal in result["goals"]:
        verdict = "met" if goal["met"] else "MISSED"
        print(f"{goal['what']:<34} {goal['reached']:>9.2f}  goal {goal['goal']} {verdict}")
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _read(path: Path | StoreUrl) -> None:
    open_cache(path).array("image/projected").read()


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _slow_down(latency_seconds: float) -> None:
    """Makes every request take longer, as if the store were far away."""
    for name in ("read_versioned", "entry", "list", "write", "write_if", "delete", "copy"):
        original = getattr(ObjectFolder, name)

        def slow(*args: Any, original: Any = original) -> Any:
            time.sleep(latency_seconds)
            return original(*args)

        setattr(ObjectFolder, name, slow)


@contextlib.contextmanager
def _store(cache: Path | StoreUrl | None) -> Iterator[StoreUrl]:
    """The address given, or a bucket of a server that ends with the block."""
    if isinstance(cache, Path):
        raise ConfigError(f"--cache {cache}: expected s3://bucket/prefix")
    if cache is not None:
        yield cache
        return
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        made = urllib.request.Request(f"{endpoint}/bench", method="PUT")
        urllib.request.urlopen(made).close()
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
        }
        yield StoreUrl.parse("s3://bench/cache")
        server.stdin.close()


if __name__ == "__main__":
    run_job(BenchmarkConfig, run)
