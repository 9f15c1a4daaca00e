"""How a caption becomes the text tower's input: policies by name, or a function of the user's.

A policy is part of a cache's identity, because it changes the numbers. It is applied to captions
only: class prompts are written out by their templates and enter the tower as they are.
"""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from featcache.errors import ConfigError

AUTO = "auto"
"""The backbone's own policy."""

_NAMES = (AUTO, "raw", "picture_of")
_CONTAINS = "contains:"
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class TextPolicy:
    """Captions to texts, row by row.

    Attributes:
        name: what the identity records; for a function of the user's it ends with a hash of the
            file that defines it, so that an edited function is another policy.
        function: n captions to n texts.
    """

    name: str
    function: Callable[[list[str]], list[str]]

    def __call__(self, captions: Sequence[str]) -> list[str]:
        """The texts of captions, in their order.

        Raises:
            ConfigError: if a function of the user's does not return one string a caption.
        """
        texts = self.function(list(captions))
        if not isinstance(texts, list) or len(texts) != len(captions):
            found = f"{len(texts)} values" if isinstance(texts, list) else type(texts).__name__
            raise ConfigError(
                f"features.text_policy {self.name}: returned {found} for {len(captions)} captions; "
                "expected a list with one string a caption"
            )
        for caption, text in zip(captions, texts, strict=True):
            if not isinstance(text, str):
                raise ConfigError(
                    f"features.text_policy {self.name}: returned {type(text).__name__} for the "
                    f"caption {caption!r}; expected a string"
                )
        return texts


def check_name(name: str) -> str:
    """The name as it is, if it can be a policy's.

    Raises:
        ValueError: what it may be instead.
    """
    if name.rstrip(":") == _CONTAINS.rstrip(":"):
        raise ValueError("contains needs a phrase extractor; give contains:MODULE:FUNCTION")
    if name not in _NAMES and not _REFERENCE.fullmatch(name.removeprefix(_CONTAINS)):
        raise ValueError(
            f"expected {', '.join(_NAMES)}, MODULE:FUNCTION or contains:MODULE:FUNCTION"
        )
    return name


def open_policy(name: str) -> TextPolicy:
    """The policy called `name`: raw, picture_of, or a function; see `check_name`.

    Raises:
        ConfigError: if a module or function is not there.
    """
    if name == "raw":
        return TextPolicy(name, list)
    if name == "picture_of":
        return TextPolicy(name, lambda captions: [picture_of(caption) for caption in captions])
    if name.startswith(_CONTAINS):
        extract, version = _imported(name)
        return TextPolicy(f"{name}#{version}", lambda captions: _contains(name, extract, captions))
    function, version = _imported(name)
    return TextPolicy(f"{name}#{version}", function)


def picture_of(caption: str) -> str:
    """The caption behind "a picture of ".

    Its first letter becomes small; a caption all in capitals becomes small as a whole.
    """
    text = caption.strip()
    text = text.lower() if text.isupper() else text[:1].lower() + text[1:]
    return f"a picture of {text}".rstrip()


def photo_contains(phrases: Sequence[str]) -> str:
    """One sentence, "The photo contains a, b.", of the phrases a and b."""
    return f"The photo contains {', '.join(phrases)}."


def _contains(name: str, extract: Callable[[list[str]], Any], captions: list[str]) -> list[str]:
    """Sentences over each caption's phrases; a caption without a phrase stays as it is."""
    found = extract(captions)
    if not isinstance(found, list) or len(found) != len(captions):
        raise ConfigError(
            f"features.text_policy {name}: expected a list with the phrases of each of "
            f"{len(captions)} captions, found "
            + (f"{len(found)} values" if isinstance(found, list) else type(found).__name__)
        )
    texts = []
    for caption, phrases in zip(captions, found, strict=True):
        listed = isinstance(phrases, list | tuple)
        if not listed or not all(isinstance(phrase, str) for phrase in phrases):
            raise ConfigError(
                f"features.text_policy {name}: returned {phrases!r} for the caption {caption!r}; "
                "expected a list of phrases"
            )
        texts.append(photo_contains(phrases) if phrases else caption)
    return texts


def _imported(name: str) -> tuple[Callable[[list[str]], Any], str]:
    """The function of a policy, and 8 hexadecimal digits over the file that defines it."""
    module_name, _, function_name = name.removeprefix(_CONTAINS).partition(":")
    option = f"features.text_policy {name}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{option}: module {module_name!r} cannot be imported ({error}); put its folder on "
            "PYTHONPATH, or install it"
        ) from None
    function: Any = module
    for part in function_name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise ConfigError(f"{option}: {module_name} has no function {function_name!r}")
    file = getattr(module, "__file__", None)
    source = Path(file).read_bytes() if file is not None else module_name.encode()
    return function, xxhash.xxh3_64_hexdigest(source)[:8]
