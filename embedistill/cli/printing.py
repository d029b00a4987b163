"""What the command line prints: tables, reports, hits."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from embedistill.report.document import Report
    from embedistill.search import Hit


def print_report(report: Report, as_json: bool) -> None:
    """Print a report as tables, or whole as JSON."""
    from embedistill.report.rendering import to_table

    if as_json:
        typer.echo(json.dumps(asdict(report), indent=2, ensure_ascii=False))
    else:
        make_console().print(to_table(report))


def print_hits(query: str, hits: list[Hit]) -> None:
    """Print a question and what was found, best first."""
    console = make_console()
    console.print(f"\nQ: {query}", markup=False)
    for hit in hits:
        console.print(f"  {hit.score:.3f}  {hit.text[:200]}  [{hit.source}]", markup=False)


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """Print a table; cells are text, not markup."""
    table = Table(*columns)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    make_console().print(table)


def make_console() -> Console:
    """Return a console that does not cut tables where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)
