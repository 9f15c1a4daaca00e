import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2]


class PrefectShell:
    """Commands given in the project's folder, against a server and a database of their own."""

    def __init__(self, folder: Path, api_url: str | None = None) -> None:
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
        self.environment = {
            **kept,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "400",  # Prefect's tables cut long values otherwise
        }
        if api_url is not None:
            self.environment["PREFECT_API_URL"] = api_url

    def start(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        """A background process; its output goes to the file `log`."""
        with (self.folder / log).open("wb") as file:
            return subprocess.Popen(
                self._command(arguments),
                cwd=PROJECT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, *arguments: str, status: int = 0) -> str:
        """The output of a command that has to end with `status`."""
        result = subprocess.run(
            self._command(arguments),
            cwd=PROJECT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        assert result.returncode == status, f"{arguments} ended with {result}\n{result.stdout}"
        return result.stdout

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        """`prefect ...` is the real console script, `flows.extract ...` a module of ours."""
        program, *rest = arguments
        if program == "prefect":
            return [str(Path(sys.executable).with_name("prefect")), *rest]
        return [sys.executable, "-m", program, *rest]


def stop(*processes: subprocess.Popen[Any], seconds: float = 5) -> None:
    """Ends processes started here, and everything they started, whatever they do about it.

    All are told at once: a worker waits for its server's answers, and the server for its worker.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + seconds
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))


@pytest.fixture(scope="session")
def shell(tmp_path_factory: pytest.TempPathFactory) -> PrefectShell:
    """Commands without a configured server, on a database of their own."""
    return PrefectShell(tmp_path_factory.mktemp("shell"))


@pytest.fixture(scope="session")
def prefect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectShell]:
    """A Prefect server on loopback, a process worker for the pool `local`, our deployments."""
    folder = tmp_path_factory.mktemp("prefect")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    shell = PrefectShell(folder, url)
    started = []
    try:
        arguments = ("server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui")
        started.append(shell.start("prefect", *arguments, log="server.log"))
        _wait_for(f"{url}/health", started[0], folder / "server.log")
        shell.run("prefect", "work-pool", "create", "local", "--type", "process")
        started.append(
            shell.start("prefect", "worker", "start", "--pool", "local", log="worker.log")
        )
        shell.run("prefect", "--no-prompt", "deploy", "--all")
        yield shell
    finally:
        stop(*started)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"no Prefect server at {url}:\n{log.read_text()[-2000:]}")
