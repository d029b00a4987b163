"""Metrics from values an item, and their bootstrap.

A resample is a row of weights: how often each item was drawn. Every metric is computed for many of them at once, and
for all models on the same ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Values = npt.NDArray[np.float64]
Ranking = npt.NDArray[np.int64]
Items = Mapping[str, Sequence[float]]
"""Values an item, by name."""

SPEARMAN, AVERAGE_PRECISION, V_MEASURE = "spearman_cosine", "cosine_ap", "v_measure"
RETRIEVED = 1_000
"""How many documents a ranking has, as trec_eval's."""

_COLUMNS = {SPEARMAN: ("cosine", "score"), AVERAGE_PRECISION: ("cosine", "label"), V_MEASURE: ("cluster", "label")}
_CHUNK = 400_000  # weights at a time: few enough for a processor's cache

_Floats = npt.NDArray[Any]
_Metric = Callable[[_Floats], _Floats]  # from weights (n_resamples, n_items) to values (n_resamples, n_models)


def metric_names(items: Items) -> list[str]:
    """Return the metrics that these values an item give: one of several columns together, or else the means."""
    return next(([name] for name, columns in _COLUMNS.items() if set(columns) <= set(items)), list(items))


def metric_value(items: Items, metric: str) -> float:
    """Return a metric with every item counted once: spearman_cosine, cosine_ap, v_measure, or a column for its mean."""
    return float(_prepare([(items, metric)])(np.ones((1, count_items(items))))[0, 0])


def count_items(items: Items) -> int:
    """Return how many items there are."""
    return len(next(iter(items.values())))


def bootstrap(measured: Sequence[tuple[Items, str]], resamples: int, seed: int) -> Values:
    """Return metrics over the same resamples of items, shape (n_measured, resamples).

    Args:
        measured: Values of the same items, of a model each, and a metric as in `metric_value`: either one metric of
            several columns for all, or means.
        resamples: How many.
        seed: The same seed and number of items draw the same resamples.
    """
    n_items, compute = count_items(measured[0][0]), _prepare(measured)
    size = max(1, _CHUNK // n_items)
    starts = range(0, resamples, size)
    seeds = np.random.SeedSequence([seed, n_items]).spawn(len(starts))

    def work(number: int) -> _Floats:
        n_rows = min(size, resamples - starts[number])
        return compute(_draw(n_rows, n_items, np.random.default_rng(seeds[number])))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        draws = np.concatenate(list(pool.map(work, range(len(starts)))))
    return np.ascontiguousarray(draws.T, np.float64)


def _draw(n_rows: int, n_items: int, random: np.random.Generator) -> _Floats:
    drawn = torch.from_numpy(random.integers(n_items, size=(n_rows, n_items)))
    weights: _Floats = torch.zeros(drawn.shape).scatter_add_(1, drawn, torch.ones(drawn.shape)).numpy()
    return weights


def _prepare(measured: Sequence[tuple[Items, str]]) -> _Metric:
    """Do what does not depend on the weights, such as sorting, once."""
    joint = next((metric for _, metric in measured if metric in _COLUMNS), None)
    if joint is None:
        means = np.stack([np.asarray(items[column], np.float64) for items, column in measured], axis=1)
        return lambda weights: weights @ means.astype(weights.dtype) / weights.sum(axis=1, keepdims=True)
    first, second = ([np.asarray(items[column], np.float64) for items, _ in measured] for column in _COLUMNS[joint])
    match joint:
        case "spearman_cosine":
            return _prepare_spearman(first, second[0])
        case "cosine_ap":
            return _prepare_precision(first, second[0] > 0)
    return _prepare_v_measure([column.astype(int) for column in first], second[0].astype(int))


@dataclass(frozen=True)
class _Order:
    """Items by rising value: their numbers, where each run of equal values starts, and how long it is."""

    items: Ranking
    starts: Ranking
    lengths: Ranking

    @cached_property
    def _tied(self) -> tuple[Ranking, Ranking]:
        """The places of items in runs of two and more, and where in that list such a run starts."""
        lengths = self.lengths[self.lengths > 1]
        return np.flatnonzero(np.repeat(self.lengths > 1, self.lengths)), np.cumsum(lengths) - lengths

    @property
    def _is_mostly_distinct(self) -> bool:
        return 2 * len(self.starts) > len(self.items)

    def merge(self, rows: _Floats) -> _Floats:
        """Return the sum over each run, shape (n_rows, n_runs)."""
        return np.add.reduceat(np.take(rows, self.items, axis=1), self.starts, axis=1)

    def total(self, rows: _Floats) -> _Floats:
        """Return the sum over each run, shape (n_rows, n_runs).

        Where few values are equal, sums are kept at the first place of a run and its others are zero, which are runs
        without weight: (n_rows, n_items), in a fifth of the time.
        """
        if not self._is_mostly_distinct:
            return self.merge(rows)
        ordered: _Floats = np.take(rows, self.items, axis=1)
        places, starts = self._tied
        if len(places):
            sums = np.add.reduceat(ordered[:, places], starts, axis=1)
            ordered[:, places] = 0
            ordered[:, places[starts]] = sums
        return ordered

    def list_runs(self) -> Ranking:
        """Return the column of `total` that each item is in."""
        runs = np.empty_like(self.items)
        columns = self.starts if self._is_mostly_distinct else np.arange(len(self.starts))
        runs[self.items] = np.repeat(columns, self.lengths)
        return runs


def _sort(values: npt.NDArray[Any]) -> _Order:
    items = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[items], prepend=values[items[0]] - 1))
    return _Order(items, starts, np.diff(starts, append=len(items)))


