from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import numpy as np
import pytest
import pytrec_eval
from scipy import stats
from sklearn.cluster import KMeans
from sklearn.metrics import average_precision_score, v_measure_score

from embedistill.choices import Kind
from embedistill.errors import EmbedistillError
from embedistill.evaluation import probes, trial
from embedistill.evaluation.comparison import Retention, _count_needed, compare_results, correct, decide
from embedistill.evaluation.costs import measure_start
from embedistill.evaluation.metrics import (
    _prepare,
    bootstrap,
    cosines,
    metric_names,
    metric_value,
    neighbour_overlap,
    score_rankings,
)
from embedistill.evaluation.probes import agree, classify, cluster, compare_similarities
from embedistill.evaluation.retrieval import make_index, search_exactly, search_index
from embedistill.evaluation.scoring import Encoder, Result, score_model
from embedistill.evaluation.tasks import (
    AgreementTask,
    ClassificationTask,
    ClusteringTask,
    PairTask,
    RetrievalTask,
    StsTask,
    make_known_item_task,
)
from embedistill.evaluation.trial import choose_texts
from embedistill.report.document import Report

RNG = np.random.default_rng(0)


def check_resampled(reference: Callable[[np.ndarray], float], items: dict[str, np.ndarray], metric: str) -> None:
    """Check a metric against another implementation: on the items, and on resamples of them."""
    assert metric_names(items) == [metric]
    n_items = len(next(iter(items.values())))
    assert metric_value(items, metric) == pytest.approx(reference(np.arange(n_items)), abs=1e-12)
    drawn = RNG.integers(n_items, size=n_items)
    weights = np.bincount(drawn, minlength=n_items).astype(float)[None, :]
    assert _prepare([(items, metric)])(weights)[0, 0] == pytest.approx(reference(drawn), abs=1e-12)


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_spearman_is_scipys_also_with_ties_and_for_a_resample(decimals: int) -> None:
    x, y = RNG.normal(size=30).round(decimals), RNG.integers(0, 6, 30).astype(float)
    check_resampled(
        lambda rows: stats.spearmanr(x[rows], y[rows]).statistic, {"cosine": x, "score": y}, "spearman_cosine"
    )


@pytest.mark.parametrize("decimals", [0, 1, 8])
def test_average_precision_is_scikit_learns_also_with_ties(decimals: int) -> None:
    x, y = RNG.normal(size=40).round(decimals), RNG.integers(0, 2, 40)
    check_resampled(lambda rows: average_precision_score(y[rows], x[rows]), {"cosine": x, "label": y}, "cosine_ap")


@pytest.mark.parametrize("n_clusters", [1, 3, 7])
def test_v_measure_is_scikit_learns(n_clusters: int) -> None:
    found, label = RNG.integers(0, n_clusters, 40), RNG.integers(0, 4, 40)
    check_resampled(
        lambda rows: v_measure_score(label[rows], found[rows]), {"cluster": found, "label": label}, "v_measure"
    )


def test_spearman_of_a_constant_is_zero() -> None:
    assert metric_value({"cosine": [1.0] * 5, "score": [1, 2, 3, 4, 5]}, "spearman_cosine") == 0


