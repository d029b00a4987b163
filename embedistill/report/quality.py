"""Sections of a report's page on how good the models are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from embedistill.evaluation.comparison import Comparison, Difference, Retention
from embedistill.evaluation.costs import ModelFacts
from embedistill.evaluation.segments import Segment
from embedistill.report.document import Report
from embedistill.report.figures import Look, Row, draw_intervals, draw_tradeoff
from embedistill.report.parts import About, Beside, Figure, Folded, Grid, Paragraph, Part, Points, Quotes
from embedistill.report.wording import (
    Roles,
    average,
    explain_documents,
    explain_verdict,
    find_averaged,
    find_main,
    format_interval,
    format_percent,
    name_segment,
)

_OPEN_ROWS = 20
_TRAINED_ON = "† Some of the texts were trained on."


def tell_verdict(report: Report, roles: Roles) -> Iterator[Part]:
    """Yield what it takes to pass, and why it is what it is."""
    if report.verdict and report.margin is not None:
        line = (
            f"To pass, {100 * (1 - report.margin):g} % of the teacher has to be kept, for sure, on every judged metric"
        )
        if report.segment_margin is not None:
            line += f", and no segment may surely keep less than {100 * (1 - report.segment_margin):g} %"
        yield Paragraph(f"{line}.")
    if points := [
        *(line for role in roles.judged for line in _summarise(report, roles, role)),
        *explain_documents(report),
        *explain_verdict(report),
    ]:
        yield Points(points)


def _summarise(report: Report, roles: Roles, role: str) -> Iterator[str]:
    """Yield one line of what a model keeps on average, and at what cost."""
    rows = find_averaged(report)
    kept = average(rows, role)
    facts = {model.role: model for model in report.models}
    if kept is None:
        return
    line = f"The mean over {_count(len(rows), 'metric')} is {format_percent(kept)} of the teacher"
    if role in facts and set(roles.teacher) & facts.keys():
        line += _compare_costs(facts[role], facts[roles.teacher[0]])
    yield f"{roles.names[role]}: {line}." if len(roles.judged) > 1 else f"{line}."


def _compare_costs(model: ModelFacts, teacher: ModelFacts) -> str:
    words = f", with {100 * model.parameters / teacher.parameters:.3g} % of its parameters"
    if model.texts_per_second and teacher.texts_per_second:
        words += f", at {model.texts_per_second / teacher.texts_per_second:.3g} times its texts a second"
    return words


def tell_retention(report: Report, roles: Roles, looks: Mapping[str, Look]) -> Iterator[Part]:
    """Yield what is kept of every task, with intervals, and how every two models differ."""
    main = find_main(report.comparisons)
    kept = [row for row in main if any(role in row.retention for role in roles.judged)]
    if kept:
        yield Beside([_draw_retention(report, kept, roles, looks), _list_retention(report, kept, roles)])
    if report.contamination:
        yield Paragraph(_TRAINED_ON)
    if report.skipped:
        yield Paragraph(f"Left out, as their data could not be had: {', '.join(report.skipped)}.")
    for summary, rows in (
        ("Every model on these metrics", main),
        ("Other metrics", [row for row in report.comparisons if row not in main]),
    ):
        if rows:
            grid = Grid(f"{summary}: value, and in brackets what is kept", *_list_values(report, rows, roles))
            yield grid if not kept else Folded(summary, [grid])
    yield from _list_differences(report, roles)


def _draw_retention(report: Report, rows: Sequence[Comparison], roles: Roles, looks: Mapping[str, Look]) -> Figure:
    drawn = [
        Row(
            label=f"{_name_task(report, row)} {row.metric}",
            note=format_interval(row.retention[roles.judged[0]]) if len(roles.judged) == 1 else "",
            intervals={role: _ends(row.retention[role]) for role in roles.judged if role in row.retention},
            marks={role: row.retention[role].value for role in roles.others if role in row.retention},
        )
        for row in rows
    ]
    least = min((row.retention[role].value, row.task) for row in rows for role in roles.judged if role in row.retention)
    label = (
        f"Share of the teacher's metric that {_join(roles, roles.judged)} keeps on {_count(len(rows), 'metric')}, with "
        f"95 % intervals; the least is {format_percent(least[0])}, on {least[1]}. The table beside has all."
    )
    about = About(
        "figure-retention", label, f"What is kept of the teacher, with 95 % intervals. {_explain_lines(report.margin)}"
    )
    return draw_intervals(about, drawn, looks=looks, threshold=None if report.margin is None else 1 - report.margin)


def _explain_lines(margin: float | None) -> str:
    line = "The solid line is the teacher"
    if margin is not None:
        line += f", the dashed one what has to be kept, {100 * (1 - margin):g} %"
    return f"{line}. Floors and baselines are the small marks; < and > are further out."


def _list_retention(report: Report, rows: Sequence[Comparison], roles: Roles) -> Grid:
    several = len(roles.judged) > 1
    columns = ["task and metric", *(["model"] if several else []), "kept [95 %]", "verdict", "items"]
    cells = [
        [
            f"{_name_task(report, row)} {row.metric}",
            *([roles.names[role]] if several else []),
            format_interval(row.retention[role]),
            row.retention[role].verdict or "",
            f"{row.n_items:,}",
        ]
        for row in rows
        for role in roles.judged
        if role in row.retention
    ]
    return _make_grid("What is kept, with its 95 % interval", columns, cells, prose=(0, 1) if several else (0,))


def _make_grid(
    caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], prose: Collection[int] = (0,)
) -> Grid:
    """Return a table without the columns that are empty, as that of verdicts is where there is no margin."""
    filled = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    kept = [[row[number] for number in filled] for row in rows]
    return Grid(caption, [columns[number] for number in filled], kept, prose, open_rows=_OPEN_ROWS)


def _list_values(report: Report, rows: Sequence[Comparison], roles: Roles) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of every model's values; queries or documents alone have rows of their own."""
    models = roles.models
    cells = []
    for row in rows:
        values = [_format_value(row, role) for role in models]
        cells.append([f"{_name_task(report, row)} {row.metric}", f"{row.n_items:,}", *values])
        for part in dict.fromkeys(part for role, (_, part) in roles.mixed.items() if role in row.values):
            mixed = {base: role for role, (base, other) in roles.mixed.items() if other == part}
            values = [_format_value(row, mixed[role]) if role in mixed else "" for role in models]
            cells.append([f"{row.task} {row.metric}, only the {part} by the model", f"{row.n_items:,}", *values])
    return ["task and metric", "items", *(roles.names[role] for role in models)], cells


