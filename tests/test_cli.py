import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from embedistill.cli import commands, recipes
from embedistill.evaluation.comparison import Comparison, Retention
from embedistill.recipe import find_recipe, list_recipes
from embedistill.report.document import Report

COMMANDS = [
    "benchmark",
    "run",
    "encode",
    "plan",
    "validate",
    "evaluate",
    "compare",
    "report",
    "search",
    "recipes",
    "cache",
]
RECIPE_COMMANDS = ["list", "show", "copy", "settings"]
CACHE_COMMANDS = ["list", "verify", "prune", "export", "import"]


def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run the command line in this process; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["embedistill", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.mark.parametrize(
    "command",
    [
        [],
        *([name] for name in COMMANDS),
        *(["recipes", name] for name in RECIPE_COMMANDS),
        *(["cache", name] for name in CACHE_COMMANDS),
    ],
)
def test_help(command: list[str]) -> None:
    result = CliRunner().invoke(commands.app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


def test_every_command_is_listed_here() -> None:
    group = typer.main.get_command(commands.app)
    assert sorted(group.commands) == sorted(COMMANDS)  # type: ignore[attr-defined]
    assert sorted(group.commands["recipes"].commands) == sorted(RECIPE_COMMANDS)  # type: ignore[attr-defined]
    assert sorted(group.commands["cache"].commands) == sorted(CACHE_COMMANDS)  # type: ignore[attr-defined]


def test_recipes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = call(monkeypatch, capsys, "recipes", "list", "--json")
    assert (code, set(json.loads(out))) == (0, {path.stem for path in list_recipes()})
    assert json.loads(out)["mpnet-14m"] == "all-mpnet-base-v2 into 14.4 million parameters that stay in its space."
    assert call(monkeypatch, capsys, "recipes", "show", "quickstart")[1] == find_recipe("quickstart").read_text()
    assert call(monkeypatch, capsys, "recipes", "copy", "quickstart", "mine.yaml")[0] == 0
    assert call(monkeypatch, capsys, "validate", "mine.yaml", "seed=3")[0] == 0
    code, _, err = call(monkeypatch, capsys, "recipes", "copy", "quickstart", "mine.yaml")
    assert (code, "mine.yaml: exists already; choose another name" in err) == (2, True)
    assert "training.minutes" in call(monkeypatch, capsys, "recipes", "settings")[1]


def test_plan_prints_teacher_student_and_three_neighbours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe_file: Path
) -> None:
    code, out, _ = call(monkeypatch, capsys, "plan", recipe_file, "student.layers=3", "--json")
    found = json.loads(out)
    assert code == 0
    assert [one["name"] for one in found["forecasts"]] == [
        *("teacher", "student", "half the layers", "narrower", "half the pieces")
    ]
    assert [one["sizes"]["layers"] for one in found["forecasts"]] == [4, 3, 1, 3, 3]
    code, out, _ = call(monkeypatch, capsys, "plan", recipe_file)
    assert (code, "half the" in out, "the teacher encodes them in" in " ".join(out.split())) == (0, True, True)
    assert not (recipe_file.parent / "runs").exists()


def test_wrong_use_is_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("name: x\ntraining: {minuts: 3}\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    cases = [
        (("validate", "bad.yaml"), "bad.yaml:2: training.minuts: unknown key"),
        (("validate", "nowhere.yaml"), "nowhere.yaml: no such file"),
        (("validate", "quickstart", "corpus.source=nowhere.txt"), "nowhere.txt: no such file"),
        (
            ("validate", "quickstart", "corpus={source: texts.jsonl, text_column: body}"),
            "texts.jsonl:1: no column 'body'",
        ),
        (("validate", "quickstart", "training.dev_task=set.jsonl"), "set.jsonl: no such file; check the path\n"),
        (("search", "nowhere", "q"), "nowhere: no index"),
        (("report", "nowhere"), "nowhere: no report.json"),
        (("compare", "nowhere"), "nowhere: no report.json"),
        (("evaluate", "nowhere", "--task", "STS12", "--data", "nowhere"), "no such folder"),
        (("evaluate", "m", "--task", "STS12", "--margin", "0.1"), "margin: no teacher to keep anything of"),
        (("evaluate", "m", "--task", "STS12", "--segment-margin", "0.1"), "segment_margin: no teacher to keep"),
        (("evaluate", "m", "--task", "STS12", "--documents", "teacher"), "documents: teacher: no teacher"),
        (("evaluate", "m", "--task", "STS12", "--documents", "nobody"), "nobody"),
        (("evaluate", "m"), "tasks: none, and no folder of them; expected names of tasks, or --data DIR"),
        (("evaluate", "m", "--teacher", "t", "--segment-margin", "5"), "segment_margin: 5.0; expected a share"),
        (("compare", "nowhere", "--segment-margin", "5"), "segment_margin: 5.0; expected a share"),
        (("evaluate", "m", "--task", "texts.jsonl"), "texts: texts alone; expected a teacher to agree with"),
        (("evaluate", "m", "--task", "STS12", "--index", "tree"), "tree"),
        (("benchmark", "m"), "tasks: none, and no folder with data; expected names of mteb's tasks, or --data DIR"),
        (("benchmark", "nowhere", "--task", "STS12"), "model nowhere: not found"),
        (("run", "quickstart", "seed"), "override 'seed': no value"),
        (("run", "quickstart", "teacher.api=http://127.0.0.1:9/v1"), "teacher.api: a teacher behind an endpoint"),
        (("encode", "quickstart", "encoding.drop=[]"), "not-finite and zero-norm among them"),
        (("cache", "prune", "--older-than", "soon"), "--older-than: 'soon'; expected a number and one of m, h, d, w"),
        (("cache", "prune", "--keep", "20"), "--keep: '20'; expected a number and one of MB, GB, TB"),
        (("cache", "export", "0", "out.parquet", "--source", "nowhere.txt"), "no such file"),
        (("cache", "verify", "xyz"), "0 of that key; expected one of: none"),
        (("cache", "import", "nowhere.parquet"), "nowhere.parquet: no such file"),
    ]
    for arguments, message in cases:
        code, out, err = call(monkeypatch, capsys, *arguments)
        assert (code, out) == (2, ""), arguments
        assert message in err
        assert "Traceback" not in err
    assert call(monkeypatch, capsys, "search")[0] == 2


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["embedistill", "validate", "nowhere.yaml", "--debug"])
    with pytest.raises(SystemExit) as stop:
        commands.main()
    assert stop.value.code == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_systems_errors_are_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: Exception) -> tuple[int, str, str]:
        def raising(*_: object) -> None:
            raise error

        monkeypatch.setattr(recipes, "find_recipe", raising)
        return call(monkeypatch, capsys, "recipes", "show", "quickstart")

    code, _, err = fail(OSError(28, "No space left on device", "/disk/x"))
    assert (code, err.startswith("Error: /disk/x: no space left on the disk; free some space, then: what is")) == (
        1,
        True,
    )
    code, _, err = fail(PermissionError(13, "Permission denied", "/disk/x"))
    assert (code, "/disk/x: no permission; choose another folder" in err) == (1, True)
    code, _, err = fail(RuntimeError("a bug"))
    assert (code, "RuntimeError: a bug; run it again with --debug" in err) == (1, True)