def _cumulate(rows: _Floats) -> _Floats:
    """Return cumulative sums along rows. numpy's hold Python's lock, so that no other thread works meanwhile."""
    sums: _Floats = torch.from_numpy(rows).cumsum(dim=1).numpy()
    return sums


def _dot(first: _Floats, second: _Floats) -> _Floats:
    product: _Floats = np.einsum("rn,rn->r", first, second)
    return product


def _prepare_spearman(variables: Sequence[Values], reference: Values) -> _Metric:
    """Prepare Spearman's rank correlation of each variable with a reference.

    An item with weight w counts as w items with the same value; equal values share their mean rank.
    """
    of_reference, of_variables = _sort(reference), [_sort(variable) for variable in variables]
    runs = of_reference.list_runs()

    def compute(weights: _Floats) -> _Floats:
        ranks, spread = _rank(of_reference.total(weights))
        weighted = weights * np.take(ranks, runs, axis=1)
        found = np.zeros((len(weights), len(variables)), weights.dtype)
        for column, order in enumerate(of_variables):
            ranks, own = _rank(order.total(weights))
            spreads = np.sqrt(spread * own)
            covariance = _dot(order.total(weighted), ranks)
            np.divide(covariance, spreads, out=found[:, column], where=spreads > 0)
        return found

    return compute


def _rank(totals: _Floats) -> tuple[_Floats, _Floats]:
    """Return the mean rank of each run less the middle one, and the sum of their squares over all items."""
    ranks = _cumulate(totals)
    middle = ranks[:, -1:] / 2
    ranks -= totals / 2
    ranks -= middle
    return ranks, _dot(totals * ranks, ranks)


def _prepare_precision(scores: Sequence[Values], positive: npt.NDArray[np.bool_]) -> _Metric:
    """Prepare average precision as scikit-learn defines it: the sum of precision times the step of recall."""
    orders = [_sort(-values) for values in scores]

    def compute(weights: _Floats) -> _Floats:
        hits = weights * positive
        found = np.zeros((len(weights), len(scores)), weights.dtype)
        for column, order in enumerate(orders):
            steps, seen = order.total(hits), _cumulate(order.total(weights))
            hit = _cumulate(steps)
            precision = np.divide(hit, seen, out=np.zeros_like(hit), where=seen > 0)
            np.divide(_dot(steps, precision), hit[:, -1], out=found[:, column], where=hit[:, -1] > 0)
        return found

    return compute


def _prepare_v_measure(clusters: Sequence[Ranking], labels: Ranking) -> _Metric:
    """Prepare the V-measure of clusterings: 2 I(cluster; label) / (H(cluster) + H(label)).

    Items with the same label that are in the same cluster of every model count as one with the sum of their weights.
    """
    cells, cell_of_item = np.unique(np.stack([*clusters, labels]), axis=1, return_inverse=True)
    of_cells = _sort(cell_of_item)
    *clusters, labels = cells
    n_labels = int(labels.max()) + 1
    of_labels = _sort(labels)
    of_clusters = [(_sort(found), _sort(found * n_labels + labels)) for found in clusters]

    def compute(weights: _Floats) -> _Floats:
        weights = of_cells.merge(weights)
        label_entropy = _entropy(of_labels.total(weights))
        found = np.ones((len(weights), len(clusters)), weights.dtype)
        for column, (of_cluster, of_both) in enumerate(of_clusters):
            apart = _entropy(of_cluster.total(weights)) + label_entropy
            shared = 2 * (apart - _entropy(of_both.total(weights)))
            np.divide(shared, apart, out=found[:, column], where=apart > 0)
        return found

    return compute


def _entropy(totals: _Floats) -> _Floats:
    share = totals / totals.sum(axis=1, keepdims=True)
    return -_dot(share, np.log(share, out=np.zeros_like(share), where=share > 0))


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
