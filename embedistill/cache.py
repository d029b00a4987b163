"""Embeddings on disk, found by the hash of their text, under a key made of everything that changes a vector.

Layout of `<root>/<key>/`, readable with numpy and json alone:

    manifest.json             the settings that the key is the sha256 of
    <shard>.vectors.npy       (n, dim) float16, unit vectors
    <shard>.texts.npy         (n, 32) uint8, the sha256 of each text
    <shard>.json              rows and the sha256 of both files; written last, so its presence means complete
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from embedistill.errors import EmbedistillError
from embedistill.files import fingerprint, read_json, remove, sha256_file, write_json, written_aside
from embedistill.progress import note

Rows = npt.NDArray[np.int64]


class EmbeddingCache:
    """The vectors of one encoding: one teacher with one set of settings.

    Args:
        root: Folder of all encodings.
        encoding: Everything that changes a vector; its "dim" is the vectors' size.
    """

    def __init__(self, root: Path, encoding: Mapping[str, Any]) -> None:
        self.key = fingerprint(encoding)
        self.dim = int(encoding["dim"])
        self.folder = root / self.key
        self._rows: dict[bytes, int] = {}
        self._shards: list[npt.NDArray[np.float16]] = []
        self._starts: list[int] = [0]
        if not (self.folder / "manifest.json").is_file():
            write_json(self.folder / "manifest.json", dict(encoding))
        for manifest in sorted(self.folder.glob("*.json")):
            if manifest.name != "manifest.json":
                self._open_shard(manifest.stem)

    def __len__(self) -> int:
        """Return the number of vectors."""
        return self._starts[-1]

    def missing(self, texts: Sequence[str]) -> list[str]:
        """Return the distinct texts without a vector, in order."""
        return [text for text in dict.fromkeys(texts) if _hash(text) not in self._rows]

    def add(self, texts: Sequence[str], vectors: npt.NDArray[np.floating[Any]]) -> None:
        """Store one vector a text, shape (n_texts, dim). When this returns they are on the disk."""
        hashes = np.frombuffer(b"".join(_hash(text) for text in texts), np.uint8).reshape(len(texts), 32)
        shard = hashlib.sha256(hashes.tobytes()).hexdigest()[:16]
        files: dict[str, npt.NDArray[Any]] = {"vectors": np.asarray(vectors, np.float16), "texts": hashes}
        sums = {}
        for name, array in files.items():
            path = self.folder / f"{shard}.{name}.npy"
            with written_aside(path) as part, part.open("wb") as stream:
                np.save(stream, array, allow_pickle=False)
            sums[name] = sha256_file(path)
        write_json(self.folder / f"{shard}.json", {"rows": len(texts), "sha256": sums})
        self._open_shard(shard)

    def locate(self, texts: Sequence[str]) -> Rows:
        """Return the row of each text, shape (n_texts,).

        Raises:
            EmbedistillError: A text has no vector.
        """
        missing = self.missing(texts)
        if missing:
            raise EmbedistillError(
                f"cache {self.folder}",
                f"no vector for {len(missing)} texts, the first {missing[0]!r:.60}",
                do="run again",
            )
        return np.array([self._rows[_hash(text)] for text in texts], np.int64)

    def read(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Read vectors from the memory-mapped shards, shape (n_rows, dim)."""
        vectors = np.empty((len(rows), self.dim), np.float32)
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shards):
            here = shards == shard
            vectors[here] = self._shards[shard][rows[here] - self._starts[shard]]
        return vectors

    def lookup(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the vectors of texts, shape (n_texts, dim)."""
        return self.read(self.locate(texts))

    def _open_shard(self, name: str) -> None:
        """Open a shard; one that is damaged is forgotten, so that its texts are encoded again."""
        rows = read_json(self.folder / f"{name}.json")["rows"]
        try:
            vectors = np.load(self.folder / f"{name}.vectors.npy", mmap_mode="r", allow_pickle=False)
            hashes = np.load(self.folder / f"{name}.texts.npy", allow_pickle=False)
            damaged = vectors.shape != (rows, self.dim) or hashes.shape != (rows, 32)
        except (OSError, ValueError):
            damaged = True
        if damaged:
            note(f"Cache {self.folder}: shard {name} is damaged; its {rows:,} texts are encoded again")
            remove(self.folder / f"{name}.json")
            return
        start = len(self)
        self._rows.update((row.tobytes(), start + index) for index, row in enumerate(hashes))
        self._shards.append(vectors)
        self._starts.append(start + len(hashes))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