def _format_value(row: Comparison, role: str) -> str:
    if role not in row.values:
        return ""
    kept = row.retention.get(role)
    return f"{row.values[role]:.4f}" + (f" ({format_percent(kept.value)})" if kept else "")


def _list_differences(report: Report, roles: Roles) -> Iterator[Folded]:
    names = roles.names
    judged = [row for row in report.differences if {row.first, row.second} & {*roles.judged}]
    others = [row for row in report.differences if row not in judged]
    for summary, rows in (("Tests of the differences to other models", judged), ("Tests of further pairs", others)):
        if rows:
            caption = f"{summary}: first less second, by the paired bootstrap; p is corrected for the tasks (Holm)"
            columns = ["task and metric", "first", "second", "difference [95 %]", "corrected p"]
            yield Folded(
                summary, [Grid(caption, columns, [_list_difference(row, names) for row in rows], prose=(0, 1, 2))]
            )


def _list_difference(row: Difference, names: Mapping[str, str]) -> list[str]:
    p = "< 0.001" if row.p_corrected < 0.001 else f"{row.p_corrected:.3f}"
    difference = f"{row.value:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
    first, second = (names.get(role, role) for role in (row.first, row.second))
    return [f"{row.task} {row.metric}", first, second, difference, p]


def tell_tradeoff(report: Report, roles: Roles, looks: Mapping[str, Look]) -> Iterator[Part]:
    """Yield models by what they keep and what they cost."""
    rows = find_averaged(report)
    means = {role: average(rows, role) for role in roles.models} | dict.fromkeys(roles.teacher, 1.0)
    kept = {model: mean for model in report.models if (mean := means.get(model.role)) is not None}
    if not rows or len(kept) < 2:
        return
    yield Paragraph(
        f"Mean retention is that of {_count(len(rows), 'metric')}. The dotted line joins the models that no "
        "other beats in both."
    )
    yield Beside(list(_draw_tradeoffs(kept, roles, looks)))
    columns = ["model", "mean retention", "texts a second", "MB on disk", "million parameters"]
    cells = [
        [roles.names[model.role], format_percent(mean), *map(_format_cost, _list_costs(model))]
        for model, mean in kept.items()
    ]
    yield Folded("The numbers", [Grid("Mean retention, speed and size", columns, cells)])


