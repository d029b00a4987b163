"""The cache of one encoding: which texts have a vector, and where it is."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import numpy.typing as npt

from embedistill.cache.shards import SUFFIX, Encoded, Shard, Vectors, list_shards, write_shard
from embedistill.errors import EmbedistillError
from embedistill.files import fingerprint, make_folder, read_json, sha256_file, write_json, written_aside
from embedistill.progress import note

MANIFEST = "manifest.json"
INDEX = "index"
LOCK = ".lock"
DAMAGED = ".damaged"

Rows = npt.NDArray[np.int64]
"""Where vectors are: the number of the shard, as this process counts them, times 2^32, plus the row; -1: nowhere."""

Hashes = npt.NDArray[np.bytes_]
"""The sha256 of texts, 32 bytes each."""

_HOUR = 3600.0
_RECENT_ROWS = (65_536, 1_048_576)
_RECENT_SHARDS = 512
_MERGE_SHARE = 16
_MERGED_ROWS = 65_536


class EmbeddingCache:
    """The vectors of one encoding: one teacher with one set of settings.

    Any number of processes may read and write one cache at the same time. See the package for the files.

    Args:
        root: Folder of all encodings.
        encoding: Everything that changes a vector; "dim" is the vectors' size and "storage_dtype" how they are kept.
    """

    _names: list[str]  # of the shards; their places are the numbers in `Rows`
    _numbers: dict[str, int]
    _n_indexed: int  # shards that the index covers, the first of them
    _texts: Hashes  # mapped from the index, sorted
    _rows: Rows
    _recent_texts: Hashes  # of the shards that the index lacks, sorted
    _recent_rows: Rows

    def __init__(self, root: Path, encoding: Mapping[str, Any]) -> None:
        self.key = fingerprint(encoding)
        self.dim, self.storage = int(encoding["dim"]), encoding.get("storage_dtype", "float16")
        self.folder = root / self.key
        make_folder(self.folder)
        if not (self.folder / MANIFEST).is_file():
            write_json(self.folder / MANIFEST, dict(encoding))
        self._touch()
        self._shards: dict[str, Shard] = {}
        self._forget()
        self._load_index()
        self.refresh()

    def __len__(self) -> int:
        """Return the number of vectors."""
        return len(self._texts) + len(self._recent_texts)

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct texts without a vector, in order."""
        distinct = list(dict.fromkeys(texts))
        return [text for text, row in zip(distinct, self._find(distinct), strict=True) if row < 0]

    def add(self, texts: Sequence[str], encoded: Encoded) -> None:
        """Store one vector a text. When this returns they are on the disk."""
        hashes = hash_texts(texts)
        self._learn({write_shard(self.folder, hashes.tobytes(), encoded, self.storage): hashes})

    def refresh(self) -> None:
        """Take up what other processes have written; a damaged shard is set aside, and its texts are missing."""
        there = list_shards(self.folder)
        if any(name not in there for name in self._names):
            self._forget()
        found = {}
        for name in sorted(there.keys() - self._numbers.keys()):
            try:
                found[name] = self._shard(name).texts.copy()  # a view would hold the file open
            except FileNotFoundError:
                continue  # another process has set it aside
            except EmbedistillError as error:
                set_aside(self.folder / (name + SUFFIX), error.found)
        self._learn(found)

    def locate(self, texts: Sequence[str]) -> Rows:
        """Return where the vector of each text is, shape (n_texts,).

        Raises:
            EmbedistillError: A text has no vector.
        """
        rows = self._find(texts)
        lost = np.flatnonzero(rows < 0)
        if lost.size:
            found = f"no vector for {len(lost)} texts, the first {texts[lost[0]]!r:.60}"
            raise EmbedistillError(f"cache {self.folder}", found, do="run again")
        return rows

    def read(self, rows: Rows) -> Vectors:
        """Read vectors from the mapped shards, shape (n_rows, dim)."""
        if time.monotonic() - self._touched > _HOUR:
            self._touch()
        vectors = np.empty((len(rows), self.dim), np.float32)
        for here, shard, inner in self._by_shard(rows):
            vectors[here] = shard.read(inner)
        return vectors

    def read_facts(self, rows: Rows) -> tuple[Vectors, npt.NDArray[np.bool_]]:
        """Return the norm of each vector as the model gave it, and whether its text was cut, shapes (n_rows,)."""
        norms, cut = np.empty(len(rows), np.float32), np.empty(len(rows), np.bool_)
        for here, shard, inner in self._by_shard(rows):
            norms[here], cut[here] = shard.read_facts(inner)
        return norms, cut

    def lookup(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of texts, shape (n_texts, dim)."""
        return self.read(self.locate(texts))

    def worst_cosine(self) -> float:
        """Return the smallest cosine of a stored vector to the one it was made of."""
        return min((self._shard(name).worst_cosine for name in self._names), default=1.0)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the cache for encoding into it; another process that does is waited for: no text is encoded twice."""
        lock = filelock.FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            note(f"Cache {self.folder}: another process is encoding into it; waiting for it to end")
            lock.acquire()
        try:
            self.refresh()
            yield
        finally:
            lock.release()

    def _touch(self) -> None:
        """Say that the cache is in use: `prune` goes by it."""
        self._touched = time.monotonic()
        with suppress(OSError):
            os.utime(self.folder / MANIFEST)

    def _find(self, texts: Sequence[str]) -> Rows:
        hashes = hash_texts(texts)
        rows = _search(self._texts, self._rows, hashes)
        lost = np.flatnonzero(rows < 0)
        rows[lost] = _search(self._recent_texts, self._recent_rows, hashes[lost])
        return rows

    def _by_shard(self, rows: Rows) -> Iterator[tuple[npt.NDArray[np.int64], Shard, Rows]]:
        order = np.argsort(rows, kind="stable")
        numbers = rows[order] >> 32
        for group in np.split(order, np.flatnonzero(np.diff(numbers)) + 1) if len(rows) else []:
            yield group, self._shard(self._names[rows[group[0]] >> 32]), rows[group] & 0xFFFFFFFF

    def _shard(self, name: str) -> Shard:
        if name not in self._shards:
            self._shards[name] = Shard(self.folder / (name + SUFFIX), self.dim, self.storage)
        return self._shards[name]

    def _learn(self, shards: Mapping[str, Hashes]) -> None:
        """Take up shards, by name with the texts of each."""
        texts, rows = [self._recent_texts], [self._recent_rows]
        for name, hashes in shards.items():
            if name in self._numbers:  # two processes wrote the same
                continue
            self._numbers[name] = len(self._names)
            self._names.append(name)
            texts.append(hashes)
            rows.append((np.int64(self._numbers[name]) << 32) + np.arange(len(hashes), dtype=np.int64))
        self._recent_texts, self._recent_rows = _sort(texts, rows)
        least, most = _RECENT_ROWS
        many = len(self._recent_texts) > min(most, max(least, len(self._texts) // _MERGE_SHARE))
        if many or len(self._names) - self._n_indexed > _RECENT_SHARDS:
            with suppress(OSError):  # a full or read-only disk: the index stays in memory
                self._write_index()

    def _forget(self) -> None:
        self._names = []
        self._numbers = {}
        self._n_indexed = 0
        self._texts, self._rows = np.empty(0, "S32"), np.empty(0, np.int64)
        self._recent_texts, self._recent_rows = np.empty(0, "S32"), np.empty(0, np.int64)
        self._shards.clear()

    def _load_index(self, names: Sequence[str] | None = None) -> None:
        """Map the index, if it is whole, of shards that are there as they were, and of those named if any are."""
        index = self.folder / INDEX
        try:
            contents = read_json(index / "contents.json")
            texts: Hashes = np.load(index / "texts.npy", mmap_mode="r", allow_pickle=False)
            rows: Rows = np.load(index / "rows.npy", mmap_mode="r", allow_pickle=False)
            whole = all(sha256_file(index / file) == digest for file, digest in contents["sha256"].items())
        except (OSError, ValueError, EmbedistillError):
            return  # it is made again
        there, covered = list_shards(self.folder), contents["shards"]
        as_named = names is None or list(covered) == list(names)
        if whole and as_named and all(there.get(name) == size for name, size in covered.items()):
            self._forget()
            self._texts, self._rows = texts, rows
            self._names, self._n_indexed = list(covered), len(covered)
            self._numbers = {name: number for number, name in enumerate(covered)}

    def _write_index(self) -> None:
        """Merge what is recent into the index, some thousand rows at a time: neither has to fit in memory twice."""
        places = np.searchsorted(self._texts, self._recent_texts)
        sizes = {name: (self.folder / (name + SUFFIX)).stat().st_size for name in self._names}
        with written_aside(self.folder / INDEX) as part:
            part.mkdir()
            _write_merged(part / "texts.npy", self._texts, self._recent_texts, places)
            _write_merged(part / "rows.npy", self._rows, self._recent_rows, places)
            sums = {file: sha256_file(part / file) for file in ("texts.npy", "rows.npy")}
            write_json(part / "contents.json", {"shards": sizes, "sha256": sums})
        self._load_index(self._names)


def hash_texts(texts: Sequence[str]) -> Hashes:
    """Return the sha256 of each text, shape (n_texts,), 32 bytes each."""
    digests = b"".join(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts)
    return np.frombuffer(digests, "S32")


def set_aside(shard: Path, reason: str) -> None:
    """Take a damaged shard out of the cache, so that its texts are encoded again; its bytes are kept beside it."""
    with suppress(FileNotFoundError):  # another process was first
        shard.replace(shard.with_suffix(DAMAGED))
    note(f"Cache {shard.parent}: shard {shard.stem[:12]} is damaged ({reason}); its texts are encoded again")


def _search(texts: Hashes, rows: Rows, wanted: Hashes) -> Rows:
    if not len(texts) or not len(wanted):
        return np.full(len(wanted), -1, np.int64)
    places = np.minimum(np.searchsorted(texts, wanted), len(texts) - 1)
    found: Rows = np.where(texts[places] == wanted, rows[places], -1)
    return found


def _sort(texts: Sequence[Hashes], rows: Sequence[Rows]) -> tuple[Hashes, Rows]:
    joined = np.concatenate(texts)
    order = np.argsort(joined, kind="stable")  # linear where the parts are sorted
    return joined[order], np.concatenate(rows)[order]


def _write_merged(path: Path, sorted_one: npt.NDArray[Any], other: npt.NDArray[Any], places: Rows) -> None:
    """Write an array to a .npy file, with the items of another one before the given places of it."""
    with path.open("wb") as file:
        shape = (len(sorted_one) + len(other),)
        np.lib.format.write_array_header_1_0(file, {"descr": other.dtype.str, "fortran_order": False, "shape": shape})
        for start in range(0, len(sorted_one) + 1, _MERGED_ROWS):
            first, last = np.searchsorted(places, [start, start + _MERGED_ROWS])
            chunk = np.insert(sorted_one[start : start + _MERGED_ROWS], places[first:last] - start, other[first:last])
            file.write(chunk.tobytes())
