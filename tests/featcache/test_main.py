"""The one command for all jobs."""

import importlib
import os
import subprocess
import sys

import pytest

from featcache.__main__ import JOBS, main
from featcache.config import Config


@pytest.mark.parametrize("name", JOBS)
def test_every_job_is_where_the_list_says(name):
    module = importlib.import_module(JOBS[name].module)
    assert issubclass(getattr(module, JOBS[name].config), Config)
    assert callable(module.run)


def test_help_lists_the_jobs_and_imports_none_of_them():
    code = "import sys, featcache.__main__; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


def test_help_that_nobody_reads_to_its_end():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "featcache", "--help"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_the_help_of_extraction_imports_no_library_that_it_does_not_need():
    code = """
import sys, featcache.extract
print(*sorted(name for name in sys.modules if "." not in name))
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    heavy = "torchvision scipy sklearn open_clip timm transformers matplotlib dask obstore sympy"
    assert not set(heavy.split()) & set(result.stdout.split())


def test_help_and_unknown_jobs(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and job.help in out for name, job in JOBS.items())
    with pytest.raises(SystemExit) as ended:
        main(["exctract"])
    assert ended.value.code == 2
    assert "unknown job 'exctract'; known: extract, finish, info" in capsys.readouterr().err


def test_a_job_runs_with_its_options(written, capsys, monkeypatch):
    path = written().path
    monkeypatch.setattr(sys, "argv", ["featcache"])
    for arguments, status in ((["info", "--cache", str(path)], 0), (["info", "--cash", "x"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status
    captured = capsys.readouterr()
    assert "20 rows, 3 classes" in captured.out
    assert "did you mean --cache?" in captured.err