def test_a_run_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe_file: Path, tmp_path: Path
) -> None:
    code, out, err = call(monkeypatch, capsys, "run", recipe_file, "training.epochs=1", "--until", "student")
    assert code == 0, err
    assert re.fullmatch(r"runs/tiny-\w+: student is done\n", out)
    assert not list(tmp_path.glob("runs/*/model"))

    code, out, err = call(monkeypatch, capsys, "run", recipe_file, "training.epochs=1")
    assert code == 0, err
    assert "student: done earlier" in err
    lines = out.rstrip().splitlines()
    folder = next((tmp_path / "runs").iterdir())
    assert re.search(r"student .*untrained", out)
    assert re.search(r"known-item ndcg@10 .* % \[\d", out)
    assert "Q: where is the ship" in out
    assert lines[-2] == f'  embedistill search runs/{folder.name} "your question"'
    assert lines[-1] == f"  python -m webbrowser {(folder / 'report.html').as_uri()}"

    code, out, err = call(monkeypatch, capsys, "run", recipe_file, "training.epochs=1", "--json")
    assert json.loads(out)["schema_version"] == 2
    assert "training: done earlier" in err
    assert len(json.loads(call(monkeypatch, capsys, "search", folder, "a cow", "--results", "3", "--json")[1])) == 3
    assert "Page: " in call(monkeypatch, capsys, "report", folder)[1]
    assert call(monkeypatch, capsys, "compare", folder, "--margin", "0.99")[0] == 0
    assert call(monkeypatch, capsys, "compare", folder, folder, "--margin", "3")[0] == 2


