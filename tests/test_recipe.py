import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from embedistill.errors import RecipeError, UsageError
from embedistill.recipe import dump_recipe, list_recipes, list_settings, load_recipe

GOOD = "name: x\nteacher: {model: org/m}\ncorpus: {source: a.txt}\nstudent: {layers: 2}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def problems(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, text), *overrides)
    assert error.value.exit_code == 2
    return str(error.value).replace(f"{tmp_path}/", "").splitlines()


def test_every_shipped_recipe_is_valid_and_repeats_itself(tmp_path: Path) -> None:
    assert list_recipes()
    for path in list_recipes():
        recipe = load_recipe(path.stem)
        assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe
        assert recipe.name == path.stem


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD + "seed: 1_000\ntraining: {learning_rate: 2e-5, epochs: 4}\n"))
    assert (recipe.seed, recipe.training.learning_rate, recipe.training.epochs) == (1000, 2e-5, 4.0)
    assert problems(tmp_path, GOOD + "seed: 1:30\n") == ["r.yaml:5: seed: '1:30'; expected a valid integer"]


def test_all_problems_are_said_at_once_with_their_lines(tmp_path: Path) -> None:
    text = GOOD + "seed: 1\nseed: 2\ntraining:\n  minuts: 3\n  batch_size: many\nevaluation:\n  tasks: [3]\n"
    found = problems(tmp_path, text)
    assert [line.split(": ")[0] for line in found] == ["r.yaml:6", "r.yaml:9", "r.yaml:8", "r.yaml:11"]
    assert "seed: a second time (first in line 5)" in found[0]
    assert "'many'; expected a valid integer" in found[1]
    assert "unknown key" in found[2]
    assert found[2].endswith("did you mean minutes?")
    assert "evaluation.tasks.0: 3; expected a valid string" in found[3]


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path, "name: x\nteacher: {}\ncorpus: {source: a}\nstudent: {layers: 1}") == [
        "r.yaml:2: teacher.model: missing; set it; what it means: embedistill recipes settings"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "r.yaml:1: empty; expected a mapping of settings"),
        ("- a\n- b\n", "r.yaml:1: list; expected a mapping"),
        ("a: [1\nb: }", "r.yaml:2: not YAML"),
        ("name: !!python/object:os.system x", "r.yaml:1: not YAML"),
    ],
)
def test_what_is_no_recipe_says_so(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(write(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("seed: -1", "seed: -1; expected greater than or equal to 0"),
        ("training: {minutes: 1e999}", "training.minutes: inf; expected a finite number"),
        ("training: {minutes: .inf}", "training.minutes: '.inf'; expected a valid number"),
        ("training: {objectives: {embedding: 0}}", "one weight above 0 of a term that follows the teacher"),
        (
            "training: {objectives: {layers: 1}}\nstudent: {layers: 2, vocabulary_size: 500}",
            "training.objectives.layers with a student that is cut out of the teacher itself",
        ),
        ("training: {report_to: [mlflow]}", "report_to with mlflow installed: pip install mlflow"),
        ("training: {layer_pairs: [[1, 2, 3]]}", "training.layer_pairs.0: [1, 2, 3]; expected"),
        ("evaluation: {tasks: [../x]}", "evaluation.tasks.0: '../x'; expected"),
        ("? [a]\n: 1", "a key that is no word"),
    ],
)
def test_what_would_fail_hours_later_is_refused(tmp_path: Path, settings: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(write(tmp_path, GOOD + settings))
    assert message in str(error.value)


def test_a_temperature_is_a_number_or_goes_from_one_to_another(tmp_path: Path) -> None:
    constant = load_recipe(write(tmp_path, GOOD + "training: {temperature: 0.1}")).training.temperature
    assert (constant.start, constant.end) == (0.1, None)
    moving = load_recipe(write(tmp_path, GOOD), "training.temperature.start=0.1", "training.temperature.end=0.02")
    assert (moving.training.temperature.start, moving.training.temperature.end) == (0.1, 0.02)
    with pytest.raises(UsageError, match=r"training\.temperature: 0; expected above 0"):
        load_recipe(write(tmp_path, GOOD + "training: {temperature: 0}"))


def test_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD.replace("org/m}", "org/m, revision: '12e4567'}")))
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8"):
        load_recipe(path)


def test_an_unknown_recipe_names_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"expected a \.yaml file or one of: .*quickstart; did you mean quickstart\?"):
        load_recipe("quikstart")


def test_an_endpoint_and_a_cluster_do_not_go_together(tmp_path: Path) -> None:
    [found] = problems(tmp_path, GOOD, "teacher.api=http://localhost/v1", "encoding.engine=ray")
    assert found.endswith(
        ":1: teacher.api with encoding.engine=ray: an endpoint spreads its work by itself; use engine=local"
    )


def test_overrides_are_checked_like_the_file(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), "training.minutes=30", "student.layers=[0, 3]", "corpus.source=hf:o/d")
    assert recipe.training.minutes == 30
    assert recipe.student.layers == [0, 3]
    assert recipe.corpus.source == "hf:o/d"
    assert load_recipe(write(tmp_path, GOOD), "search.question=what is it: a ship?").search.question.endswith("ship?")
    (clash,) = problems(tmp_path, GOOD, "training.minutes=7", "training.dev_size=0", "training.dev_steps=3")
    assert clash == (
        "override 'training.dev_size=0' and override 'training.dev_steps=3': training: its settings together; "
        "expected dev_size above 0, without which dev_steps does nothing"
    )
    assert problems(tmp_path, GOOD, "training.minutes", "traning.minutes=3", "seed=x") == [
        "override 'training.minutes': no value; expected key=value, such as training.minutes=30",
        "override 'seed=x': seed: 'x'; expected a valid integer",
        (
            "override 'traning.minutes=3': traning: unknown key; expected one of: name, seed, teacher, corpus, "
            "student, encoding, training, evaluation, search; did you mean training?"
        ),
    ]


def test_an_overridden_recipe_has_a_run_folder_of_its_own(tmp_path: Path) -> None:
    plain, other = load_recipe(write(tmp_path, GOOD)), load_recipe(write(tmp_path, GOOD), "seed=7")
    assert plain.name == "x"
    assert other.name.startswith("x-")
    assert other.name == load_recipe(write(tmp_path, GOOD), "seed=7").name
    assert load_recipe(write(tmp_path, GOOD), "seed=7", "name=mine").name == "mine"


