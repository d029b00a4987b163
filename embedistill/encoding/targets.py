"""Which of a teacher's vectors are no good to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import faiss
import numpy as np
import numpy.typing as npt

from embedistill.cache.store import EmbeddingCache
from embedistill.choices import Fault
from embedistill.teacher import Embeddings

Numbers = npt.NDArray[np.int64]
"""Numbers of texts."""

_CHUNK = 8192
_REFERENCE = 10_000
_NEIGHBOUR = 10
_FAR_OUT = 3.0


def find_faults(cache: EmbeddingCache, texts: Sequence[str]) -> dict[Fault, Numbers]:
    """Return the numbers of the distinct texts whose vectors have a fault, by fault; a vector may have several.

    Of texts with equal vectors all but the first are named. An outlier's distance (1 - cosine) to its 10th nearest
    neighbour among at most 10,000 of the vectors is more than three interquartile ranges above the third quartile
    (Tukey, Exploratory Data Analysis, 1977: far out).
    """
    rows = cache.locate(texts)
    norms, cut = cache.read_facts(rows)
    finite = np.isfinite(norms)
    usable = np.flatnonzero(finite & (norms > 0))
    return {
        "not-finite": np.flatnonzero(~finite),
        "zero-norm": np.flatnonzero(finite & (norms == 0)),
        "cut": np.flatnonzero(cut),
        "equal": usable[_find_repeated(cache, rows[usable])],
        "outlier": usable[_find_outliers(cache, rows[usable])],
    }


def _find_repeated(cache: EmbeddingCache, rows: Numbers) -> Numbers:
    sums = [hashlib.sha256(vector.tobytes()).digest() for _, vectors in _read(cache, rows) for vector in vectors]
    _, first = np.unique(np.array(sums, "S32"), return_index=True)
    return np.setdiff1d(np.arange(len(rows)), first)


def _find_outliers(cache: EmbeddingCache, rows: Numbers) -> Numbers:
    if len(rows) <= _NEIGHBOUR:
        return np.empty(0, np.int64)
    sample = np.unique(np.linspace(0, len(rows) - 1, min(_REFERENCE, len(rows))).astype(np.int64))
    index = faiss.IndexFlatIP(cache.dim)
    index.add(cache.read(rows[sample]))
    found = [index.search(vectors, _NEIGHBOUR + 1)[0][:, -1] for _, vectors in _read(cache, rows)]
    distances = 1 - np.concatenate(found)
    lower, upper = np.quantile(distances, [0.25, 0.75])
    return np.flatnonzero(distances > upper + _FAR_OUT * (upper - lower))


def _read(cache: EmbeddingCache, rows: Numbers) -> Iterator[tuple[int, Embeddings]]:
    for start in range(0, len(rows), _CHUNK):
        yield start, cache.read(rows[start : start + _CHUNK])
