"""One shard of a cache: an Arrow file that is named by the sha256 of its bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from embedistill.choices import Storage
from embedistill.errors import EmbedistillError
from embedistill.files import sha256_file, written_aside

Vectors = npt.NDArray[np.float32]
"""Shape (n_texts, dim)."""

SUFFIX = ".arrow"
_NUMPY_TYPES = {"float32": "f4", "float16": "f2", "bfloat16": "u2", "int8": "i1"}
_ARROW_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "bfloat16": pa.uint16(), "int8": pa.int8()}


@dataclass(frozen=True)
class Encoded:
    """What a teacher made of some texts.

    Attributes:
        vectors: Unit vectors, shape (n_texts, dim); all zero or not finite where the model gave such.
        norms: Their lengths as the model gave them, shape (n_texts,).
        tokens: Tokens of each text that the model saw, shape (n_texts,); 0: not known.
        cut: Whether the model did not see all of a text, shape (n_texts,).
    """

    vectors: Vectors
    norms: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    cut: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls, raw: Vectors, tokens: npt.NDArray[np.int32] | None = None, cut: npt.NDArray[np.bool_] | None = None
    ) -> Encoded:
        """Make vectors of any length to unit vectors, in fp32."""
        raw = np.ascontiguousarray(raw, np.float32)
        norms = np.linalg.norm(raw, axis=1).astype(np.float32)
        with np.errstate(invalid="ignore"):
            vectors = raw / np.maximum(norms, np.finfo(np.float32).tiny)[:, None]
        return cls(
            vectors,
            norms,
            np.zeros(len(raw), np.int32) if tokens is None else tokens,
            np.zeros(len(raw), np.bool_) if cut is None else cut,
        )


class Shard:
    """A shard on disk. It holds no file open: each reading maps the file, and lets go of it.

    Args:
        path: The file.
        dim: Dimension of the vectors.
        storage: Number format of the vectors.

    Raises:
        EmbedistillError: The file is no such shard: it was cut or overwritten.
    """

    def __init__(self, path: Path, dim: int, storage: Storage) -> None:
        try:
            content = pa.memory_map(str(path)).read_buffer()
            table = pa.ipc.open_file(pa.BufferReader(content)).read_all()
            if table.schema.types != _schema(dim, storage).types:
                raise pa.ArrowInvalid(f"columns {table.schema.types}")
            table.validate()
            columns = {name: table[name].chunk(0) for name in table.column_names}
            metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
            self.worst_cosine = float(metadata["cosine"])
            self._scale = np.array(json.loads(metadata["scale"]), np.float32) if "scale" in metadata else None
        except (OSError, IndexError, KeyError, AttributeError, ValueError, pa.ArrowException) as error:
            if not _is_of_content(error):
                raise
            do = "see: embedistill cache verify"
            raise EmbedistillError(f"shard {path}", str(error), "a shard as it was written", do) from error
        self._path, self._dim, self._storage, self._rows = path, dim, storage, len(table)
        values = columns["vector"].values
        parts = {"vector": values, **{name: columns[name] for name in ("text", "norm", "cut")}}
        self._offsets = {name: part.buffers()[1].address - content.address for name, part in parts.items()}

    def __len__(self) -> int:
        """Return the number of vectors."""
        return self._rows

    @property
    def texts(self) -> npt.NDArray[np.bytes_]:
        """The sha256 of each text, shape (n_texts,), mapped."""
        return self._map("text", "S32", (self._rows,))

    def read(self, rows: npt.NDArray[np.int64]) -> Vectors:
        """Return vectors by row, shape (n_rows, dim), in fp32."""
        stored = self._map("vector", _NUMPY_TYPES[self._storage], (self._rows, self._dim))
        return _from_storage(stored[rows], self._storage, self._scale)

    def read_facts(self, rows: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Return the norms of vectors and whether their texts were cut, by row, shapes (n_rows,)."""
        bits = np.unpackbits(self._map("cut", "u1", ((self._rows + 7) // 8,)), bitorder="little")
        return self._map("norm", "f4", (self._rows,))[rows], bits[rows].astype(np.bool_)

    def _map(self, column: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        with self._path.open("rb", buffering=0) as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(content, dtype, math.prod(shape), self._offsets[column]).reshape(shape)


def write_shard(folder: Path, texts: bytes, encoded: Encoded, storage: Storage) -> str:
    """Write a shard and return its name. When this returns it is on the disk, and what it holds is acknowledged.

    Args:
        folder: Where to.
        texts: The sha256 of each text, 32 bytes each.
        encoded: Their vectors.
        storage: Number format to keep them in.
    """
    stored, scale = _to_storage(encoded.vectors, storage)
    worst = _worst_cosine(encoded.vectors, _from_storage(stored, storage, scale))
    metadata = {"storage": storage, "cosine": f"{worst:.7f}"}
    if scale is not None:
        metadata["scale"] = json.dumps([float(value) for value in scale])
    dim = stored.shape[1]
    columns = [
        pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(stored), [None, pa.py_buffer(texts)]),
        pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel(), _ARROW_TYPES[storage]), dim),
        pa.array(encoded.norms, pa.float32()),
        pa.array(encoded.tokens, pa.int32()),
        pa.array(encoded.cut, pa.bool_()),
    ]
    schema = _schema(dim, storage).with_metadata(metadata)
    stream = pa.BufferOutputStream()
    with pa.ipc.new_file(stream, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    content = stream.getvalue()
    name = hashlib.sha256(content).hexdigest()
    with written_aside(folder / (name + SUFFIX)) as part, part.open("wb") as file:
        file.write(content)
    return name


def list_shards(folder: Path) -> dict[str, int]:
    """Return the bytes of each shard in a folder, by name."""
    return {path.stem: path.stat().st_size for path in sorted(folder.glob("*" + SUFFIX))}


def is_intact(path: Path) -> bool:
    """Say whether a shard's bytes can be read and are those that it was written with."""
    try:
        return sha256_file(path) == path.stem
    except OSError as error:
        if not _is_of_content(error):
            raise
        return False


def _is_of_content(error: Exception) -> bool:
    """Say whether an error is of what a file holds: not of too many open files, say, or of a disk that is away."""
    return getattr(error, "errno", None) in {None, errno.EIO}


def _schema(dim: int, storage: Storage) -> Any:
    vector = pa.list_(_ARROW_TYPES[storage], dim)
    fields = [("text", pa.binary(32)), ("vector", vector), ("norm", pa.float32()), ("tokens", pa.int32())]
    return pa.schema([*fields, ("cut", pa.bool_())])


def _to_storage(vectors: Vectors, storage: Storage) -> tuple[npt.NDArray[Any], Vectors | None]:
    match storage:
        case "bfloat16":
            bits = np.ascontiguousarray(vectors).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
            return np.where(np.isnan(vectors), 0x7FC0, rounded).astype(np.uint16), None
        case "int8":
            finite = np.nan_to_num(vectors, posinf=0, neginf=0)
            scale = np.maximum(np.abs(finite).max(axis=0), np.finfo(np.float32).tiny) / 127
            return np.rint(finite / scale).astype(np.int8), scale.astype(np.float32)
        case _:
            return vectors.astype(storage), None


def _from_storage(stored: npt.NDArray[Any], storage: Storage, scale: Vectors | None) -> Vectors:
    match storage:
        case "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        case "int8":
            return stored.astype(np.float32) * (1 if scale is None else scale)
        case _:
            return stored.astype(np.float32)


def _worst_cosine(vectors: Vectors, kept: Vectors) -> float:
    """Return the smallest cosine of a vector to what is kept of it; of vectors that have a direction."""
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(kept, axis=1)
    usable = np.isfinite(lengths) & (lengths > 0)
    cosines = (vectors[usable] * kept[usable]).sum(axis=1) / lengths[usable]
    return float(cosines.min()) if cosines.size else 1.0
