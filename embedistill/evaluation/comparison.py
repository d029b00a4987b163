"""How much of the teacher a student keeps, how sure that is, and whether it is enough."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np

from embedistill.evaluation.metrics import (
    AVERAGE_PRECISION,
    SPEARMAN,
    V_MEASURE,
    Values,
    bootstrap,
    count_items,
)
from embedistill.evaluation.scoring import TEACHER, Result
from embedistill.progress import progress_bar

Verdict = Literal["PASS", "FAIL", "UNDECIDED"]
MAIN = {
    SPEARMAN: "STS",
    "ndcg@10": "retrieval",
    "accuracy": "classification",
    V_MEASURE: "clustering",
    AVERAGE_PRECISION: "pairs",
}
"""The metrics that are judged, one a kind of task, and the kind."""
_FEWEST = 20
"""Items: of fewer, nothing is decided, as a bootstrap of them says too little."""


@dataclass(frozen=True)
class Retention:
    """Student metric / teacher metric on the same items, with a 95 % interval, and the verdict against a margin.

    Where the verdict is UNDECIDED, `items_needed` says about how many items would decide it, were the value the true
    one: an interval narrows with the root of their number. On fewer than twenty items, or where the teacher is not
    surely above zero, it is always UNDECIDED.
    """

    value: float
    low: float
    high: float
    verdict: Verdict | None = None
    items_needed: int | None = None

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


@dataclass(frozen=True)
class Difference:
    """First model less second on a task's main metric, with a 95 % interval, and a test of whether there is one.

    Attributes:
        task: Its name.
        metric: Its main metric.
        first: A role.
        second: Another role.
        value: What the first has more.
        low: Of the interval.
        high: Of the interval.
        p_value: Two-sided, of no difference, by the paired bootstrap.
        p_corrected: For as many tasks as these two were compared on (Holm, 1979).
    """

    task: str
    metric: str
    first: str
    second: str
    value: float
    low: float
    high: float
    p_value: float
    p_corrected: float


@dataclass(frozen=True)
class Drawn:
    """One metric of one task: its value and its resamples by role."""

    task: str
    metric: str
    n_items: int
    values: dict[str, float]
    draws: dict[str, Values]


def compare_results(
    results: Sequence[Result], *, resamples: int, seed: int, margin: float | None = None
) -> tuple[list[Comparison], list[Difference]]:
    """Compare every role's results with the teacher's, task by task and metric by metric, and every two roles.

    Retention has a percentile interval from a paired bootstrap: the same resamples of items for all models (Efron and
    Tibshirani, 1993). Of two tasks of a kind or more a further row has the mean; its interval resamples the items of
    every task.

    Args:
        results: Results on the same items; where none has the role "teacher", there is no retention.
        resamples: Bootstrap resamples.
        seed: Of the resamples.
        margin: With it, retention in a main metric has a verdict: PASS when the interval is above 1 - margin, FAIL
            when below.
    """
    drawn = list(_draw_all(results, resamples, seed))
    drawn += list(_average(drawn))
    comparisons = [
        Comparison(one.task, one.metric, one.n_items, one.values, retain(one, margin if one.metric in MAIN else None))
        for one in drawn
    ]
    return comparisons, _test(drawn)


def _draw_all(results: Sequence[Result], resamples: int, seed: int) -> Iterator[Drawn]:
    with progress_bar("bootstrap", sum(len(result.metrics) for result in results), "metrics") as advance:
        for task in dict.fromkeys(result.task for result in results):
            peers = [result for result in results if result.task == task]
            yield from draw(peers, resamples, seed)
            advance(sum(len(peer.metrics) for peer in peers))


def draw(results: Sequence[Result], resamples: int, seed: int) -> Iterator[Drawn]:
    """Resample the items of one task, once for all its metrics and models."""
    task = results[0].task
    measured = [(metric, result) for result in results for metric in result.metrics]
    items = [(result.items, metric) for metric, result in measured]
    draws = bootstrap(items, resamples, seed + zlib.crc32(task.encode()))
    for metric in dict.fromkeys(metric for metric, _ in measured):
        rows = {result.role: row for (name, result), row in zip(measured, draws, strict=True) if name == metric}
        values = {result.role: result.metrics[metric] for name, result in measured if name == metric}
        yield Drawn(task, metric, count_items(results[0].items), values, rows)


def _average(drawn: Sequence[Drawn]) -> Iterator[Drawn]:
    """Yield the mean of two tasks of a kind or more, of the roles that did all of them."""
    for metric, kind in MAIN.items():
        some = [one for one in drawn if one.metric == metric]
        if len(some) < 2:
            continue
        roles = [role for role in some[0].values if all(role in one.values for one in some)]
        yield Drawn(
            f"{kind} mean",
            metric,
            sum(one.n_items for one in some),
            {role: float(np.mean([one.values[role] for one in some])) for role in roles},
            {role: np.mean([one.draws[role] for one in some], axis=0) for role in roles},
        )


def retain(drawn: Drawn, margin: float | None) -> dict[str, Retention]:
    """Return the retention of every role but the teacher; nothing where the teacher is not above zero."""
    if drawn.values.get(TEACHER, 0.0) <= 0:
        return {}  # there is nothing to keep
    retentions = {}
    reference = np.where(drawn.draws[TEACHER] == 0, np.nan, drawn.draws[TEACHER])
    is_sure = bool(np.percentile(drawn.draws[TEACHER], 2.5) > 0)
    for role, value in drawn.values.items():
        if role != TEACHER:
            low, high = (float(bound) for bound in np.nanpercentile(drawn.draws[role] / reference, [2.5, 97.5]))
            kept = Retention(value / drawn.values[TEACHER], low, high, decide(low, high, margin))
            if margin is not None and not (is_sure and drawn.n_items >= _FEWEST):
                kept = replace(kept, verdict="UNDECIDED")
            needed = _count_needed(kept, drawn.n_items, margin) if is_sure else None
            retentions[role] = replace(kept, items_needed=needed)
    return retentions


def choose_metric(first: Result, second: Result) -> str:
    """Return the metric that two models are compared by on a task: the main one, else the first that both have."""
    both = [name for name in first.metrics if name in second.metrics]
    return next((name for name in both if name in MAIN), both[0])


def decide(low: float, high: float, margin: float | None) -> Verdict | None:
    """Return the verdict on an interval of retention; None without a margin."""
    if margin is None:
        return None
    if low > 1 - margin:
        return "PASS"
    return "FAIL" if high < 1 - margin else "UNDECIDED"


def _count_needed(kept: Retention, n_items: int, margin: float | None) -> int | None:
    """Return how many items would bring the nearer end of the interval to the threshold."""
    if margin is None or kept.verdict != "UNDECIDED":
        return None
    distance = kept.value - (1 - margin)
    half = kept.value - kept.low if distance > 0 else kept.high - kept.value
    return max(_FEWEST, math.ceil(n_items * (half / distance) ** 2)) if abs(distance) > 1e-4 else None


def _test(drawn: Sequence[Drawn]) -> list[Difference]:
    """Test every two roles on every main metric, corrected for the tasks they share."""
    judged = [one for one in drawn if one.metric in MAIN and not one.task.endswith(" mean")]
    roles = list(dict.fromkeys(role for one in judged for role in one.values))
    found: list[Difference] = []
    for first, second in combinations(roles, 2):
        pair = [_subtract(one, first, second) for one in judged if {first, second} <= one.values.keys()]
        corrected = correct({row.task: row.p_value for row in pair})
        found += [replace(row, p_corrected=corrected[row.task]) for row in pair]
    return found


def _subtract(drawn: Drawn, first: str, second: str) -> Difference:
    draws = drawn.draws[first] - drawn.draws[second]
    low, high = (float(bound) for bound in np.percentile(draws, [2.5, 97.5]))
    p = float(min(1.0, 2 * (1 + min(np.sum(draws <= 0), np.sum(draws >= 0))) / (1 + len(draws))))
    p = max(p, 2.0 ** (1 - drawn.n_items))  # as few as n items can be that sure, by their signs
    value = drawn.values[first] - drawn.values[second]
    return Difference(drawn.task, drawn.metric, first, second, value, low, high, p, p)


def correct(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number by the step-down method of Holm (1979)."""
    corrected: dict[str, float] = {}
    worst = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[name]))
        corrected[name] = worst
    return corrected
