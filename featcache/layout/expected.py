"""What a sound cache has to hold: its arrays, their chunks, and the tables of its identity."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from featcache.identity import ListHash
from featcache.layout.cache_plan import ShardKind
from featcache.layout.chunks import ArrayFiles
from featcache.layout.tables import read_strings
from featcache.manifest import class_hash, rows_hash

if TYPE_CHECKING:
    from featcache.store import Store


def expected_names(attributes: Mapping[str, Any]) -> set[str]:
    """Names of the groups and arrays that a cache of these attributes has."""
    kinds = get_args(ShardKind)
    groups = {"image", "text", "rows", "classes", "class_text", "shards"}
    arrays = {name for names in attributes["arrays"].values() for name in names}
    return groups | arrays | {f"shards/{kind}" for kind in kinds}


def needed_chunks(
    store: "Store", name: str, files: ArrayFiles, sizes: Mapping[str, int]
) -> set[int]:
    """Chunks that have to be there: those of done shards, and all of every other array."""
    for kind in get_args(ShardKind):
        if name == f"shards/{kind}" and not store.complete:
            return set()
        if name in store.attributes["arrays"][kind]:
            marks = f"shards/{kind}/c"  # damage in there is reported once, there
            done = [shard for shard in store.shards(kind) if f"{marks}/{shard.index}" in sizes]
            return {c for shard in done for c in files.chunks_of(shard.start, shard.stop)}
    return set(range(files.num_chunks))


def table_problems(store: "Store") -> Iterator[str]:
    """Tables whose checksums hold but which belong to another dataset than the identity."""
    dataset = store.identity.dataset
    columns = []
    for name in ("id", "path", "split"):
        columns.append(ListHash())
        for strings in read_strings(store.files(f"rows/{name}")):
            columns[-1].update_strings(strings)
    if rows_hash(*columns) != dataset.rows:
        yield f"{store.path / 'rows'}: ids, paths or splits are not those of the identity"
    if class_hash([str(name) for name in store.read("classes/name")]) != dataset.classes:
        yield f"{store.path / 'classes/name'}: class names are not those of the identity"