def test_rankings_are_scored_as_trec_eval_does() -> None:
    rankings = np.array([RNG.permutation(40)[:20] for _ in range(25)])
    judged = [{int(d): int(RNG.integers(0, 4)) for d in RNG.permutation(40)[:12]} for _ in range(25)]
    for row in judged:
        row[0] = 2  # something is relevant
    ours = score_rankings(rankings, judged, k=10)
    qrels = {str(q): {str(d): rel for d, rel in row.items()} for q, row in enumerate(judged)}
    run = {str(q): {str(d): float(-rank) for rank, d in enumerate(row[:10])} for q, row in enumerate(rankings)}
    whole = {str(q): {str(d): float(-rank) for rank, d in enumerate(row)} for q, row in enumerate(rankings)}
    measures = {"ndcg_cut_10", "recip_rank", "recall_1,10,100", "map"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    of_all = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(whole)
    for query in range(25):
        expected = theirs[str(query)]
        assert ours["ndcg@10"][query] == pytest.approx(expected["ndcg_cut_10"])
        assert ours["mrr@10"][query] == pytest.approx(expected["recip_rank"])
        assert ours["map"][query] == pytest.approx(of_all[str(query)]["map"])
        for cut in (1, 10, 100):
            assert ours[f"recall@{cut}"][query] == pytest.approx(of_all[str(query)][f"recall_{cut}"])


def test_a_ranking_by_hand() -> None:
    scores = score_rankings(np.array([[7, 3, 5]]), [{3: 1.0, 9: 1.0, 5: 0.0}], k=2, recalls=(1, 2))
    assert scores["mrr@2"] == [0.5]
    assert scores["recall@1"] == [0.0]
    assert scores["recall@2"] == [0.5]
    assert scores["map"] == [0.25]
    assert scores["ndcg@2"] == [pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))]


def test_overlap_and_cosine_by_hand() -> None:
    assert neighbour_overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [3, 9]])) == [1.0, 0.5]
    assert cosines(np.array([[1, 0], [0.6, 0.8]]), np.array([[0, 1], [0.8, 0.6]])) == pytest.approx([0, 0.96])


def test_the_bootstrap_of_a_mean_has_its_known_spread() -> None:
    values = RNG.normal(size=400)
    items = {"ndcg@10": list(values)}
    (draws,) = bootstrap([(items, "ndcg@10")], 4000, seed=1)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.1)
    np.testing.assert_array_equal(draws, bootstrap([(items, "ndcg@10")], 4000, seed=1)[0])


def test_the_bootstrap_of_spearman_is_what_scipy_finds_on_resamples() -> None:
    x = RNG.normal(size=60)
    items = {"cosine": x, "score": (x + RNG.normal(size=60)).round()}
    draws = bootstrap([(items, "spearman_cosine")] * 2, 3000, seed=1)
    np.testing.assert_array_equal(*draws)
    rows = RNG.integers(60, size=(3000, 60))
    theirs = [stats.spearmanr(x[some], items["score"][some]).statistic for some in rows]
    assert np.quantile(draws[0], [0.025, 0.5, 0.975]) == pytest.approx(
        np.quantile(theirs, [0.025, 0.5, 0.975]), abs=0.02
    )


def result(role: str, task: str, items: dict[str, list[float]]) -> Result:
    metric = "spearman_cosine" if "score" in items else next(iter(items))
    return Result(task, role, role, {metric: metric_value(items, metric)}, items)


def test_retention_of_a_student_that_loses_a_tenth_of_everything_is_sure() -> None:
    teacher = list(RNG.uniform(0.2, 1, 50))
    student = [0.9 * value for value in teacher]
    results = [result("teacher", "T", {"ndcg@10": teacher}), result("student", "T", {"ndcg@10": student})]
    (row,), tests = compare_results(results, resamples=500, seed=0, margin=0.03)
    kept = row.retention["student"]
    assert (kept.value, kept.low, kept.high) == pytest.approx((0.9, 0.9, 0.9))
    assert str(kept) == "0.900 [0.900, 0.900] FAIL"
    assert (row.n_items, kept.items_needed) == (50, None)
    (tested,) = tests
    assert (tested.first, tested.second) == ("teacher", "student")
    assert tested.value == pytest.approx(np.mean(teacher) / 10)
    assert tested.p_value == pytest.approx(2 / 501)  # in none of 500 resamples is the student as good


def test_retention_is_paired() -> None:
    """Two models with the same errors differ less surely when their items are taken as independent."""
    noise = RNG.normal(size=200)
    teacher, student = list(1 + noise), list(0.95 + noise)
    results = [result("teacher", "T", {"m": teacher}), result("student", "T", {"m": student})]
    kept = compare_results(results, resamples=1000, seed=0)[0][0].retention["student"]
    assert kept.high - kept.low < 0.05
    assert kept.verdict is None


