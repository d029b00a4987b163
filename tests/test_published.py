"""The published results: the page says what the figures say."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedistill.evaluation.scoring import Result, save_results
from embedistill.recipe import list_recipes

EVAL = Path(__file__).parents[1] / "eval"


@pytest.fixture(scope="module")
def publish() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(EVAL / "publish.py")))


def test_the_page_is_what_the_figures_say(publish: SimpleNamespace) -> None:
    page = (EVAL / "README.md").read_text(encoding="utf-8")
    assert publish.render(publish.load_students()) == page, "run: python eval/publish.py render"


def test_the_readme_says_what_was_published(publish: SimpleNamespace) -> None:
    readme = (EVAL.parent / "README.md").read_text(encoding="utf-8")
    for line in publish.summarise(publish.load_students()):
        assert line in readme, "the README's first table is not of eval/results/students"


def test_the_recipes_say_what_was_published(publish: SimpleNamespace) -> None:
    said = {path.stem: path.read_text(encoding="utf-8") for path in list_recipes()}
    students = [one for one in publish.load_students() if one["name"] in said and not one.get("judged")]
    for one in students:
        kept = [publish._kept(publish._find(one, mean))["value"] for mean in publish.MEANS]
        sts, retrieval = (f"{100 * value:.1f} %" for value in kept)
        expected = f"# Keeps, of the teacher: {sts} of STS, {retrieval} of nDCG@10 in retrieval"
        assert expected in said[one["name"]], one["name"]
    assert len(students) == 5


def test_a_student_that_is_judged_on_something_else_has_a_table_of_its_own(publish: SimpleNamespace) -> None:
    students = [one for one in publish.load_students() if not one.get("judged")]
    other = {**students[-1], "name": "made-up", "judged": "its queries", "comparisons": students[0]["comparisons"][:1]}
    page = publish.render([*students, other])
    row = students[0]["comparisons"][0]
    (line,) = [line for line in page.splitlines() if line.startswith("| made-up |")]
    assert f"| its queries | {row['task']} {row['metric']} | {100 * row['values']['teacher']:.2f} |" in line
    assert page.count("made-up") == 2  # there, and among the commands
    assert publish.summarise([*students, other]) == publish.summarise(students)


def test_means_are_of_the_published_sets_alone(publish: SimpleNamespace, tmp_path: Path) -> None:
    cosines = {"teacher": [0.1, 0.2, 0.3, 0.4], "student": [0.1, 0.2, 0.4, 0.3]}
    values = {"teacher": 1.0, "student": 0.8}  # 1 - 6 (0 + 0 + 1 + 1) / (4 x 15)
    results = [
        Result(task, role, "", {"spearman_cosine": value}, {"cosine": cosines[role], "score": [1.0, 2.0, 3.0, 4.0]})
        for task in (*publish.STS, "STSBenchmark.dev", "BIOSSES")
        for role, value in values.items()
    ]
    save_results(results, tmp_path / "results")
    rows = {row.task: row for row in publish.compare(tmp_path / "results")}
    assert set(rows) == {*publish.STS, "STS mean", "STSBenchmark.dev", "BIOSSES"}
    assert (rows["STS mean"].n_items, rows["STS mean"].values) == (28, pytest.approx(values))
    assert rows["STS mean"].retention["student"].value == pytest.approx(0.8)
    save_results([result for result in results if result.task != "STS12"], tmp_path / "fewer")
    assert "STS mean" not in {row.task for row in publish.compare(tmp_path / "fewer")}
