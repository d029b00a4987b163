"""The whole line on a tiny teacher: run, kill, run again, and everything that can be in its way."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
from conftest import run_in_forks
from sentence_transformers import SentenceTransformer

from embedistill import (
    benchmark,
    compare,
    distill,
    evaluate,
    examination,
    judgement,
    load_recipe,
    pipeline,
    precomputation,
    stages,
)
from embedistill.cache.store import EmbeddingCache
from embedistill.encoding.cluster import TeacherSpec
from embedistill.encoding.local import LocalEncoder
from embedistill.errors import EmbedistillError, RecipeError, UsageError
from embedistill.evaluation.comparison import MAIN, Retention
from embedistill.evaluation.loading import load_task
from embedistill.evaluation.scoring import load_results
from embedistill.evaluation.segments import Segment
from embedistill.precomputation import encode_corpus
from embedistill.report.document import load_report, save_report
from embedistill.stages import Stages
from embedistill.teacher import locate
from embedistill.training.objectives import DistillationLoss

RUN = """
import os, signal, sys
from embedistill import load_recipe
import embedistill.pipeline as pipeline

def killing(function, at):
    calls = 0
    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

folder, place, at = sys.argv[2], sys.argv[3], int(sys.argv[4])
os.makedirs(folder, exist_ok=True)
os.chdir(folder)
if place:
    module_name, _, name = place.rpartition(":")
    module = __import__(module_name, fromlist=["x"])
    *owners, attribute = name.split(".")
    for owner in owners:
        module = getattr(module, owner)
    setattr(module, attribute, killing(getattr(module, attribute), at))
pipeline.distill(load_recipe(sys.argv[1]), "run", "cache")
"""

KILLS = [
    ("embedistill.corpus.records:pq.write_table", 1),
    ("embedistill.cache.shards:written_aside", 1),
    ("embedistill.material:find_faults", 1),
    ("embedistill.student.saving:np.save", 1),
    ("embedistill.training.objectives:DistillationLoss.forward", 14),
    ("embedistill.training.objectives:DistillationLoss.forward", 13),  # in the second training
    ("embedistill.evaluation.scoring:write_json", 3),
    ("embedistill.pipeline:write_page", 1),
    ("embedistill.search:faiss.write_index", 1),
]


def comparable(folder: Path) -> dict[str, object]:
    """Return a report without what time and place make of it."""
    report = json.loads((folder / "report.json").read_text())
    report.pop("seconds")
    for model in report["models"]:
        for time_and_place in ("name", "texts_per_second", "p50_ms", "p95_ms"):
            model.pop(time_and_place)
    return report


def test_killed_in_every_stage_the_run_comes_to_the_same_report(recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(recipe_file.read_text().replace("epochs: 2,", "epochs: 2, then: {on: queries, share: 0.3},"))
    killed_at = [[str(recipe_file), str(tmp_path / "killed"), place, str(at)] for place, at in [*KILLS, ("", 0)]]
    exits = run_in_forks("embedistill.pipeline", RUN, killed_at)
    assert exits == [*[-signal.SIGKILL] * len(KILLS), 0]
    assert run_in_forks("embedistill.pipeline", RUN, [[str(recipe_file), str(tmp_path / "whole"), "", "0"]], 1) == [0]
    killed, whole = comparable(tmp_path / "killed" / "run"), comparable(tmp_path / "whole" / "run")
    assert killed.keys() == whole.keys()
    assert killed["corpus"] == whole["corpus"]
    for mine, theirs in zip(killed["comparisons"], whole["comparisons"], strict=True):
        assert mine["values"] == pytest.approx(theirs["values"], abs=1e-3)
    models = [tmp_path / name / "run" / "model" for name in ("killed", "whole")]
    texts = ["ship harbour", "cow field tractor", "a storm"]
    mine, theirs = (SentenceTransformer(str(model), device="cpu").encode(texts) for model in models)
    np.testing.assert_allclose(mine, theirs, atol=1e-4)
    assert not list((tmp_path / "killed" / "run").glob(".*.part"))
    records = [json.loads((tmp_path / name / "run" / "run.json").read_text()) for name in ("killed", "whole")]
    resumed = [{name for name, stage in record["stages"].items() if stage["resumed"]} for record in records]
    assert resumed == [{"corpus", "encode", "student", "training", "evaluation", "report", "index"}, set()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, teacher_dir: Path, corpus_file: Path, data_dir: Path) -> Path:
    """A finished run with every kind of task, in a folder with its recipe and its cache."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "r.yaml").write_text(
        f"""\
name: r
teacher: {{model: {teacher_dir}, dtype: float32}}
corpus: {{source: {corpus_file}, text_column: body, query_column: title, holdout: 0.2}}
student: {{layers: 2, embedding_size: 16}}
training: {{epochs: 2, batch_size: 16, dtype: float32, learning_rate: 0.001}}
evaluation:
  tasks: [agreement, known-item, STSBenchmark, STS12, Tiny]
  data: {data_dir}
  baselines: [{teacher_dir}]
  margin: 0.5
  resamples: 200
search: {{question: where is the ship, results: 2}}
"""
    )
    distill(load_recipe(folder / "r.yaml"), folder / "run", folder / "cache")
    return folder


