"""Job: a cache as .npy files or as one parquet file, in bounded memory.

python -m featcache.export --cache cache/inat2021 --format parquet --out inat2021.parquet
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from featcache.config import Config, run_job
from featcache.errors import CacheError
from featcache.layout.feature_array import FeatureArray
from featcache.reader import Cache, open_cache
from featcache.storage import CachePath

BLOCK_BYTES = 64 << 20
"""Features in memory at a time; a row group of the parquet file holds as much."""


class ExportConfig(Config):
    """Writes a cache as .npy files or as one parquet file."""

    cache: CachePath
    """Folder of the cache, or s3://bucket/prefix."""
    format: Literal["numpy", "parquet"] = "parquet"
    """numpy = a folder of .npy files and tables; parquet = one file."""
    out: Path
    """Folder (numpy) or file (parquet) to write; must not exist."""
    arrays: tuple[str, ...] | None = None
    """Arrays to write, e.g. image/projected; unset = all features. Int8 tokens become float32."""


def run(config: ExportConfig) -> Path:
    """Writes the export, prints what it holds and where it is, and returns that.

    Raises:
        CacheError: no such cache or array, shards missing, or `out` exists.
    """
    cache = open_cache(config.cache)
    write = to_numpy if config.format == "numpy" else to_parquet
    path = write(cache, config.out, config.arrays)
    prefix = "" if config.format == "numpy" else "image/"
    for name in cache.feature_names(prefix) if config.arrays is None else config.arrays:
        array = cache.array(name)
        print(f"{name:<24} {len(array):,} rows of {' x '.join(map(str, array.shape[1:]))}")
    print(path)
    return path


def to_numpy(cache: Cache, folder: str | Path, arrays: Sequence[str] | None = None) -> Path:
    """Writes arrays as .npy and everything else as tables; the folder appears whole.

    `image/projected` becomes `image.projected.npy`, row by row as in the cache; `rows.parquet` has
    id, path, split, valid, labels and captions of each image; `text/projected` goes with
    `captions.parquet` (row, caption); `classes.parquet` the class table, `cache.json` the identity.
    Int8 tokens become the float32 numbers they stand for.

    Args:
        cache: the cache.
        folder: must not exist.
        arrays: names; None = all feature arrays.

    Returns:
        The folder.

    Raises:
        CacheError: if the folder exists or an array does not.
    """
    folder = Path(folder)
    names = cache.feature_names() if arrays is None else list(arrays)
    sources = [cache.array(name) for name in names]
    building = _partial(folder)
    building.mkdir(parents=True)
    try:
        for source in sources:
            file = building / f"{source.name.replace('/', '.')}.npy"
            out = np.lib.format.open_memmap(file, "w+", source.dtype, source.shape)
            for start, stop in _blocks(len(source), source.row_bytes):
                source.read(slice(start, stop), out=out[start:stop])
            out.flush()
        whole = {"valid": pa.array(cache.valid)}
        pq.write_table(_row_table(cache, 0, cache.num_rows, whole), building / "rows.parquet")
        offsets, captions = cache.captions
        owners = np.repeat(np.arange(cache.num_rows), np.diff(offsets))
        pq.write_table(
            pa.table({"row": owners, "caption": pa.array(captions, pa.large_string())}),
            building / "captions.parquet",
        )
        cache.classes.to_parquet(building / "classes.parquet")
        described = {"fingerprint": cache.fingerprint, "identity": cache.identity.record()}
        (building / "cache.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def to_parquet(cache: Cache, file: str | Path, arrays: Sequence[str] | None = None) -> Path:
    """Writes one row an image: id, path, split, label names, captions and image features.

    Features are fixed-size lists, null for unreadable images; an array with more than one axis a
    row is flattened, its shape is in the column's metadata; int8 tokens become float32. The file
    appears whole.

    Args:
        cache: the cache.
        file: must not exist.
        arrays: names of image arrays; None = all of them.

    Returns:
        The file.

    Raises:
        CacheError: if the file exists or an array does not.
        ConfigError: if an array has other rows than the images.
    """
    file = Path(file)
    chosen = cache.feature_names("image/") if arrays is None else list(arrays)
    sources = [cache.row_array(name) for name in chosen]
    building = _partial(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    row_bytes = sum(source.row_bytes for source in sources)
    writer: pq.ParquetWriter | None = None
    try:
        for start, stop in _blocks(cache.num_rows, row_bytes):
            features = {
                source.name.removeprefix("image/"): _lists(source, cache.valid, start, stop)
                for source in sources
            }
            table = _row_table(cache, start, stop, features)
            if writer is None:
                schema = _described(table.schema, cache, sources)
                writer = pq.ParquetWriter(building, schema, compression="zstd")
            writer.write_table(table.cast(writer.schema), row_group_size=stop - start)
        if writer is not None:
            writer.close()
        building.rename(file)
    finally:
        if writer is not None:
            writer.close()
        building.unlink(missing_ok=True)
    return file


def _partial(target: Path) -> Path:
    if target.exists():
        raise CacheError(f"{target}: exists already; delete it or choose another --out")
    return target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")


def _blocks(num_rows: int, row_bytes: int) -> Iterator[tuple[int, int]]:
    size = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, num_rows, size):
        yield start, min(num_rows, start + size)


def _row_table(cache: Cache, start: int, stop: int, columns: dict[str, pa.Array]) -> pa.Table:
    """Ids, paths, splits, label names, captions and further columns of the rows [start, stop)."""
    names = pa.array(cache.classes["name"].tolist(), pa.large_string())
    table: dict[str, Any] = {
        "id": pa.array(cache.ids[start:stop], pa.large_string()),
        "path": pa.array(cache.paths[start:stop], pa.large_string()),
        "split": pa.array(cache.splits[start:stop], pa.string()),
    }
    if cache.task == "single_label":
        labels = cache.labels(np.arange(start, stop))
        table["label"] = names.take(pa.array(labels, mask=labels < 0))
    elif cache.task == "multi_label":
        offsets, values = cache.label_lists
        flat = names.take(pa.array(values[offsets[start] : offsets[stop]]))
        table["labels"] = _ragged(offsets[start : stop + 1], flat)
    caption_offsets, captions = cache.captions
    if captions:
        flat = pa.array(captions[caption_offsets[start] : caption_offsets[stop]], pa.large_string())
        table["captions"] = _ragged(caption_offsets[start : stop + 1], flat)
    return pa.table({**table, **columns})


def _ragged(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets - offsets[0], pa.int64()), values)


def _lists(source: FeatureArray, valid: npt.NDArray[np.bool_], start: int, stop: int) -> pa.Array:
    """Rows [start, stop) as fixed-size lists; null where there are no features."""
    values = source.read(slice(start, stop))
    width = int(np.prod(source.shape[1:], dtype=np.int64))
    return pa.FixedSizeListArray.from_arrays(
        pa.array(values.reshape(-1)), width, mask=pa.array(~valid[start:stop])
    )


def _described(schema: pa.Schema, cache: Cache, sources: Sequence[FeatureArray]) -> pa.Schema:
    for source in sources:
        index = schema.get_field_index(source.name.removeprefix("image/"))
        shape = json.dumps(list(source.shape[1:]))
        schema = schema.set(index, schema.field(index).with_metadata({"shape": shape}))
    identity = json.dumps(cache.identity.record())
    return schema.with_metadata({"fingerprint": cache.fingerprint, "identity": identity})


if __name__ == "__main__":
    run_job(ExportConfig, run)
