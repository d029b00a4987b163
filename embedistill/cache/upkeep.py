"""Look after caches: list, verify, prune, and exchange embeddings with others as parquet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedistill.cache.shards import SUFFIX, Encoded, Shard, is_intact, list_shards
from embedistill.cache.store import DAMAGED, LOCK, MANIFEST, EmbeddingCache, set_aside
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import PART, folder_bytes, read_json, remove, written_aside
from embedistill.progress import progress_bar

_ROWS = 8192
_ENCODING = b"embedistill"
_HOUR = 3600.0


@dataclass(frozen=True)
class CacheFacts:
    """One encoding on disk.

    Attributes:
        key: Name of its folder.
        teacher: Whose vectors they are.
        prompt: What stood before each text.
        rows: How many vectors.
        dim: Their dimension.
        storage: Their number format.
        bytes: On disk.
        last_used: Seconds since 1970.
    """

    key: str
    teacher: str
    prompt: str
    rows: int
    dim: int
    storage: str
    bytes: int
    last_used: float


def list_caches(root: Path) -> list[CacheFacts]:
    """Return every encoding below a folder, the one used last first."""
    found = [_describe(folder) for folder in _folders(root)]
    return sorted(found, key=lambda facts: facts.last_used, reverse=True)


def find_cache(root: Path, key: str) -> EmbeddingCache:
    """Open a cache by its key, or by enough of its beginning.

    Raises:
        UsageError: None or several have such a key.
    """
    folders = [folder for folder in _folders(root) if folder.name.startswith(key)]
    if len(folders) != 1:
        keys = ", ".join(folder.name[:12] for folder in folders or _folders(root)) or "none"
        raise UsageError(f"cache {key!r} in {root}", f"{len(folders)} of that key", f"one of: {keys}")
    return EmbeddingCache(root, read_json(folders[0] / MANIFEST))


def verify_caches(root: Path, key: str = "") -> list[Path]:
    """Read every shard, and set aside those whose bytes changed since they were written; return these.

    Their texts are encoded again by the next run that needs them. `key` is the beginning of the keys to read.

    Raises:
        UsageError: No encoding has such a key.
    """
    folders = [folder for folder in _folders(root) if folder.name.startswith(key)]
    if key and not folders:
        keys = ", ".join(folder.name[:12] for folder in _folders(root)) or "none"
        raise UsageError(f"cache {key!r} in {root}", "0 of that key", f"one of: {keys}")
    shards = [path for folder in folders for path in _shards_of(folder)]
    damaged = []
    with progress_bar("verifying", len(shards), "shards") as advance:
        for path in shards:
            if not is_intact(path):
                set_aside(path, "its bytes are not those that were written")
                damaged.append(path)
            advance(1)
    return damaged


def prune_caches(root: Path, *, older_than: float | None = None, keep: int | None = None) -> list[CacheFacts]:
    """Delete encodings, those used longest ago first, and return them; and sweep what kills and damage left behind.

    Args:
        root: Folder of all encodings.
        older_than: Delete those that were not used for so many seconds.
        keep: Then delete until this many bytes are left.
    """
    for part in root.glob(f".*{PART}"):  # an encoding that a kill left half deleted
        remove(part)
    for folder in _folders(root):
        _sweep(folder)
    facts = list_caches(root)
    left = sum(found.bytes for found in facts)
    deleted = []
    for found in reversed(facts):
        old = older_than is not None and time.time() - found.last_used > older_than
        if (old or (keep is not None and left > keep)) and _delete(root / found.key):
            left -= found.bytes
            deleted.append(found)
    return deleted


def export_vectors(cache: EmbeddingCache, texts: Iterable[str], target: Path) -> int:
    """Write the texts that have a vector, once each, to one parquet file with `text` and `embedding`; return how many.

    The encoding is in the file's metadata, so that `import_vectors` knows whose vectors they are. Memory is constant
    but for some 100 bytes a text.
    """
    vector = pa.list_(pa.float16() if cache.storage == "float16" else pa.float32(), cache.dim)
    encoding = read_json(cache.folder / MANIFEST)
    schema = pa.schema([("text", pa.string()), ("embedding", vector)], metadata={_ENCODING: json.dumps(encoding)})
    written: set[int] = set()
    with written_aside(target) as part, pq.ParquetWriter(part, schema, compression="zstd") as writer:
        for batch in _batches(texts):
            lacking = set(cache.missing(batch))
            kept = [text for text in batch if text not in lacking]
            found = dict(zip(cache.locate(kept).tolist(), kept, strict=True))
            rows = {row: text for row, text in found.items() if row not in written}
            if rows:
                vectors = cache.read(np.array(list(rows), np.int64)).astype(vector.value_type.to_pandas_dtype())
                flat = pa.array(vectors.ravel(), vector.value_type)
                lists = pa.FixedSizeListArray.from_arrays(flat, cache.dim)
                writer.write_table(pa.table([pa.array(list(rows.values())), lists], schema=schema))
                written |= rows.keys()
    return len(written)


def read_encoding(file: Path) -> dict[str, Any] | None:
    """Return the encoding that a parquet file of embeddings names, or None where it was made by others."""
    metadata = _open_parquet(file).schema_arrow.metadata or {}
    return json.loads(metadata[_ENCODING]) if _ENCODING in metadata else None


def import_vectors(
    cache: EmbeddingCache, file: Path, text_column: str = "text", embedding_column: str = "embedding"
) -> int:
    """Store the vectors of a parquet file, and return how many the cache lacked.

    Raises:
        UsageError: The file lacks a column, or has vectors of another dimension.
    """
    added = 0
    for texts, vectors in read_embeddings(file, text_column, embedding_column):
        if vectors.shape[1] != cache.dim:
            found = f"{embedding_column} has {vectors.shape[1]} dimensions"
            raise UsageError(str(file), found, f"{cache.dim}", "give the teacher that they are of")
        numbers = {text: number for number, text in enumerate(texts)}
        lacking = cache.missing(texts)
        if lacking:
            cache.add(lacking, Encoded.of(vectors[[numbers[text] for text in lacking]]))
        added += len(lacking)
    return added


def read_embeddings(
    file: Path, text_column: str = "text", embedding_column: str = "embedding"
) -> Iterator[tuple[list[str], Any]]:
    """Yield texts and their vectors (n_texts, dim) from a parquet file, some thousands at a time.

    Raises:
        UsageError: It is no parquet file, lacks a column, or has rows of different lengths.
    """
    parquet = _open_parquet(file)
    absent = [column for column in (text_column, embedding_column) if column not in parquet.schema_arrow.names]
    if absent:
        names = ", ".join(parquet.schema_arrow.names)
        raise UsageError(str(file), f"no column {absent[0]!r}", f"one of: {names}", "name the columns")
    for batch in parquet.iter_batches(_ROWS, columns=[text_column, embedding_column]):
        texts, column = batch.column(text_column), batch.column(embedding_column)
        if not pa.types.is_string(texts.type) and not pa.types.is_large_string(texts.type):
            raise UsageError(str(file), f"{text_column} is of {texts.type}", "strings", "name another column")
        if not _is_list_of_numbers(column.type):
            raise UsageError(
                str(file), f"{embedding_column} is of {column.type}", "lists of numbers", "name another column"
            )
        if texts.null_count or column.null_count:
            raise UsageError(str(file), "a row without text or vector", "one of each in every row", "leave the row out")
        if len(pc.list_value_length(column).unique()) > 1:
            raise UsageError(str(file), f"{embedding_column} has rows of different lengths", "vectors of one dimension")
        vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
        yield texts.to_pylist(), vectors.astype(np.float32)


def _open_parquet(file: Path) -> Any:
    if not file.is_file():
        raise UsageError(str(file), "no such file", "a parquet file", "check the path")
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise UsageError(str(file), str(error), "a parquet file") from None


def _is_list_of_numbers(kind: Any) -> bool:
    lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    numbers: bool = lists and (pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type))
    return numbers


def _folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob(f"*/{MANIFEST}") if not path.parent.name.startswith("."))


def _shards_of(folder: Path) -> list[Path]:
    return [folder / (name + SUFFIX) for name in list_shards(folder)]


def _describe(folder: Path) -> CacheFacts:
    encoding = read_json(folder / MANIFEST)
    rows = 0
    for path in _shards_of(folder):
        try:
            rows += len(Shard(path, int(encoding["dim"]), encoding["storage_dtype"]))
        except (EmbedistillError, KeyError):
            continue  # `verify` names it
    return CacheFacts(
        folder.name,
        str(encoding.get("teacher", "")),
        str(encoding.get("prompt", "")),
        rows,
        int(encoding.get("dim", 0)),
        str(encoding.get("storage_dtype", "")),
        folder_bytes(folder),
        (folder / MANIFEST).stat().st_mtime,
    )


def _sweep(folder: Path) -> None:
    """Remove parts that no process has touched for an hour, and shards that were set aside."""
    stale = [path for path in folder.glob(f".*{PART}") if time.time() - path.stat().st_mtime > _HOUR]
    for path in [*stale, *folder.glob("*" + DAMAGED)]:
        remove(path)


def _delete(folder: Path) -> bool:
    """Delete an encoding, unless a process is encoding into it."""
    try:
        with filelock.FileLock(folder / LOCK, timeout=0):
            remove(folder)
    except filelock.Timeout:
        return False
    return True


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, _ROWS)):
        yield batch
