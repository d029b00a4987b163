"""A report for people: a table in the terminal, a self-contained page in the browser."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.markup import escape
from rich.table import Table

from embedistill.evaluation.comparison import Comparison, Retention
from embedistill.evaluation.costs import ModelFacts
from embedistill.files import read_json, write_text
from embedistill.report.document import Report


def to_table(report: Report) -> Table:
    """Return the report as one table: a column a model, a row a figure."""
    roles = [model.role for model in report.models]
    table = Table(title=escape(report.name), title_justify="left", caption_justify="left")
    table.add_column("")
    for role in roles:
        table.add_column(escape(role), justify="right")
    keeps = [role for role in roles if any(role in row.retention for row in report.comparisons)]
    for role in keeps:
        table.add_column(escape(f"{role} keeps [95 %]" if len(keeps) > 1 else "keeps [95 %]"), justify="right")
    for label, values in list_facts(report.models):
        table.add_row(label, *values, *[""] * len(keeps))
    table.add_section()
    for row in report.comparisons:
        values = [f"{row.values[role]:.4f}" if role in row.values else "" for role in roles]
        kept = [format_retention(row.retention.get(role)) for role in keeps]
        table.add_row(f"{row.task} {row.metric}", *values, *(escape(text) for text in kept))
    captions = [f"left out, no data: {', '.join(report.skipped)}"] if report.skipped else []
    table.caption = "\n".join([*captions, *list_planned(report)]) or None
    return table


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
    if any(model.texts_per_second for model in models):
        yield "texts/s", [f"{model.texts_per_second:.0f}" if model.texts_per_second else "" for model in models]


def format_retention(retention: Retention | None) -> str:
    """Return retention in per cent, such as 96.7 % [95.5, 97.9] PASS."""
    if retention is None:
        return ""
    verdict = f" {retention.verdict}" if retention.verdict else ""
    return f"{100 * retention.value:.1f} % [{100 * retention.low:.1f}, {100 * retention.high:.1f}]{verdict}"


def write_page(report: Report, folder: Path) -> Path:
    """Write report.html from the report and from what else the run's folder holds, and return its path."""
    log, run = folder / "training_log.jsonl", folder / "run.json"
    recipe = folder / "recipe.yaml"
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("embedistill.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    ).get_template("page.html")
    page = template.render(
        report=report,
        facts=list(list_facts(report.models)),
        bars=_draw_bars(report.comparisons),
        format_retention=format_retention,
        planned=list_planned(report),
        curves=_draw_curves([json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
        run=read_json(run) if run.is_file() else {},
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _draw_bars(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Place the student's intervals on a scale from the lowest of them, in whole tenths, to 105 %."""
    rows = [(row, row.retention["student"]) for row in comparisons if "student" in row.retention]
    floor = min([0.9, *(int(kept.low * 10) / 10 for _, kept in rows)])

    def place(value: float) -> float:
        return round(100 * (min(value, 1.05) - floor) / (1.05 - floor), 2)

    return [
        {
            "label": f"{row.task} {row.metric}",
            "text": format_retention(kept),
            "low": place(kept.low),
            "value": place(kept.value),
            "high": place(kept.high),
            "one": place(1.0),
        }
        for row, kept in rows
    ]


def _draw_curves(log: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return each term of the loss as the points of a line in a box of 100 x 40."""
    steps = [entry for entry in log if "loss" in entry]
    if len(steps) < 2:
        return []
    terms = [name for name in steps[0] if name not in {"epoch", "step", "learning_rate", "grad_norm"}]
    last = steps[-1]["step"]
    curves = []
    for term in terms:
        values = [entry[term] for entry in steps]
        top = max(values) or 1.0
        points = " ".join(f"{100 * e['step'] / last:.2f},{40 - 38 * e[term] / top:.2f}" for e in steps)
        curves.append({"term": term, "points": points, "first": values[0], "last": values[-1]})
    return curves