@pytest.mark.parametrize(("verdict", "expected"), [("PASS", 0), ("FAIL", 1), ("UNDECIDED", 3)])
def test_the_exit_code_is_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verdict: Any, expected: int
) -> None:
    kept = {"student": Retention(0.9, 0.8, 1.0, verdict)}
    report = Report("r", [], [Comparison("T", "ndcg@10", 50, {"teacher": 1.0, "student": 0.9}, kept)], 0.03)
    monkeypatch.setattr("embedistill.judgement.evaluate", lambda *_, **__: report)
    assert call(monkeypatch, capsys, "evaluate", "m", "--json")[0] == expected


def test_evaluate_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    teacher_dir: Path,
    mpnet_dir: Path,
    data_dir: Path,
) -> None:
    same = ("evaluate", teacher_dir, "--teacher", teacher_dir, "--task", "Tiny", "--data", data_dir)
    code, out, _ = call(monkeypatch, capsys, *same, "--margin", "0.5", "--json")
    assert code == 0
    assert json.loads(out)["comparisons"][0]["retention"]["student"]["verdict"] == "PASS"


def test_a_folder_without_write_permission(recipe_file: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        blocked = tmp_path / "file"
        blocked.write_text("")  # root may write anywhere, but not below a file
    else:
        blocked = tmp_path / "dir"
        blocked.mkdir(mode=0o500)
    command = [sys.executable, "-m", "embedistill", "run", str(recipe_file), "--run-dir", str(blocked / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in {1, 2}
    assert done.stderr.splitlines()[-1].startswith(f"Error: {blocked}")
    assert "Traceback" not in done.stderr


def test_a_corpus_is_encoded_and_its_cache_looked_after(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe_file: Path,
    corpus_file: Path,
    teacher_dir: Path,
    mpnet_dir: Path,
    tmp_path: Path,
) -> None:
    def run(*arguments: object, cache: str = "cache") -> tuple[int, str]:
        return call(monkeypatch, capsys, *arguments, "--cache-dir", tmp_path / cache)[:2]

    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    n_texts = len({row["body"] for row in rows} | {row["title"] for row in rows})
    assert json.loads(run("encode", recipe_file, "--json")[1]) == {"encoded": n_texts}
    assert run("encode", recipe_file)[1] == "0 texts encoded, the others were there\n"
    [facts] = json.loads(run("cache", "list", "--json")[1])
    assert (facts["teacher"], facts["rows"], facts["dim"]) == (str(teacher_dir), n_texts, 32)
    assert facts["key"][:12] in run("cache", "list")[1]

    export = ("cache", "export", facts["key"][:9], "out.parquet", "--source", corpus_file)
    export += ("--text-column", "body", "--query-column", "title")
    assert run(*export) == (0, f"out.parquet: {n_texts} texts with their vectors\n")
    assert call(monkeypatch, capsys, *export)[0] == 2
    taken = f"{n_texts} vectors taken in, the others were there\n"
    assert run("cache", "import", "out.parquet", cache="other") == (0, taken)
    [copied] = json.loads(run("cache", "list", "--json", cache="other")[1])
    assert (copied["key"], copied["rows"]) == (facts["key"], n_texts)
    foreign = pq.read_table("out.parquet").replace_schema_metadata(None)
    pq.write_table(foreign, "foreign.parquet")
    assert "give --teacher" in call(monkeypatch, capsys, "cache", "import", "foreign.parquet")[2]
    wrong = call(monkeypatch, capsys, "cache", "import", "foreign.parquet", "--teacher", mpnet_dir)
    assert wrong[0] == 2
    assert "'s own; expected above 0.99" in wrong[2]
    assert run("cache", "import", "foreign.parquet", "--teacher", teacher_dir, cache="third") == (0, taken)
    both = call(monkeypatch, capsys, "cache", "import", "foreign.parquet", "--teacher", teacher_dir, "--recipe", "mine")
    assert (both[0], "--teacher, --recipe: both" in both[2]) == (2, True)

    assert run("cache", "verify") == (0, "every shard is as it was written\n")
    shards = (tmp_path / "cache" / "embeddings" / facts["key"]).glob("*.arrow")  # of documents, of queries
    shard = max(shards, key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run("cache", "verify", facts["key"][:6]) == (1, f"damaged: {shard}\n")
    assert json.loads(run("encode", recipe_file, "--json")[1]) == {"encoded": 160}
    assert run("cache", "prune", "--older-than", "1d", "--keep", "20GB") == (0, "")
    code, out = run("cache", "prune", "--keep", "0.0MB")
    assert code == 0
    assert out.startswith(f"deleted {facts['key'][:12]}: {n_texts} vectors of {teacher_dir}")


def test_vectors_are_taken_in_for_the_prompts_and_formats_of_a_recipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], teacher_dir: Path, tmp_path: Path
) -> None:
    texts = [f"ship harbour {word}" for word in ("cow", "tide", "net")]
    vectors = SentenceTransformer(str(teacher_dir)).encode([f"storm {text}" for text in texts])
    pq.write_table(pa.table({"text": texts, "embedding": list(vectors)}), "vectors.parquet")
    Path("texts.txt").write_text("\n".join(texts))
    recipe = Path("prompted.yaml")
    recipe.write_text(
        f"teacher: {{model: {teacher_dir}, dtype: float32, prompts: {{document: 'storm '}}}}\n"
        "corpus: {source: texts.txt}\nstudent: {layers: 1}\nencoding: {storage: int8}\nname: prompted\n"
    )
    cache = ("--cache-dir", tmp_path / "prompted")
    taking = ("cache", "import", "vectors.parquet", "--kind", "document", "--recipe", recipe, *cache)
    assert call(monkeypatch, capsys, *taking)[:2] == (0, "3 vectors taken in, the others were there\n")
    assert call(monkeypatch, capsys, "encode", recipe, *cache)[1] == "0 texts encoded, the others were there\n"
    wrong = call(monkeypatch, capsys, "cache", "import", "vectors.parquet", "--recipe", recipe, *cache)
    assert (wrong[0], "'s own; expected above 0.99" in wrong[2]) == (2, True)  # as plain texts they have no prompt


def test_a_lost_student_ends_a_run_with_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe_file: Path
) -> None:
    settings = ["training.learning_rate=1.0", "training.epochs=5", "training.dev_size=0"]  # no text is kept out
    code, out, err = call(monkeypatch, capsys, "run", recipe_file, *settings, "--until", "training")
    assert (code, out) == (1, "")
    assert re.search(r"training, step \d+: the student (collapsed|diverged).*lower training\.learning_rate", err)


def test_a_file_where_a_folder_has_to_be_is_said_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe_file: Path,
    teacher_dir: Path,
    data_dir: Path,
) -> None:
    Path("afile").write_text("mine")
    for arguments, message in (
        (("run", recipe_file, "--run-dir", "afile"), "afile: a file; expected a folder"),
        (("run", recipe_file, "--cache-dir", "afile"), "a file; expected a folder"),
        (("evaluate", teacher_dir, "--data", data_dir, "--task", "STS12", "--out", "afile"), "--out afile: a file"),
    ):
        code, _, err = call(monkeypatch, capsys, *arguments)
        assert (code, message in err) == (2, True), err
    assert (
        "--out afile: a file; expected a new folder"
        in call(monkeypatch, capsys, "compare", "a", "b", "--out", "afile")[2]
    )
    assert Path("afile").read_text() == "mine"


def test_what_would_be_mixed_up_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], teacher_dir: Path, data_dir: Path
) -> None:
    mixed = ("evaluate", teacher_dir, "--data", data_dir, "--task", "STS12", "--baseline", "student")
    code, _, err = call(monkeypatch, capsys, *mixed)
    assert (code, "--baseline: student, which models of an evaluation are called" in err) == (2, True)


def test_a_copied_recipe_names_its_runs_after_its_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, name in (("my search.yaml", "my-search"), ("2024.yaml", "2024")):
        call(monkeypatch, capsys, "recipes", "copy", "quickstart", file)
        assert f"embedistill run makes runs/{name}\n" in call(monkeypatch, capsys, "validate", file)[1]
