"""The report of a run as one value, on disk as report.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from embedistill.errors import UsageError
from embedistill.evaluation.comparison import MAIN, Comparison, Difference, Retention, Verdict
from embedistill.evaluation.costs import ModelFacts
from embedistill.evaluation.scoring import TEACHER
from embedistill.evaluation.segments import Segment
from embedistill.files import read_json, write_json

SCHEMA_VERSION = 2
_READABLE = (1, 2)
REPORT = "report.json"


@dataclass(frozen=True)
class Report:
    """Models and how they compare.

    Attributes:
        name: Of the run.
        models: The teacher first.
        comparisons: One a metric.
        margin: Of the verdicts.
        corpus: What became of the corpus, counts by name.
        examples: Some of the texts that were left out, or whose vectors have a fault, by reason.
        seconds: By stage.
        skipped: Tasks that were asked for and could not be had.
        judged: Roles that the verdict is on.
        planned: What was planned of the student beside what was measured: what, planned, measured.
        differences: Every two models on every task, tested.
        segments: Retention on parts of the tasks, the least first.
        segment_margin: What a segment may lose: one that surely loses more is a FAIL.
        contamination: How many of a task's texts were trained on, of tasks with any.
        disagreements: The items on which teacher and student differ most, with their texts.
        details: By task and role: costs of an index, distribution of similarities.
    """

    name: str
    models: Sequence[ModelFacts]
    comparisons: Sequence[Comparison]
    margin: float | None = None
    corpus: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    skipped: Sequence[str] = ()
    judged: Sequence[str] = ("student",)
    planned: Sequence[dict[str, Any]] = ()
    differences: Sequence[Difference] = ()
    segments: Sequence[Segment] = ()
    segment_margin: float | None = None
    contamination: dict[str, int] = field(default_factory=dict)
    disagreements: Sequence[dict[str, Any]] = ()
    details: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def retention(self, task: str, metric: str | None = None, role: str = "student") -> Retention:
        """Return how much of the teacher a model keeps on a task; by its first metric where none is named.

        Raises:
            KeyError: There is no such task, metric or role.
        """
        for comparison in self.comparisons:
            if comparison.task == task and metric in {None, comparison.metric} and role in comparison.retention:
                return comparison.retention[role]
        raise KeyError(f"{task}, {metric}, {role}: not in {[(row.task, row.metric) for row in self.comparisons]}")

    @property
    def verdict(self) -> Verdict | None:
        """The worst verdict on the judged: FAIL before UNDECIDED before PASS; None without a margin.

        A segment that surely loses too much is a FAIL, whatever the mean; one of which that is not sure does not count.
        Where the teacher has nothing to keep, it is UNDECIDED.
        """
        kept = [row.retention[role] for row in self.comparisons for role in self.judged if role in row.retention]
        verdicts = {retention.verdict for retention in kept}
        if self.margin is not None and self.nothing_to_keep:
            verdicts.add("UNDECIDED")
        if any(segment.retention.verdict == "FAIL" for segment in self.segments):
            return "FAIL"
        worst: tuple[Verdict, ...] = ("FAIL", "UNDECIDED", "PASS")
        return next((verdict for verdict in worst if verdict in verdicts), None)

    @property
    def nothing_to_keep(self) -> list[Comparison]:
        """The main metrics of judged models on which the teacher is not above zero."""
        return [
            row
            for row in self.comparisons
            if row.metric in MAIN and TEACHER in row.values and not row.retention and set(row.values) & set(self.judged)
        ]


def save_report(report: Report, folder: Path) -> None:
    """Write report.json."""
    write_json(folder / REPORT, asdict(report))


def load_report(folder: Path) -> Report:
    """Read the report of a run, also one of an earlier version.

    Raises:
        UsageError: There is none, or it is of a later version.
    """
    path = folder / REPORT
    if not path.is_file():
        raise UsageError(
            str(folder), f"no {REPORT}", "the folder of a finished run", "embedistill run RECIPE makes one"
        )
    content: dict[str, Any] = read_json(path)
    if content.get("schema_version") not in _READABLE:
        found, expected = f"schema_version {content.get('schema_version')}", f"one of {', '.join(map(str, _READABLE))}"
        raise UsageError(str(path), found, expected, "install the version of embedistill that wrote it, or a later one")
    return TypeAdapter(Report).validate_python(content | {"schema_version": SCHEMA_VERSION})
