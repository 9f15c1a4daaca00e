"""All jobs under one command: `featcache extract ...` does what `python -m featcache.extract` does.

A job is imported when it is called: the list of jobs costs no start-up time.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from featcache.config import run_job, until_unread


class Job(NamedTuple):
    """A job's place.

    Attributes:
        module: where it is.
        config: name of its configuration there; its function is `run`.
        help: what it does, in a line.
    """

    module: str
    config: str
    help: str


JOBS: Mapping[str, Job] = {
    "extract": Job("featcache.extract", "ExtractConfig", "write, resume or update a feature cache"),
    "finish": Job("featcache.finish", "FinishConfig", "write a cache's features from its tokens"),
    "info": Job("featcache.info", "InfoConfig", "show what a cache holds"),
    "verify": Job("featcache.verify", "VerifyConfig", "check every byte of a cache"),
    "diff": Job("featcache.diff", "DiffConfig", "compare a cache with its dataset as it is now"),
    "export": Job("featcache.export", "ExportConfig", "write features as .npy or parquet files"),
    "report": Job("featcache.report", "ReportConfig", "draw a cache on one HTML page"),
    "merge": Job("featcache.merge", "MergeConfig", "write an adapted backbone as a plain model"),
    "join": Job("featcache.join", "JoinConfig", "show what caches of one dataset hold together"),
    "mirror": Job("featcache.mirror", "MirrorConfig", "tidy local copies of caches in stores"),
    "caption": Job("featcache.caption", "CaptionConfig", "write a caption for every image"),
    "convert": Job("featcache.convert", "ConvertConfig", "lay a dataset out in folders"),
    "frequency": Job(
        "featcache.class_frequency", "ClassFrequencyConfig", "count classes and pairs of classes"
    ),
    "submit": Job("featcache.submission", "SubmissionConfig", "write a competition's answer file"),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a job; exit status as of `run_job`, 2 for an unknown job."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        with until_unread():
            print(_help())
        sys.exit(0 if given else 2)
    if given[0] not in JOBS:
        print(f"error: unknown job {given[0]!r}; known: {', '.join(JOBS)}", file=sys.stderr)
        sys.exit(2)
    job = JOBS[given[0]]
    module = importlib.import_module(job.module)
    config: Any = getattr(module, job.config)
    run: Callable[[Any], object] = module.run
    sys.argv = [f"featcache {given[0]}", *given[1:]]
    run_job(config, run)


def _help() -> str:
    width = max(map(len, JOBS))
    lines = [f"  {name:<{width}}  {job.help}" for name, job in JOBS.items()]
    return "\n".join(
        [
            "usage: featcache JOB [--config FILE] [--option VALUE ...]",
            "",
            *lines,
            "",
            "featcache JOB --help lists a job's options.",
        ]
    )


if __name__ == "__main__":
    main()
