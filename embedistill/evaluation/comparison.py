"""How much of the teacher a student keeps, how sure that is, and whether it is enough."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from embedistill.evaluation.metrics import SPEARMAN, Values, bootstrap, count_items
from embedistill.evaluation.scoring import NEIGHBOURS, Result
from embedistill.progress import progress_bar

Verdict = Literal["PASS", "FAIL", "UNDECIDED"]
STS_MEAN = "STS mean"
_OF_AGREEMENT = {"cosine", f"overlap@{NEIGHBOURS}"}  # the teacher has 1 by definition: a margin on it means nothing


@dataclass(frozen=True)
class Retention:
    """Student metric / teacher metric on the same items, with a 95 % interval, and the verdict against a margin."""

    value: float
    low: float
    high: float
    verdict: Verdict | None = None

    def __str__(self) -> str:
        """Say it in one line: 0.967 [0.955, 0.979] PASS."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" + (f" {self.verdict}" if self.verdict else "")


@dataclass(frozen=True)
class Comparison:
    """One metric of one task: the value of every role, and the retention of every role but the teacher."""

    task: str
    metric: str
    n_items: int
    values: dict[str, float]
    retention: dict[str, Retention]


def compare_results(
    results: Sequence[Result], *, resamples: int, seed: int, margin: float | None = None
) -> list[Comparison]:
    """Compare every role's results with the teacher's, task by task and metric by metric.

    Retention has a percentile interval from a paired bootstrap: the same resamples of items for both models. With two
    STS sets or more, a last row has the mean of their values; its interval resamples the items of every set.

    Args:
        results: Results on the same items; where none has the role "teacher", there is no retention.
        resamples: Bootstrap resamples.
        seed: Of the resamples.
        margin: With it, retention has a verdict: PASS when the interval is above 1 - margin, FAIL when below.
    """
    comparisons: list[Comparison] = []
    of_sts: list[tuple[dict[str, float], dict[str, Values]]] = []
    with progress_bar("bootstrap", sum(len(result.metrics) for result in results), "metrics") as advance:
        for task in dict.fromkeys(result.task for result in results):
            peers = {result.role: result for result in results if result.task == task}
            for metric in dict.fromkeys(name for peer in peers.values() for name in peer.metrics):
                having = {role: peer for role, peer in peers.items() if metric in peer.metrics}
                values = {role: peer.metrics[metric] for role, peer in having.items()}
                draws = {}
                for role, peer in having.items():
                    draws[role] = bootstrap(peer.items, metric, resamples, seed + zlib.crc32(task.encode()))
                    advance(1)
                n_items = count_items(next(iter(having.values())).items)
                judged = None if metric in _OF_AGREEMENT else margin
                comparisons.append(Comparison(task, metric, n_items, values, _retentions(values, draws, judged)))
                if metric == SPEARMAN:
                    of_sts.append((values, draws))
    return comparisons + _average(of_sts, sum(row.n_items for row in comparisons if row.metric == SPEARMAN), margin)


def _average(
    of_sts: Sequence[tuple[dict[str, float], dict[str, Values]]], n_items: int, margin: float | None
) -> list[Comparison]:
    """Return the mean of two STS sets or more as a row of its own."""
    if len(of_sts) < 2:
        return []
    roles = [role for role in of_sts[0][0] if all(role in values for values, _ in of_sts)]
    means = {role: float(np.mean([values[role] for values, _ in of_sts])) for role in roles}
    draws = {role: np.mean([drawn[role] for _, drawn in of_sts], axis=0) for role in roles}
    return [Comparison(STS_MEAN, SPEARMAN, n_items, means, _retentions(means, draws, margin))]


def decide(low: float, high: float, margin: float | None) -> Verdict | None:
    """Return the verdict on an interval of retention; None without a margin."""
    if margin is None:
        return None
    if low > 1 - margin:
        return "PASS"
    return "FAIL" if high < 1 - margin else "UNDECIDED"


def _retentions(values: dict[str, float], draws: dict[str, Values], margin: float | None) -> dict[str, Retention]:
    if not values.get("teacher"):
        return {}  # a teacher at zero has nothing to keep
    retentions = {}
    reference = np.where(draws["teacher"] == 0, np.nan, draws["teacher"])
    for role, value in values.items():
        if role != "teacher":
            low, high = (float(bound) for bound in np.nanpercentile(draws[role] / reference, [2.5, 97.5]))
            retentions[role] = Retention(value / values["teacher"], low, high, decide(low, high, margin))
    return retentions
