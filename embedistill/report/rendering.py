"""A report for people: a table in the terminal, a self-contained page in the browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jinja2
from rich.markup import escape
from rich.table import Table

from embedistill.evaluation.comparison import Comparison
from embedistill.evaluation.scoring import DOCUMENTS, QUERIES
from embedistill.files import read_json, write_text
from embedistill.report.document import Report
from embedistill.report.sections import Surroundings, list_sections
from embedistill.report.wording import (
    Roles,
    explain_documents,
    explain_needed,
    explain_segments,
    find_main,
    format_interval,
    format_percent,
    format_retention,
    list_facts,
    list_planned,
    list_roles,
)

PAGE = "report.html"


def to_table(report: Report) -> Table:
    """Return the report as one table: a row a figure, a column a model, and one of what each judged model keeps.

    Of models that are not judged a row says what they keep; of the judged ones it has their queries or documents alone
    beneath, where they were searched with those of the teacher.
    """
    roles = list_roles(report)
    table = Table(title=escape(report.name), title_justify="left", caption_justify="left")
    table.add_column("", no_wrap=True)
    for role in roles.models:
        table.add_column(escape(roles.names[role]), justify="right", overflow="fold")
        if role in roles.judged:
            table.add_column("keeps [95 %]", justify="right", no_wrap=True)
    for cells in [*_list_costs(report, roles), None, *_list_metrics(report, roles)]:
        if cells is None:
            table.add_section()
        else:
            table.add_row(*map(escape, cells))
    table.caption = "\n".join(escape(line) for line in _list_captions(report)) or None
    return table


def _list_costs(report: Report, roles: Roles) -> Iterator[list[str]]:
    for label, values in list_facts(report.models):
        by_role = dict(zip((model.role for model in report.models), values, strict=True))
        cells = [label]
        for role in roles.models:
            cells += [by_role.get(role, ""), *([""] if role in roles.judged else [])]
        yield cells


def _list_metrics(report: Report, roles: Roles) -> Iterator[list[str]]:
    for row in find_main(report.comparisons):
        yield [f"{row.task} {row.metric}", *_list_cells(row, roles)]
        for part in (QUERIES, DOCUMENTS):
            cells = _list_mixed(row, roles, part)
            if any(cells):
                yield [f"  with its {part} alone", *cells]


def _list_cells(row: Comparison, roles: Roles) -> list[str]:
    cells = []
    for role in roles.models:
        value = f"{row.values[role]:.4f}" if role in row.values else ""
        kept = row.retention.get(role)
        if role in roles.judged:
            cells += [value, format_retention(kept)]
        else:
            cells.append(format_percent(kept.value) if kept else value)
    return cells


def _list_mixed(row: Comparison, roles: Roles, part: str) -> list[str]:
    """Return the cells of the judged models whose queries or documents alone were their own."""
    by_model = {base: role for role, (base, other) in roles.mixed.items() if other == part and role in row.values}
    cells = []
    for model in roles.models:
        if model in roles.judged:
            role = by_model.get(model, "")
            kept = row.retention.get(role)
            cells += [f"{row.values[role]:.4f}" if role else "", format_interval(kept) if kept else ""]
        else:
            cells.append("")
    return cells


def _list_captions(report: Report) -> Iterator[str]:
    if report.skipped:
        yield f"left out, no data: {', '.join(report.skipped)}"
    yield from explain_documents(report)
    yield from list_planned(report)
    yield from explain_needed(report)
    yield from explain_segments(report)
    if report.contamination:
        counts = ", ".join(f"{task} {count:,}" for task, count in report.contamination.items())
        yield f"texts of tasks that were trained on: {counts}"


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return the entries of a run's trainings, their steps counted through; none where there is no log."""
    entries: list[dict[str, float]] = []
    for path in (folder / "training_log.jsonl", *sorted(folder.glob("training_log-*.jsonl"))):
        first = max((entry["step"] for entry in entries), default=0)
        lines = path.read_text().splitlines() if path.is_file() else []
        entries += [entry | {"step": first + entry["step"]} for entry in map(json.loads, lines)]
    return entries


def write_page(report: Report, folder: Path) -> Path:
    """Write report.html from the report and from what else the run's folder holds, and return its path."""
    run, recipe = folder / "run.json", folder / "recipe.yaml"
    around = Surroundings(
        log=read_log(folder),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        record=read_json(run) if run.is_file() else {},
    )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("embedistill.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["tie"] = _tie
    page = environment.get_template("page.html").render(name=report.name, sections=list_sections(report, around))
    write_text(folder / PAGE, page.lstrip())
    return folder / PAGE


def _tie(text: str) -> str:
    """Keep a number and its per cent sign, and the two ends of an interval, on one line."""
    return re.sub(r" (?=%)|(?<=\d,) (?=[-+\d.]+\])", "\N{NO-BREAK SPACE}", text)
