"""Command line, YAML and records of the typed configurations."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, PositiveFloat, PositiveInt

from featcache.config import Config, one_of, run_job, union_of
from featcache.errors import ConfigError, DatasetError
from featcache.storage import CachePath


class Part(Config):
    """Base of the two kinds."""

    kind: str


class Line(Part):
    """One line."""

    kind: Literal["line"] = "line"
    """Kind."""
    thick: bool | None = None
    """Be thick; unset = where it fits."""
    bias: bool = True
    """Add an offset."""
    rates: tuple[PositiveFloat, ...] = (0.1,)
    """Rates per step."""
    bound: bool = True
    """Bound the line."""


class Mix(Part):
    """A mixture."""

    kind: Literal["mix"] = "mix"
    """Kind."""
    experts: PositiveInt = 32
    """Number of experts."""
    bound: float = 1.0
    """Largest share of one expert."""


AnyPart: Any = union_of({"line": Line, "mix": Mix}, default="line")


class Job(Config):
    """Some job."""

    cache: str
    """Folder."""
    head: AnyPart = Field(default=Line(), discriminator="kind")
    """Which part."""
    epochs: PositiveInt = 5
    """Passes over the data."""
    quick: bool = False
    """Be quick."""
    loss: AnyPart | None = Field(default=None, discriminator="kind")
    """Another part, or none."""


def parse(*arguments: str) -> Job:
    return Job.from_command_line(arguments)


def test_flags_with_short_and_long_kind() -> None:
    assert parse("--cache", "x", "--head", "mix", "--head.experts", "4").head == Mix(experts=4)
    assert parse("--cache", "x", "--head=mix").head == Mix()
    assert parse("--cache", "x", "--head.kind", "mix").head == Mix()


def test_an_option_without_kind_belongs_to_the_default_kind() -> None:
    assert parse("--cache", "x", "--head.rates", "0.5,2").head == Line(rates=(0.5, 2.0))
    assert parse("--cache", "x", "--no-head.bias").head == Line(bias=False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), None),
        (("--head.thick",), True),
        (("--head.thick", "--quick"), True),
        (("--head.thick", "false"), False),
        (("--head.thick=true",), True),
        (("--no-head.thick", "--quick"), False),
    ],
)
def test_flags_of_a_bool_that_may_be_left_open(flags: tuple[str, ...], expected: Any) -> None:
    job = parse("--cache", "x", *flags)
    assert job.head == Line(thick=expected)
    assert job.quick == ("--quick" in flags)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--no-head.bound",), Line(bound=False)),
        (("--head.bound", "--quick"), Line()),
        (("--head.bound=false",), Line(bound=False)),
        (("--head", "mix", "--head.bound", "0.5"), Mix(bound=0.5)),
    ],
)
def test_a_bool_of_one_kind_that_is_a_number_in_another(
    flags: tuple[str, ...], expected: Any
) -> None:
    assert parse("--cache", "x", *flags).head == expected


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Any) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("cache: from_file\nepochs: 7\nhead: {kind: mix, experts: 3}\n")
    job = parse("--config", str(file), "--epochs", "9")
    assert job == Job(cache="from_file", epochs=9, head=Mix(experts=3))
    assert parse(f"--config={file}", "--head.experts", "8").head == Mix(experts=8)


def test_another_kind_on_the_command_line_drops_the_files_options(tmp_path: Any) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("cache: c\nhead: {kind: mix, experts: 3}\n")
    assert parse("--config", str(file), "--head", "line").head == Line()


def test_yaml_round_trip_and_short_kind_in_yaml(tmp_path: Any) -> None:
    job = Job(cache="c", head=Mix(experts=2), quick=True)
    file = tmp_path / "job.yaml"
    file.write_text(job.to_yaml())
    assert Job.from_yaml(file) == job
    file.write_text("cache: c\nhead: mix\n")
    assert Job.from_yaml(file).head == Mix()
    assert yaml.safe_load(job.to_yaml()) == job.record()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--head", "mix"), "cache: Field required"),
        (("--cache", "x", "--epochs", "-1"), "epochs: Input should be greater than 0, found '-1'"),
        (
            ("--cache", "x", "--head.experts", "4"),
            "head.experts: no such option of line, found '4'",
        ),
        (("--cache", "x", "--head", "moo"), "head: unknown kind 'moo'; known: 'mix', 'line'"),
        (
            ("--cache", "x", "--loss.experts", "4"),
            "loss: found loss.experts without loss.kind",
        ),
        (("--config", "absent.yaml"), "--config absent.yaml: no such file"),
        (("--config",), "--config: expected a YAML file after it"),
    ],
)
def test_each_mistake_is_one_line_with_its_dotted_path(
    arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(*arguments)
    assert len(str(caught.value).splitlines()) == 1


def test_a_misspelt_key_in_the_file_is_named(tmp_path: Any) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("cache: c\nepoch: 3\n")
    with pytest.raises(ConfigError, match="epoch: no such option"):
        parse("--config", str(file))
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected `key: value` lines, found list"):
        parse("--config", str(file))
    file.write_text("cache: [\n")
    with pytest.raises(ConfigError, match="not YAML"):
        parse("--config", str(file))


def test_flags_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--cache", "x", "--epoch", "3")
    assert caught.value.code == 2
    assert "did you mean --epochs?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--cache", "x", "--head.rates", "1", "2")
    assert "several values go with commas" in capsys.readouterr().err


def test_help_shows_every_option_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for part in (
        "Some job.",
        "--config",
        "--head.kind {mix,line}",
        "Number of experts",
        "default: 5",
    ):
        assert part.replace("{mix,line}", "") in text


@pytest.mark.parametrize("where", ["--head", "--head.kind", "file"])
def test_help_of_a_kind_has_the_options_of_that_kind_alone(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("head: mix\nloss: line\n")
    chosen = ["--config", str(file)] if where == "file" else [where, "mix"]
    with pytest.raises(SystemExit) as caught:
        parse(*chosen, "--help")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "Largest share of one expert. (default: 1.0)" in text
    assert "--head.bias" not in text
    assert ("--loss.experts" in text) == (where != "file")
    with pytest.raises(SystemExit):
        parse("--help")
    everything = " ".join(capsys.readouterr().out.split())
    assert "[mix] Largest share of one expert. [line] Bound the line." in everything
    assert "--head KIND --loss KIND --help: the options of these kinds alone." in everything


class Several(Config):
    """Several jobs."""

    jobs: list[Job] = Field(default=[Job(cache="x")])
    """What to do."""


def test_help_of_a_list_of_configurations(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Several.from_command_line(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.endswith("What to do.")  # no defaults of all, no flags that do not exist


def test_configurations_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job(cache="c").epochs = 3  # type: ignore[misc]


def test_environment_variables_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPOCHS", "77")
    monkeypatch.setenv("CACHE", "elsewhere")
    assert parse("--cache", "x") == Job(cache="x")


def test_exit_status_tells_bad_options_bad_input_and_bugs_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["job", "--cache", "x"])

    def outcome(error: BaseException | None) -> int | str | None:
        def body(job: Job) -> None:
            if error is not None:
                raise error

        with pytest.raises(SystemExit) as caught:
            run_job(Job, body)
        return caught.value.code

    assert outcome(None) == 0
    assert outcome(DatasetError("photos: no images")) == 1
    assert capsys.readouterr().err == "error: photos: no images\n"
    assert outcome(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        run_job(Job, lambda job: 1 / 0)
    with pytest.raises(OSError, match="no path"):  # nothing that a user could look at
        outcome(OSError("no path"))
    monkeypatch.setattr("sys.argv", ["job"])
    assert outcome(None) == 2


def test_a_path_that_the_system_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["job", "--cache", "x"])
    file = tmp_path / "file"
    file.write_text("")

    def message(touch: Callable[[], object]) -> str:
        with pytest.raises(SystemExit) as caught:
            run_job(Job, lambda job: touch())
        assert caught.value.code == 1
        return capsys.readouterr().err

    in_the_way = "a file is in the way of a folder; choose another path"
    assert message(lambda: file.mkdir(exist_ok=True)) == f"error: {file}: {in_the_way}\n"
    assert message((file / "x").mkdir) == f"error: {file / 'x'}: {in_the_way}\n"
    assert message(tmp_path.read_bytes).startswith(f"error: {tmp_path}: Is a directory; check")


def test_a_value_that_fits_no_member_of_a_union_is_one_line() -> None:
    class Sized(Config):
        size: PositiveInt | Literal["auto"] = "auto"
        cache: CachePath = Path("c")

    with pytest.raises(ConfigError, match=r"^size: Input .* integer.* or .* 'auto', found 'big'$"):
        Sized.from_command_line(["--size", "big"])


def test_a_path_that_may_lie_in_a_store_is_a_path_in_the_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Reader(Config):
        cache: CachePath
        """Where it is."""

    with pytest.raises(SystemExit):
        Reader.from_command_line(["--help"])
    assert "--cache PATH" in capsys.readouterr().out


def test_an_address_is_no_local_path() -> None:
    class Writer(Config):
        out: Path
        copy_of: Path | None = None
        source: str = ""

    assert Writer.model_validate({"out": "a/b", "source": "s3://c/d"}).copy_of is None
    with pytest.raises(ValueError, match="expected a local path for out, found 's3://b/c'"):
        Writer.model_validate({"out": "s3://b/c"})
    with pytest.raises(ValueError, match="expected a local path for copy_of"):
        Writer.model_validate({"out": "a", "copy_of": "https://b/c"})


def test_a_configuration_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "shard.tar").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        Job.from_yaml(tmp_path / "shard.tar")


_UNREAD = """
import sys
from featcache.config import Config, run_job
class Job(Config):
    lines: int = 0
    to: str = "stdout"
