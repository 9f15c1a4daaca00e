"""A flow from a plain shell: `python -m flows.extract` needs no server set up beforehand.

With no API configured, Prefect would start a temporary server by itself: first its import in this
process, then the same in the server's, 7 s before the first task on two cores; tracebacks of
cancelled tasks when it stops; and a server left over when this process is killed. Here it starts in
a child process beside this process's own imports, which adds about 1 s, keeps its words for a file,
and ends when the pipe to its parent closes, however that comes about. It works on the user's own
Prefect database, so that the runs stay visible.
"""

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings, temporary_settings

from featcache.config import Config, run_job
from featcache.errors import UserError

STARTUP_SECONDS = 120.0
"""The first start of all creates the database: 10 s on a quiet machine."""

T = TypeVar("T", bound=Config)


class FlowError(UserError, RuntimeError):
    """A flow run did not complete; the message is the run's own."""


class TemporaryServer:
    """A Prefect API on a free port of 127.0.0.1, in a child process."""

    def __init__(self) -> None:
        self._words = tempfile.NamedTemporaryFile(prefix="prefect-server-", suffix=".log")  # noqa: SIM115
        user_settings = get_current_settings().to_environment_variables(exclude_unset=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "flows.server"],
            env={"PREFECT_SERVER_ANALYTICS_ENABLED": "false", **os.environ, **user_settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            start_new_session=True,  # Ctrl-C is for the flow alone, which still needs its server
        )

    def url(self) -> str:
        """The API's address, once it answers.

        Raises:
            FlowError: if the server does not start; the message ends with the server's last words.
        """
        assert self._process.stdout is not None
        port = self._process.stdout.readline().decode().strip()
        url = f"http://127.0.0.1:{port}/api"
        deadline = time.monotonic() + STARTUP_SECONDS
        while port and time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    return url
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        lines = Path(self._words.name).read_text(errors="replace").strip().splitlines()
        raise FlowError(
            f"the temporary Prefect server did not start ({lines[-1] if lines else 'no reason'}); "
            "start one with `prefect server start` and set PREFECT_API_URL, or run the job itself"
        )


_early: list[TemporaryServer] = []
_kept: list[TemporaryServer] = []  # until this process ends: Prefect sends its last lines at exit


def start_early() -> None:
    """Starts the server, if one will be needed, so that the caller's imports run beside it."""
    settings = get_current_settings()
    if settings.api.url is None and settings.server.ephemeral.enabled and "--help" not in sys.argv:
        _early.append(TemporaryServer())


def run_flow(config_class: type[T], start: Callable[[T], State[Any]]) -> NoReturn:
    """Runs a flow from the command line and exits as its job would.

    Exit status: 0 completed, 1 failed or user error (one line), 2 illegal options, 130 interrupted.

    Args:
        config_class: the flow's parameters as options.
        start: calls the flow with them and returns its final state.
    """
    run_job(config_class, lambda config: complete(lambda: start(config)))


def complete(call: Callable[[], State[Any]]) -> State[Any]:
    """The final state of a flow that is called with an API that answers.

    Args:
        call: calls the flow with `return_state=True`.

    Raises:
        FlowError: if it did not complete; the message is the run's own.
    """
    with temporary_settings(_reach_api()):
        state = call()
        # It would warn, at every exit, that it is still sending the last event.
        logging.getLogger("prefect.EventsWorker").setLevel(logging.ERROR)
    if not state.is_completed():
        raise FlowError(state.message or f"the flow run ended as {state.name}")
    return state


def _reach_api() -> dict[str, str]:
    """Settings with which Prefect finds its API: none if it is configured, or a temporary server's.

    Raises:
        FlowError: if there is neither, or the configured one does not answer.
    """
    settings = get_current_settings()
    if settings.api.url is not None:
        require_answer(settings.api.url)
        return {}
    if not settings.server.ephemeral.enabled:
        raise FlowError(
            "no Prefect API is configured and temporary servers are switched off; set "
            "PREFECT_API_URL, or PREFECT_SERVER_ALLOW_EPHEMERAL_MODE=true, or run the job itself"
        )
    server = _early.pop() if _early else TemporaryServer()
    _kept.append(server)
    # It has no pages to look at, so that the log had better not name one.
    return {"api.url": server.url(), "ui_url": ""}


def require_answer(api_url: str) -> None:
    """Checks that the configured Prefect API answers.

    Raises:
        FlowError: naming the address.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        error = client.api_healthcheck()
    if error is not None:
        raise FlowError(
            f"no Prefect server answers at {api_url} ({error}); start it with `prefect server "
            "start`, or take the address back with `prefect config unset PREFECT_API_URL`"
        )


def _serve() -> None:
    """The child: serves until standard input closes, which it does when the parent is gone."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))  # refuses connections until the server itself listens
    print(listener.getsockname()[1], flush=True)

    import uvicorn
    from prefect.server.api.server import create_app

    config = uvicorn.Config(create_app(ephemeral=True, final=True), log_level="error")
    server = uvicorn.Server(config)

    def leave_with_parent() -> None:
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=leave_with_parent, daemon=True).start()
    server.run(sockets=[listener])


if __name__ == "__main__":
    _serve()
