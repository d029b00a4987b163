"""The sections of a report's page: what each holds, in order. One that has nothing to say is left out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from embedistill.report.document import Report
from embedistill.report.figures import Look, assign_looks, draw_bars, draw_curve, draw_histograms
from embedistill.report.parts import About, Beside, Figure, Folded, Grid, Paragraph, Part, Quotes, Section, Source
from embedistill.report.quality import (
    tell_contamination,
    tell_disagreements,
    tell_retention,
    tell_segments,
    tell_tradeoff,
    tell_verdict,
)
from embedistill.report.wording import Roles, format_percent, format_seconds, list_facts, list_roles

_OPEN_ROWS = 20
_NOT_A_TERM = {"epoch", "step", "learning_rate", "grad_norm"}
_LOST = {
    "after filters": ["bad", "short", "damaged", "language"],
    "after deduplication": ["duplicate", "near_duplicate"],
    "selected": ["not_selected"],
    "not in the evaluation": ["in_evaluation", "in_holdout"],
}
"""Stages of the funnel, and what is lost on the way to each."""


@dataclass(frozen=True)
class Surroundings:
    """What else a run's folder holds.

    Attributes:
        log: Of the training: the entries.
        recipe: As it was resolved.
        record: Versions, hardware.
    """

    log: Sequence[Mapping[str, float]] = ()
    recipe: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)


def list_sections(report: Report, around: Surroundings) -> list[Section]:
    """Return the sections of a report's page that have something to say."""
    roles = list_roles(report)
    looks = assign_looks(roles)
    head = f"Verdict: {report.verdict}" if report.verdict else "In short"
    sections = [
        Section("verdict", head, list(tell_verdict(report, roles)), report.verdict or ""),
        Section("retention", "What is kept, by task", list(tell_retention(report, roles, looks))),
        Section("tradeoff", "Quality against speed and size", list(tell_tradeoff(report, roles, looks))),
        Section("models", "What the models cost", list(_tell_models(report, roles))),
        Section("segments", "Segments", list(tell_segments(report, roles, looks))),
        Section("contamination", "Texts of tasks that were trained on", list(tell_contamination(report))),
        Section("similarities", "Similarities of texts", list(_tell_similarities(report, roles, looks))),
        Section("indexes", "Search indexes", list(_tell_indexes(report, roles))),
        Section("disagreements", "Where teacher and student differ most", list(tell_disagreements(report))),
        Section("training", "Training", list(_tell_training(around.log))),
        Section("data", "Data", list(_tell_data(report))),
        Section("time", "Time", list(_tell_time(report))),
        Section("recipe", "Recipe, versions and hardware", list(_tell_origin(around))),
    ]
    return [section for section in sections if section.parts]


def _tell_models(report: Report, roles: Roles) -> Iterator[Part]:
    if report.models:
        labels, values = zip(*list_facts(report.models), strict=True)
        rows = [
            [roles.names[model.role], model.name, *facts]
            for model, facts in zip(report.models, zip(*values, strict=True), strict=True)
        ]
        yield Grid("What the models cost, measured in one run", ["model", "name", *labels], rows, prose=(0, 1))
    if report.planned:
        rows = [
            [
                row["what"],
                f"{row['planned']:.3g}",
                f"{row['measured']:.3g}",
                f"{row['measured'] / row['planned'] - 1:+.0%}",
            ]
            for row in report.planned
        ]
        yield Grid("What was planned", ["figure", "planned", "measured", "off by"], rows)


def _tell_similarities(report: Report, roles: Roles, looks: Mapping[str, Look]) -> Iterator[Part]:
    found = [
        (task, role, details["similarities"])
        for task, by_role in report.details.items()
        for role, details in by_role.items()
        if "similarities" in details and role not in roles.teacher
    ]
    judged = [(task, role, some) for task, role, some in found if role in roles.judged and roles.teacher]
    for number, one in enumerate(judged):
        yield Beside([_draw_similarities(number, *one, looks), _list_thresholds(roles, *one)])
    if found:
        rows = [[roles.names.get(role, role), task, f"{some['distance']:.4f}"] for task, role, some in found]
        caption = "How far a similarity is from the teacher's on average, as distributions (Wasserstein)"
        yield Grid(caption, ["model", "task", "distance"], rows, prose=(0, 1))


def _draw_similarities(
    number: int, task: str, role: str, found: Mapping[str, Any], looks: Mapping[str, Look]
) -> Figure:
    names = [looks[one].name if one in looks else one for one in ("teacher", role)]
    about = About(
        f"figure-similarities-{number}",
        f"Distribution of the similarities of two different texts on {task}, of {names[0]} and {names[1]}: their "
        f"distance is {found['distance']:.4f}.",
        f"Similarities of two different texts on {task}, in shares of the pairs.",
    )
    shown = {"teacher": found["teacher"], role: found["model"]}
    return draw_histograms(about, found["edges"], shown, looks=looks)