def test_the_mean_of_sts_sets_is_the_ratio_of_means() -> None:
    score = list(RNG.uniform(0, 5, 60))
    results = []
    for task in ("A", "B"):
        for role, noise in (("teacher", 0.5), ("student", 2.0)):
            cosine = list(np.array(score) + noise * RNG.normal(size=60))
            results.append(result(role, task, {"cosine": cosine, "score": score}))
    (*single, mean), _ = compare_results(results, resamples=200, seed=0)
    assert mean.task == "STS mean"
    assert mean.values["student"] == pytest.approx(np.mean([row.values["student"] for row in single]))
    assert mean.retention["student"].value == pytest.approx(mean.values["student"] / mean.values["teacher"])
    assert mean.retention["student"].low < mean.retention["student"].value < mean.retention["student"].high


def test_a_teacher_at_zero_has_no_retention() -> None:
    results = [result("teacher", "T", {"m": [0.0, 0.0]}), result("student", "T", {"m": [1.0, 0.0]})]
    assert compare_results(results, resamples=100, seed=0)[0][0].retention == {}


def test_a_teacher_below_zero_has_nothing_to_keep_and_one_near_zero_decides_nothing() -> None:
    teacher, better = [-1.0] * 30 + [0.5] * 10, [1.0] * 40
    results = [result("teacher", "T", {"ndcg@10": teacher}), result("student", "T", {"ndcg@10": better})]
    rows = compare_results(results, resamples=100, seed=0, margin=0.03)[0]
    assert rows[0].retention == {}
    assert Report("r", [], rows, 0.03).verdict == "UNDECIDED"
    weak = [1.0, -0.9] * 20
    results = [result("teacher", "T", {"ndcg@10": weak}), result("student", "T", {"ndcg@10": [5 * v for v in weak]})]
    kept = compare_results(results, resamples=100, seed=0, margin=0.03)[0][0].retention["student"]
    assert (kept.value, kept.verdict, kept.items_needed) == (pytest.approx(5), "UNDECIDED", None)


def test_a_few_items_decide_nothing() -> None:
    """Of three items that all fell, a test by their signs is sure to one in four, not one in thousands."""
    for n_items, verdict in ((3, "UNDECIDED"), (20, "FAIL")):
        teacher = [0.9, 0.8, 0.7, 0.9] * 5
        results = [
            result(role, "T", {"ndcg@10": [share * value for value in teacher[:n_items]]})
            for role, share in (("teacher", 1.0), ("student", 0.5))
        ]
        rows, (tested,) = compare_results(results, resamples=5000, seed=0, margin=0.03)
        assert rows[0].retention["student"].verdict == verdict
        assert tested.p_value == pytest.approx(0.25 if n_items == 3 else 2 / 5001)
    assert rows[0].retention["student"].items_needed is None


def test_an_undecided_student_is_told_how_many_items_would_decide() -> None:
    """Four times the items halve the interval, so that its nearer end comes to where it has to be."""
    kept = Retention(0.98, 0.96, 1.0, "UNDECIDED")
    assert _count_needed(kept, 100, 0.03) == 400
    assert _count_needed(Retention(0.96, 0.94, 0.99, "UNDECIDED"), 100, 0.03) == 900
    assert _count_needed(Retention(0.97, 0.96, 0.98, "UNDECIDED"), 100, 0.03) is None
    assert _count_needed(Retention(0.99, 0.98, 1.0, "PASS"), 100, 0.03) is None