def again(folder: Path, *overrides: str) -> pipeline.Run:
    return distill(load_recipe(folder / "r.yaml", "name=r", *overrides), folder / "run", folder / "cache")


def test_a_run_holds_what_it_should(finished: Path, teacher_dir: Path) -> None:
    run = finished / "run"
    assert {path.name for path in run.iterdir()} - {".lock"} == {
        *("recipe.yaml", "run.json", "corpus.parquet", "untrained", "model", "training_log.jsonl", "results"),
        *("report.json", "report.html", "index", "targets.json"),
    }
    record = json.loads((run / "run.json").read_text())
    assert list(record["stages"]) == ["corpus", "encode", "student", "training", "evaluation", "report", "index"]
    assert record["versions"]["sentence-transformers"]
    result = json.loads((run / "results" / "STS12" / "student.json").read_text())
    assert len(result["items"]["cosine"]) == 40
    report = load_report(run)
    assert [model.role for model in report.models] == ["teacher", "student", "untrained", str(teacher_dir)]
    assert {row.task for row in report.comparisons} == {
        *("agreement", "known-item", "STSBenchmark", "STS12", "Tiny", "STS mean", "retrieval mean")
    }
    (mean,) = (row for row in report.comparisons if row.task == "retrieval mean")
    roles = ["teacher", "student", "student queries", "student documents", "untrained", "word vectors", "teacher's PCA"]
    assert list(mean.values) == [*roles, str(teacher_dir)]
    assert list(mean.retention) == list(mean.values)[1:]
    assert report.details["known-item"]["student"]["index"]["kind"] == "flat"
    assert len(report.details["agreement"]["student"]["similarities"]["model"]) == 52
    assert {segment.task for segment in report.segments} <= {"STSBenchmark", "STS12", "agreement", "known-item"}
    assert len(report.disagreements) == 10
    assert report.contamination == {}
    itself = report.retention("Tiny", role=str(teacher_dir))
    assert itself.value == pytest.approx(1, abs=0.02)
    assert 0.9 < report.retention("agreement", "cosine").value < 1
    assert report.retention("agreement", "cosine").verdict is None  # the teacher has 1 by definition
    assert report.retention("STS12").verdict


def test_a_finished_run_is_not_run_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("read", "encode", "build", "train", "evaluate", "report", "index"):
        monkeypatch.setattr(pipeline._Line, name, lambda self: pytest.fail("run again"))
    run = again(finished)
    assert run.student.encode("a plain SentenceTransformer").shape == (16,)


