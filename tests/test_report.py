import ast
import io
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from embedistill.errors import UsageError
from embedistill.evaluation.comparison import Comparison, Difference, Retention
from embedistill.evaluation.costs import ModelFacts, measure_speed
from embedistill.evaluation.segments import Segment
from embedistill.report import figures
from embedistill.report.document import Report, load_report, save_report
from embedistill.report.rendering import read_log, to_table, write_page
from embedistill.report.wording import explain_needed, explain_verdict, format_retention, format_seconds, shorten

FROZEN = Path(__file__).parent / "reports"
FIGURES = {
    *("figure-retention", "figure-speed", "figure-size", "figure-segments", "figure-similarities-0", "figure-funnel"),
    *(f"figure-training-{number}" for number in range(6)),
}

SCRIPT = "<script>document.title = 'owned'; fetch('http://127.0.0.1:9/')</script>"
IMAGE = "<img src=x onerror=\"document.title='owned'\">"
BASELINE = "sentence-transformers/all-MiniLM-L6-v2"
TASKS = {
    **{f"STS{year}": "spearman_cosine" for year in (12, 13, 14, 15, 16)},
    "STSBenchmark": "spearman_cosine",
    "TIME": "ndcg@10",
    "CISI": "ndcg@10",
    "Cranfield": "ndcg@10",
    "Banking77": "accuracy",
    "TwentyNewsgroups": "v_measure",
    "TwitterSemEval": "cosine_ap",
}
LEVELS = {"student": 0.965, "untrained": 0.81, "word vectors": 0.72, "teacher's PCA": 0.992, BASELINE: 0.94}
TEXT = (
    "The committee which met on Tuesday, in the smaller of the two halls, found that the figures handed in by the "
    "northern districts did not agree with those of the year before, and asked for a second count. "
)


def make_full_report() -> Report:
    """Return a report with everything that a report can have, as large as real ones."""
    rng = random.Random(1)
    speeds = {
        "teacher": (
            "sentence-transformers/all-mpnet-base-v2",
            109486464,
            12,
            768,
            438.7,
            30.5,
            80.4,
            96.0,
            2.1,
            1310.0,
        ),
        "student": ("runs/mpnet-14m/model", 14591616, 4, 312, 59.3, 392.2, 9.6, 12.2, 0.9, 812.0),
        "untrained": ("runs/mpnet-14m/untrained", 14591616, 4, 312, 59.3, 388.0, 9.7, 12.4, 0.9, 815.0),
        BASELINE: (BASELINE, 22713216, 6, 384, 91.6, 280.1, 13.4, 16.0, 1.0, 850.0),
        "paraphrase-MiniLM-L3-v2": ("paraphrase-MiniLM-L3-v2", 17389824, 3, 384, 69.6, 540.0, 7.0, 8.8, 0.8, 790.0),
    }
    levels = {**LEVELS, "paraphrase-MiniLM-L3-v2": 0.88}
    comparisons = [row for task, metric in TASKS.items() for row in _make_rows(rng, task, metric, levels)]
    agreement = {"teacher": 1.0, **{role: round(level - 0.1, 4) for role, level in levels.items()}}
    for metric in ("cosine", "overlap@10", "rank_correlation"):
        kept = {role: _keep(value, 0.01, None) for role, value in agreement.items() if role != "teacher"}
        comparisons.append(Comparison("agreement", metric, 2000, agreement, kept))
    for kind, metric in (("STS mean", "spearman_cosine"), ("retrieval mean", "ndcg@10")):
        comparisons.append(_make_row(rng, kind, metric, levels, 4000, 0.006))
    return Report(
        name="mpnet-14m",
        models=[ModelFacts(role, *facts) for role, facts in speeds.items()],
        comparisons=comparisons,
        margin=0.03,
        corpus={
            "read": 771600,
            "bad": 3,
            "short": 1210,
            "damaged": 88,
            "language": 5120,
            "duplicate": 32923,
            "near_duplicate": 12000,
            "not_selected": 520000,
            "in_evaluation": 256,
            "train": 198000,
            "holdout": 2000,
            "vectors cut": 334,
        },
        examples={"duplicate": [TEXT[:200], "Short one."], "near_duplicate": [TEXT[20:190]], "vectors cut": [TEXT * 3]},
        seconds={
            "corpus": 24.0,
            "encode": 3127.2,
            "student": 290.5,
            "training": 3600.4,
            "evaluation": 512.8,
            "report": 61.0,
        },
        skipped=["MSMARCO"],
        planned=[
            {"what": "million parameters", "planned": 14.5, "measured": 14.59},
            {"what": "times the teacher's texts/s", "planned": 12.9, "measured": 12.1},
        ],
        differences=[
            Difference(task, metric, first, second, 0.01, -0.002, 0.03, 0.04, 0.12)
            for task, metric in TASKS.items()
            for first, second in (
                ("teacher", "student"),
                ("student", "untrained"),
                ("student", BASELINE),
                ("untrained", BASELINE),
            )
        ],
        segments=_make_segments(rng),
        segment_margin=0.06,
        contamination={"STS12": 14, "Banking77": 3},
        disagreements=[
            {
                "task": "STSBenchmark" if number % 2 else "TIME",
                "value": "rank of the cosine" if number % 2 else "ndcg@10",
                "texts": [f"{TEXT * (1 + number)}Number {number}.", "A man plays a guitar."][: 1 + number % 2],
                "teacher": 0.93 - number / 100,
                "student": 0.2 + number / 100,
            }
            for number in range(10)
        ],
        details=_make_details(rng),
    )