def _draw_tradeoffs(kept: Mapping[ModelFacts, float], roles: Roles, looks: Mapping[str, Look]) -> Iterator[Figure]:
    for number, (name, cost) in enumerate({"speed": "texts a second", "size": "MB on disk"}.items()):
        less = name == "size"
        found = [(model.role, _list_costs(model)[number], mean) for model, mean in kept.items()]
        points = {role: (value, mean) for role, value, mean in found if value}
        if len(points) > 1:
            values = "; ".join(f"{roles.names[role]} {x:.3g}, {format_percent(y)}" for role, (x, y) in points.items())
            better = "further left" if less else "further right"
            about = About(
                f"figure-{name}",
                f"Models by {cost} and mean retention: {values}.",
                f"Mean retention against {cost}: {better} and higher is better.",
            )
            yield draw_tradeoff(about, points, looks=looks, cost=cost, less_is_better=less)


def _list_costs(model: ModelFacts) -> list[float | None]:
    return [model.texts_per_second, model.megabytes, model.parameters / 1e6]


def _format_cost(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def tell_segments(report: Report, roles: Roles, looks: Mapping[str, Look]) -> Iterator[Part]:
    """Yield what is kept on parts of the tasks, the least first."""
    if not report.segments or not roles.judged:
        return
    worst = sorted(report.segments, key=lambda segment: segment.retention.value)
    if report.segment_margin is not None:
        yield Paragraph(_count_segments(worst, 1 - report.segment_margin))
    columns = ["segment", "kept [95 %]", "verdict", "items"]
    cells = [
        [name_segment(one, roles), format_interval(one.retention), one.retention.verdict or "", f"{one.n_items:,}"]
        for one in worst
    ]
    grid = _make_grid("What is kept on segments, the least first", columns, cells)
    yield Beside([_draw_segments(worst[:_OPEN_ROWS], report, roles, looks), grid])
    columns = ["segment", "metric", "items", "teacher", "student"]
    cells = [_list_segment(one, roles) for one in worst]
    grid = Grid("Values on segments", columns, cells, prose=(0, 1), open_rows=len(cells))
    yield Folded("The values of teacher and student", [grid])


def _count_segments(segments: Sequence[Segment], threshold: float) -> str:
    counts = Counter(segment.retention.verdict for segment in segments)
    return (
        f"Of {_count(len(segments), 'segment')} {counts['FAIL']} surely keep less than {100 * threshold:g} %, "
        f"{counts['PASS']} surely more, and of {counts['UNDECIDED']} it is not sure. Verdicts are corrected for the "
        "number of segments, so that they ask for more than the intervals show."
    )


def _draw_segments(segments: Sequence[Segment], report: Report, roles: Roles, looks: Mapping[str, Look]) -> Figure:
    rows = [Row(name_segment(one, roles), "", {one.role: _ends(one.retention)}) for one in segments]
    label = (
        f"What is kept on the {_count(len(segments), 'segment')} with the least, with 95 % intervals; the least is "
        f"{format_percent(segments[0].retention.value)}, on {rows[0].label}. The table beside has all."
    )
    about = About("figure-segments", label, "The segments on which the least is kept, with 95 % intervals.")
    margin = report.segment_margin
    return draw_intervals(about, rows, looks=looks, threshold=None if margin is None else 1 - margin)


def _list_segment(segment: Segment, roles: Roles) -> list[str]:
    values = [f"{segment.n_items:,}", f"{segment.teacher:.4f}", f"{segment.student:.4f}"]
    return [name_segment(segment, roles), segment.metric, *values]


def tell_contamination(report: Report) -> Iterator[Part]:
    """Yield which tasks have texts that were trained on."""
    if report.contamination:
        rows = [[task, f"{count:,}"] for task, count in report.contamination.items()]
        yield Paragraph("What is kept on these tasks may be more than on texts that the student has not seen.")
        yield Grid("Distinct texts of a task that were trained on", ["task", "texts"], rows)


def tell_disagreements(report: Report) -> Iterator[Part]:
    """Yield the items on which teacher and student differ most."""
    for item in report.disagreements:
        title = f"{item['task']}, {item['value']}: teacher {item['teacher']:.4g}, student {item['student']:.4g}"
        yield Quotes(title, item["texts"])


def _name_task(report: Report, row: Comparison) -> str:
    return f"{row.task} †" if row.task in report.contamination else row.task


def _ends(kept: Retention) -> tuple[float, float, float]:
    return kept.low, kept.value, kept.high


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _join(roles: Roles, some: Sequence[str]) -> str:
    return " and ".join(roles.names[role] for role in some)
