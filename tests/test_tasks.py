import gzip
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest

from embedistill import hub
from embedistill.errors import EmbedistillError, UsageError
from embedistill.evaluation.loading import describe_tasks, list_tasks, load_task, load_tasks, save_sts
from embedistill.evaluation.tasks import (
    AgreementTask,
    ClassificationTask,
    ClusteringTask,
    PairTask,
    RetrievalTask,
    StsTask,
    draw_experiments,
    fingerprint_task,
    list_items,
    list_texts,
)


def test_sets_from_a_folder(data_dir: Path) -> None:
    sts = load_task("STS12", data_dir)
    assert isinstance(sts, StsTask)
    assert len(sts.sentences1) == len(sts.scores) == 40
    tiny = load_task("Tiny", data_dir)
    assert isinstance(tiny, RetrievalTask)
    assert (len(tiny.queries), len(tiny.documents)) == (20, 30)
    assert tiny.relevance[0] == {0: 2.0, 5: 1.0}


def test_a_set_that_is_not_there_names_those_that_are(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"STS99: not in .* expected one of: STS12, STSBenchmark, Tiny"):
        load_task("STS99", data_dir)
    with pytest.raises(UsageError, match="no such folder"):
        load_task("STS12", tmp_path / "nowhere")


def test_without_folder_and_hub_a_set_is_an_error_or_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EmbedistillError, match="the Hub does not answer; name a folder that has it"):
        load_task("STSBenchmark", None)
    assert load_tasks(["STSBenchmark"], None, skip_missing=True) == []
    assert "Task STSBenchmark is left out" in capsys.readouterr().err


def test_a_set_with_a_bad_row_is_not_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "sts" / "S.jsonl", [{"sentence1": "a", "sentence2": "b"}])
    with pytest.raises(UsageError, match=r"S\.jsonl:1"):
        load_tasks(["S"], tmp_path, skip_missing=True)
    assert load_tasks(["T"], tmp_path, skip_missing=True) == []


def test_sets_from_the_hub_are_those_that_mteb_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(path: str, **options: object) -> list[dict[str, object]]:
        asked.append((path, options))
        return [{"sentence1": "a", "sentence2": "b", "score": 1.0}, {"sentence1": "c", "sentence2": "d", "score": 5.0}]

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("STSBenchmark", None)
    assert isinstance(task, StsTask)
    assert (task.sentences1, task.scores) == (["a", "c"], [1.0, 5.0])
    ((path, options),) = asked  # type: ignore[misc]
    assert path == "mteb/stsbenchmark-sts"
    assert len(options["revision"]) == 40
    assert options["split"] == "test"
    with pytest.raises(UsageError, match="SciFact: a task of type Retrieval; expected an STS set"):
        load_task("SciFact", None)
    with pytest.raises(UsageError, match="Nonsense: not a task of mteb"):
        load_task("Nonsense", None)


