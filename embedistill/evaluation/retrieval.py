"""Search over FAISS: rankings, and what an index costs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedistill.choices import IndexKind
from embedistill.evaluation.metrics import Ranking

Embeddings = npt.NDArray[np.float32]

_LINKS, _BEAM = 32, 128  # of HNSW
_CELL, _PROBED, _CODE = 39, 16, 8  # of IVF-PQ: vectors a cell at least, cells looked into, dimensions a byte
_PQ_FROM = 39 * 256  # vectors: fewer do not fill the codebooks
_LATENCY_QUERIES = 100


@dataclass(frozen=True)
class IndexCosts:
    """What a FAISS index costs, with the threads that FAISS has by default.

    Attributes:
        kind: flat, hnsw or ivfpq.
        build_seconds: Training and adding.
        megabytes: Serialised.
        queries_per_second: All queries in one call.
        p50_ms: Median latency of one query.
        p95_ms: 95th percentile of it.
    """

    kind: str
    build_seconds: float
    megabytes: float
    queries_per_second: float
    p50_ms: float
    p95_ms: float


def search_exactly(documents: Embeddings, queries: Embeddings, k: int) -> Ranking:
    """Return the numbers of the k documents with the largest inner product, shape (n_queries, k), by FAISS."""
    return _search(make_index(documents, "flat"), queries, min(k, len(documents)))


def search_index(documents: Embeddings, queries: Embeddings, k: int, kind: IndexKind) -> tuple[Ranking, IndexCosts]:
    """Search an index of a kind, and say what it costs.

    Returns:
        The numbers of k documents, shape (n_queries, k), -1 where it found fewer; and the costs.
    """
    start = time.perf_counter()
    index = make_index(documents, kind)
    built = time.perf_counter() - start
    start = time.perf_counter()
    ranking = _search(index, queries, min(k, len(documents)))
    rate = len(queries) / (time.perf_counter() - start)
    times = []
    for query in queries[:_LATENCY_QUERIES]:
        start = time.perf_counter()
        _search(index, query[None], 10)
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times, [50, 95])
    megabytes = len(faiss.serialize_index(index)) / 1e6
    return ranking, IndexCosts(kind, built, megabytes, rate, float(p50), float(p95))


def make_index(documents: Embeddings, kind: IndexKind) -> Any:
    """Return a FAISS index of unit vectors (n_documents, dim) by inner product.

    IVF-PQ has a byte for eight dimensions; with fewer than 9,984 documents, which its codebooks need, its cells hold
    whole vectors.
    """
    vectors, dim = np.ascontiguousarray(documents), documents.shape[1]
    n_cells = max(1, min(4 * int(len(vectors) ** 0.5), len(vectors) // _CELL))
    codes = f"PQ{dim // _CODE}" if len(vectors) >= _PQ_FROM and dim % _CODE == 0 else "Flat"
    factory = {"flat": "Flat", "hnsw": f"HNSW{_LINKS},Flat", "ivfpq": f"IVF{n_cells},{codes}"}[kind]
    index: Any = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    if kind == "hnsw":
        index.hnsw.efSearch = _BEAM
    if kind == "ivfpq":
        index.nprobe = min(_PROBED, n_cells)
    return index


def _search(index: Any, queries: Embeddings, k: int) -> Ranking:
    _, numbers = index.search(np.ascontiguousarray(queries), k)
    return np.asarray(numbers, np.int64)
