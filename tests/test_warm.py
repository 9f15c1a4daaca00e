import os
import signal
from pathlib import Path

from .warm import WarmProcess


def test_a_warm_process_is_what_the_interpreter_starts(tmp_path: Path) -> None:
    told = WarmProcess(
        *("-c", "import os, sys; print(sys.argv, os.environ['OWN']); sys.exit('why')", "given"),
        env={**os.environ, "OWN": "mine"},
    )
    assert told.wait() == ("['-c', 'given'] mine\n", "why\n", 1)
    script = tmp_path / "script.py"
    (tmp_path / "beside.py").write_text("NAME = 'beside'")
    script.write_text("import os, beside\nprint(__name__, beside.NAME, os.environ.get('OWN'))")
    assert WarmProcess(str(script)).wait() == ("__main__ beside None\n", "", 0)
    output, errors, status = WarmProcess("-m", "json.tool", str(tmp_path / "none.json")).wait()
    assert (output, status) == ("", 2)
    assert "No such file" in errors
    output, errors, status = WarmProcess("-c", "1 / 0").wait()
    assert (output, status) == ("", 1)
    assert "ZeroDivisionError" in errors


def test_a_warm_process_has_nothing_of_this_project_and_can_be_killed() -> None:
    code = "import sys; print([m for m in sys.modules if m.split('.')[0] in sys.argv[1:]])"
    own = ("featcache", "heads", "finetune", "flows", "tests")
    assert WarmProcess("-c", code, *own).wait() == ("[]\n", "", 0)
    sleeping = WarmProcess("-c", "import time; time.sleep(100)")
    assert sleeping.is_running()
    sleeping.kill()
    assert sleeping.wait()[2] == -signal.SIGKILL
