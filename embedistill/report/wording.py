"""A report in words: which rows and models stand first, and how their figures are written, on any medium."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from embedistill.evaluation.comparison import MAIN, Comparison, Retention
from embedistill.evaluation.costs import ModelFacts
from embedistill.evaluation.scoring import DOCUMENTS, QUERIES, TEACHER
from embedistill.evaluation.segments import Segment
from embedistill.report.document import Report

_NAMED = 3  # rows or segments of a kind that a sentence names
_IN_REACH = 100  # times as many items as there are: no one goes and gets more


@dataclass(frozen=True)
class Roles:
    """Who is in a report.

    Attributes:
        teacher: "teacher", where it was scored.
        judged: Whom the verdict is on.
        others: Floors and baselines.
        mixed: Of a model whose queries or documents alone were its own: the model and which of the two, by role.
        names: What each is called: of a path or an id the part behind the last "/", where that is of one alone.
    """

    teacher: tuple[str, ...]
    judged: tuple[str, ...]
    others: tuple[str, ...]
    mixed: dict[str, tuple[str, str]]
    names: dict[str, str]

    @property
    def models(self) -> tuple[str, ...]:
        """The teacher, the judged, the others."""
        return self.teacher + self.judged + self.others


def list_roles(report: Report) -> Roles:
    """Return who is in a report, in its order."""
    found = dict.fromkeys(
        [*(model.role for model in report.models), *(role for row in report.comparisons for role in row.values)]
    )
    mixed = {
        role: (base, part)
        for role in found
        for base, _, part in [role.rpartition(" ")]
        if base in found and part in {QUERIES, DOCUMENTS}
    }
    return Roles(
        teacher=tuple(role for role in found if role == TEACHER),
        judged=tuple(role for role in report.judged if role in found),
        others=tuple(role for role in found if role not in {TEACHER, *report.judged, *mixed}),
        mixed=mixed,
        names=shorten(found),
    )


def shorten(names: Iterable[str]) -> dict[str, str]:
    """Return the part of each name behind its last "/", or all of it where another has the same."""
    short = {name: name.rstrip("/").rpartition("/")[2] or name for name in names}
    counts = Counter(short.values())
    return {name: brief if counts[brief] == 1 else name for name, brief in short.items()}


def find_main(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the rows of main metrics, and all rows of the tasks that have none."""
    having = {row.task for row in comparisons if row.metric in MAIN}
    return [row for row in comparisons if row.metric in MAIN or row.task not in having]


def find_averaged(report: Report) -> list[Comparison]:
    """Return the rows that a model's mean retention is taken over: of main metrics, or of any where there are none."""
    kept = [row for row in report.comparisons if row.retention and not row.task.endswith(" mean")]
    return [row for row in kept if row.metric in MAIN] or kept


def average(rows: Sequence[Comparison], role: str) -> float | None:
    """Return the mean retention of a role over rows; None where it lacks one of them."""
    if not rows or any(role not in row.retention for row in rows):
        return None
    return fmean(row.retention[role].value for row in rows)


def list_planned(report: Report) -> list[str]:
    """Return a line for each figure that was planned: the plan, what was measured, and by how much that is off."""
    return [
        f"{row['what']}: planned {row['planned']:.3g}, measured {row['measured']:.3g} "
        f"({row['measured'] / row['planned'] - 1:+.0%})"
        for row in report.planned
    ]


def list_facts(models: Sequence[ModelFacts]) -> Iterator[tuple[str, list[str]]]:
    """Yield what the models cost: a label and a value a model."""
    yield "parameters", [f"{model.parameters / 1e6:.1f} M" for model in models]
    yield "layers", ["" if model.layers is None else str(model.layers) for model in models]
    yield "dimension", [str(model.embedding_size) for model in models]
    yield "MB on disk", [f"{model.megabytes:.0f}" for model in models]
    measured: dict[str, list[str]] = {
        "texts/s": [_round(model.texts_per_second, int((model.texts_per_second or 0) < 10)) for model in models],
        "ms for a text, median": [_round(model.p50_ms, 1) for model in models],
        "ms, 95th percentile": [_round(model.p95_ms, 1) for model in models],
        "cold start, s": [_round(model.cold_start_seconds, 1) for model in models],
        "peak MB of memory": [_round(model.peak_megabytes) for model in models],
    }
    yield from ((label, values) for label, values in measured.items() if any(values))


