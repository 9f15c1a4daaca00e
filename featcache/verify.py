"""Job: read every byte of a cache and name each file that is damaged, missing or foreign.

python -m featcache.verify --cache cache/inat2021
"""

import sys
import time
from dataclasses import dataclass

from featcache.config import Config, run_job
from featcache.errors import CacheCorruptError
from featcache.layout.cache_plan import human_bytes
from featcache.storage import CachePath
from featcache.store import verify


class VerifyConfig(Config):
    """Checks all checksums of a cache; exit status 1 if a file is damaged, missing or foreign."""

    cache: CachePath
    """Folder of the cache, or s3://bucket/prefix."""


@dataclass(frozen=True)
class VerifyReport:
    """What was checked.

    Attributes:
        num_bytes: bytes of the chunk files read.
        arrays: bytes by array.
        seconds: time it took.
    """

    num_bytes: int
    arrays: dict[str, int]
    seconds: float


def run(config: VerifyConfig) -> VerifyReport:
    """Checks a cache, prints a line an array, and the rate.

    Raises:
        CacheError: if there is no cache.
        CacheCorruptError: one line for each bad file.
    """
    arrays: dict[str, int] = {}
    start = time.perf_counter()
    shown = [0.0]

    def progress(name: str, num_bytes: int) -> None:
        arrays[name] = arrays.get(name, 0) + num_bytes
        seconds = time.perf_counter() - start
        if sys.stderr.isatty() and seconds - shown[0] > 0.2:
            shown[0] = seconds
            total = sum(arrays.values())
            print(f"\r{_rate(total, seconds)}\033[K", end="", file=sys.stderr, flush=True)

    problems = verify(config.cache, progress)
    report = VerifyReport(sum(arrays.values()), arrays, time.perf_counter() - start)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    if problems:
        raise CacheCorruptError("\n".join(problems))
    for name, num_bytes in arrays.items():
        print(f"OK  {name}  {human_bytes(num_bytes)}")
    print(f"OK  {config.cache}  {_rate(report.num_bytes, report.seconds)}")
    return report


def _rate(num_bytes: int, seconds: float) -> str:
    return f"{human_bytes(num_bytes)} in {seconds:.1f} s, {human_bytes(num_bytes / seconds)}/s"


if __name__ == "__main__":
    run_job(VerifyConfig, run)