def _list_thresholds(roles: Roles, task: str, role: str, found: Mapping[str, Any]) -> Grid:
    name = roles.names[role]
    rows = [[f"{theirs:.2f}", f"{mine:.4f}"] for theirs, mine in found["thresholds"]]
    caption = f"Thresholds on {task} that as many pairs are above"
    return Grid(caption, ["a threshold of the teacher", f"in its place, of {name}"], rows)


def _tell_indexes(report: Report, roles: Roles) -> Iterator[Part]:
    rows = [
        [
            task,
            roles.names.get(role, role),
            index["kind"],
            f"{index['build_seconds']:.2f}",
            f"{index['megabytes']:.1f}",
            f"{index['queries_per_second']:,.0f}",
            f"{index['p50_ms']:.2f}",
            f"{index['p95_ms']:.2f}",
        ]
        for task, by_role in report.details.items()
        for role, details in by_role.items()
        if (index := details.get("index"))
    ]
    if rows:
        columns = ["task", "model", "index", "s to build", "MB", "queries/s", "ms, median", "ms, 95th percentile"]
        yield Grid("What searching costs", columns, rows, prose=(0, 1, 2), open_rows=_OPEN_ROWS)


def _tell_training(log: Sequence[Mapping[str, float]]) -> Iterator[Part]:
    curves = dict(_find_curves(log))
    if not curves:
        return
    figures: list[Figure] = []
    rows = []
    for name, (steps, values) in curves.items():
        words = name.replace("_", " ")
        ends = f"{words}: {values[0]:.4g} at first, {values[-1]:.4g} at last"
        about = About(f"figure-training-{len(figures)}", f"Course of {ends}, over {steps[-1]:g} steps.", ends)
        figures.append(draw_curve(about, steps, values))
        rows.append([words, *(f"{value:.4g}" for value in (values[0], values[-1], min(values), max(values)))])
    yield Paragraph("The loss, its terms, and readings on texts that are not trained on (dev), by step.")
    yield Beside(figures, narrow=True)
    yield Folded("The numbers", [Grid("Training in numbers", ["reading", "first", "last", "least", "most"], rows)])


def _find_curves(log: Sequence[Mapping[str, float]]) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Yield steps and values of the loss, its terms, and the readings on dev texts; of two points or more."""
    training = [entry for entry in log if "loss" in entry]
    readings = [entry for entry in log if any(name.startswith("dev_") for name in entry)]
    for entries in (training, readings):
        for name in dict.fromkeys(name for entry in entries for name in entry if name not in _NOT_A_TERM):
            points = [(entry["step"], entry[name]) for entry in entries if math.isfinite(entry.get(name, math.nan))]
            if len(points) > 1:
                steps, values = zip(*points, strict=True)
                yield name, (list(steps), list(values))


def _tell_data(report: Report) -> Iterator[Part]:
    if not report.corpus:
        return
    rows = [[name.replace("_", " "), f"{count:,}"] for name, count in report.corpus.items()]
    grid = Grid("What became of the records", ["what became of them", "records"], rows)
    stages = _count_stages(report.corpus)
    if stages:
        words = ", ".join(f"{name} {count:,}" for name, count in stages)
        about = About("figure-funnel", f"Records left: {words}.", "Records that were left, stage by stage.")
        yield Beside([draw_bars(about, stages), grid])
    else:
        yield grid
    for name, texts in report.examples.items():
        if texts:
            yield Folded(f"Examples: {name.replace('_', ' ')}", [Quotes("", texts)])


def _count_stages(corpus: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return how many records were left after each stage; nothing where it is not known how many were read."""
    if "read" not in corpus:
        return []
    left = corpus["read"]
    stages = [("read", left)]
    for name, losses in _LOST.items():
        left -= sum(corpus.get(loss, 0) for loss in losses)
        stages.append((name, left))
    return [*stages, *((name, corpus[name]) for name in ("train", "holdout") if name in corpus)]


def _tell_time(report: Report) -> Iterator[Part]:
    if report.seconds:
        total = sum(report.seconds.values())
        rows = [
            [stage, format_seconds(seconds), format_percent(seconds / (total or 1))]
            for stage, seconds in report.seconds.items()
        ]
        rows.append([f"all: {total / 3600:.2f} hours", format_seconds(total), ""])
        yield Grid("Time by stage", ["stage", "time", "share"], rows)


def _tell_origin(around: Surroundings) -> Iterator[Part]:
    facts = {
        "commit": around.record.get("git_commit") or "",
        "seed": around.record.get("seed", ""),
        **around.record.get("hardware", {}),
    }
    tables = {
        "Versions": around.record.get("versions", {}),
        "Hardware and origin": {name: value for name, value in facts.items() if value not in ("", [])},
    }
    yield from _beside(
        Grid(caption, ["what", "which"], [[name, _write_value(value)] for name, value in rows.items()], prose=(0, 1))
        for caption, rows in tables.items()
        if rows
    )
    if around.recipe:
        yield Source("Recipe", around.recipe)


def _beside(parts: Iterable[Part]) -> Iterator[Beside]:
    found = list(parts)
    if found:
        yield Beside(found)


def _write_value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
