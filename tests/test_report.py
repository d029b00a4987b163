import io
import json
from pathlib import Path

import pytest

from embedistill.errors import UsageError
from embedistill.evaluation.comparison import Comparison, Retention
from embedistill.evaluation.costs import ModelFacts, measure_speed
from embedistill.report.document import Report, load_report, save_report
from embedistill.report.rendering import format_retention, to_table, write_page

SCRIPT = "<script>alert(1)</script>"
REPORT = Report(
    name=f"run {SCRIPT}",
    models=[
        ModelFacts("teacher", "t", 109_500_000, 12, 768, 438.0, 30.0),
        ModelFacts("student", SCRIPT, 46_000_000, 3, 384, 186.0, 120.0),
    ],
    comparisons=[
        Comparison(
            "known-item", "mrr@10", 50, {"teacher": 0.8, "student": 0.76}, {"student": Retention(0.95, 0.9, 0.99)}
        ),
        Comparison(
            "known-item", "ndcg@10", 50, {"teacher": 0.9, "student": 0.9}, {"student": Retention(1, 1, 1, "PASS")}
        ),
        Comparison("zero", "mrr@10", 5, {"teacher": 0.0, "student": 0.1}, {}),
    ],
    margin=0.03,
    corpus={"read": 1234},
    seconds={"encode": 12.5},
    skipped=["STSBenchmark"],
)


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    save_report(REPORT, tmp_path)
    loaded = load_report(tmp_path)
    assert loaded.comparisons == REPORT.comparisons
    assert loaded.models == REPORT.models
    assert json.loads((tmp_path / "report.json").read_text())["schema_version"] == 1


def test_retention_is_found_by_task_metric_and_role() -> None:
    assert REPORT.retention("known-item").value == 0.95
    assert REPORT.retention("known-item", "ndcg@10").verdict == "PASS"
    with pytest.raises(KeyError, match="not in"):
        REPORT.retention("known-item", "recall@10")


def test_a_folder_without_report_and_one_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no report.json; expected the folder of a finished run"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 99}')
    with pytest.raises(UsageError, match="schema_version 99; expected 1"):
        load_report(tmp_path)


def test_the_worst_verdict_counts() -> None:
    def verdict(*verdicts: str | None) -> str | None:
        rows = [Comparison("t", "m", 1, {}, {"student": Retention(1, 1, 1, each)}) for each in verdicts]  # type: ignore[arg-type]
        return Report("r", [], rows).verdict

    assert verdict("PASS", "UNDECIDED", "FAIL") == "FAIL"
    assert verdict("PASS", "UNDECIDED") == "UNDECIDED"
    assert verdict("PASS", "PASS") == "PASS"
    assert verdict(None) is None


def test_the_table_has_every_figure() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(to_table(REPORT))
    text = console.export_text()
    for figure in ("109.5 M", "186", "120", "0.7600", "95.0 % [90.0, 99.0]", "PASS", "left out, no data: STSBenchmark"):
        assert figure in text


def test_the_page_is_self_contained_and_text_is_inert(tmp_path: Path) -> None:
    (tmp_path / "training_log.jsonl").write_text(
        "".join(json.dumps({"loss": 1.0 / step, "embedding": 0.5 / step, "step": step}) + "\n" for step in (1, 2, 3))
    )
    (tmp_path / "recipe.yaml").write_text(f"name: {SCRIPT}\n")
    page = write_page(REPORT, tmp_path).read_text()
    assert SCRIPT not in page
    assert page.count("&lt;script&gt;") >= 2
    assert "http://" not in page
    assert "https://" not in page
    assert "95.0 % [90.0, 99.0]" in page
    assert "embedding: 0.5000 to 0.1667" in page


def test_retention_in_words() -> None:
    assert format_retention(Retention(0.967, 0.955, 0.979, "PASS")) == "96.7 % [95.5, 97.9] PASS"
    assert format_retention(None) == ""
    assert str(Retention(0.967, 0.955, 0.979, "PASS")) == "0.967 [0.955, 0.979] PASS"


def test_speed_takes_turns() -> None:
    calls: list[str] = []
    encoders = {name: (lambda texts, name=name: calls.append(name)) for name in "ab"}
    speeds = measure_speed(encoders, ["x"] * 10, rounds=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert all(speed > 0 for speed in speeds.values())