def test_a_run_may_end_behind_its_training(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(recipe_file, "training.epochs=0.1", "evaluation.tasks=[agreement]")
    run = distill(recipe, tmp_path / "run", until="training")
    assert run.student.encode("trained").shape == (16,)
    with pytest.raises(UsageError, match=r"run: no report\.json; expected the folder of a finished run"):
        _ = run.report
    assert not (tmp_path / "run" / "results").exists()
    for name in ("read", "encode", "build", "train"):
        monkeypatch.setattr(pipeline._Line, name, lambda self: pytest.fail("run again"))
    assert distill(recipe, tmp_path / "run").report.retention("agreement").value > 0


def test_a_kill_before_a_training_is_on_record_loses_nothing_of_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(path: Path) -> None:
        raise KeyboardInterrupt(path)

    recipe = load_recipe(recipe_file, "training.epochs=0.1")
    with monkeypatch.context() as killed:
        killed.setattr(pipeline, "remove", kill)
        with pytest.raises(KeyboardInterrupt, match="results"):
            distill(recipe, tmp_path / "run", until="training")
    monkeypatch.setattr(DistillationLoss, "forward", lambda *_: pytest.fail("trained again"))
    run = distill(recipe, tmp_path / "run", until="training")
    assert not (run.folder / "checkpoints").exists()
    seconds = Stages(run.folder, recipe.seed).seconds
    assert list(seconds) == ["corpus", "encode", "student", "training, since it went on"]


def test_a_run_ends_behind_a_stage_that_there_is(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="until: 'train'; expected corpus, encode, student or training"):
        distill(load_recipe(recipe_file), tmp_path / "run", until="train")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
    run = distill(load_recipe(recipe_file), tmp_path / "run", until="corpus")
    assert (run.folder / "corpus.parquet").is_file()
    with pytest.raises(UsageError, match="run: no student yet"):
        _ = run.student


def test_a_new_student_leaves_no_report_of_the_one_before(recipe_file: Path, corpus_file: Path, tmp_path: Path) -> None:
    own, rows = tmp_path / "own.jsonl", corpus_file.read_text().splitlines()
    own.write_text("\n".join(rows) + "\n")
    recipe = load_recipe(recipe_file, f"corpus.source={own}", "training.epochs=0.1", "evaluation.tasks=[agreement]")
    assert distill(recipe, tmp_path / "run").report.comparisons
    own.write_text("\n".join(rows[:-10]) + "\n")
    run = distill(recipe, tmp_path / "run", until="training")
    assert not {"results", "report.json", "report.html", "index"} & {path.name for path in run.folder.iterdir()}
    assert distill(recipe, tmp_path / "run").report.comparisons


def test_a_finished_run_is_evaluated_anew_where_only_that_changed(
    recipe_file: Path, corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distill(load_recipe(recipe_file, "training.epochs=0.1", "evaluation.tasks=[agreement]"), "run")
    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    pairs = [{"sentence1": row["body"], "sentence2": row["title"], "score": n} for n, row in enumerate(rows)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for name in ("read", "encode", "build", "train"):
        monkeypatch.setattr(pipeline._Line, name, lambda self: pytest.fail("run again"))
    changed = ["evaluation.tasks=[agreement, own.jsonl]", "evaluation.misspelt=true", "evaluation.index=hnsw"]
    report = distill(load_recipe(recipe_file, "training.epochs=0.1", *changed), "run").report
    assert {row.task for row in report.comparisons} == {"agreement", "own"}
    assert report.contamination["own"] > 200  # a task of the training texts, that nobody named before the training
    monkeypatch.setattr(pipeline._Line, "evaluate", lambda self: pytest.fail("run again"))
    report = distill(load_recipe(recipe_file, "training.epochs=0.1", *changed, "evaluation.margin=0.5"), "run")
    assert report.report.verdict


def test_a_stage_whose_output_is_gone_is_run_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(finished / "run" / "index")
    for name in ("read", "encode", "build", "train", "evaluate", "report"):
        monkeypatch.setattr(pipeline._Line, name, lambda self: pytest.fail("run again"))
    again(finished)
    assert (finished / "run" / "index" / "index.json").is_file()


def test_the_stored_recipe_repeats_the_run(finished: Path) -> None:
    repeated = distill(load_recipe(finished / "run" / "recipe.yaml"), finished / "repeated", finished / "cache")
    first = load_report(finished / "run")
    for mine, theirs in zip(repeated.report.comparisons, first.comparisons, strict=True):
        assert mine.values == pytest.approx(theirs.values, abs=1e-4)
    both = compare(finished / "run", finished / "repeated", out=finished / "both")
    assert load_report(finished / "both").comparisons == both.comparisons
    assert "repeated" in (finished / "both" / "report.html").read_text()
    assert [model.role for model in both.models] == ["teacher", "run", "repeated"]
    assert both.retention("STS12", role="repeated").value == pytest.approx(first.retention("STS12").value, abs=1e-3)


def test_a_comparison_has_the_segments_of_all_its_runs(finished: Path, tmp_path: Path) -> None:
    for name, kept in (("weak", 0.5), ("good", 0.97)):
        shutil.copytree(finished / "run", tmp_path / name)
        retention = Retention(kept, kept - 0.01, kept + 0.01)
        segment = Segment("STS12", "source", "forum", "spearman_cosine", 60, 0.8, 0.8 * kept, retention)
        save_report(replace(load_report(tmp_path / name), segments=[segment]), tmp_path / name)
    both = compare(tmp_path / "good", tmp_path / "weak", out=tmp_path / "both")
    assert [(one.role, one.retention.verdict) for one in both.segments] == [("weak", "FAIL"), ("good", "PASS")]
    assert both.verdict == "FAIL"
    (tmp_path / "weak").rename(tmp_path / "teacher")  # which the teacher of both is called
    mistaken = compare(tmp_path / "good", tmp_path / "teacher")
    assert [model.role for model in mistaken.models] == ["teacher", str(tmp_path / "good"), str(tmp_path / "teacher")]
    assert mistaken.retention("STS12", role=str(tmp_path / "good")).value == both.retention("STS12", role="good").value
    (tmp_path / "teacher").rename(tmp_path / "weak")
    wide = compare(tmp_path / "good", tmp_path / "weak", margin=0.6, segment_margin=0.7)
    assert {one.retention.verdict for one in wide.segments} == {"PASS"}
    assert "weak, STS12, source: forum" in (tmp_path / "both" / "report.html").read_text()


def test_a_folder_with_another_recipes_run_is_left_alone(finished: Path) -> None:
    before = (finished / "run" / "report.json").read_bytes()
    with pytest.raises(UsageError, match=r"the run of another recipe: training\.epochs 2\.0, now 5\.0"):
        again(finished, "training.epochs=5")
    assert (finished / "run" / "report.json").read_bytes() == before


def test_a_run_of_before_a_setting_was_there_goes_on(finished: Path) -> None:
    path = finished / "run" / "recipe.yaml"
    kept = path.read_text()
    older = [line for line in kept.splitlines() if "source_column" not in line]
    assert len(older) == len(kept.splitlines()) - 1
    path.write_text("\n".join(older) + "\n")
    try:
        again(finished)
    finally:
        path.write_text(kept)


def test_a_folder_with_other_files_is_left_alone(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match=r"no run of ours, but thesis\.txt"):
        distill(load_recipe(recipe_file), tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_two_processes_do_not_share_a_run(finished: Path) -> None:
    with filelock.FileLock(finished / "run" / ".lock"), pytest.raises(UsageError, match="another process is at work"):
        again(finished)


def test_no_disk_space_is_said_before_anything_is_encoded(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    monkeypatch.setattr(LocalEncoder, "run", lambda *_, **__: pytest.fail("encoded"))
    with pytest.raises(UsageError, match=r"0\.0 GB free; expected .* GB; free some space"):
        distill(load_recipe(recipe_file), tmp_path / "run")


def test_what_cannot_be_is_said_before_anything_is_encoded(
    recipe_file: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalEncoder, "run", lambda *_, **__: pytest.fail("encoded"))
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a"}\n{"text": "b"}\n')
    own = shutil.copy(texts, tmp_path / "agreement.jsonl")
    cases = {
        ("evaluation={data: nowhere, missing: skip}",): "nowhere: no such folder",
        (f"training.dev_task={texts}",): "training.dev_task: {texts}: texts alone; expected pairs",
        (f"evaluation.tasks=[{texts}, {texts}]",): "tasks: texts more than once; expected a name each; rename the file",
        (f"evaluation.tasks=[agreement, {own}]",): "tasks: agreement more than once",
        ("training.dev_task=STS12.dev", f"evaluation.data={data_dir}"): "training.dev_task: STS12.dev: not in",
        ("student={layers: 2, vocabulary_size: 20}",): "student.vocabulary_size: 20; expected at least 193",
        ("student={from: static, vocabulary_size: 20}",): "student.vocabulary_size: 20; expected at least 193",
        ("student.layers=9",): "student.layers: 9; expected at most the teacher's 4",
        ("evaluation.tasks=[STS99]", f"evaluation.data={data_dir}"): "STS99: not in",
        ("evaluation.tasks=[STS12]",): "the Hub does not answer",
        ("corpus.text_column=text",): "no column 'text'; expected one of: body, title, source",
        ("corpus.min_characters=9999",): "0 records to train on",
        ("teacher.model=org/none",): "model org/none: not found",
        ("corpus.source=nowhere.txt",): "no such file or folder",
        ("evaluation.baselines=[org/none]",): "model org/none: not found",
    }
    for overrides, message in cases.items():
        recipe = load_recipe(recipe_file, *overrides)
        with pytest.raises(EmbedistillError) as error:
            distill(recipe, tmp_path / recipe.name)
        assert message.replace("{texts}", str(texts)) in str(error.value)
    with pytest.raises(RecipeError):
        load_recipe(recipe_file, "student.layers=0")


def test_a_task_that_cannot_be_had_may_be_skipped_and_stays_so(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, "evaluation.tasks=[agreement, STS12]", "evaluation.missing=skip")
    report = distill(recipe, tmp_path / "run").report
    assert list(report.skipped) == ["STS12"]
    assert {row.task for row in report.comparisons} == {"agreement"}


def test_tasks_that_could_not_be_had_are_asked_for_again_until_the_corpus_is_read(
    recipe_file: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file, "evaluation.tasks=[agreement, STS12]", "evaluation.missing=skip")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read_records", lambda _: (_ for _ in ()).throw(EmbedistillError("hf:", "no answer")))
        with pytest.raises(EmbedistillError, match="no answer"):
            distill(recipe, tmp_path / "run")
    monkeypatch.setattr(
        examination, "load_tasks", lambda names, *_, **__: [load_task(name, data_dir) for name in names]
    )
    assert distill(recipe, tmp_path / "run").report.skipped == []


def test_a_recipe_that_came_to_nothing_may_be_mended(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no column 'text'"):
        distill(load_recipe(recipe_file, "name=tiny", "corpus.text_column=text"), tmp_path / "run")
    with pytest.raises(UsageError, match="known-item cannot be had"):
        distill(load_recipe(recipe_file, "name=tiny", "corpus.query_column=null"), tmp_path / "run")
    mended = load_recipe(recipe_file, "name=tiny", "training.epochs=0.1", "evaluation.tasks=[agreement]", "search=null")
    assert distill(mended, tmp_path / "run").report.retention("agreement").value > 0.5


def test_tasks_that_cannot_be_made_of_the_corpus_are_said_before_anything_is_encoded(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalEncoder, "run", lambda *_, **__: pytest.fail("encoded"))
    for policy in ("error", "skip"):
        recipe = load_recipe(
            recipe_file, "corpus.query_column=null", "evaluation.tasks=[known-item]", f"evaluation.missing={policy}"
        )
        with pytest.raises(UsageError, match=r"known-item cannot be had; .* set corpus\.query_column"):
            distill(recipe, tmp_path / policy)


def test_a_cache_that_is_gone_is_filled_again(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(BaseException):
        pass

    def stop(*_: object, **__: object) -> None:
        raise Stop

    recipe = load_recipe(recipe_file, "evaluation.tasks=[agreement]", "search=null", "training.epochs=0.1")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train", stop)
        with pytest.raises(Stop):
            distill(recipe, tmp_path / "run", tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    assert distill(recipe, tmp_path / "run", tmp_path / "cache").report.comparisons


def test_sets_of_the_hub_stay_with_the_run(
    recipe_file: Path, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(recipe_file, "evaluation.tasks=[STS12]", "search=null", "training.epochs=0.1")
    with monkeypatch.context() as patch:
        patch.setattr(examination, "load_tasks", lambda names, *_, **__: [load_task(name, data_dir) for name in names])
        patch.setattr(pipeline._Line, "encode", lambda self: pytest.fail("stop here"))
        with pytest.raises(pytest.fail.Exception):
            distill(recipe, tmp_path / "run")
    report = distill(recipe, tmp_path / "run").report  # the Hub does not answer any more
    assert report.comparisons[0].n_items == 40


def test_a_student_in_the_teachers_own_space(recipe_file: Path, tmp_path: Path, teacher_dir: Path) -> None:
    recipe = load_recipe(recipe_file, "student.embedding_size=null", "student.layers=[0, 1, 2, 3]", "search=null")
    run = distill(recipe, tmp_path / "run")
    assert run.student.get_embedding_dimension() == 32
    assert not (run.folder / "model" / "teacher_projection.npy").exists()
    assert not (run.folder / "index").exists()
    texts = ["the ship in the harbour.", "a cow on the field."]
    cosine = (run.student.encode(texts) * SentenceTransformer(str(teacher_dir)).encode(texts)).sum(1)
    assert cosine.min() > 0.9


def test_a_corpus_that_grows_encodes_only_what_is_new(recipe_file: Path, corpus_file: Path, tmp_path: Path) -> None:
    grown = tmp_path / "grown.jsonl"
    grown.write_text(corpus_file.read_text())
    recipe = load_recipe(recipe_file, f"corpus.source={grown}", "training.epochs=0.1")
    distill(recipe, tmp_path / "run", tmp_path / "cache")
    with grown.open("a") as stream:
        stream.write(json.dumps({"body": "one more ship near the old harbour.", "title": "one more ship"}) + "\n")
    distill(recipe, tmp_path / "run", tmp_path / "cache")
    encoded = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["encode"]["encoded"]
    assert encoded <= 8  # the new text, and what moved from the held-out part to the training part


def test_a_model_is_evaluated_beside_its_teacher(teacher_dir: Path, mpnet_dir: Path, data_dir: Path) -> None:
    report = evaluate(str(mpnet_dir), ["STS12", "Tiny"], teacher=str(teacher_dir), data=data_dir, margin=0.03)
    assert [model.role for model in report.models] == ["teacher", "student"]
    assert report.retention("STS12").verdict
    same = evaluate(mpnet_dir, ["STS12"], teacher=str(mpnet_dir), data=data_dir)
    assert same.retention("STS12").value == pytest.approx(1, abs=0.05)  # the cache holds half precision
    assert (same.margin, same.segment_margin) == (0.03, 0.06)
    alone = evaluate(teacher_dir, ["STS12"], data=data_dir)
    assert alone.comparisons[0].retention == {}
    sts = same.comparisons[0]
    assert np.isfinite(list(sts.values.values())).all()


def test_a_student_may_be_judged_by_its_queries_on_the_teachers_documents(
    finished: Path, teacher_dir: Path, mpnet_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"teacher": str(teacher_dir), "data": data_dir, "margin": 0.03, "floors": False}
    usual = evaluate(finished / "run", ["STS12", "Tiny"], **asked, out=tmp_path / "usual")
    tower = evaluate(finished / "run", ["STS12", "Tiny"], **asked, documents="teacher", out=tmp_path / "tower")
    values = [{row.task: row.values for row in one.comparisons if row.metric in MAIN} for one in (usual, tower)]
    assert values[1]["Tiny"]["student"] == values[0]["Tiny"]["student queries"]
    assert list(values[1]["Tiny"]) == ["teacher", "student"]
    assert values[1]["Tiny"]["teacher"] == values[0]["Tiny"]["teacher"]
    assert values[1]["STS12"] == values[0]["STS12"]
    assert tower.retention("Tiny", "ndcg@10") == usual.retention("Tiny", "ndcg@10", "student queries")
    page = (tmp_path / "tower" / "report.html").read_text()
    assert "In retrieval, the documents are the teacher&#39;s, and the queries alone those of student." in page
    shared = {row.task for row in compare(tmp_path / "usual", tmp_path / "tower").comparisons}
    assert "Tiny" not in shared
    with pytest.raises(UsageError, match="documents: teacher: a student that is not in its teacher's space"):
        evaluate(mpnet_dir, ["Tiny"], **asked, documents="teacher")


def test_the_student_of_a_run_has_the_floors_of_its_run_beside_it(
    finished: Path, teacher_dir: Path, mpnet_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    own = {row.task: row for row in load_report(finished / "run").comparisons if row.metric in MAIN}
    report = evaluate(finished / "run", ["STS12"], teacher=str(teacher_dir), data=data_dir)
    (sts,) = report.comparisons
    assert list(sts.values) == ["teacher", "student", "untrained", "word vectors", "teacher's PCA"]
    for role in {*sts.values} - {"word vectors"}:  # whose head is solved on other texts of the corpus
        assert sts.values[role] == pytest.approx(own["STS12"].values[role], abs=1e-3), role
    assert [model.role for model in report.models] == ["teacher", "student", "untrained"]
    shutil.copytree(finished / "run", tmp_path / "run", ignore=shutil.ignore_patterns("untrained"))
    (row,) = evaluate(tmp_path / "run", ["STS12"], teacher=str(teacher_dir), data=data_dir).comparisons
    assert list(row.values) == ["teacher", "student", "word vectors", "teacher's PCA"]
    for other in (
        {"teacher": str(teacher_dir), "floors": False},
        {"teacher": str(mpnet_dir)},  # the student is not in its space
        {},
    ):
        (row,) = evaluate(finished / "run", ["STS12"], data=data_dir, **other).comparisons
        assert set(row.values) <= {"teacher", "student"}, other


def test_the_products_of_all_but_the_teacher_may_be_rough(
    finished: Path, teacher_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    asked: dict[str, Any] = {"teacher": str(teacher_dir), "data": data_dir}
    evaluate(finished / "run", ["STS12"], **asked, out=tmp_path / "exact")
    evaluate(finished / "run", ["STS12"], **asked, dtype="bfloat16", out=tmp_path / "rough")
    exact, rough = (
        {found.role: np.concatenate([*map(np.array, found.items.values())]) for found in load_results(folder)}
        for folder in (tmp_path / "exact" / "results", tmp_path / "rough" / "results")
    )
    moved = {role for role, values in exact.items() if not np.array_equal(values, rough[role])}
    assert moved == {"student", "untrained"}  # the others are the teacher's
    for role in moved:
        np.testing.assert_allclose(rough[role], exact[role], atol=0.02)
    with pytest.raises(UsageError, match="dtype: float64; expected auto, float32 or bfloat16"):
        evaluate(finished / "run", ["STS12"], **asked, dtype="float64")  # type: ignore[arg-type]


def test_the_teacher_of_a_run_has_the_prompts_that_its_recipe_gave_it(
    teacher_dir: Path, mpnet_dir: Path, corpus_file: Path, recipe_file: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(recipe_file, "teacher.prompts={query: 'ship : '}", "evaluation.tasks=[agreement]")
    run = distill(recipe, tmp_path / "run")
    assert run.student.prompts["query"] == "ship : "
    found = [judgement._locate_teacher(str(name), tmp_path / "run", tmp_path) for name in (teacher_dir, mpnet_dir)]
    assert [one.prompts for one in found] == [{"query": "ship : "}, {}]
    assert judgement._locate_teacher(str(teacher_dir), None, tmp_path).prompts == {}


def test_a_corpus_of_queries_is_taught_and_judged_with_the_prompt_of_queries(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["corpus.kind=query", "corpus.query_column=null", "search=null"]
    settings.append("teacher.prompts={query: 'ship : ', document: 'a : '}")
    recipe = load_recipe(recipe_file, *settings, "evaluation.tasks=[agreement]", "training.epochs=0.5")
    taught: list[str] = []
    monkeypatch.setattr(pipeline, "train", lambda student, inputs, *_, **__: taught.extend(inputs))
    run = distill(recipe, tmp_path / "run", tmp_path / "cache")
    record = json.loads((run.folder / "run.json").read_text())
    assert list(record["stages"]["encode"]["cache_keys"]) == ["query"]
    assert taught
    assert all(text.startswith("ship : ") for text in taught)
    assert encode_corpus(recipe, tmp_path / "cache") == 0


def test_a_report_does_not_take_the_place_of_a_runs_own(finished: Path, data_dir: Path, tmp_path: Path) -> None:
    student = finished / "run" / "model"
    with pytest.raises(UsageError, match="a run, whose own report would be lost; expected a new folder"):
        evaluate(student, ["STS12"], data=data_dir, out=finished / "run")
    with pytest.raises(UsageError, match="a run, whose own report would be lost"):
        compare(finished / "run", finished / "run", out=finished / "run")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine.csv").write_text("1")
    with pytest.raises(UsageError, match=r"a folder results/ that is not of an evaluation: mine\.csv"):
        evaluate(student, ["STS12"], data=data_dir, out=tmp_path)
    for _ in range(2):  # that of an earlier evaluation is replaced
        evaluate(student, ["STS12"], data=data_dir, out=tmp_path / "judged")


def test_runs_searched_in_other_indexes_are_not_compared(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "other")
    assert "Tiny" in {row.task for row in compare(finished / "run", tmp_path / "other").comparisons}
    for path in (tmp_path / "other" / "results" / "Tiny").glob("*.json"):
        path.write_text(path.read_text().replace('"kind": "flat"', '"kind": "hnsw"'))
    shared = {row.task for row in compare(finished / "run", tmp_path / "other").comparisons}
    assert "STS12" in shared
    assert "Tiny" not in shared
    with pytest.raises(UsageError, match="one run twice"):
        compare(finished / "run", tmp_path / ".." / tmp_path.name / "other", tmp_path / "other")


def test_runs_without_a_common_task_cannot_be_compared(finished: Path, recipe_file: Path, tmp_path: Path) -> None:
    distill(load_recipe(recipe_file, "evaluation.tasks=[agreement]", "seed=9", "search=null"), tmp_path / "other")
    with pytest.raises(UsageError, match="no task with the same items"):
        compare(finished / "run", tmp_path / "other")
    with pytest.raises(UsageError, match="runs: none; expected the folder of one finished run"):
        compare()


def test_a_recipe_hands_its_corpus_to_the_engine_it_names(
    recipe_file: Path, corpus_file: Path, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def encode_on_ray(
        texts: Iterator[str], kind: str, cache: EmbeddingCache, spec: TeacherSpec, **settings: Any
    ) -> int:
        calls.append((kind, len(set(texts)), cache.storage, spec.name, settings))
        return 7

    monkeypatch.setattr(precomputation, "encode_on_ray", encode_on_ray)
    settings = ["encoding.engine=ray", "encoding.workers=3", "encoding.gpus=0.5", "encoding.store=s3://b/e"]
    recipe = load_recipe(recipe_file, *settings, "encoding.storage=int8")
    assert encode_corpus(recipe, tmp_path / "cache") == 14
    rows = [json.loads(line) for line in corpus_file.read_text().splitlines()]
    given = {"store": "s3://b/e", "workers": 3, "cores": 1, "gpus": 0.5}
    assert calls == [
        (kind, len({row[column] for row in rows}), "int8", str(teacher_dir), given)
        for kind, column in (("document", "body"), ("query", "title"))
    ]


def test_vectors_that_cannot_be_trained_on_are_left_out_and_said(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = LocalEncoder.run

    def spoil(self: LocalEncoder, prepared: Any, advance: Any = lambda _: None) -> Any:
        encoded, effort = run(self, prepared, advance)
        encoded.norms[:2] = [np.nan, 0]
        return encoded, effort

    monkeypatch.setattr(LocalEncoder, "run", spoil)
    recipe = load_recipe(recipe_file, "training.epochs=0.1", "search=null", "evaluation.tasks=[agreement]")
    done = distill(recipe, tmp_path / "run", tmp_path / "cache")
    targets = json.loads((tmp_path / "run" / "targets.json").read_text())
    assert (targets["counts"]["not-finite"], targets["counts"]["zero-norm"]) == (2, 2)  # of documents and of queries
    assert {kind: len(numbers) for kind, numbers in targets["dropped"].items()} == {"document": 2, "query": 2}
    assert len(targets["examples"]["not-finite"]) == 2
    assert done.report.corpus["vectors zero-norm"] == 2
    material = pipeline._Line(recipe, tmp_path / "run", tmp_path / "cache").material
    for kind, texts in material.trained.items():
        watched = material.watched[kind]
        assert len(texts) + len(watched) == len(set(texts) | set(watched)) == len(material.encoded[kind]) - 2
    assert sum(len(texts) for texts in material.watched.values()) == (2 * 128 - 4) // 20


def test_all_that_a_training_offers_works_together(
    recipe_file: Path, data_dir: Path, sentences: list[str], tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"anchor": text.split()[0] + " " + text.split()[-1], "positive": text, "negative": sentences[number + 60]}
        for number, text in enumerate(sentences[160:220])
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "positive": "Ã©tÃ© â€™ broken"}]))
    recipe = load_recipe(
        recipe_file,
        f"corpus.pairs={pairs}",
        "corpus.near_duplicates=drop",
        "corpus.drop_damaged=true",
        "corpus.select={size: 150, by: diversity}",
        "training={epochs: 9, steps: 6, batch_size: 32, batch_tokens: 400, checkpoint_steps: 2}",
        "training.dtype=float32",
        "training.objectives={embedding: 1, layers: 0.1, attention: 0.1}",
        "training.objectives.ranking={start: 0, end: 1, schedule: linear}",
        "training.relation_heads=4",
        "training.balance=true",
        "training.temperature=learned",
        "training.neighbours=3",
        "training.curriculum=centre",
        "training.then={on: pairs, share: 0.5, learning_rate: 1e-3, objectives: {embedding: 1, pairs: 0.5}}",
        "training.dev_task=STS12",
        f"evaluation.data={data_dir}",
    )
    run = distill(recipe, tmp_path / "run")
    first, second = (
        [json.loads(line) for line in (run.folder / name).read_text().splitlines()]
        for name in ("training_log.jsonl", "training_log-1.jsonl")
    )
    assert {"embedding", "ranking", "layers", "attention"} <= set.union(*(set(entry) for entry in first))
    assert max(entry.get("pairs", 0) for entry in second) > 0
    assert "dev_score" in first[0]
    assert [max(entry["step"] for entry in log) for log in (first, second)] == [3, 3]  # half of six
    assert run.report.corpus["damaged"] == 1
    assert run.report.examples["damaged"] == ["Ã©tÃ© â€™ broken"]
    assert "Ã©tÃ© â€™ broken" in (run.folder / "report.html").read_text()
    assert run.student.encode("a ship").shape == (16,)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "training.then={on: queries, objectives: {embedding: 1, pairs: 0.1}}",
            r"training\.then: .*expected objectives without pairs, which queries alone have not, or on: pairs",
        ),
        (
            "training.temperature=learned",
            r"expected objectives\.contrastive or objectives\.pairs, for temperature: learned",
        ),
        ("training.relation_heads=4", r"expected objectives\.attention, without which relation_heads does nothing"),
        ("training={dev_size: 0, dev_steps: 3}", r"expected dev_size above 0, without which dev_steps does nothing"),
        (
            "training.then={on: queries}",
            r"training\.then\.on: queries: no text has a query; expected corpus\.query_col",
        ),
        ("training.objectives.pairs=1", r"training\.objectives\.pairs: no text has a query"),
        ("training={objectives: {attention: 1}, relation_heads: 3}", r"relation_heads: 3, with hidden sizes 32 and 32"),
        (
            "training={objectives: {layers: 1}, layer_pairs: [[2, 1]]}",
            r"layer_pairs: \[2, 1\]; expected layers of the student below 2",
        ),
        ("training.matryoshka=[17]", r"training\.matryoshka: 17; expected at most the 16 dimensions"),
    ],
)
def test_a_training_that_cannot_be_is_refused_before_anything_is_encoded(
    recipe_file: Path, tmp_path: Path, setting: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "encode_missing", lambda *given: pytest.fail("encoded"))
    fixed = ("corpus.query_column=null", "evaluation.tasks=[agreement]", "search=null")
    with pytest.raises(UsageError, match=message):
        distill(load_recipe(recipe_file, *fixed, setting), tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("corpus.source=nowhere.txt", r"nowhere\.txt: no such file or folder"),
        ("corpus.text_column=text", r"no column 'text'; expected one of: body, title"),
        ("corpus.pairs={corpus}", r"no column 'positive'; expected one of: body, title"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_said_before_the_teacher_is_looked_for(
    recipe_file: Path, corpus_file: Path, tmp_path: Path, setting: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "locate", lambda *given, **named: pytest.fail("looked for"))
    monkeypatch.setattr(precomputation, "locate", lambda *given, **named: pytest.fail("looked for"))
    recipe = load_recipe(recipe_file, setting.format(corpus=corpus_file))
    for wanted in (lambda: distill(recipe, tmp_path / "run"), lambda: encode_corpus(recipe)):
        with pytest.raises(UsageError, match=message):
            wanted()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("evaluation.tasks=[STS99]", "evaluation.data={data}"), "evaluation.tasks: STS99: not in"),
        (("evaluation.tasks=[own.jsonl]",), r"evaluation\.tasks: .*own\.jsonl: no such file"),
        (("evaluation={{data: nowhere, missing: skip}}",), r"evaluation\.data: .*nowhere: no such folder"),
        (("training.dev_task=STS12.dev", "evaluation.data={data}"), r"training\.dev_task: STS12\.dev: not in"),
    ],
)
def test_sets_that_are_not_there_are_said_before_the_teacher_is_looked_for_and_by_validate(
    recipe_file: Path,
    data_dir: Path,
    tmp_path: Path,
    settings: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "locate", lambda *given, **named: pytest.fail("looked for"))
    recipe = load_recipe(recipe_file, *(setting.format(data=data_dir) for setting in settings))
    for wanted in (lambda: distill(recipe, tmp_path / "run"), lambda: examination.check_sets(recipe)):
        with pytest.raises(UsageError, match=message):
            wanted()


def test_a_corpus_without_a_text_is_not_taken_for_one_that_is_encoded(recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UsageError, match="corpus: no text in it; expected one at the very least"):
        encode_corpus(load_recipe(recipe_file, f"corpus={{source: {tmp_path / 'empty.txt'}}}"), tmp_path / "cache")


def test_a_damaged_file_of_a_run_is_named(finished: Path) -> None:
    record = finished / "run" / "run.json"
    whole = record.read_text()
    record.write_text(whole[:-40])
    try:
        with pytest.raises(EmbedistillError, match=r"run\.json: damaged: .*; expected JSON; restore it, or make anew"):
            again(finished)
    finally:
        record.write_text(whole)


def test_a_run_stands_for_its_student_wherever_a_model_is_asked_for(
    finished: Path, teacher_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    run = finished / "run"
    found = locate(str(run), models_dir=tmp_path)
    assert (found.name, found.path) == (str(run), run / "model")
    assert found.weights_sha256 == locate(str(run / "model"), models_dir=tmp_path).weights_sha256
    report = evaluate(teacher_dir, ["STS12"], data=data_dir, baselines=[str(run)])
    assert [model.role for model in report.models] == ["student", str(run)]
    benchmark(run, ["STS12"], data=data_dir, out=tmp_path / "mteb")
    assert [path.name for path in (tmp_path / "mteb" / "results").iterdir()] == ["local__run"]


def test_a_run_without_a_student_stands_for_none(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="a run without a student yet; expected a run whose training is done"):
        locate(str(tmp_path), models_dir=tmp_path)


@pytest.mark.parametrize("curriculum", ["length", "queries-last", "error"])
def test_curricula_run(recipe_file: Path, tmp_path: Path, curriculum: str) -> None:
    settings = (f"training.curriculum={curriculum}", "evaluation.tasks=[agreement]", "search=null")
    assert distill(load_recipe(recipe_file, *settings), tmp_path / "run").report.retention("agreement").value > 0