def make_hostile_report() -> Report:
    """Return the full report with markup wherever a text comes from outside."""
    full = make_full_report()
    task, found = f"{IMAGE}{SCRIPT}", full.details["agreement"]["student"]
    kept = {"student": Retention(0.9, 0.8, 1.0), BASELINE: Retention(0.9, 0.8, 1.0), SCRIPT: Retention(0.9, 0.8, 1.0)}
    row = Comparison(task, "ndcg@10", 9, {"teacher": 1.0, **dict.fromkeys(kept, 0.9)}, kept)
    return replace(
        full,
        name=f"run {SCRIPT}",
        models=[*full.models[:2], ModelFacts(SCRIPT, IMAGE, 9, None, 8, 1.0, 2.0)],
        comparisons=[row],
        segments=[Segment(task, SCRIPT, IMAGE, "ndcg@10", 60, 1.0, 0.5, Retention(0.5, 0.4, 0.6))],
        corpus={**full.corpus, f"vectors {SCRIPT}": 3},
        examples={SCRIPT: [IMAGE, SCRIPT]},
        seconds={**full.seconds, SCRIPT: 1.0},
        skipped=[SCRIPT],
        contamination={task: 3},
        disagreements=[{"task": task, "value": SCRIPT, "texts": [SCRIPT, IMAGE], "teacher": 0.9, "student": 0.1}],
        differences=[Difference(task, SCRIPT, "teacher", SCRIPT, 0.1, 0.0, 0.2, 0.04, 0.12)],
        details={task: {"student": found}},
    )


def _keep(value: float, half: float, margin: float | None) -> Retention:
    low, high = value - half, value + half
    if margin is None:
        return Retention(value, low, high)
    verdict = "PASS" if low > 1 - margin else "FAIL" if high < 1 - margin else "UNDECIDED"
    return Retention(value, low, high, verdict, 5400 if verdict == "UNDECIDED" else None)  # type: ignore[arg-type]


def _make_row(
    rng: random.Random,
    task: str,
    metric: str,
    levels: dict[str, float],
    n_items: int,
    half: float,
    margin: float | None = 0.03,
) -> Comparison:
    teacher = rng.uniform(0.5, 0.9)
    shares = {role: level + rng.uniform(-0.03, 0.03) for role, level in levels.items()}
    values = {"teacher": teacher, **{role: teacher * share for role, share in shares.items()}}
    kept = {role: _keep(share, half, margin) for role, share in shares.items()}
    return Comparison(task, metric, n_items, values, kept)


def _make_rows(rng: random.Random, task: str, metric: str, levels: dict[str, float]) -> Iterator[Comparison]:
    n_items, half = (83, 0.03) if metric == "ndcg@10" else (1379, 0.012)
    if metric == "ndcg@10":
        levels = levels | {"student queries": 0.985, "student documents": 0.981}
    yield _make_row(rng, task, metric, levels, n_items, half)
    if metric == "ndcg@10":
        for other in ("mrr@10", "recall@1", "recall@10", "recall@100", "map", "overlap@10"):
            yield _make_row(rng, task, other, levels, n_items, half, None)