def test_many_tests_are_corrected_as_holm_does() -> None:
    """By hand: 0.01 x 4, 0.02 x 3, 0.03 x 2, and 0.9, none less than the one before."""
    assert correct({"a": 0.03, "b": 0.01, "c": 0.9, "d": 0.02}) == pytest.approx(
        {"b": 0.04, "d": 0.06, "a": 0.06, "c": 0.9}
    )
    assert correct({"a": 0.6, "b": 0.7}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_two_models_alike_do_not_differ() -> None:
    values = list(RNG.uniform(size=50))
    results = [result(role, "T", {"ndcg@10": values}) for role in ("teacher", "student", "other")]
    tests = compare_results(results, resamples=100, seed=0)[1]
    assert [(one.first, one.second) for one in tests] == [
        ("teacher", "student"),
        ("teacher", "other"),
        ("student", "other"),
    ]
    assert {one.p_corrected for one in tests} == {1.0}


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.98, 0.99, 0.03, "PASS"),
        (0.90, 0.96, 0.03, "FAIL"),
        (0.96, 0.98, 0.03, "UNDECIDED"),
        (0.1, 0.2, None, None),
    ],
)
def test_verdicts(low: float, high: float, margin: float | None, verdict: str | None) -> None:
    assert decide(low, high, margin) == verdict


def test_known_items_with_an_unclear_query_are_left_out() -> None:
    task = make_known_item_task("k", [("a", "x"), ("b", "y"), ("b", "z"), ("c", "z")], ["x", "y", "z", "w"])
    assert task is not None
    assert (task.queries, task.documents) == (["a", "c"], ["x", "y", "z", "w"])
    assert task.relevance == [{0: 1.0}, {2: 1.0}]
    assert make_known_item_task("k", [("a", "x")], ["x"]) is None


def fake_encode(texts: list[str], kind: str) -> np.ndarray:
    """Put a text at the angle that it names, in degrees."""
    angles = np.radians([float(text) for text in texts])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_a_model_is_scored_on_every_task_and_encodes_each_text_of_a_kind_once() -> None:
    calls: dict[str, list[str]] = {}

    def encode(texts: list[str], kind: str) -> np.ndarray:
        assert kind not in calls
        calls[kind] = list(texts)
        return fake_encode(texts, kind)

    tasks = [
        StsTask("S", ["0", "0", "0"], ["10", "50", "90"], [5, 3, 1]),
        RetrievalTask("R", ["10"], ["0", "50", "12"], [{2: 1.0}]),
        AgreementTask("agreement", ["0", "10", "50", "90"]),
        PairTask("P", ["0", "0"], ["10", "90"], [True, False]),
        ClassificationTask("C", ["0", "5", "80", "90"], ["low", "low", "high", "high"], ["10", "70"], ["low", "high"]),
        ClusteringTask("K", ["0", "5", "80", "90"], ["a", "a", "b", "b"]),
    ]
    found = score_model(
        tasks, encode, role="student", model="m", teacher=fake_encode, teacher_space=lambda same: same, asymmetric=True
    )
    sts, retrieval, of_queries, of_documents, agreement, pairs, classification, clustering = found
    assert calls == {
        "plain": ["0", "10", "50", "90", "5", "80", "70"],
        "query": ["10"],
        "document": ["0", "50", "12", "10", "90"],
    }
    assert sts.metrics == {"spearman_cosine": 1.0}
    assert sts.items["cosine"] == pytest.approx([np.cos(np.radians(angle)) for angle in (10, 50, 90)], abs=1e-6)
    ranked = ["ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100", "map", "overlap@10"]
    assert retrieval.metrics == of_queries.metrics == dict.fromkeys(ranked, 1.0)
    assert (of_queries.role, of_documents.role) == ("student queries", "student documents")
    assert agreement.metrics == pytest.approx({"cosine": 1.0, "overlap@10": 1.0, "rank_correlation": 1.0})
    assert agreement.details["similarities"]["distance"] == 0
    assert pairs.metrics == {"cosine_ap": 1.0}
    assert classification.items == {"accuracy": [1.0, 1.0]}
    assert clustering.metrics == {"v_measure": pytest.approx(1.0)}


