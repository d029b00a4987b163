"""What a run says while it works: one line a fact, one bar a long step, all on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_console = Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """Say one line."""
    _console.print(text, markup=False, soft_wrap=True)


@contextmanager
def progress_bar(label: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar with rate and time left; yields a function that takes how many more are done.

    Where stderr is no terminal, one line is said at the end instead. A total of None is one that is not known.
    """
    columns = [
        TextColumn("{task.description:<22}"),
        BarColumn(24),
        TextColumn("{task.completed:,.0f}" + ("/{task.total:,.0f}" if total is not None else "")),
    ]
    with Progress(*columns, _Rate(unit), TimeElapsedColumn(), TimeRemainingColumn(), console=_console) as bar:
        task = bar.add_task(label, total=total)
        yield lambda done: bar.advance(task, done)


class _Rate(ProgressColumn):
    """Completed units a second."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        super().__init__()

    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        return Text(f"{task.completed / seconds:,.1f} {self.unit}/s" if seconds else f"- {self.unit}/s")
