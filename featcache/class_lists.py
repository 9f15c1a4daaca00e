"""Class tables without a dataset: lists that are built in, and files of names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from featcache.errors import ConfigError

CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
"""Classes of CIFAR-10 in its own order."""

_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(name.replace("_", " ") for name in _CIFAR100.split())
"""Classes of CIFAR-100 in its own order."""

BUILT_IN = {"cifar10": CIFAR10, "cifar100": CIFAR100}
"""Lists by name."""


def class_list(source: str) -> pd.DataFrame:
    """The class table that a name or a file stands for; names may repeat, order is the index.

    Args:
        source: `cifar10`, `cifar100`, or a file: .csv or .tsv with a column `name` (other columns
            are metadata that prompts may use), anything else with one name a line. Underscores
            become blanks.

    Returns:
        Column `name`, `count` (0) and metadata, all text but the count; C rows.

    Raises:
        ConfigError: if there is no such list or file, or no name in it.
    """
    if source in BUILT_IN:
        return class_table(BUILT_IN[source])
    file = Path(source)
    if not file.is_file():
        raise ConfigError(
            f"classes: {source!r} is no file and no list that is built in; expected "
            f"{', '.join(BUILT_IN)}, or a file with one class name a line"
        )
    try:
        if file.suffix in (".csv", ".tsv"):
            separator = "," if file.suffix == ".csv" else "\t"
            table = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False)
            if "name" not in table:
                found = ", ".join(map(str, table.columns))
                raise ConfigError(f"classes: {file} has no column name; its columns are {found}")
            names = [str(name).replace("_", " ").strip() for name in table["name"]]
            table = table.assign(name=names, count=np.zeros(len(table), np.int64))
        else:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
            table = class_table([line for line in lines if line.strip()])
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"classes: {file} is no list of names ({reason})") from None
    if not len(table) or "" in set(table["name"]):
        what = "an empty name" if len(table) else "no name"
        raise ConfigError(f"classes: {file} has {what} in it; expected one class name a line")
    return table


def class_table(names: Sequence[str]) -> pd.DataFrame:
    """A table of names alone, with blanks for underscores."""
    plain = [" ".join(name.replace("_", " ").split()) for name in names]
    return pd.DataFrame({"name": plain, "count": np.zeros(len(plain), np.int64)})