def test_bad_sets_say_where(tmp_path: Path) -> None:
    (tmp_path / "sts").mkdir()
    path = tmp_path / "sts" / "X.jsonl"
    path.write_text('{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a"}\n')
    with pytest.raises(UsageError, match=r"X\.jsonl:2: sentence1; expected an object with sentence1, sentence2, score"):
        load_task("X", tmp_path)
    for bad, message in (
        ('{"sentence1": "a", "sentence2": null, "score": 1}', "sentence2 is None; expected a string"),
        ('{"sentence1": "a", "sentence2": "b", "score": NaN}', "score is nan; expected a number"),
        ('{"sentence1": "a", "sentence2": "b", "score": "x"}', "score is 'x'; expected a number"),
    ):
        path.write_text(bad)
        with pytest.raises(UsageError, match=message):
            load_task("X", tmp_path)
    path.write_bytes(b'{"sentence1": "\xff"}')
    with pytest.raises(UsageError, match=r"X\.jsonl:1: byte 0xff is not UTF-8"):
        load_task("X", tmp_path)
    row = '{"sentence1": "a", "sentence2": "b", "score": 3}\n'
    for text, message in (
        ("", "nothing in it; expected an object with sentence1, sentence2, score a line"),
        (row * 3, "3 pairs with the same score; expected two different scores"),
        (row.replace("b", "cut \\ud83d"), r"X\.jsonl:1: sentence2 has half of a surrogate pair"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_task("X", tmp_path)


def test_every_file_may_be_packed_or_named_test(tmp_path: Path) -> None:
    pairs = [{"sentence1": "a", "sentence2": "b", "score": n} for n in (1, 2)]
    write_rows(tmp_path / "sts" / "S.test.jsonl", pairs)
    write_rows(tmp_path / "classification" / "C.train.jsonl.gz", labelled("a b", "x y"))
    write_rows(tmp_path / "classification" / "C.test.jsonl", labelled("c d", "x y"))
    beir = tmp_path / "retrieval" / "R"
    write_rows(beir / "corpus.jsonl.gz", [{"_id": f"d{n}", "text": f"document {n}"} for n in range(3)])
    write_rows(beir / "queries.jsonl.gz", [{"_id": f"q{n}", "text": f"query {n}"} for n in range(2)])
    (beir / "qrels").mkdir()
    judged = b"query-id\tcorpus-id\tscore\nq0\td2\t1\nq1\td0\t2\n"
    (beir / "qrels" / "test.tsv.gz").write_bytes(gzip.compress(judged))
    shutil.copy(tmp_path / "sts" / "S.test.jsonl", tmp_path / "sts" / "S.jsonl.bak")
    write_rows(tmp_path / "sts" / "S.test.jsonl.gz", pairs)
    assert list_tasks(tmp_path) == ["S", "C", "R"]
    sts, classification, retrieval = load_tasks(["S", "C", "R"], tmp_path, skip_missing=False)
    assert isinstance(sts, StsTask)
    assert isinstance(classification, ClassificationTask)
    assert isinstance(retrieval, RetrievalTask)
    assert retrieval.relevance == [{2: 1.0}, {0: 2.0}]
    assert (retrieval.query_ids, retrieval.document_ids) == (["q0", "q1"], ["d0", "d1", "d2"])
    (beir / "qrels" / "test.tsv.gz").write_bytes(gzip.compress(judged.partition(b"\n")[2]))
    with pytest.raises(UsageError, match=r"test\.tsv\.gz:1: a judgement, 'q0\\td2\\t1'; expected the names"):
        load_task("R", tmp_path)
    write_rows(beir / "queries.jsonl.gz", [{"_id": "q0", "text": "a"}, {"_id": "q0", "text": "b"}])
    with pytest.raises(UsageError, match=r"queries\.jsonl\.gz:2: _id 'q0' for the second time"):
        load_task("R", tmp_path)
    (beir / "queries.jsonl.gz").unlink()
    with pytest.raises(UsageError, match=r"R: no queries\.jsonl; expected corpus\.jsonl, queries\.jsonl and"):
        load_task("R", tmp_path)


def test_a_saved_set_is_the_same(data_dir: Path, tmp_path: Path) -> None:
    task = load_task("STS12", data_dir)
    assert isinstance(task, StsTask)
    save_sts(task, tmp_path)
    assert load_task("STS12", tmp_path) == task


def test_what_a_set_is_changes_with_its_file(data_dir: Path, tmp_path: Path) -> None:
    before = describe_tasks(["STS12", "Tiny"], data_dir)
    assert before == describe_tasks(["STS12", "Tiny"], data_dir)
    assert len(before[1]) >= 4
    assert describe_tasks(["STS12"], None) == [["STS12"]]
    copy = shutil.copytree(data_dir, tmp_path / "copy")
    before = describe_tasks(["STS12", "Tiny"], copy)
    for file in (copy / "sts" / "STS12.jsonl", copy / "retrieval" / "Tiny" / "qrels" / "test.tsv"):
        status = file.stat()
        file.write_bytes(file.read_bytes()[::-1])  # as many bytes
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        now = describe_tasks(["STS12", "Tiny"], copy)
        assert now != before
        before = now


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def labelled(texts: str, labels: str) -> list[dict[str, object]]:
    return [{"text": text, "label": label} for text, label in zip(texts.split(), labels.split(), strict=True)]


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    folder = tmp_path / "sets"
    write_rows(folder / "classification" / "C.train.jsonl", labelled("a b c d", "x y x y"))
    write_rows(folder / "classification" / "C.test.jsonl", labelled("e f", "x y"))
    write_rows(folder / "clustering" / "K.jsonl.gz", labelled("a b c", "1 2 1"))
    pairs = [{"sentence1": "a", "sentence2": "b", "label": 1}, {"sentence1": "c", "sentence2": "d", "label": 0}]
    write_rows(folder / "pairs" / "P.jsonl", pairs)
    write_rows(folder / "pairs" / "P.dev.jsonl", pairs)
    return folder


def test_classification_clustering_and_pairs_come_from_a_folder(sets: Path) -> None:
    assert list_tasks(sets) == ["P", "C", "K"]  # development and training parts are no tasks
    classification, clustering, pairs = (load_task(name, sets) for name in "CKP")
    assert isinstance(classification, ClassificationTask)
    assert (classification.fitted_labels, classification.texts) == (["x", "y", "x", "y"], ["e", "f"])
    assert list_texts(classification) == {"plain": ["a", "b", "c", "d", "e", "f"]}
    assert list_items(classification) == [("e",), ("f",)]
    assert isinstance(clustering, ClusteringTask)
    assert (clustering.texts, clustering.labels) == (["a", "b", "c"], ["1", "2", "1"])
    assert isinstance(pairs, PairTask)
    assert (pairs.labels, list_items(pairs)) == ([True, False], [("a", "b"), ("c", "d")])


def test_what_is_wrong_in_labelled_sets_is_said(sets: Path) -> None:
    write_rows(sets / "classification" / "C.test.jsonl", labelled("e f", "x z"))
    with pytest.raises(UsageError, match=r"C.test.jsonl: labels z; expected the labels of C.train.jsonl"):
        load_task("C", sets)
    (sets / "classification" / "C.train.jsonl").unlink()
    with pytest.raises(UsageError, match=r"no C.train.jsonl beside it"):
        load_task("C", sets)
    write_rows(sets / "clustering" / "K.jsonl.gz", labelled("a b", "1 1"))
    with pytest.raises(UsageError, match="1 label; expected two"):
        load_task("K", sets)
    write_rows(sets / "pairs" / "P.jsonl", [{"sentence1": "a", "sentence2": "b", "label": 2}])
    with pytest.raises(UsageError, match="labels 2; expected 0 and 1"):
        load_task("P", sets)


def test_a_file_of_ones_own_is_what_its_columns_say(tmp_path: Path) -> None:
    sts = write_rows(tmp_path / "s.jsonl", [{"sentence1": "a", "sentence2": "b", "score": n} for n in (1, 2)])
    assert isinstance(load_task(str(sts), None), StsTask)
    rows = [
        {"query": "q1", "documents": ["a", "b"], "relevance": [1, 0], "category": "x"},
        {"query": "q2", "documents": ["b", "c"], "relevance": [0, 2], "category": "y"},
        {"query": "q3", "documents": ["c"], "relevance": [0], "category": "y"},
    ]
    search = load_task(str(write_rows(tmp_path / "own.search.jsonl.gz", rows)), None)
    assert isinstance(search, RetrievalTask)
    assert (search.name, search.queries, search.documents) == ("own.search", ["q1", "q2"], ["a", "b", "c"])
    assert search.relevance == [{0: 1.0, 1: 0.0}, {1: 0.0, 2: 2.0}]
    assert search.columns == {"category": ["x", "y"]}
    texts = load_task(str(write_rows(tmp_path / "t.jsonl", [{"text": "a", "source": "s"}, {"text": "b"}])), None)
    assert isinstance(texts, AgreementTask)
    assert texts.columns == {"source": ["s", ""]}
    judged = [("q1", "a", 1), ("q2", "b", 2), ("q1", "b", 1), ("q1", "a", 0)]  # a row a judgement, one doubled
    flat = [{"query": query, "documents": [text], "relevance": [grade]} for query, text, grade in judged]
    merged = load_task(str(write_rows(tmp_path / "flat.jsonl", flat)), None)
    assert isinstance(merged, RetrievalTask)
    assert (merged.queries, merged.relevance) == (["q1", "q2"], [{0: 1.0, 1: 1.0}, {1: 2.0}])
    rows[0]["relevance"] = [1]
    with pytest.raises(UsageError, match=r"bad.jsonl:1: documents and relevance; expected two lists of the same"):
        load_task(str(write_rows(tmp_path / "bad.jsonl", rows)), None)
    with pytest.raises(UsageError, match="no such file"):
        load_task(str(tmp_path / "nowhere.jsonl"), None)


def test_what_a_task_is_does_not_depend_on_its_further_columns() -> None:
    plain, grouped = AgreementTask("t", ["a", "b"]), AgreementTask("t", ["a", "b"], {"source": ["x", "y"]})
    assert fingerprint_task(plain) == fingerprint_task(grouped) != fingerprint_task(AgreementTask("t", ["a", "c"]))


def test_a_probe_is_fitted_on_eight_of_a_class_ten_times() -> None:
    task = ClassificationTask("c", [str(n) for n in range(60)], ["x", "y", "z"] * 20, ["a"], ["x"])
    drawn = draw_experiments(task)
    assert len(drawn) == 10
    for numbers in drawn:
        assert sorted(task.fitted_labels[number] for number in numbers) == ["x"] * 8 + ["y"] * 8 + ["z"] * 8
    assert drawn[0] != drawn[1]
    assert drawn == draw_experiments(task)
