"""One typed configuration per job: command line, YAML file, Prefect parameter and record.

`Config` is the base of every job's model. `one_of` builds the union of a folder's config classes,
told apart by `kind`. `run_job` is the whole of a job's `__main__`.
"""

import argparse
import difflib
import importlib
import json
import os
import pkgutil
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TextIO, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from featcache.config_kinds import (
    chosen_kinds,
    expand_kinds,
    expand_optional_flags,
    kind_fields,
    kind_texts,
    nested_models,
    with_kinds,
)
from featcache.errors import ConfigError, UserError


class Config(BaseModel):
    """Base of every configuration: frozen, no unknown keys, a field's docstring is its help."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )

    aliases: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Further names for `kind`, each with the options it stands for: names in common use."""

    @model_validator(mode="before")
    @classmethod
    def _short_kinds(cls, values: Any) -> Any:
        """Reads `head: mop` as `head: {kind: mop}`, and an omitted `kind` as the default's."""
        if not isinstance(values, Mapping):
            return values
        values = dict(values)
        for name, field in cls.model_fields.items():
            _refuse_url(name, field, values.get(name))
            if field.discriminator is None or name not in values:
                continue
            value = values[name]
            if isinstance(value, str):
                value = {"kind": value}
            elif isinstance(value, Mapping) and "kind" not in value:
                kind = _default_kind(field)
                if kind is not None:
                    value = {"kind": kind, **value}
            values[name] = _by_own_kind(field, value)
        return values

    def record(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON values: what a run folder or a cache keeps."""
        result: dict[str, Any] = self.model_dump(mode="json")
        return result

    def to_yaml(self) -> str:
        """The resolved configuration as YAML that `--config` reads back."""
        text: str = yaml.safe_dump(self.record(), sort_keys=False, allow_unicode=True)
        return text

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that plain nested values describe, as `record` gives them.

        Raises:
            ConfigError: one line per illegal or missing value, each with its full dotted path.
        """
        return cls._validated(values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """The configuration a YAML file describes.

        Raises:
            ConfigError: if the file is missing, is not a mapping, or has an illegal value.
        """
        return cls._validated(_read_yaml(path))

    @classmethod
    def from_command_line(cls, argv: Sequence[str] | None = None) -> Self:
        """The configuration from flags and `--config FILE`; flags beat the file, it the defaults.

        Args:
            argv: arguments without the program name; default `sys.argv[1:]`.

        Raises:
            ConfigError: one line per illegal or missing value, each with its full dotted path.
            SystemExit: for `--help` (0) and for unknown flags (2).
        """
        arguments = list(sys.argv[1:] if argv is None else argv)
        arguments, file = _take_config_file(arguments)
        values: dict[str, Any] = {} if file is None else _read_yaml(file)
        arguments = expand_kinds(cls, arguments)
        chosen = chosen_kinds(cls, arguments, values)
        asks = {"-h", "--help"} & set(arguments)
        model = with_kinds(cls, chosen) if asks else cls  # the options of one kind are read better
        flags = _parse_flags(model, expand_optional_flags(cls, arguments))
        return cls._validated(merge(values, flags))

    @classmethod
    def _validated(cls, values: Mapping[str, Any]) -> Self:
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError("\n".join(_error_lines(error, kind_fields(cls)))) from None


T = TypeVar("T", bound=Config)

_UNION_MEMBER = re.compile(r"constrained-\w+|literal\[.*\]")


def one_of(package: str, path: Iterable[str], base: type[T]) -> dict[str, type[T]]:
    """Config classes of a folder by `kind`; adding a file to the folder adds a member.

    Args:
        package: dotted name of the folder's package (`__name__` of its `__init__`).
        path: the package's `__path__`.
        base: the class every member derives from.

    Raises:
        TypeError: if two files claim the same `kind`.
    """
    for module in sorted(info.name for info in pkgutil.iter_modules(path)):
        importlib.import_module(f"{package}.{module}")
    members: dict[str, type[T]] = {}
    pending = list(base.__subclasses__())
    while pending:
        member = pending.pop(0)
        pending.extend(member.__subclasses__())
        field = member.model_fields.get("kind")
        if field is None or not member.__module__.startswith(package + "."):
            continue
        kind = field.default
        if not isinstance(kind, str):
            continue
        if kind in members:
            raise TypeError(
                f"kind {kind!r} is claimed by {members[kind].__module__} and {member.__module__}"
            )
        members[kind] = member
    return dict(sorted(members.items()))


def union_of(members: Mapping[str, type[Config]], default: str | None = None) -> Any:
    """The union type of `members`; `default` goes last so that `--help` shows its values."""
    order = sorted(members, key=lambda kind: (kind == default, kind))
    return Union[tuple(members[kind] for kind in order)]  # noqa: UP007 (built at run time)


def run_job(config_class: type[T], run: Callable[[T], object]) -> NoReturn:
    """Runs a job from the command line and ends the process.

    Exit status 0 done, 1 bad input, 2 bad option, 130 ^C, 141 nobody reads its output any more.
    """
    with until_unread():
        try:
            run(config_class.from_command_line())
        except UserError as error:
            for line in str(error).splitlines():
                print(f"error: {line}", file=sys.stderr)
            sys.exit(2 if isinstance(error, ConfigError) else 1)
        except OSError as error:
            if error.filename is None:
                raise
            print(f"error: {_file_problem(error)}", file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted: what is written stays; the same command resumes", file=sys.stderr)
            sys.exit(130)
        sys.exit(0)


@contextmanager
def until_unread() -> Iterator[None]:
    """Ends the process quietly once nobody reads its output, as in `featcache info | head`.

    Raises:
        SystemExit: with status 141, which other tools have then.
    """
    try:
        try:
            yield
        except SystemExit:  # --help ends so
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        unread = [stream for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:
            raise  # somebody else's pipe
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in unread:  # Python writes the rest at exit, and would complain
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        sys.exit(128 + signal.SIGPIPE)


def _flush() -> None:
    if sys.stdout is not None:  # there is none if it was closed from the start
        sys.stdout.flush()


def _is_unread(stream: TextIO | None) -> bool:
    """Whether a stream goes into a pipe whose other end is closed."""
    poll = select.poll()
    try:
        if stream is not None:
            poll.register(stream.fileno(), 0)
    except (OSError, ValueError):  # not a file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _refuse_url(name: str, field: FieldInfo, value: Any) -> None:
    """Stops where a local path is meant: Path would make a folder `s3:` of an address.

    Raises:
        ValueError: naming the option.
    """
    local = field.annotation in (Path, Path | None)  # what may lie in a store says so
    if local and isinstance(value, str) and "://" in value:
        raise ValueError(f"expected a local path for {name}, found {value!r}")


def _file_problem(error: OSError) -> str:
    """What the system refuses, in a line that names the path."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{error.filename}: a file is in the way of a folder; choose another path"
    return f"{error.filename}: {error.strerror}; check the path, its permissions and the disk"


def _default_kind(field: FieldInfo) -> str | None:
    default = field.get_default(call_default_factory=False)
    return None if default is PydanticUndefined else getattr(default, "kind", None)


def _by_own_kind(field: FieldInfo, value: Any) -> Any:
    """`value` with an alias of a kind replaced by the kind and the options it stands for."""
    if isinstance(value, Mapping):
        for member in nested_models(field.annotation):
            options = getattr(member, "aliases", {}).get(str(value.get("kind")))
            if options is not None:
                return {**options, **value, "kind": member.model_fields["kind"].default}
    return value


def _read_yaml(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"--config {file}: no such file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {file}: not YAML ({' '.join(str(error).split())})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {file}: not UTF-8 text ({error.reason})") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"--config {file}: expected `key: value` lines, found {type(values).__name__}"
        )
    return values


def _take_config_file(arguments: list[str]) -> tuple[list[str], str | None]:
    """Splits `--config FILE` or `--config=FILE` off the arguments."""
    rest: list[str] = []
    file: str | None = None
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--config":
            if position + 1 == len(arguments):
                raise ConfigError("--config: expected a YAML file after it")
            file = arguments[position + 1]
            position += 2
            continue
        if argument.startswith("--config="):
            file = argument.removeprefix("--config=")
        else:
            rest.append(argument)
        position += 1
    return rest, file


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations; hints at misspelt flags, tells kinds' options apart."""

    def __init__(self, *args: Any, model: type[Config] | None = None, **kwargs: Any):
        kwargs["allow_abbrev"] = False
        super().__init__(*args, **kwargs)
        self._kind_texts = {} if model is None else kind_texts(model)
        self._kind_flags = () if model is None else {f"--{n}.kind" for n in kind_fields(model)}

    def format_help(self) -> str:
        """The help text; an option that only some kinds have begins with their names."""
        mixed = [flag for flag in self._option_string_actions if flag in self._kind_flags]
        if mixed:
            named = " ".join(flag.replace(".kind", " KIND") for flag in mixed)
            self.epilog = f"{named} --help: the options of these kinds alone."
        for action in self._actions:
            if "StoreUrl" in str(action.metavar):
                action.metavar = "PATH"
            text = next(
                (self._kind_texts[f] for f in action.option_strings if f in self._kind_texts), ""
            )
            if text:
                default = re.search(r"\(default: .*\)$", str(action.help), re.DOTALL)
                shown = f" {default[0]}" if default and text.count("[") == 1 else ""
                action.help = text.replace("%", "%%") + shown
            whole = re.search(r"\s*\(default: \[\w+\(", action.help or "")
            if whole and action.help:  # a list of whole configurations, with all their options
                action.help = action.help[: whole.start()]
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0].split("=")[0]
            close = difflib.get_close_matches(flag, list(self._option_string_actions), n=1)
            hint = "see --help" if flag.startswith("-") else "several values go with commas: 1,2"
            message += f" (did you mean {close[0]}?)" if close else f" ({hint})"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _parse_flags(model: type[Config], arguments: list[str]) -> dict[str, Any]:
    """Nested values of the flags that were given, still unvalidated."""
    module = sys.modules.get("__main__")
    spec = getattr(module, "__spec__", None)
    program = f"python -m {spec.name}" if spec is not None else None
    if spec is not None and spec.name == "featcache.__main__":
        program = f"python -m {sys.argv[0]}"  # which the front command has set to its job

    class Settings(BaseSettings):
        model_config = SettingsConfigDict(
            cli_implicit_flags=True,
            cli_enforce_required=False,
            cli_avoid_json=True,
            use_attribute_docstrings=True,
            extra="forbid",
            protected_namespaces=(),
        )

    settings = type(model.__name__, (Settings, model), {"__doc__": model.__doc__})
    parser = _Parser(
        prog=program,
        usage="%(prog)s [--config FILE] [--option VALUE ...]",
        description=model.__doc__,
        model=model,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with the same names; flags beat it"
    )
    source: Any = CliSettingsSource(settings, root_parser=parser, cli_parse_args=arguments)
    values: dict[str, Any] = source()
    values.pop("config", None) if "config" not in model.model_fields else None
    return values


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Recursive union; `above` wins, and another `kind` drops the options of the kind below."""
    merged = dict(below)
    for name, value in above.items():
        under = merged.get(name)
        if isinstance(value, Mapping):
            if isinstance(under, str):
                under = {"kind": under}
            if isinstance(under, Mapping):
                other_kind = "kind" in value and value["kind"] != under.get("kind", value["kind"])
                merged[name] = dict(value) if other_kind else merge(under, value)
                continue
        merged[name] = value
    return merged


def _error_lines(error: ValidationError, kind_fields: set[str]) -> list[str]:
    problems: dict[tuple[str, str], list[str]] = {}  # a union has one for each of its members
    for item in error.errors(include_url=False):
        names: list[str] = []
        tagged = False
        for part in item["loc"]:  # pydantic names the member of a union that did not fit
            if _UNION_MEMBER.fullmatch(str(part)):
                continue
            # and the kind behind a union's name: head.linear.bias
            if not tagged:
                names.append(str(part))
            tagged = not tagged and ".".join(names) in kind_fields
        path = ".".join(names) or "configuration"
        found = item.get("input")
        hidden = item["type"] in ("missing", "union_tag_invalid") or isinstance(found, Mapping)
        shown = "" if hidden else f", found {found!r}"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "no such option" + (f" of {item['loc'][-2]}" if len(item["loc"]) > 1 else "")
        elif item["type"] == "union_tag_invalid":
            context = item["ctx"]
            message = f"unknown kind {context['tag']!r}; known: {context['expected_tags']}"
        elif item["type"] == "union_tag_not_found" and isinstance(found, Mapping):
            given = ", ".join(f"{path}.{name}" for name in found)
            message = f"found {given} without {path}.kind, which has no default; add --{path} KIND"
        problems.setdefault((path, shown), []).append(message)
    return [
        f"{path}: {' or '.join(messages)}{shown}" for (path, shown), messages in problems.items()
    ]


def canonical_json(value: Any) -> str:
    """JSON text that is equal for equal values: sorted keys, no blanks, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )
