"""The published results: the page says what the figures say."""

import re
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


def test_the_picture_is_of_what_was_published(publish: SimpleNamespace) -> None:
    picture = publish.PICTURE.read_text(encoding="utf-8")
    for line in publish.summarise(publish.load_students()):
        assert line in picture, "run: python eval/publish.py render"


def test_the_recipes_say_what_was_published(publish: SimpleNamespace) -> None:
    said = {path.stem: path.read_text(encoding="utf-8") for path in list_recipes()}
    students = [one for one in publish.load_students() if one["name"] in said and not one.get("judged")]
    for one in students:
        kept = [publish._kept(publish._find(one, mean))["value"] for mean in publish.MEANS]
        sts, retrieval = (f"{100 * value:.1f} %" for value in kept)
        expected = f"# Keeps, of the teacher: {sts} of STS, {retrieval} of nDCG@10 in retrieval"
        assert expected in said[one["name"]], one["name"]
    assert len(students) == 5
    for name in ("quickstart", "domain-search"):
        (one,) = (one for one in publish.load_students() if one["name"] == name)
        kept = publish._kept(publish._find(one, "known-item"))["value"]
        assert re.search(rf"# Keeps, of the teacher's nDCG@10 in .*: {100 * kept:.1f} %", said[name]), name


def test_a_student_that_is_judged_on_something_else_has_a_table_of_its_own(publish: SimpleNamespace) -> None:
    students = [one for one in publish.load_students() if not one.get("judged")]
    other = {**students[-1], "name": "made-up", "judged": "its queries", "comparisons": students[0]["comparisons"][:1]}
    page = publish.render([*students, other])
    row = students[0]["comparisons"][0]
    (line,) = [line for line in page.splitlines() if line.startswith("| made-up |")]
    assert (
        f"| its queries | {row['task']} {row['metric']} | {row['n_items']:,} | {100 * row['values']['teacher']:.2f} |"
        in line
    )
    assert page.count("made-up") == 2  # there, and among the commands
    assert publish.summarise([*students, other]) == publish.summarise(students)


def test_a_recipe_with_other_seeds_has_a_table_that_says_how_far_they_differ(publish: SimpleNamespace) -> None:
    students = [one for one in publish.load_students() if not one.get("seed_of")]
    first = next(one for one in students if one["name"] == "mpnet-3l")
    first["layers"] = [0, 1, 11]
    others = []
    for seed, kept in ((1, 0.8), (2, 0.9)):
        row = {"task": "STS mean", "retention": {"student": {"value": kept, "low": 0.7, "high": 1.0}}}
        others.append({**first, "name": f"other-{seed}", "seed_of": "mpnet-3l", "seed": seed, "comparisons": [row]})
    first["comparisons"] = [
        {**row, "retention": {"student": {"value": 1.0, "low": 0.9, "high": 1.1}}} for row in first["comparisons"]
    ]
    page = publish.render([*students, *others])
    table = page.partition("## mpnet-3l with other seeds")[2].partition("##")[0]
    assert "| 1 | 0, 1, 11 | 3,106 | **80.0** [70.0, 100.0] |" in table
    assert "| 3 seeds | | | 90.0, sd 10.00 |" in table  # of 100, 80 and 90
    assert publish.summarise([*students, *others]) == publish.summarise(students)


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
