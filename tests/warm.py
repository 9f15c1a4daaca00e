"""Python processes that start at once: forks of one that has imported the large libraries.

Importing them takes longer than most of what the tests do in processes of their own. Only others'
modules are imported beforehand, so a process gets all of this project by itself; what `python -m`,
`python -c` and `python FILE` do, it does. Run as a script this is the one that forks.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = (
    "open_clip",
    "matplotlib.figure",
    "pandas",
    "pydantic_settings",
    "safetensors.torch",
    "sklearn.metrics",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torchvision.transforms.v2",
    "zarr",
)


class WarmProcess:
    """A process that runs `python ARGUMENTS`.

    Attributes:
        pid: its id; signals reach it as they reach any other process.
    """

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """Starts it.

        Args:
            arguments: of the interpreter: `-m MODULE …`, `-c CODE …` or `FILE …`.
            env: the environment; None = this process's.
        """
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("out", "err", "end")]
        for path in self._files[:2]:  # there even if it is killed before it says anything
            path.touch()
        request = {
            "arguments": arguments,
            "env": dict(os.environ if env is None else env),
            "folder": os.getcwd(),
            "files": [str(path) for path in self._files],
        }
        self._ended: tuple[str, str, int] | None = None
        self.pid: int = _ask(request)

    def wait(self, timeout: float = 200) -> tuple[str, str, int]:
        """Output, errors and exit status (-signal if one ended it).

        Raises:
            TimeoutError: if it takes longer than `timeout` seconds; it is killed.
        """
        out, err, end = self._files
        deadline = time.monotonic() + timeout
        while self._ended is None:
            if end.exists():
                self._ended = out.read_text(), err.read_text(), int(end.read_text())
                self._folder.cleanup()
            elif time.monotonic() > deadline:
                said = err.read_text()
                self.kill()
                raise TimeoutError(f"still running after {timeout} s: {said}")
            else:
                time.sleep(0.01)
        return self._ended

    def kill(self) -> None:
        """Ends it at once, unless it has ended."""
        if self._ended is None:
            if self.is_running():
                os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._ended is None and not self._files[-1].exists()


@cache
def _server() -> "subprocess.Popen[str]":
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # the end of its input is its end
    return server


def _ask(request: dict[str, Any]) -> int:
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def _serve() -> dict[str, Any] | None:
    """Forks for every request; gives it back in the new process, and None when there are no more.

    A process in between waits for the new one and puts down how it ended.
    """
    for line in iter(sys.stdin.readline, ""):
        request: dict[str, Any] = json.loads(line)
        told, tells = os.pipe()
        if os.fork() == 0:
            pid = os.fork()
            if pid == 0:
                os.close(told)
                os.close(tells)
                return request
            os.write(tells, f"{pid}".encode())
            os.close(tells)
            _, status = os.waitpid(pid, 0)
            end = Path(request["files"][-1])
            unfinished = end.with_name("unfinished")
            unfinished.write_text(str(os.waitstatus_to_exitcode(status)))
            unfinished.rename(end)
            os._exit(0)
        os.close(tells)
        print(os.read(told, 32).decode(), flush=True)
        os.close(told)
        _reap(os.WNOHANG)
    _reap(0)
    return None


def _reap(options: int) -> None:
    try:
        while os.waitpid(-1, options)[0]:
            pass
    except ChildProcessError:
        return


def _become(request: dict[str, Any]) -> None:
    """Does what the interpreter does with these arguments in this environment."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["folder"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    opened = [os.open(os.devnull, os.O_RDONLY)]
    opened += [os.open(path, flags) for path in request["files"][:2]]
    for number, descriptor in enumerate(opened):
        os.dup2(descriptor, number)
        os.close(descriptor)
    if "OMP_NUM_THREADS" in os.environ:  # read when torch was imported
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    first, *rest = request["arguments"]
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [os.path.abspath(path) for path in own if path and path not in sys.path]
    if first == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, os.getcwd())
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, os.path.dirname(os.path.abspath(first)))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # the folder of this file; nothing is to be found there
    for name in LIBRARIES:
        importlib.import_module(name)
    asked = _serve()
    if asked is not None:
        _become(asked)
