"""The report of a run as one value, on disk as report.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from embedistill.errors import UsageError
from embedistill.evaluation.comparison import Comparison, Retention, Verdict
from embedistill.evaluation.costs import ModelFacts
from embedistill.files import read_json, write_json

SCHEMA_VERSION = 1
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
        """The worst verdict on the judged: FAIL before UNDECIDED before PASS; None without a margin."""
        kept = [row.retention[role] for row in self.comparisons for role in self.judged if role in row.retention]
        verdicts = {retention.verdict for retention in kept}
        worst: tuple[Verdict, ...] = ("FAIL", "UNDECIDED", "PASS")
        return next((verdict for verdict in worst if verdict in verdicts), None)


def save_report(report: Report, folder: Path) -> None:
    """Write report.json."""
    write_json(folder / REPORT, asdict(report))


def load_report(folder: Path) -> Report:
    """Read the report of a run.

    Raises:
        UsageError: There is none, or it is of another version.
    """
    path = folder / REPORT
    if not path.is_file():
        raise UsageError(
            str(folder), f"no {REPORT}", "the folder of a finished run", "embedistill run RECIPE makes one"
        )
    content: dict[str, Any] = read_json(path)
    if content.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(str(path), f"schema_version {content.get('schema_version')}", str(SCHEMA_VERSION))
    comparisons = [
        Comparison(**{**row, "retention": {role: Retention(**kept) for role, kept in row["retention"].items()}})
        for row in content["comparisons"]
    ]
    return Report(**{**content, "models": [ModelFacts(**row) for row in content["models"]], "comparisons": comparisons})