def queries_alone(encode: Encoder) -> Encoder:
    def refusing(texts: Sequence[str], kind: Kind) -> np.ndarray:
        assert kind == "query", "documents are the teacher's"
        return encode(texts, kind)

    return refusing


def test_students_queries_find_what_the_teachers_documents_say() -> None:
    """The student turns queries by 90 degrees and documents not at all: each side is judged by its own fault."""
    documents, queries = ["0", "40", "90", "130"], ["2", "88"]
    task = RetrievalTask("R", queries, documents, [{0: 1.0}, {2: 1.0}])

    def student(texts: list[str], kind: str) -> np.ndarray:
        return fake_encode([str(float(text) + 90 * (kind == "query")) for text in texts], kind)

    plain, of_queries, of_documents = score_model(
        [task],
        student,
        role="student",
        model="m",
        teacher=fake_encode,
        teacher_space=lambda same: same,
        asymmetric=True,
    )
    assert plain.items["recall@1"] == of_queries.items["recall@1"] == [0.0, 0.0]
    assert of_documents.items["recall@1"] == [1.0, 1.0]
    borrowing = {"teacher": fake_encode, "teacher_space": lambda same: same, "borrows": True}
    (borrowed,) = score_model([task], queries_alone(student), role="student", model="m", **borrowing)
    assert (borrowed.role, borrowed.details["documents"]) == ("student", "teacher")
    assert borrowed.items == of_queries.items
    (teacher,) = score_model([task], fake_encode, role="teacher", model="t", teacher=fake_encode)
    assert teacher.details["nearest"] == pytest.approx([np.cos(np.radians(2))] * 2)


def test_speed_is_measured_on_what_the_student_encodes_and_on_fewer_texts_where_they_are_long() -> None:
    queries, documents = [f"query {n}" for n in range(100)], [f"{n} " + 1_000 * "x" for n in range(100)]
    tasks = [RetrievalTask("R", queries, documents, [{n: 1.0} for n in range(100)])]
    (chosen, again), of_queries = (choose_texts(tasks) for _ in range(2)), choose_texts(tasks, "teacher")
    assert chosen == again
    assert set(chosen) < {*queries, *documents}
    assert 20 <= len(chosen) < 64
    assert sum(map(len, chosen)) <= 20_000
    assert (len(of_queries), set(of_queries) - set(queries)) == (64, set())
    long = AgreementTask("A", [text + 5_000 * "x" for text in documents])
    assert len(choose_texts([long])) == 16


def test_exact_search_is_numpys() -> None:
    documents, queries = RNG.normal(size=(50, 8)).astype("f4"), RNG.normal(size=(5, 8)).astype("f4")
    np.testing.assert_array_equal(search_exactly(documents, queries, 7), np.argsort(-queries @ documents.T)[:, :7])


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivfpq"])
def test_every_index_finds_what_is_clearly_nearest(kind: str) -> None:
    documents = RNG.normal(size=(300, 16)).astype("f4")
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    ranking, costs = search_index(documents, documents[:20], 5, kind)  # type: ignore[arg-type]
    np.testing.assert_array_equal(ranking[:, 0], np.arange(20))
    assert costs.kind == kind
    assert 300 * 16 * 4 / 1e6 < costs.megabytes < 1
    assert costs.p50_ms <= costs.p95_ms


def test_many_documents_are_kept_as_codes() -> None:
    documents = np.random.default_rng(0).normal(size=(10_000, 16)).astype("f4")
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    assert isinstance(faiss.downcast_index(make_index(documents, "ivfpq")), faiss.IndexIVFPQ)
    assert search_index(documents, documents[:20], 5, "ivfpq")[1].megabytes < 10_000 * 16 * 4 / 3e6


