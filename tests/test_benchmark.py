import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import pytrec_eval
import yaml
from scipy import stats

from embedistill import hub
from embedistill.choices import Kind
from embedistill.errors import EmbedistillError, UsageError
from embedistill.evaluation.benchmark import BenchmarkEncoder, list_benchmark_tasks, run_benchmark, write_submission

STS = [
    ("a ship in the harbour", "the ship is in a harbour", 4.8),
    ("a cow in the field", "the farmer has a cow", 2.6),
    ("bread and cheese", "a loop in the code", 3.6),
    ("the old captain", "the captain is old", 4.4),
    ("onion soup with salt", "salt for the soup", 1.0),
    ("a storm at sea", "a cow eats wheat", 0.2),
]
DOCUMENTS = {
    "d1": ("Ships", "a ship sails to the harbour in a storm"),
    "d2": ("Cows", "a cow stands in the field near the barn"),
    "d3": ("Soup", "onion soup with bread and cheese"),
    "d4": ("Harbours", "the harbour has a captain and a ship and a net"),
    "d5": ("", "a compiler finds the bug in the loop"),
}
QUERIES = {"q1": "ship in the harbour", "q2": "cheese soup", "q3": "the loop has a bug", "q4": "nobody judged this"}
JUDGED = {"q1": {"d1": 1, "d4": 2}, "q2": {"d3": 1, "d2": 1}, "q3": {"d5": 1}}


class Words:
    """Unit sums of one random vector a word, another for another seed; it counts what it is asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.asked: list[tuple[Kind, list[str]]] = []

    def __call__(self, texts: Sequence[str], kind: Kind) -> Any:
        self.asked.append((kind, list(texts)))
        vectors = np.stack([sum(map(self.embed_word, text.lower().split())) for text in texts])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def embed_word(self, word: str) -> Any:
        return np.random.default_rng([self.seed, zlib.crc32(word.encode())]).normal(size=24)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def write_pairs(path: Path, pairs: Sequence[tuple[str, str, Any]], value: str = "score") -> None:
    write_rows(path, ({"sentence1": a, "sentence2": b, value: c} for a, b, c in pairs))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tiny set of every type."""
    data = tmp_path / "data"
    write_pairs(data / "sts" / "STSBenchmark.jsonl", STS)
    write_pairs(data / "sts" / "STS22.jsonl", STS)  # mteb has it in 18 languages
    write_pairs(data / "sts" / "Nonsense.jsonl", STS)
    beir = data / "retrieval" / "SciFact"
    write_rows(beir / "corpus.jsonl.gz", ({"_id": i, "title": t, "text": x} for i, (t, x) in DOCUMENTS.items()))
    write_rows(beir / "queries.jsonl", ({"_id": i, "text": text} for i, text in QUERIES.items()))
    (beir / "qrels").mkdir()
    lines = [f"{query}\t{document}\t{score}" for query, row in JUDGED.items() for document, score in row.items()]
    (beir / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines, ""]))
    labelled = [(f"{first} {word}", label) for first, second, _ in STS for word, label in (("now", "x"), (second, "y"))]
    for name in ("classification/Banking77.train", "classification/Banking77.test"):
        write_rows(data / f"{name}.jsonl", ({"text": text, "label": label} for text, label in labelled))
    write_rows(data / "clustering/TwentyNewsgroups.jsonl.gz", ({"text": t, "label": s} for t, s in labelled * 50))
    write_pairs(data / "pairs/TwitterURLCorpus.jsonl", [(a, b, int(score > 2)) for a, b, score in STS], "label")
    return data


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)


def run(names: Sequence[str], encode: Words, folder: Path | None, name: str = "org/words") -> dict[str, float]:
    return run_benchmark(
        names, encode, model_name=name, revision="r1", embedding_size=24, results_dir=Path("results"), folder=folder
    )


