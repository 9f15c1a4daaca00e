import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows import plugin


@pytest.mark.parametrize("group", ["deployment", "deployments"])
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_short_name_becomes_full_and_options_stay(group: str, command: str) -> None:
    arguments = [group, command, "extract-features", "-p", "a=1", "--watch"]
    changed = plugin.full_names(arguments)
    assert changed == [group, command, "extract-features/extract-features", "-p", "a=1", "--watch"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["deployment", "run"],
        ["deployment", "run", "somebody-elses"],
        ["deployment", "run", "extract-features/extract-features"],
        ["deployment", "run", "--tag", "extract-features"],
        ["deployment", "delete", "extract-features"],
        ["flow-run", "run", "extract-features"],
    ],
)
def test_anything_else_is_left_alone(arguments: list[str]) -> None:
    assert plugin.full_names(list(arguments)) == arguments


@pytest.mark.parametrize("program", ["/usr/bin/prefect", r"prefect.exe", "prefect"])
def test_hook_changes_arguments_of_prefect(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, "deployment", "run", "two-stage"])
    plugin.setup_environment(ctx=None)
    assert sys.argv == [program, "deployment", "run", "two-stage/two-stage"]


def test_hook_understands_python_m_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-m", "deployment", "run", "two-stage"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "prefect", *sys.argv[1:]])
    plugin.setup_environment(ctx=None)
    assert sys.argv[3] == "two-stage/two-stage"


@pytest.mark.parametrize("argv", [[], ["-m"], ["pytest", "deployment", "run", "two-stage"]])
def test_hook_leaves_other_programs_alone(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", list(argv))
    plugin.setup_environment(ctx=None)
    assert sys.argv == argv


def test_plugin_pulls_nothing_heavy_into_every_prefect_command(tmp_path: Path) -> None:
    code = "import sys, prefect, flows.plugin; print(*{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PREFECT_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(result.stdout.split())
    assert "flows" in loaded
    assert loaded.isdisjoint({"torch", "numpy", "zarr", "open_clip", "featcache", "heads"})
