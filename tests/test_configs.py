"""Every YAML in a configs folder parses, and opens with how it was run."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml

from featcache.config import Config

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("*/configs/*.yaml"))
COMMAND = re.compile(r"python -m (\S+)(?: .*)? --config (\S+)")


def opening(file: Path) -> str:
    """The comment lines at the top, joined."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return "\n".join(lines)


def config_class(module_name: str) -> type[Config]:
    """The job's one configuration: ExtractConfig of featcache.extract, and so on."""
    module = importlib.import_module(module_name)
    words = module_name.rpartition(".")[2].split("_")
    wanted = "".join(word.title() for word in words) + "Config"
    if inspect.isclass(getattr(module, wanted, None)):
        found: type[Config] = getattr(module, wanted)
        return found
    hints = inspect.get_annotations(module.run, eval_str=True)
    return next(hint for hint in hints.values() if issubclass(hint, Config))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
class TestFile:
    def test_opens_with_command_hardware_time_and_result(self, file: Path) -> None:
        text = opening(file)
        match = COMMAND.search(text)
        assert match, "the exact command is missing"
        assert match[2] == file.relative_to(ROOT).as_posix(), "the command names another file"
        for label in ("Hardware:", "Time:", "Expect:"):
            line = next((line for line in text.splitlines() if line.startswith(label)), "")
            assert len(line) > len(label) + 3, f"no line that starts with {label}"

    def test_parses(self, file: Path) -> None:
        match = COMMAND.search(opening(file))
        assert match
        cls = config_class(match[1])
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        config = cls.from_yaml(file)
        assert config.model_fields_set == set(values)
        assert cls.model_validate(config.record()) == config

    def test_states_no_default_again(self, file: Path) -> None:
        """What a file says is what differs; a repeated default hides that."""
        match = COMMAND.search(opening(file))
        assert match
        cls = config_class(match[1])
        for name, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
            field = cls.model_fields[name]
            if not field.is_required() and not isinstance(value, dict):
                assert value != field.default, f"{name} repeats the default"


def test_there_are_configs() -> None:
    assert FILES
