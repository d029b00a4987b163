"""Metrics from values an item, and their bootstrap.

A resample is a column of weights: how often each item was drawn. Every metric is computed for many of them at once, and
for all models on the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Ranking = npt.NDArray[np.int64]
Items = Mapping[str, Sequence[float]]
"""Values an item, by name."""

SPEARMAN, AVERAGE_PRECISION, V_MEASURE = "spearman_cosine", "cosine_ap", "v_measure"
RETRIEVED = 1_000
"""How many documents a ranking has, as trec_eval's."""

_COLUMNS = {SPEARMAN: ("cosine", "score"), AVERAGE_PRECISION: ("cosine", "label"), V_MEASURE: ("cluster", "label")}
_MOST_COLUMNS, _CHUNK = 2_500, 10_000_000  # resamples at a time, and weights: rows long enough for numpy, in 40 MB

_Floats = npt.NDArray[Any]
_Metric = Callable[[_Floats], _Floats]  # from weights (n_items, n_resamples) to values (n_models, n_resamples)


def metric_names(items: Items) -> list[str]:
    """Return the metrics that these values an item give: one of several columns together, or else the means."""
    return next(([name] for name, columns in _COLUMNS.items() if set(columns) <= set(items)), list(items))


def metric_value(items: Items, metric: str) -> float:
    """Return a metric with every item counted once: spearman_cosine, cosine_ap, v_measure, or a column for its mean."""
    return float(_prepare([items], metric)(np.ones((count_items(items), 1)))[0, 0])


def count_items(items: Items) -> int:
    """Return how many items there are."""
    return len(next(iter(items.values())))


