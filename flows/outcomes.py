"""How runs end: a user's mistake in one line and without a retry, everything else as it is."""

from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Failed

REFUSED = "Refused"
"""Name of the Failed state of a run that stopped because something outside it has to change."""


def refused(error: Exception) -> State[Any]:
    """A Failed state with the error's message on one line, without a traceback in the log."""
    return Failed(name=REFUSED, message=one_line(error))


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def worth_a_retry(task: Any, run: Any, state: State[Any]) -> bool:
    """Whether a failed task may succeed by itself: not if it was refused."""
    return state.name != REFUSED
