import numpy as np
import pytest
import pytrec_eval
from scipy import stats

from embedistill.evaluation.comparison import STS_MEAN, compare_results, decide
from embedistill.evaluation.metrics import (
    bootstrap,
    cosines,
    metric_value,
    neighbour_overlap,
    score_rankings,
    spearman,
)
from embedistill.evaluation.scoring import Result, score_model, search_exactly
from embedistill.evaluation.tasks import AgreementTask, RetrievalTask, StsTask, make_known_item_task

RNG = np.random.default_rng(0)


def test_spearman_is_scipys_also_with_ties_and_for_a_resample() -> None:
    for _ in range(20):
        x, y = RNG.integers(0, 6, 30).astype(float), RNG.normal(size=30)
        drawn = RNG.integers(30, size=30)
        weights = np.stack([np.ones(30), np.bincount(drawn, minlength=30)], axis=1).astype(float)
        plain, resampled = spearman(x, y, weights)
        assert plain == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert resampled == pytest.approx(stats.spearmanr(x[drawn], y[drawn]).statistic, abs=1e-12)


def test_spearman_of_a_constant_is_zero() -> None:
    assert spearman(np.ones(5), np.arange(5.0), np.ones((5, 1)))[0] == 0


def test_rankings_are_scored_as_trec_eval_does() -> None:
    rankings = np.array([RNG.permutation(40)[:20] for _ in range(25)])
    judged = [{int(d): int(RNG.integers(0, 4)) for d in RNG.permutation(40)[:12]} for _ in range(25)]
    for row in judged:
        row[0] = 2  # something is relevant
    ours = score_rankings(rankings, judged, k=10)
    qrels = {str(q): {str(d): rel for d, rel in row.items()} for q, row in enumerate(judged)}
    run = {str(q): {str(d): float(-rank) for rank, d in enumerate(row[:10])} for q, row in enumerate(rankings)}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut_10", "recip_rank", "recall_10"}).evaluate(run)
    for query in range(25):
        expected = theirs[str(query)]
        assert ours["ndcg@10"][query] == pytest.approx(expected["ndcg_cut_10"])
        assert ours["mrr@10"][query] == pytest.approx(expected["recip_rank"])
        assert ours["recall@10"][query] == pytest.approx(expected["recall_10"])


def test_a_ranking_by_hand() -> None:
    scores = score_rankings(np.array([[7, 3, 5]]), [{3: 1.0, 9: 1.0}], k=2)
    assert scores["mrr@2"] == [0.5]
    assert scores["recall@2"] == [0.5]
    assert scores["ndcg@2"] == [pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))]


def test_overlap_and_cosine_by_hand() -> None:
    assert neighbour_overlap(np.array([[1, 2], [3, 4]]), np.array([[2, 1], [3, 9]])) == [1.0, 0.5]
    assert cosines(np.array([[1, 0], [0.6, 0.8]]), np.array([[0, 1], [0.8, 0.6]])) == pytest.approx([0, 0.96])


def test_the_bootstrap_of_a_mean_has_its_known_spread() -> None:
    values = RNG.normal(size=400)
    draws = bootstrap({"ndcg@10": list(values)}, "ndcg@10", 4000, seed=1)
    assert draws.mean() == pytest.approx(values.mean(), abs=0.01)
    assert draws.std() == pytest.approx(values.std() / 20, rel=0.1)
    np.testing.assert_array_equal(draws, bootstrap({"ndcg@10": list(values)}, "ndcg@10", 4000, seed=1))


def result(role: str, task: str, items: dict[str, list[float]]) -> Result:
    metric = "spearman_cosine" if "score" in items else next(iter(items))
    return Result(task, role, role, {metric: metric_value(items, metric)}, items)


def test_retention_of_a_student_that_loses_a_tenth_of_everything_is_sure() -> None:
    teacher = list(RNG.uniform(0.2, 1, 50))
    student = [0.9 * value for value in teacher]
    results = [result("teacher", "T", {"ndcg@10": teacher}), result("student", "T", {"ndcg@10": student})]
    (row,) = compare_results(results, resamples=500, seed=0, margin=0.03)
    kept = row.retention["student"]
    assert (kept.value, kept.low, kept.high) == pytest.approx((0.9, 0.9, 0.9))
    assert str(kept) == "0.900 [0.900, 0.900] FAIL"
    assert row.n_items == 50


def test_retention_is_paired() -> None:
    """Two models with the same errors differ less surely when their items are taken as independent."""
    noise = RNG.normal(size=200)
    teacher, student = list(1 + noise), list(0.95 + noise)
    results = [result("teacher", "T", {"m": teacher}), result("student", "T", {"m": student})]
    kept = compare_results(results, resamples=1000, seed=0)[0].retention["student"]
    assert kept.high - kept.low < 0.05
    assert kept.verdict is None


def test_the_mean_of_sts_sets_is_the_ratio_of_means() -> None:
    score = list(RNG.uniform(0, 5, 60))
    results = []
    for task in ("A", "B"):
        for role, noise in (("teacher", 0.5), ("student", 2.0)):
            cosine = list(np.array(score) + noise * RNG.normal(size=60))
            results.append(result(role, task, {"cosine": cosine, "score": score}))
    *single, mean = compare_results(results, resamples=200, seed=0)
    assert mean.task == STS_MEAN
    assert mean.values["student"] == pytest.approx(np.mean([row.values["student"] for row in single]))
    assert mean.retention["student"].value == pytest.approx(mean.values["student"] / mean.values["teacher"])
    assert mean.retention["student"].low < mean.retention["student"].value < mean.retention["student"].high


def test_a_teacher_at_zero_has_no_retention() -> None:
    results = [result("teacher", "T", {"m": [0.0, 0.0]}), result("student", "T", {"m": [1.0, 0.0]})]
    assert compare_results(results, resamples=100, seed=0)[0].retention == {}


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
    ]
    sts, retrieval, agreement = score_model(
        tasks, encode, role="student", model="m", teacher=fake_encode, teacher_space=lambda vectors: vectors
    )
    assert calls == {
        "plain": ["0", "10", "50", "90"],
        "query": ["10"],
        "document": ["0", "50", "12", "10", "90"],
    }
    assert sts.metrics == {"spearman_cosine": 1.0}
    assert sts.items["cosine"] == pytest.approx([np.cos(np.radians(angle)) for angle in (10, 50, 90)], abs=1e-6)
    assert retrieval.metrics == {"ndcg@10": 1.0, "mrr@10": 1.0, "recall@10": 1.0}
    assert agreement.metrics == {"cosine": pytest.approx(1.0), "overlap@10": 1.0}


def test_exact_search_is_numpys() -> None:
    documents, queries = RNG.normal(size=(50, 8)).astype("f4"), RNG.normal(size=(5, 8)).astype("f4")
    np.testing.assert_array_equal(search_exactly(documents, queries, 7), np.argsort(-queries @ documents.T)[:, :7])