def bootstrap(models: Sequence[Items], metric: str, resamples: int, seed: int) -> Values:
    """Return a metric of models over the same resamples of their items, shape (n_models, resamples).

    Args:
        models: Values of the same items, one mapping a model.
        metric: As in `metric_value`.
        resamples: How many.
        seed: The same seed and number of items draw the same resamples.
    """
    n_items, compute = count_items(models[0]), _prepare(models, metric)
    size = max(1, min(_MOST_COLUMNS, _CHUNK // n_items))
    starts = range(0, resamples, size)
    seeds = np.random.SeedSequence([seed, n_items]).spawn(len(starts))

    def work(number: int) -> _Floats:
        n_columns = min(size, resamples - starts[number])
        return compute(_draw(n_items, n_columns, np.random.default_rng(seeds[number])))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return np.concatenate(list(pool.map(work, range(len(starts)))), axis=1).astype(np.float64)


def _draw(n_items: int, n_columns: int, random: np.random.Generator) -> _Floats:
    counts = np.empty((n_columns, n_items), np.float32)
    for row in counts:
        row[:] = np.bincount(random.integers(n_items, size=n_items, dtype=np.int32), minlength=n_items)
    return np.ascontiguousarray(counts.T)


def _prepare(models: Sequence[Items], metric: str) -> _Metric:
    """Do what does not depend on the weights, such as sorting, once."""
    first, second = (
        [np.asarray(items[column], np.float64) for items in models] for column in _COLUMNS.get(metric, (metric, metric))
    )
    match metric:
        case "spearman_cosine":
            return _prepare_spearman(first, second[0])
        case "cosine_ap":
            return _prepare_precision(first, second[0] > 0)
        case "v_measure":
            return _prepare_v_measure([column.astype(int) for column in first], second[0].astype(int))
    matrix = np.stack(first)
    return lambda weights: matrix.astype(weights.dtype) @ weights / weights.sum(axis=0)


def _prepare_spearman(variables: Sequence[Values], reference: Values) -> _Metric:
    """Prepare Spearman's rank correlation of each variable with a reference.

    An item with weight w counts as w items with the same value; equal values share their mean rank.
    """
    of_reference, of_variables = _group(reference), [_group(variable) for variable in variables]

    def compute(weights: _Floats) -> _Floats:
        half, n_drawn = weights / 2, weights.sum(axis=0)
        cubes = np.einsum("nr,nr,nr->r", weights, weights, weights)
        ranks = np.empty_like(weights)
        for group, rank in _walk(half, of_reference):
            ranks[group] = weights[group] * rank
        spread = _spread(weights, cubes, of_reference)
        found = np.zeros((len(variables), len(n_drawn)), weights.dtype)
        for row, groups in zip(found, of_variables, strict=True):
            covariance, part = np.zeros_like(n_drawn), np.empty_like(n_drawn)
            for group, rank in _walk(half, groups):
                covariance += np.multiply(rank, _total(ranks, group), out=part)
            spreads = np.sqrt(spread * _spread(weights, cubes, groups))
            np.divide(covariance, spreads, out=row, where=spreads > 0)
        return found

    return compute


def _group(values: npt.NDArray[Any]) -> list[Ranking]:
    """Return the numbers of the items that share a value, by rising value."""
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def _total(rows: _Floats, group: Ranking) -> _Floats:
    total: _Floats = rows[group[0]] if len(group) == 1 else rows[group].sum(axis=0)
    return total


def _walk(half: _Floats, groups: Sequence[Ranking]) -> Iterator[tuple[Ranking, _Floats]]:
    """Yield each group and its items' mean rank less the middle one, by column, of half the weights.

    The rank is an array that the next step changes.
    """
    rank = -half.sum(axis=0)
    for group in groups:
        weight = _total(half, group)
        rank += weight
        yield group, rank
        rank += weight


def _spread(weights: _Floats, cubes: _Floats, groups: Sequence[Ranking]) -> _Floats:
    """Return the sum of squared mean ranks less their middle, by column: (n^3 - the groups' sum of cubes) / 12."""
    ties = [group for group in groups if len(group) > 1]
    for group in ties:
        of_group = weights[group]
        cubes = cubes + of_group.sum(axis=0) ** 3 - np.einsum("nr,nr,nr->r", of_group, of_group, of_group)
    spread: _Floats = (weights.sum(axis=0) ** 3 - cubes) / 12
    return spread


def _prepare_precision(scores: Sequence[Values], positive: npt.NDArray[np.bool_]) -> _Metric:
    """Prepare average precision as scikit-learn defines it: the sum of precision times the step of recall."""
    grouped = [_group(-values) for values in scores]

    def compute(weights: _Floats) -> _Floats:
        hits = weights * positive[:, None]
        total = hits.sum(axis=0)
        found = []
        for groups in grouped:
            area = np.zeros_like(total)
            seen, hit, precision = np.zeros_like(total), np.zeros_like(total), np.zeros_like(total)
            for group in groups:
                seen += _total(weights, group)
                if positive[group].any():
                    step = _total(hits, group)
                    hit += step
                    np.divide(hit, seen, out=precision, where=seen > 0)
                    area += precision * step
            found.append(np.divide(area, total, out=np.zeros_like(total), where=total > 0))
        return np.stack(found)

    return compute


def _prepare_v_measure(clusters: Sequence[Ranking], labels: Ranking) -> _Metric:
    """Prepare the V-measure of clusterings: 2 I(cluster; label) / (H(cluster) + H(label))."""
    n_labels = int(labels.max()) + 1
    of_labels = _group(labels)
    of_clusters = [(_group(found), _group(found * n_labels + labels)) for found in clusters]

    def compute(weights: _Floats) -> _Floats:
        label_entropy = _entropy(weights, of_labels)
        found = np.ones((len(clusters), weights.shape[1]), weights.dtype)
        for row, (of_cluster, of_both) in zip(found, of_clusters, strict=True):
            apart = _entropy(weights, of_cluster) + label_entropy
            np.divide(2 * (apart - _entropy(weights, of_both)), apart, out=row, where=apart > 0)
        return found

    return compute


def _entropy(weights: _Floats, groups: Sequence[Ranking]) -> _Floats:
    entropy, n_drawn = np.zeros_like(weights[0]), weights.sum(axis=0)
    for group in groups:
        share = _total(weights, group) / n_drawn
        entropy -= share * np.log(share, out=np.zeros_like(share), where=share > 0)
    total: _Floats = entropy
    return total


def score_rankings(
    rankings: Ranking, relevance: Sequence[Mapping[int, float]], k: int = 10, recalls: Sequence[int] = (1, 10, 100)
) -> dict[str, list[float]]:
    """Score rankings, a value a query, as trec_eval does: `ndcg@k` with linear gain, `mrr@k`, `recall@...`, `map`.

    Args:
        rankings: Document numbers, best first, shape (n_queries, n_retrieved); -1 is no document.
        relevance: For each query the relevance of documents; what is not above 0 is not relevant.
        k: Cut-off of ndcg and mrr.
        recalls: Cut-offs of recall.
    """
    names = [f"ndcg@{k}", f"mrr@{k}", *(f"recall@{cut}" for cut in recalls), "map"]
    scores: dict[str, list[float]] = {name: [] for name in names}
    discounts = 1 / np.log2(np.arange(2, k + 2))
    for ranking, judged in zip(rankings, relevance, strict=True):
        relevant = {document: gain for document, gain in judged.items() if gain > 0}
        ideal = np.sort(list(relevant.values()))[::-1][:k]
        places = np.flatnonzero(np.isin(ranking, list(relevant)))
        gains = np.array([relevant[int(document)] for document in ranking[places]])
        high = places < k
        values = [
            float(gains[high] @ discounts[places[high]] / (ideal @ discounts[: len(ideal)])),
            1 / (int(places[0]) + 1) if high.any() else 0.0,
            *(int((places < cut).sum()) / len(relevant) for cut in recalls),
            float(np.sum(np.arange(1, len(places) + 1) / (places + 1)) / len(relevant)),
        ]
        for name, value in zip(names, values, strict=True):
            scores[name].append(value)
    return scores


def neighbour_overlap(neighbours: Ranking, reference: Ranking) -> list[float]:
    """Return for each row the share of the reference's neighbours that stand in it too, whatever their order."""
    return [len({*a.tolist()} & {*b.tolist()}) / len(b) for a, b in zip(neighbours, reference, strict=True)]


def cosines(first: npt.NDArray[Any], second: npt.NDArray[Any]) -> list[float]:
    """Return the cosine of each row of unit vectors with the same row of others."""
    return [float(value) for value in np.einsum("nd,nd->n", first, second, dtype=np.float64)]
