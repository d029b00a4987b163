"""Metrics from one value an item, and their bootstrap.

A resample is a column of weights: how often each item was drawn. Every metric is computed for many of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Ranking = npt.NDArray[np.int64]

SPEARMAN = "spearman_cosine"
_CHUNK = 32  # columns: small enough for a processor's cache


def metric_names(items: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the metrics that these values an item give: Spearman of cosine and score, or else the means."""
    return [SPEARMAN] if "score" in items else list(items)


def metric_values(items: Mapping[str, Sequence[float]], metric: str, weights: Values) -> Values:
    """Return a metric for every column of weights (n_items, n_resamples) as (n_resamples,).

    Args:
        items: Values an item by name.
        metric: spearman_cosine, or a name in `items` for its mean.
        weights: How often each item counts.
    """
    if metric == SPEARMAN:
        return spearman(np.asarray(items["cosine"]), np.asarray(items["score"]), weights)
    means: Values = np.asarray(items[metric], np.float64) @ weights / weights.sum(axis=0)
    return means


def metric_value(items: Mapping[str, Sequence[float]], metric: str) -> float:
    """Return a metric with every item counted once."""
    return float(metric_values(items, metric, np.ones((count_items(items), 1)))[0])


def count_items(items: Mapping[str, Sequence[float]]) -> int:
    """Return how many items there are."""
    return len(next(iter(items.values())))


def bootstrap(items: Mapping[str, Sequence[float]], metric: str, resamples: int, seed: int) -> Values:
    """Return a metric over resamples of the items, shape (resamples,).

    The same seed and number of items draw the same resamples, so that two models' values are paired.
    """
    draws = _draw(count_items(items), resamples, seed)
    return np.concatenate([metric_values(items, metric, weights) for weights in draws])


def _draw(n_items: int, resamples: int, seed: int) -> Iterator[Values]:
    random = np.random.default_rng([seed, n_items])
    for start in range(0, resamples, _CHUNK):
        n_columns = min(_CHUNK, resamples - start)
        drawn = random.integers(n_items, size=(n_items, n_columns)) * n_columns + np.arange(n_columns)
        yield np.bincount(drawn.ravel(), minlength=n_items * n_columns).reshape(n_items, n_columns).astype(np.float64)


def spearman(first: Values, second: Values, weights: Values) -> Values:
    """Return Spearman's rank correlation of two variables (n_items,) for every column of weights, as (n_resamples,).

    An item with weight w counts as w items with the same value; equal values share their mean rank.
    """
    x, y = _mean_ranks(first, weights), _mean_ranks(second, weights)
    middle = (weights.sum(axis=0) + 1) / 2
    x -= middle
    y -= middle
    weighted = weights * x
    covariance = np.einsum("nr,nr->r", weighted, y)
    spread = np.sqrt(np.einsum("nr,nr->r", weighted, x) * np.einsum("nr,nr,nr->r", weights, y, y))
    correlation: Values = np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0)
    return correlation


def _mean_ranks(values: Values, weights: Values) -> Values:
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(values[order]) != 0])
    groups = np.add.reduceat(weights[order], starts, axis=0)
    ranks = np.cumsum(groups, axis=0) - groups / 2 + 0.5
    group_of_item = np.empty(len(values), np.int64)
    group_of_item[order] = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(values)]))
    return ranks[group_of_item]


def score_rankings(rankings: Ranking, relevance: Sequence[Mapping[int, float]], k: int = 10) -> dict[str, list[float]]:
    """Score rankings, a value a query, as trec_eval does: `ndcg@k` with linear gain, `mrr@k`, `recall@k`.

    Args:
        rankings: Document numbers, best first, shape (n_queries, at least k or all); -1 is no document.
        relevance: For each query the relevance of documents; what is not above 0 is not relevant.
        k: Cut-off.
    """
    scores: dict[str, list[float]] = {f"ndcg@{k}": [], f"mrr@{k}": [], f"recall@{k}": []}
    discounts = 1 / np.log2(np.arange(2, k + 2))
    for ranking, judged in zip(rankings, relevance, strict=True):
        gains = np.array([max(0.0, judged.get(int(document), 0.0)) for document in ranking[:k]])
        ideal = np.array(sorted((gain for gain in judged.values() if gain > 0), reverse=True))
        hits = np.flatnonzero(gains)
        scores[f"ndcg@{k}"].append(float(gains @ discounts[: len(gains)] / (ideal[:k] @ discounts[: len(ideal[:k])])))
        scores[f"mrr@{k}"].append(1 / (int(hits[0]) + 1) if hits.size else 0.0)
        scores[f"recall@{k}"].append(hits.size / len(ideal))
    return scores


def neighbour_overlap(neighbours: Ranking, reference: Ranking) -> list[float]:
    """Return for each row the share of the reference's neighbours that stand in it too, whatever their order."""
    return [len({*a.tolist()} & {*b.tolist()}) / len(b) for a, b in zip(neighbours, reference, strict=True)]


def cosines(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> list[float]:
    """Return the cosine of each row of unit vectors with the same row of others."""
    return [float(value) for value in np.einsum("nd,nd->n", first, second, dtype=np.float64)]