def _make_segments(rng: random.Random) -> list[Segment]:
    values = {
        "characters": ["4 to 31", "32 to 60", "61 to 110", "111 to 2031"],
        "similarity by the teacher": ["-0.03 to 0.21", "0.21 to 0.5", "0.5 to 0.8", "0.8 to 1"],
        "genre": ["news", "captions", "forums and question-and-answer sites"],
    }
    tasks = ["STSBenchmark", "Banking77", "TwitterSemEval", "STS16"]
    segments = []
    for task in tasks:
        for column, names in values.items():
            for name in names[: 3 if column == "genre" else 4]:
                share = rng.uniform(0.86, 1.0)
                kept = _keep(share, 0.02, 0.06)
                segments.append(Segment(task, column, name, TASKS[task], 340, 0.8, 0.8 * share, kept))
    return sorted(segments, key=lambda segment: segment.retention.value)[:40]


def _make_details(rng: random.Random) -> dict[str, dict[str, dict[str, Any]]]:
    edges = [round(-0.3 + 0.025 * number, 4) for number in range(53)]
    humps = [[2.718 ** -(((edge - centre) / 0.12) ** 2) for edge in edges[:-1]] for centre in (0.1, 0.16)]
    shares = [[round(value / sum(hump), 6) for value in hump] for hump in humps]
    thresholds = [[0.3, 0.351], [0.4, 0.442], [0.5, 0.53], [0.6, 0.622], [0.7, 0.71]]
    found = {"distance": 0.0612, "thresholds": thresholds, "edges": edges, "model": shares[1], "teacher": shares[0]}
    costs = {
        "kind": "hnsw",
        "build_seconds": 1.2,
        "megabytes": 33.1,
        "queries_per_second": 5021.0,
        "p50_ms": 0.2,
        "p95_ms": 0.31,
    }
    roles = ["teacher", "student", "untrained", BASELINE, "student queries", "student documents"]
    return {
        "agreement": {"student": {"similarities": found}, "untrained": {"similarities": found | {"distance": 0.113}}},
        **{
            task: {role: {"index": costs | {"p50_ms": round(rng.uniform(0.1, 0.4), 3)}} for role in roles}
            for task in ("TIME", "CISI", "Cranfield")
        },
    }


