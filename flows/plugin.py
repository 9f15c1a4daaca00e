"""Lets `prefect deployment run extract-features` find our deployments without a slash.

Prefect names a deployment FLOW/DEPLOYMENT and refuses anything else. Both halves are equal here, so
the short name is enough. Prefect runs this hook while it is being imported, before its command line
reads `sys.argv`. Only exactly `prefect deployment run|inspect NAME ...` with one of our names is
changed. Every `prefect` command pays for this hook: it imports nothing heavy and never raises.

Prefect loads plugins only if it is told to: `[tool.prefect.plugins]` of this project's
`pyproject.toml` does so for commands given in its folder, `prefect config set
PREFECT_PLUGINS_ENABLED=true` for the whole machine.
"""

import sys
from pathlib import PurePath
from typing import Any

from prefect.plugins import register_hook

DEPLOYMENTS = frozenset({"extract-features", "finetune-backbone", "train-heads", "two-stage"})
"""Deployments of `prefect.yaml`; each one's flow has the same name."""


@register_hook  # type: ignore[untyped-decorator, unused-ignore]
def setup_environment(*, ctx: Any) -> None:
    """Rewrites the short name of one of our deployments in this process's arguments."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # `python -m prefect`: the package is imported before argv[0] is known
        is_prefect = sys.orig_argv[-len(sys.argv) - 1 :][:2] == ["-m", "prefect"]
    else:
        is_prefect = PurePath(program).stem == "prefect"
    if is_prefect:
        sys.argv[1:] = full_names(sys.argv[1:])


def full_names(arguments: list[str]) -> list[str]:
    """`arguments` of a prefect command with our short deployment name written as NAME/NAME."""
    if len(arguments) < 3:
        return arguments
    group, command, name = arguments[:3]
    if group not in ("deployment", "deployments") or command not in ("run", "inspect"):
        return arguments
    if name not in DEPLOYMENTS:
        return arguments
    return [group, command, f"{name}/{name}", *arguments[3:]]