def run(job):
    for number in range(job.lines):
        print(number, file=getattr(sys, job.to))
run_job(Job, run)
"""


def buffered() -> dict[str, str]:
    """The environment in which Python writes to a pipe as usual, in blocks."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("arguments", [["--lines", "3"], ["--lines", "99999"], ["--help"]])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_that_nobody_reads_ends_a_job_quietly(arguments: list[str], stream: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        other = "stderr" if stream == "stdout" else "stdout"
        streams: Any = {stream: writing, other: subprocess.PIPE}
        given = arguments if "--help" in arguments else [*arguments, "--to", stream]
        command = [sys.executable, "-c", _UNREAD, *given]
        ended = subprocess.run(command, check=False, env=buffered(), **streams)
    finally:
        os.close(writing)
    if "--help" in arguments and stream == "stderr":
        assert ended.returncode == 0
        assert b"--lines" in ended.stdout
        return
    assert ended.returncode == 141
    assert (ended.stdout or b"", ended.stderr or b"") == (b"", b"")


def test_a_job_without_standard_output_runs(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(_UNREAD, encoding="utf-8")
    command = f'"{sys.executable}" "{script}" --lines 3 >&-'
    ended = subprocess.run(command, shell=True, capture_output=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["job", "--cache", "x"])

    def body(job: Job) -> None:
        raise BrokenPipeError("a worker's")

    with pytest.raises(BrokenPipeError, match="a worker's"):
        run_job(Job, body)


def test_two_files_with_one_kind_are_refused(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "twokinds"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text(
        "from featcache.config import Config\nclass Base(Config):\n    kind: str\n"
    )
    for name, kind in (("a", "one"), ("b", "two")):
        (package / f"{name}.py").write_text(
            "from typing import Literal\nfrom twokinds.base import Base\n"
            f"class {name.upper()}(Base):\n    kind: Literal['{kind}'] = '{kind}'\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path))
    import twokinds.base  # type: ignore[import-not-found]

    assert list(one_of("twokinds", [str(package)], twokinds.base.Base)) == ["one", "two"]
    (package / "c.py").write_text((package / "a.py").read_text().replace("class A", "class C"))
    with pytest.raises(TypeError, match=r"'one' is claimed by twokinds.a and twokinds.c"):
        one_of("twokinds", [str(package)], twokinds.base.Base)
