"""Which records of a corpus are used, where there are more than can be."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedistill.choices import By
from embedistill.corpus.records import Record
from embedistill.progress import progress_bar

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""From texts to cheap unit vectors, (n_texts, dim)."""

_CHUNK = 8192
_CLUSTER_RECORDS = 50
_MOST_CLUSTERS = 2_000
_SAMPLE_PER_CLUSTER = 50


def select(records: Sequence[Record], size: int | None, by: By, embed: Embed | None = None) -> list[Record]:
    """Return so many records, in the order they came.

    random takes the first, so that the order has to be one by chance. The others cut the corpus into groups and take as
    even a number of each as there are, first come first: by source; by length, a group for each doubling of characters;
    by diversity, in k-means clusters of cheap embeddings. cost takes of the groups by length in proportion to their
    number divided by the root of their mean length, which is the best sample that a budget of characters buys (optimal
    allocation, Neyman, 1934, where texts of all lengths vary alike).

    Args:
        records: In random order.
        size: How many; None: all.
        by: How.
        embed: What diversity is told by.
    """
    if size is None or size >= len(records):
        return list(records)
    weights: dict[str, float] = {}
    match by:
        case "random":
            return list(records[:size])
        case "source":
            groups = [record.source for record in records]
        case "length" | "cost":
            groups = [str(len(record.text).bit_length()) for record in records]
            if by == "cost":
                weights = _weigh(records, groups)
        case "diversity":
            if embed is None:
                raise ValueError("diversity needs embed")
            groups = _cluster(records, min(size // _CLUSTER_RECORDS + 1, _MOST_CLUSTERS), embed)
    quotas = share_out(Counter(groups), size, weights)
    chosen = []
    for record, group in zip(records, groups, strict=True):
        if quotas[group] > 0:
            quotas[group] -= 1
            chosen.append(record)
    return chosen


def share_out(counts: Counter[str], size: int, weights: Mapping[str, float] | None = None) -> dict[str, int]:
    """Return how many to take of each group, `size` in all or all there are.

    As near in proportion to the weights, equal ones by default, as their counts allow.
    """
    weigh = {group: (weights or {}).get(group, 1.0) for group in counts}
    order = sorted(counts, key=lambda group: (counts[group] / weigh[group], group))
    quotas, left = {}, size
    weights_left = list(accumulate(weigh[group] for group in reversed(order)))[::-1]
    for group, weight_left in zip(order, weights_left, strict=True):
        quotas[group] = min(counts[group], int(left * weigh[group] / weight_left + 1e-9))
        left -= quotas[group]
    return quotas


def _weigh(records: Sequence[Record], groups: Sequence[str]) -> dict[str, float]:
    """Return the number of each group's records, divided by the root of their mean length."""
    counts, characters = Counter(groups), Counter[str]()
    for record, group in zip(records, groups, strict=True):
        characters[group] += len(record.text)
    return {group: count / math.sqrt(characters[group] / count) for group, count in counts.items()}


def _cluster(records: Sequence[Record], n_clusters: int, embed: Embed) -> list[str]:
    """Return the cluster of each record; centres are found in the first of them."""
    fitted = max(n_clusters * _SAMPLE_PER_CLUSTER, _CHUNK)
    groups: list[str] = []
    centres: Any = None
    with progress_bar("cheap embeddings", len(records), "texts") as advance:
        for start, end in pairwise([0, *range(fitted, len(records), _CHUNK), len(records)]):
            vectors = embed([record.text for record in records[start:end]])
            centres = centres or find_centres(vectors[: n_clusters * _SAMPLE_PER_CLUSTER], n_clusters)
            groups += [str(group) for group in centres.search(vectors, 1)[1][:, 0]]
            advance(end - start)
    return groups


def find_centres(vectors: npt.NDArray[np.float32], n_clusters: int) -> Any:
    """Return a FAISS index of the centres that spherical k-means finds in unit vectors, shape (n_vectors, dim)."""
    kmeans = faiss.Kmeans(vectors.shape[1], n_clusters, niter=10, spherical=True, seed=0, min_points_per_centroid=1)
    kmeans.train(vectors)
    return kmeans.index