def _round(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def format_retention(retention: Retention | None) -> str:
    """Return retention in per cent, such as 96.7 % [95.5, 97.9] PASS."""
    if retention is None:
        return ""
    return f"{format_interval(retention)}{f' {retention.verdict}' if retention.verdict else ''}"


def format_interval(retention: Retention) -> str:
    """Return retention in per cent with its interval, such as 96.7 % [95.5, 97.9]."""
    return f"{100 * retention.value:.1f} % [{100 * retention.low:.1f}, {100 * retention.high:.1f}]"


def format_percent(share: float | None) -> str:
    """Return a share in per cent, such as 96.7 %; nothing for None."""
    return "" if share is None else f"{100 * share:.1f} %"


def format_seconds(seconds: float) -> str:
    """Return a time as people say it: 12.5 s, 3 min 20 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def name_segment(segment: Segment, roles: Roles) -> str:
    """Return a segment in words, such as STS17, language: de; where several students are judged, of which."""
    student = f"{roles.names[segment.role]}, " if len(roles.judged) > 1 else ""
    return f"{student}{segment.task}, {segment.column}: {segment.value}"


def explain_documents(report: Report) -> Iterator[str]:
    """Yield which models searched the teacher's documents, where such were asked for."""
    borrowing = {
        role: None
        for by_role in report.details.values()
        for role, details in by_role.items()
        if role != TEACHER and details.get("documents") == TEACHER
    }
    if borrowing:
        yield f"In retrieval, the documents are the teacher's, and the queries alone those of {_join([*borrowing])}."


def explain_verdict(report: Report) -> list[str]:
    """Return why the verdict is what it is, a sentence a reason; nothing without a margin."""
    if report.margin is None or report.verdict is None:
        return []
    reasons = [*_explain_rows(report, report.margin), *explain_needed(report), *explain_segments(report)]
    if report.nothing_to_keep:
        names = [f"{row.task} {row.metric}" for row in report.nothing_to_keep]
        reasons.append(f"The teacher is not above zero on {_join(names)}: there is nothing to keep, and no verdict.")
    return reasons


def _list_judged(report: Report) -> list[tuple[str, Comparison, Retention]]:
    """Return the rows with a verdict, with what they are called."""
    roles = list_roles(report)
    several = len(roles.judged) > 1
    return [
        (f"{roles.names[role]}, {row.task} {row.metric}" if several else f"{row.task} {row.metric}", row, kept)
        for role in roles.judged
        for row in report.comparisons
        for kept in [row.retention.get(role)]
        if kept and kept.verdict
    ]


def _explain_rows(report: Report, margin: float) -> Iterator[str]:
    rows, asked = _list_judged(report), f"{100 * (1 - margin):g} %"
    passed = sum(kept.verdict == "PASS" for *_, kept in rows)
    of = f"{passed} of {len(rows)} metrics that are judged" if passed < len(rows) else f"all {passed} judged metrics"
    if rows:
        yield f"Surely more than {asked} is kept on {of}."
    for verdict, words in (("FAIL", f"Surely less than {asked} is kept on"), ("UNDECIDED", "Not yet sure on")):
        some = sorted((kept.value, name, kept) for name, _, kept in rows if kept.verdict == verdict)
        if some:
            yield f"{words} {_join([f'{name}, {format_interval(kept)}' for _, name, kept in some])}."


def explain_needed(report: Report) -> Iterator[str]:
    """Yield how many items would decide the undecided row that needs most, and which rows are too near the margin."""
    needed = [(kept.items_needed, name, row.n_items) for name, row, kept in _list_judged(report) if kept.items_needed]
    if in_reach := [(items, name, there) for items, name, there in needed if items <= _IN_REACH * there]:
        most, name, there = max(in_reach)
        yield f"About {most:,} items would decide {name}, which has {there:,}{_other(len(in_reach) - 1)}."
    if near := [name for items, name, there in needed if items > _IN_REACH * there]:
        yield f"Too near the margin for {_IN_REACH} times the items to decide: {_join(near)}."


def _other(count: int) -> str:
    return f"; the {count} others that are undecided need fewer" if count > 1 else ""


def explain_segments(report: Report) -> Iterator[str]:
    """Yield which segments fail, the worst first, where any does."""
    failed = [segment for segment in report.segments if segment.retention.verdict == "FAIL"]
    if failed and report.segment_margin is not None:
        roles = list_roles(report)
        names = [f"{name_segment(segment, roles)}, {format_interval(segment.retention)}" for segment in failed]
        yield f"Surely less than {100 * (1 - report.segment_margin):g} % is kept on the segment {_join(names)}."


def _join(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")