def test_what_a_finished_run_may_be_given_anew_leaves_its_folder_alone(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    anew = ["evaluation.misspelt=true", "search={question: where, results: 2}"]
    assert load_recipe(path, *anew).name == "x"
    assert load_recipe(path, "seed=7", *anew).name == load_recipe(path, "seed=7").name


def test_files_of_tasks_are_found_from_another_folder_too(tmp_path: Path) -> None:
    tasks = ("evaluation.tasks=[STS12, own.jsonl.gz, ~/mine.jsonl]", "training.dev_task=dev.jsonl")
    recipe = load_recipe(write(tmp_path, GOOD), *tasks)
    home = str(Path.home() / "mine.jsonl")
    assert recipe.evaluation.tasks == ["STS12", str(Path("own.jsonl.gz").absolute()), home]
    assert recipe.training.dev_task == str(Path("dev.jsonl").absolute())


def test_a_prompt_is_of_a_kind_that_there_is(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_recipe(path, "teacher.prompts={query: 'query: '}").teacher.prompts == {"query": "query: "}
    with pytest.raises(RecipeError, match=r"teacher\.prompts.*'passage'.*'plain', 'query' or 'document'"):
        load_recipe(path, "teacher.prompts={passage: x}")


def test_a_query_has_no_query_of_its_own(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_recipe(path, "corpus.kind=query").corpus.kind == "query"
    with pytest.raises(RecipeError, match="expected no query_column beside kind: query"):
        load_recipe(path, "corpus.kind=query", "corpus.query_column=title")
    with pytest.raises(RecipeError, match="expected kind: document for docstrings"):
        load_recipe(path, "corpus.kind=query", "corpus.source=docstrings:torch")
    with pytest.raises(RecipeError, match=r"search: null beside corpus\.kind: query"):
        load_recipe(path, "corpus.kind=query", "search={question: where}")


def test_segments_are_not_judged_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="segment_margin beside a margin, without which there is no verdict"):
        load_recipe(write(tmp_path, GOOD), "evaluation.margin=null", "evaluation.segment_margin=0.1")


def test_paths_become_absolute(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), "evaluation.data=sets")
    assert recipe.corpus.source == str(tmp_path / "a.txt")
    assert recipe.evaluation.data == str(tmp_path / "sets")
    assert recipe.teacher.model == "org/m"


def test_every_setting_is_described() -> None:
    settings = list(list_settings())
    assert len(settings) > 25
    assert all(setting.description for setting in settings)


def test_recipes_ship_inside_the_wheel(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(command, cwd=root, capture_output=True, check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"embedistill/recipes/{path.name}" for path in list_recipes()} <= set(names)
    assert {"embedistill/py.typed", "embedistill/report/page.html"} <= set(names)


def test_checking_a_recipe_does_not_import_torch() -> None:
    code = "import sys, embedistill.cli.commands; from embedistill import load_recipe; load_recipe('quickstart'); "
    code += "print([name for name in ('torch', 'transformers', 'numpy', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ("{}", "expected layers, or one of max_parameters, max_mb_int8 and speedup, and no size beside it"),
        ("{layers: 2, speedup: 3}", "expected layers, or one of"),
        ("{max_parameters: 14.5M, speedup: 3}", "expected layers, or one of"),
        ("{hidden_size: 312}", "expected layers, or one of"),
        ("{max_parameters: 14.5X}", "r.yaml:4: student.max_parameters: '14.5X'"),
        ("{from: static, layers: 2}", "expected no layers with from: static"),
        (
            "{from: org/other, vocabulary_size: 9, via: {layers: 2}}",
            "expected no via, vocabulary_size with from: org/other",
        ),
        ("{layers: 2, via: {hidden_size: 9}}", "expected layers, a number or a list"),
        ("{layers: 2, form: static}", "did you mean from?"),
    ],
)
def test_students_of_two_kinds_or_none_are_refused(tmp_path: Path, student: str, message: str) -> None:
    (found,) = problems(tmp_path, GOOD.replace("{layers: 2}", student))
    assert message in found


def test_a_student_is_read_and_written_by_the_names_of_a_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("{layers: 2}", "{from: static, embedding_size: 8}"))
    recipe = load_recipe(path)
    assert (recipe.student.origin, recipe.student.layers, recipe.student.budgets) == ("static", None, {})
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert "  from: static\n" in dump_recipe(recipe)
    assert load_recipe(tmp_path / "again.yaml") == recipe
    budget = load_recipe(path, "student={max_parameters: 14.5M}").student
    assert budget.budgets == {"max_parameters": 14_500_000}
    assert "student.from" in {setting.key for setting in list_settings()}
    assert "student.via.layers" in {setting.key for setting in list_settings()}


def test_a_model_to_start_from_may_be_a_folder_and_a_budget_goes_without_assistant(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    recipe = load_recipe(write(tmp_path, GOOD), "student={from: start}")
    assert recipe.student.origin == str(tmp_path / "start")
    (found,) = problems(tmp_path, GOOD.replace("{layers: 2}", "{speedup: 2, via: {layers: 2}}"))
    assert "expected layers beside via" in found
