"""What else embeddings are good for: classes for a probe, topics for clusters, agreement with a teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression

from embedistill.evaluation.metrics import Values, cosines, neighbour_overlap
from embedistill.evaluation.retrieval import Embeddings, search_exactly

NEIGHBOURS = 10
_REFERENCES, _BLOCKS = 1_000, 10  # texts that all others are compared with, and how many times as many of these
_ITERATIONS, _SEED = 100, 42  # as mteb's
_STARTS = (
    10  # whole k-means from each, the tightest kept: mini-batches, as mteb's, are 7 points apart from seed to seed
)
_THRESHOLDS = np.arange(0.3, 0.91, 0.1)
_EDGES = np.linspace(-0.3, 1.0, 53)


def classify(fitted: Embeddings, fitted_labels: Sequence[str], texts: Embeddings, labels: Sequence[str]) -> list[float]:
    """Return for each text 1.0 where a logistic regression on the fitted ones finds its label, else 0.0."""
    probe = LogisticRegression(max_iter=_ITERATIONS, random_state=_SEED).fit(fitted, list(fitted_labels))
    return [float(found == label) for found, label in zip(probe.predict(texts), labels, strict=True)]


def cluster(texts: Embeddings, n_clusters: int) -> list[int]:
    """Return the number of each text's cluster, by the best of ten k-means (Lloyd, 1982)."""
    means = KMeans(n_clusters, n_init=_STARTS, random_state=_SEED)
    return [int(number) for number in means.fit_predict(texts)]


def agree(vectors: Embeddings, teacher: Embeddings, target: Embeddings | None) -> dict[str, list[float]]:
    """Return how a model agrees with its teacher on texts, a value a text.

    Args:
        vectors: The model's, unit vectors (n_texts, dim).
        teacher: The teacher's.
        target: The teacher's in the model's space, where it has such: adds the cosine of the two.

    Returns:
        cosine; overlap@10, the share of the ten nearest neighbours that the teacher has too; rank_correlation,
        Spearman's, of the similarities to (at most) 1,000 of the texts.
    """
    neighbours, reference = (_nearest(matrix, min(NEIGHBOURS, len(matrix) - 1)) for matrix in (vectors, teacher))
    blocks = zip(_iter_similarities(vectors), _iter_similarities(teacher), strict=True)
    ranks = (np.mean(_row_ranks(mine) * _row_ranks(theirs), axis=1) for mine, theirs in blocks)
    found = {
        f"overlap@{NEIGHBOURS}": neighbour_overlap(neighbours, reference),
        "rank_correlation": [float(value) for block in ranks for value in block],
    }
    return found if target is None else {"cosine": cosines(vectors, target), **found}


def compare_similarities(vectors: Embeddings, teacher: Embeddings) -> dict[str, Any]:
    """Return how far the similarities of (at most 10,000) different texts are from the teacher's, as distributions.

    Returns:
        distance, Wasserstein's: the mean shift of a similarity; thresholds, pairs of one of the teacher's and the one
        that as many pairs of texts are above by the model: what to use in its place; edges, model and teacher of a
        histogram, in shares.
    """
    mine, theirs = (
        np.sort(np.concatenate([block.ravel() for block in islice(_iter_similarities(matrix), _BLOCKS)]))
        for matrix in (vectors, teacher)
    )
    shares = np.searchsorted(theirs, _THRESHOLDS) / len(theirs)
    known = shares < 1 - 10 / len(theirs)  # ten pairs at least are above it
    histograms = [np.histogram(values, _EDGES)[0] / len(values) for values in (mine, theirs)]
    return {
        "distance": float(np.abs(mine - theirs).mean()),
        "thresholds": [
            [round(float(threshold), 2), round(float(np.quantile(mine, share)), 4)]
            for threshold, share in zip(_THRESHOLDS[known], shares[known], strict=True)
        ],
        "edges": [round(float(edge), 4) for edge in _EDGES],
        "model": [round(float(share), 6) for share in histograms[0]],
        "teacher": [round(float(share), 6) for share in histograms[1]],
    }


def _iter_similarities(vectors: Embeddings) -> Iterator[Values]:
    """Yield the cosines of texts with the first ones but themselves, (n_texts, n_references), a block at a time."""
    references = vectors[:_REFERENCES]
    for start in range(0, len(vectors), _REFERENCES):
        found: Values = (vectors[start : start + _REFERENCES] @ references.T).astype(np.float64)
        if start == 0:
            found = found[~np.eye(len(found), dtype=bool)].reshape(len(found), -1)
        yield found


def _row_ranks(similarities: Values) -> Values:
    """Return standardised ranks along each row."""
    ranks = rankdata(similarities, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    spread = np.maximum(ranks.std(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    standardised: Values = ranks / spread
    return standardised


def _nearest(vectors: Embeddings, k: int) -> Any:
    """Return each row's k nearest others."""
    found = search_exactly(vectors, vectors, k + 1)
    return np.array([[other for other in row if other != number][:k] for number, row in enumerate(found)], np.int64)