def test_a_folder_names_its_tasks(folder: Path, tmp_path: Path) -> None:
    assert list_benchmark_tasks(folder) == [
        "Banking77Classification",
        "STSBenchmark",
        "SciFact",
        "TwentyNewsgroupsClustering.v2",  # not the first version: it takes ready-made sets of texts
        "TwitterURLCorpus",
    ]
    assert list_benchmark_tasks(tmp_path / "nowhere") == []


def test_sts_is_spearman_of_the_cosines(folder: Path) -> None:
    encode = Words()
    scores = run(["STSBenchmark"], encode, folder)
    first, second = (Words()([row[column] for row in STS], "plain") for column in (0, 1))
    expected = stats.spearmanr((first * second).sum(axis=1), [score for *_, score in STS]).statistic
    assert scores == {"STSBenchmark": pytest.approx(expected, abs=1e-6)}
    assert {kind for kind, _ in encode.asked} == {"plain"}


def test_retrieval_is_trec_evals_and_knows_queries_from_documents(folder: Path) -> None:
    encode = Words()
    scores = run(["SciFact"], encode, folder)
    assert {kind for kind, _ in encode.asked} == {"query", "document"}
    texts = [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
    assert [texts for kind, texts in encode.asked if kind == "document"] == [texts]
    cosines = Words()([QUERIES[query] for query in JUDGED], "query") @ Words()(texts, "document").T
    found = {
        query: dict(zip(DOCUMENTS, map(float, row), strict=True)) for query, row in zip(JUDGED, cosines, strict=True)
    }
    each = pytrec_eval.RelevanceEvaluator(JUDGED, {"ndcg_cut_10"}).evaluate(found)
    expected = np.mean([row["ndcg_cut_10"] for row in each.values()])
    assert 0.5 < expected < 1
    assert scores["SciFact"] == pytest.approx(expected, abs=1e-5)  # mteb rounds to five digits


def test_mteb_leaves_out_a_document_that_is_the_query_itself(folder: Path) -> None:
    """In ArguAna queries stand in the corpus, under the same id."""
    beir = folder / "retrieval" / "ArguAna"
    texts = {"a": "red green", "b": "red green blue", "c": "white"}
    for name in ("corpus", "queries"):
        write_rows(beir / f"{name}.jsonl", ({"_id": i, "text": text} for i, text in texts.items()))
    (beir / "qrels").mkdir()
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\tb\t1\nb\ta\t1\n")
    assert run(["ArguAna"], Words(), folder) == {"ArguAna": 1.0}


def test_classification_clustering_and_pairs_run(folder: Path) -> None:
    names = ["Banking77Classification", "TwentyNewsgroupsClustering.v2", "TwitterURLCorpus"]
    scores = run(names, Words(), folder)
    assert list(scores) == names
    assert scores["Banking77Classification"] > 0.8  # it is tested on what it was trained on
    assert all(0 < score <= 1 for score in scores.values())


def test_what_is_there_is_not_run_again(folder: Path) -> None:
    names = ["STSBenchmark", "SciFact"]
    first = run(names, Words(), folder)
    again = Words()
    assert run(names, again, folder) == first
    assert again.asked == []
    write_pairs(folder / "sts" / "STSBenchmark.jsonl", STS[1:])
    assert run(names, again, folder)["STSBenchmark"] != first["STSBenchmark"]
    assert sum(len(texts) for _, texts in again.asked) == 10  # of the changed set alone


def test_two_models_share_no_results(folder: Path) -> None:
    first, second = Words(), Words(seed=1)
    one = run(["STSBenchmark"], first, folder)
    other = run(["STSBenchmark"], second, folder, "words")
    assert second.asked
    assert one != other
    found = mteb.ResultCache("results").load_results()
    assert {model.model_name: model.task_results[0].get_score() for model in found.model_results} == {
        "org/words": one["STSBenchmark"],
        "local/words": other["STSBenchmark"],
    }
    with pytest.raises(UsageError, match=r"revision of org/words: 'a/b'; expected a commit or a sum"):
        run_benchmark([], first, model_name="org/words", revision="a/b", embedding_size=24, results_dir=Path("results"))


def test_a_result_says_that_its_data_was_another(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["STSBenchmark"], Words(), folder)
    assert "STSBenchmark: 6 items from" in (said := capsys.readouterr().err)
    assert "not mteb's 1,379: compare with no other's figures" in said
    (path,) = Path("results").rglob("STSBenchmark.json")
    assert re.fullmatch(r"local-other:[0-9a-f]{16}", json.loads(path.read_text())["dataset_revision"])
    with pytest.raises(EmbedistillError, match="STSBenchmark: the Hub does not answer"):
        run(["STSBenchmark"], Words(), None)  # what the Hub would give is another result


def test_a_text_is_encoded_once_and_its_rows_come_in_order() -> None:
    encode = Words()
    encoder = BenchmarkEncoder(encode, None)
    batches = [{"text": ["b", "a"]}, {"text": ["b", "c"]}]
    vectors = encoder.encode(batches, task_metadata=None, hf_split="test", hf_subset="default", prompt_type="query")
    assert encode.asked == [("query", ["b", "a", "c"])]
    np.testing.assert_array_equal(vectors, Words()(["b", "a", "b", "c"], "query"))
    assert encoder.similarity(vectors, vectors).shape == (4, 4)
    np.testing.assert_allclose(encoder.similarity_pairwise(vectors, vectors), 1, atol=1e-6)
    assert isinstance(encoder, mteb.EncoderProtocol)


def test_what_cannot_be_run_is_refused_before_anything_is(folder: Path, tmp_path: Path) -> None:
    encode = Words()
    with pytest.raises(UsageError, match=r"task STSBenchmak: not a task of mteb; .*Did you mean: 'STSBenchmark'"):
        run(["STSBenchmark", "STSBenchmak"], encode, folder)
    with pytest.raises(UsageError, match=r"task STS12: not in .*, and the Hub .*; expected one of: Banking77Class"):
        run(["STSBenchmark", "STS12"], encode, folder)
    with pytest.raises(EmbedistillError, match="task STS12: the Hub does not answer; name a folder"):
        run(["STS12"], encode, None)
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        run(["STS12"], encode, tmp_path / "nowhere")
    assert encode.asked == []


def test_the_hub_has_what_the_folder_has_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)  # it is asked, and cannot be had offline
    with pytest.raises(EmbedistillError, match=r"task STS12: .*; check the network, or name a folder"):
        run(["STS12"], Words(), folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("sts/STSBenchmark.jsonl", '{"sentence1": "a", "score": 1}', r"jsonl:1: sentence1, score; expected an object"),
        ("retrieval/SciFact/qrels/test.tsv", "query-id\n1 2 3\n", r"test\.tsv:2: '1 2 3'; expected a query"),
    ],
)
def test_bad_data_says_where(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    with pytest.raises(UsageError, match=message):
        run(["STSBenchmark", "SciFact"], Words(), folder)


def test_a_submission_holds_the_figure_and_says_whose_data(folder: Path, tmp_path: Path) -> None:
    pairs = [(f"{a} {number}", b, score) for number in range(230) for a, b, score in STS][:1379]
    write_pairs(folder / "sts" / "STSBenchmark.jsonl", pairs)
    scores = run(["STSBenchmark", "SciFact"], Words(), folder)
    student = tmp_path / "student"
    paths = write_submission(Path("results"), student, model_name="org/words", revision="r1")
    assert paths == [student / ".eval_results" / "STSBenchmark.yaml"]  # and not SciFact of five documents
    entries = yaml.safe_load(paths[0].read_text())
    assert [entry["dataset"]["task_id"] for entry in entries] == ["STSBenchmark_default_test", "STSBenchmark"]
    for entry in entries:
        assert entry["value"] == pytest.approx(100 * scores["STSBenchmark"], abs=1e-4)
        assert entry["dataset"]["id"] == "mteb/stsbenchmark-sts"
        assert "revision" not in entry["dataset"]
        assert "on a local copy of the data (local:" in entry["notes"]
    with pytest.raises(UsageError, match="no results of org/words at r2; run the benchmark first"):
        write_submission(Path("results"), student, model_name="org/words", revision="r2")