def test_similarities_of_a_model_that_halves_them_are_found_out() -> None:
    """Two dimensions tell texts apart; a third, the same for all, raises every similarity from s to (s + 1) / 2."""
    angles = RNG.uniform(0, 2 * np.pi, 200)
    teacher = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("f4")
    model = np.concatenate([teacher, np.ones((200, 1), "f4")], axis=1) / np.sqrt(2).astype("f4")
    found = compare_similarities(model, teacher)
    assert dict(found["thresholds"])[0.5] == pytest.approx(0.75, abs=0.01)
    similarities = (teacher @ teacher.T)[~np.eye(200, dtype=bool)]
    assert found["distance"] == pytest.approx(np.mean((1 - similarities) / 2), abs=1e-4)
    assert sum(found["model"]) == pytest.approx(1, abs=1e-4)
    kept = agree(model, teacher, None)
    assert kept["overlap@10"] == pytest.approx([1.0] * 200)
    assert kept["rank_correlation"] == pytest.approx([1.0] * 200, abs=1e-3)
    assert "cosine" not in kept


def test_rank_correlation_is_scipys_without_the_text_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_REFERENCES", 8)  # texts in three blocks
    model, teacher = (RNG.normal(size=(20, 5)).astype("f4") for _ in range(2))
    model[11] = model[12]  # a tie
    found = agree(model, teacher, None)["rank_correlation"]
    for row in range(20):
        others = [other for other in range(8) if other != row]
        expected = stats.spearmanr(model[row] @ model[others].T, teacher[row] @ teacher[others].T).statistic
        assert found[row] == pytest.approx(expected, abs=1e-6)


def test_a_probe_and_clusters_find_what_is_there() -> None:
    low, high = (fake_encode([str(n) for n in some], "plain") for some in (range(20), range(70, 90)))
    both, labels = np.concatenate([low, high]), ["low"] * 20 + ["high"] * 20
    assert classify(both, labels, both[[0, 39]], ["low", "low"]) == [1.0, 0.0]
    found = cluster(both, 2)
    assert len(set(found[:20])) == len(set(found[20:])) == 1 != len(set(found))


def test_clusters_are_the_tightest_whatever_the_start() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(7), 80)
    texts = random.normal(size=(7, 16))[groups] + random.normal(size=(len(groups), 16))
    texts = (texts / np.linalg.norm(texts, axis=1, keepdims=True)).astype(np.float32)
    tightest = min(KMeans(7, n_init=1, random_state=seed).fit(texts).inertia_ for seed in range(60))
    for order in (np.arange(len(texts)), *(random.permutation(len(texts)) for _ in range(3))):
        found = np.array(cluster(texts[order], 7))
        parts = [texts[order][found == number] for number in range(7)]
        assert sum(np.square(part - part.mean(axis=0)).sum() for part in parts) < 1.01 * tightest


@pytest.mark.real_start
def test_a_new_process_says_what_a_model_needs(teacher_dir: Path, tmp_path: Path) -> None:
    start = measure_start(teacher_dir, ["a ship", "a cow"])
    assert 0 < start.cold_start_seconds < 60
    assert start.peak_megabytes is not None
    assert 100 < start.peak_megabytes < 10_000
    with pytest.raises(EmbedistillError, match=r"nothing: .*; check that SentenceTransformer\(path\) loads it"):
        measure_start(tmp_path / "nothing", ["a ship"])


def test_a_model_whose_vectors_are_not_finite_has_no_score() -> None:
    """Sorted, they would be the largest, and a set in the order of its scores would be perfect."""

    def encode(texts: Sequence[str], kind: str) -> np.ndarray:
        return np.full((len(texts), 2), np.nan, np.float32)

    task = StsTask("S", ["0", "0", "0"], ["10", "50", "90"], [1, 3, 5])
    with pytest.raises(
        EmbedistillError, match="student m: 4 of 4 vectors are not finite, such as that of '0'; expected"
    ):
        score_model([task], encode, role="student", model="m")


def test_a_model_whose_start_cannot_be_measured_is_compared_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trial, "measure_start", measure_start)
    assert trial._try_start(tmp_path / "nothing", ["a ship"]) is None
    assert "Start and memory are not measured: model" in capsys.readouterr().err