def fill_folder(folder: Path) -> Path:
    """Write what else a run's folder holds."""
    log = [
        {"dev_cosine": 0.63 + step / 5000, "dev_rank": 180.0 - step / 100, "step": step} for step in range(0, 1000, 100)
    ]
    for step in range(20, 1000, 20):
        terms = {
            "embedding": 0.2 / step**0.4 + step % 3 / 300,
            "similarity": 0.4 / step,
            "matrix": 0.001 * (1 + step % 7),
        }
        log.append(
            {"loss": sum(terms.values()), "grad_norm": 1.0, "learning_rate": 1e-4, **terms, "epoch": 0.1, "step": step}
        )
    log.append({"train_runtime": 3600.0, "train_loss": 0.1, "epoch": 3.0, "step": 1000})
    (folder / "training_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    (folder / "recipe.yaml").write_text(f"name: mpnet-14m\nseed: 42\ncorpus:\n  source: [{'x' * 120}]\n  # {SCRIPT}\n")
    hardware = {"machine": "x86_64", "system": "Linux", "cores": 2, "gpus": []}
    record = {
        "seed": 42,
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "hardware": hardware,
        "git_commit": "14c3271",
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


REPORT = Report(
    name=f"run {SCRIPT}",
    models=[
        ModelFacts("teacher", "t", 109_500_000, 12, 768, 438.0, 30.0),
        ModelFacts("student", SCRIPT, 46_000_000, 3, 384, 186.0, 120.0),
    ],
    comparisons=[
        Comparison(
            "known-item", "ndcg@10", 50, {"teacher": 0.9, "student": 0.9}, {"student": Retention(1, 1, 1, "PASS")}
        ),
        Comparison(
            "known-item", "mrr@10", 50, {"teacher": 0.8, "student": 0.76}, {"student": Retention(0.95, 0.9, 0.99)}
        ),
        Comparison("zero", "mrr@10", 5, {"teacher": 0.0, "student": 0.1}, {}),
    ],
    margin=0.03,
    corpus={"read": 1234},
    seconds={"encode": 12.5},
    skipped=["STSBenchmark"],
)


class Elements(HTMLParser):
    """The elements of a page: names with attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\N{NO-BREAK SPACE}", " ")

    def list_attributes(self, tag: str, name: str) -> list[str]:
        return [value for found, attributes in self.found if found == tag and (value := attributes.get(name))]


def render(report: Report, folder: Path) -> Elements:
    return Elements(write_page(report, folder).read_text(encoding="utf-8"))


def print_table(report: Report, width: int = 160) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(to_table(report))
    return console.export_text()


def test_a_report_survives_the_disk(tmp_path: Path) -> None:
    full = make_full_report()
    save_report(full, tmp_path)
    assert asdict(load_report(tmp_path)) == json.loads(json.dumps(asdict(full)))
    assert json.loads((tmp_path / "report.json").read_text())["schema_version"] == 2


@pytest.mark.parametrize("path", sorted(FROZEN.glob("*.json")), ids=lambda path: path.stem)
def test_reports_of_every_version_are_read_and_shown(path: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(path.read_bytes())
    report = load_report(tmp_path)
    assert report.retention("STSBenchmark").value == 0.967
    assert "96.7 % [95.5, 97.9]" in print_table(report)
    assert "96.7 % [95.5, 97.9]" in render(report, tmp_path).text


def test_there_is_a_frozen_report_of_every_version() -> None:
    assert [json.loads(path.read_text())["schema_version"] for path in sorted(FROZEN.glob("*.json"))] == [1, 2]


def test_retention_is_found_by_task_metric_and_role() -> None:
    assert REPORT.retention("known-item", "mrr@10").value == 0.95
    assert REPORT.retention("known-item").verdict == "PASS"
    with pytest.raises(KeyError, match="not in"):
        REPORT.retention("known-item", "recall@10")


def test_a_folder_without_report_and_one_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no report.json; expected the folder of a finished run"):
        load_report(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 99}')
    with pytest.raises(UsageError, match="schema_version 99; expected one of 1, 2"):
        load_report(tmp_path)


def test_the_worst_verdict_counts() -> None:
    def verdict(*verdicts: str | None, segment: str | None = None) -> str | None:
        rows = [Comparison("t", "m", 1, {}, {"student": Retention(1, 1, 1, each)}) for each in verdicts]  # type: ignore[arg-type]
        part = Segment("t", "length", "short", "m", 60, 1, 1, Retention(1, 1, 1, segment))  # type: ignore[arg-type]
        return Report("r", [], rows, segments=[part]).verdict

    assert verdict("PASS", "UNDECIDED", "FAIL") == "FAIL"
    assert verdict("PASS", "UNDECIDED") == "UNDECIDED"
    assert verdict("PASS", "PASS") == "PASS"
    assert verdict(None) is None
    assert verdict("PASS", segment="FAIL") == "FAIL"
    assert verdict("PASS", segment="UNDECIDED") == "PASS"


def test_the_table_has_the_main_metric_of_a_task_and_what_is_left_out() -> None:
    text = print_table(REPORT)
    for figure in ("109.5 M", "186", "120", "0.9000", "100.0 % [100.0, 100.0] PASS", "left out, no data: STSBenchmark"):
        assert figure in text
    assert "known-item mrr@10" not in text
    assert re.search(r"zero mrr@10 +│ +0.0000 │ +0.1000 │ +│", text)


def test_the_table_fits_a_terminal() -> None:
    full = make_full_report()
    names = {"paraphrase-MiniLM-L3-v2", "teacher's PCA"}
    for row in full.comparisons:
        for name in names:
            row.values.pop(name, None), row.retention.pop(name, None)
    lean = replace(full, models=[model for model in full.models if model.role not in names])
    lines = print_table(lean).splitlines()
    assert max(map(len, lines)) <= 160
    assert " all-MiniLM-L6-v2 " in lines[2]
    assert not any("…" in line for line in lines)
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    time = next(number for number, row in enumerate(cells) if row and row[0] == "TIME ndcg@10")
    assert re.fullmatch(r"[\d.]+ % \[[\d.]+, [\d.]+\] UNDECIDED", cells[time][3])
    assert all(re.fullmatch(r"[\d.]+ %", cell) for cell in cells[time][4:])
    assert cells[time + 1][0] == "with its queries alone"
    assert re.fullmatch(r"[\d.]+ % \[[\d.]+, [\d.]+\]", cells[time + 1][3])
    assert cells[time + 1][4:] == ["", "", ""]
    text = "\n".join(lines)
    for words in (
        "agreement overlap@10",
        "About 5,400 items would decide",
        "Surely less than 94 % is kept on the segment",
    ):
        assert words in text
    assert "texts of tasks that were trained on: STS12 14, Banking77 3" in text


def test_every_judged_model_has_what_it_keeps(tmp_path: Path) -> None:
    kept = {"runs/a": Retention(0.98, 0.975, 0.985, "PASS"), "runs/b": Retention(0.9, 0.89, 0.91, "FAIL")}
    row = Comparison("STS16", "spearman_cosine", 9, {"teacher": 0.8, "runs/a": 0.784, "runs/b": 0.72}, kept)
    report = Report("a and b", [], [row], 0.03, judged=["runs/a", "runs/b"])
    text = print_table(report)
    assert "98.0 % [97.5, 98.5] PASS" in text
    assert "90.0 % [89.0, 91.0] FAIL" in text
    assert explain_verdict(report) == [
        "Surely more than 97 % is kept on 1 of 2 metrics that are judged.",
        "Surely less than 97 % is kept on b, STS16 spearman_cosine, 90.0 % [89.0, 91.0].",
    ]
    page = render(report, tmp_path)
    assert page.list_attributes("figure", "id") == ["figure-retention"]
    assert "b: The mean over 1 metric is 90.0 % of the teacher." in page.text


def test_a_model_without_a_teacher_has_its_values(tmp_path: Path) -> None:
    models = [ModelFacts(role, role, 9, 2, 8, 1.0, 2.0) for role in ("student", "another")]
    report = Report("alone", models, [Comparison("TIME", "ndcg@10", 9, {"student": 0.5123, "another": 0.4}, {})], 0.03)
    assert re.search(r"TIME ndcg@10 +│ +0.5123 │ +│ +0.4000 │", print_table(report))
    page = render(report, tmp_path)
    assert page.list_attributes("h2", "id") == ["retention", "models"]
    assert "0.5123" in page.text


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(make_full_report(), fill_folder(tmp_path_factory.mktemp("run")))


def test_the_page_has_every_figure(full_page: Path) -> None:
    page = Elements(full_page.read_text(encoding="utf-8"))
    assert set(page.list_attributes("figure", "id")) == FIGURES
    assert len(page.list_attributes("svg", "aria-label")) == len(FIGURES)
    every = [value for _, attributes in page.found if (value := attributes.get("id"))]
    assert len(every) == len(set(every))
    for words in (
        "Verdict: FAIL",
        "STS12 †",
        "only the queries by the model",
        "14c3271",
        "all: 2.12 hours",
        "dev cosine",
    ):
        assert words in page.text


def test_a_page_leaves_out_what_a_report_has_not(tmp_path: Path) -> None:
    page = render(Report("empty", [], []), tmp_path)
    assert {"figure", "section", "table", "nav"} & {tag for tag, _ in page.found} == set()
    page = render(replace(REPORT, seconds={}), tmp_path)
    assert page.list_attributes("h2", "id") == ["verdict", "retention", "tradeoff", "models", "data"]


def test_text_of_the_data_is_inert(tmp_path: Path) -> None:
    page = render(make_hostile_report(), fill_folder(tmp_path))
    assert {"script", "img", "iframe", "object", "base"} & {tag for tag, _ in page.found} == set()
    assert not [name for _, attributes in page.found for name in attributes if name.startswith("on")]
    addresses = [value for _, found in page.found for name in ("href", "src") if (value := found.get(name))]
    assert all(address.startswith(("#", "data:,")) for address in addresses)
    assert page.text.count(SCRIPT) >= 20


def test_the_same_report_gives_the_same_bytes(full_page: Path, tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path"}):
        settings = dict(matplotlib.rcParams)
        again = write_page(make_full_report(), fill_folder(tmp_path))
        assert dict(matplotlib.rcParams) == settings
    assert again.read_bytes() == full_page.read_bytes()


def test_drawing_is_imported_where_it_is_done() -> None:
    tree = ast.parse(Path(figures.__file__).read_text())
    top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not [node for node in top if "matplotlib" in ast.unparse(node)]


def test_names_of_any_script_and_values_of_any_size_are_drawn(tmp_path: Path) -> None:
    names = ["$x$ and $y$", "日本語のタスク", "a\tb\x00c", "x" * 300, "&amp; <b>"]
    values = [(-3.0, -2.0, 0.9), (0.0, 0.0, 0.0), (0.9, 1.0, 1.1), (1.0, 40.0, 100.0), (0.97, 0.97, 0.97)]
    rows = [
        Comparison(name, "ndcg@10", 9, {"teacher": 0.1, "student": 0.1}, {"student": Retention(value, low, high)})
        for name, (low, value, high) in zip(names, values, strict=True)
    ]
    models = [ModelFacts(role, role, 5, None, 8, 2.0, 3.0) for role in ("teacher", "student")]
    text = render(Report("odd", models, rows), tmp_path).text
    for words in ("$x$ and $y$ ndcg@10", "日本語のタスク ndcg@10", "a bc ndcg@10", "&amp; <b> ndcg@10", "xxx…"):
        assert words in text


def test_retention_and_time_in_words() -> None:
    assert format_retention(Retention(0.967, 0.955, 0.979, "PASS")) == "96.7 % [95.5, 97.9] PASS"
    assert format_retention(None) == ""
    assert str(Retention(0.967, 0.955, 0.979, "PASS")) == "0.967 [0.955, 0.979] PASS"
    assert [format_seconds(seconds) for seconds in (12.5, 200, 3720)] == ["12.5 s", "3 min 20 s", "1 h 02 min"]


def test_names_are_short_but_distinct() -> None:
    assert shorten(["teacher", "a/b", "c/d", "e/d"]) == {"teacher": "teacher", "a/b": "b", "c/d": "c/d", "e/d": "e/d"}


def test_the_verdict_in_words() -> None:
    passed, failed, *_ = explain_verdict(make_full_report())
    assert passed == "Surely more than 97 % is kept on 5 of 14 metrics that are judged."
    assert failed.startswith(
        "Surely less than 97 % is kept on STS13 spearman_cosine, 94.1 % [92.9, 95.3]; retrieval mean"
    )
    kept = Retention(0.98, 0.96, 0.99, "UNDECIDED", 5400)
    row = Comparison("STS16", "spearman_cosine", 1379, {"teacher": 0.8, "student": 0.784}, {"student": kept})
    assert explain_verdict(Report("r", [], [row], 0.03)) == [
        "Surely more than 97 % is kept on 0 of 1 metrics that are judged.",
        "Not yet sure on STS16 spearman_cosine, 98.0 % [96.0, 99.0].",
        "About 5,400 items would decide STS16 spearman_cosine, which has 1,379.",
    ]
    near = replace(row, retention={"student": replace(kept, items_needed=137_901)})  # a hundred times 1,379 is one less
    assert [*explain_needed(Report("r", [], [near], 0.03))] == [
        "Too near the margin for 100 times the items to decide: STS16 spearman_cosine."
    ]


def test_speed_takes_turns() -> None:
    calls: list[tuple[str, int]] = []
    encoders = {name: (lambda texts, name=name: calls.append((name, len(texts)))) for name in "ab"}
    speeds = measure_speed(encoders, ["x"] * 10, rounds=2)
    assert [name for name, n_texts in calls if n_texts == 10] == ["a", "b", "a", "b"]
    assert sum(n_texts == 1 for _, n_texts in calls) == 2 * 10
    assert all(speed.texts_per_second > 0 and speed.p50_ms <= speed.p95_ms for speed in speeds.values())


def test_a_second_training_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    (tmp_path / "training_log.jsonl").write_text('{"step": 5, "loss": 2}\n{"step": 10, "loss": 1}\n')
    (tmp_path / "training_log-1.jsonl").write_text('{"step": 3, "loss": 7}\n')
    assert [(entry["step"], entry["loss"]) for entry in read_log(tmp_path)] == [(5, 2), (10, 1), (13, 7)]
