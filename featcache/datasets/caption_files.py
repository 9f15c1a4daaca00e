"""Captions of image files: a table with a path on each row, or the lists that `folder` reads."""

from collections.abc import Collection
from pathlib import Path

from featcache.datasets.path_lists import read_captions
from featcache.datasets.table import caption_lists, read_table
from featcache.errors import DatasetError

_TABLES = (".csv", ".tsv", ".parquet", ".pq")
_COLUMNS = ("caption", "captions")


def captions_of(file: Path, paths: Collection[str]) -> dict[str, list[str]]:
    """Captions of each of some images, in the file's order; images without any are not in it.

    Args:
        file: .csv, .tsv or .parquet with columns `path` and `caption` (or `captions`, a JSON list a
            cell), or otherwise a list, `path caption` on each line. A path may come on several
            rows; other images' captions are left out.
        paths: of the images, as the file names them.

    Raises:
        DatasetError: no such file, a column is missing, or no caption is of one of the images.
    """
    if file.suffix.lower() not in _TABLES:
        return {path: texts for path, texts in read_captions(file, paths).items() if texts}
    table = read_table(file)
    columns = [name for name in _COLUMNS if name in table.columns]
    if "path" not in table.columns or not columns:
        table.fail(f"expected columns path and caption, found {', '.join(table.columns)}")
    found: dict[str, list[str]] = {}
    named = [str(path).strip() for path in table["path"]]
    for path, texts in zip(named, caption_lists(table, columns) or [], strict=True):
        if path in paths and texts:
            found.setdefault(path, []).extend(texts)
    if not found:
        raise DatasetError(
            f"{file}: no caption is of one of the {len(paths)} images, its first row is of "
            f"{named[0]}; expected paths such as {min(paths)}"
        )
    return found
