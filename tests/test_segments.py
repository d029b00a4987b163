"""Where a student is worse than on average, and that it is seen."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import make_tokenizer

from embedistill.evaluation.comparison import MAIN, Retention
from embedistill.evaluation.metrics import metric_value
from embedistill.evaluation.scoring import Result
from embedistill.evaluation.segments import (
    MISSPELT,
    Segment,
    count_characters,
    find_segments,
    judge_segments,
    make_distance_measure,
    make_piece_measure,
    misspell,
)
from embedistill.evaluation.tasks import AgreementTask, ClassificationTask, ClusteringTask, RetrievalTask, StsTask
from embedistill.evaluation.trial import find_contamination, find_disagreements
from embedistill.judgement import judge
from embedistill.report.document import Report

RNG = np.random.default_rng(0)
N = 2_000
GOLD = RNG.uniform(0, 5, N)
SOURCES = [f"s{number % 5}" for number in range(N)]
TASK = StsTask("T", [f"a{n}" for n in range(N)], [f"b{n}" for n in range(N)], list(GOLD), {"source": SOURCES})


def result(role: str, cosine: np.ndarray, task: str = "T") -> Result:
    items = {"cosine": list(cosine), "score": list(GOLD)}
    return Result(task, role, role, {"spearman_cosine": metric_value(items, "spearman_cosine")}, items)


def results(noise_of_s3: float) -> list[Result]:
    """A teacher, and a student that is as good but for one of five sources."""
    teacher = GOLD + 0.3 * RNG.normal(size=N)
    noise = np.where(np.array(SOURCES) == "s3", noise_of_s3, 0.05)
    return [result("teacher", teacher), result("student", teacher + noise * RNG.normal(size=N))]


def report(scored: list[Result]) -> Report:
    return judge("r", [TASK], scored, measures={}, margin=0.03, resamples=500, models=[])


def test_a_student_that_fails_on_a_fifth_of_the_cases_fails_though_its_mean_passes() -> None:
    damaged = report(results(0.7))
    assert damaged.comparisons[0].retention["student"].verdict == "PASS"
    assert (damaged.segments[0].column, damaged.segments[0].value) == ("source", "s3")
    assert damaged.segments[0].retention.verdict == "FAIL"
    assert damaged.verdict == "FAIL"
    assert report(results(0.05)).verdict == "PASS"


def test_a_segment_is_the_metric_of_its_items() -> None:
    scored = results(0.7)
    (worst, *others) = find_segments([TASK], scored, {}, student="student", seed=0)
    rows = [number for number, source in enumerate(SOURCES) if source == "s3"]
    of_rows = {name: [values[row] for row in rows] for name, values in scored[1].items.items()}
    assert worst.n_items == len(rows) == 400
    assert worst.student == metric_value(of_rows, "spearman_cosine")
    assert worst.retention.value == pytest.approx(worst.student / worst.teacher)
    assert worst.retention.low < worst.retention.value < worst.retention.high
    assert worst.retention.verdict is None
    assert {segment.column for segment in others} == {"source"}


def test_measures_make_quarters_of_a_task() -> None:
    task = replace(TASK, sentences1=["x" * (1 + number % 100) for number in range(N)], columns={})
    found = find_segments([task], results(0.05), {"characters": count_characters}, student="student", seed=0)
    lengths = {segment.value: segment.n_items for segment in found if segment.column == "characters"}
    assert sum(lengths.values()) == N
    assert len(lengths) == 4
    assert all(" to " in value for value in lengths)


def test_queries_are_told_apart_by_how_near_the_teacher_finds_a_document() -> None:
    task = RetrievalTask("R", [f"q{n}" for n in range(400)], ["d"], [{0: 1.0}] * 400)
    near = np.arange(400) / 400
    items = {"teacher": {"ndcg@10": [1.0] * 400}, "student": {"ndcg@10": list((near > 0.25) * 1.0)}}
    scored = [Result("R", role, role, {"ndcg@10": float(np.mean(of["ndcg@10"]))}, of) for role, of in items.items()]
    scored[0].details["nearest"] = list(near)
    worst = find_segments([task], scored, {}, student="student", seed=0)[0]
    assert (worst.column, worst.value, worst.n_items) == ("similarity of the nearest", "0 to 0.2475", 100)
    assert worst.student == 0


def test_of_few_items_and_of_a_teacher_that_knows_nothing_nothing_is_said() -> None:
    few = replace(TASK, columns={"source": ["rare" if number < 40 else "common" for number in range(N)]})
    columns = {segment.value for segment in find_segments([few], results(0.05), {}, student="student", seed=0)}
    assert "common" in columns
    assert "rare" not in columns
    blind = [result(role, RNG.normal(size=N)) for role in ("teacher", "student")]
    assert find_segments([TASK], blind, {}, student="student", seed=0) == []


def test_languages_are_told_where_there_are_several() -> None:
    english = [f"The library opens at nine o'clock in the morning, as on day {n}" for n in range(N // 2)]
    german = [f"Die Bibliothek wird morgens um neun Uhr geöffnet, wie am Tag {n}" for n in range(N // 2)]
    task = replace(TASK, sentences1=english + german, columns={})
    scored = [result("teacher", GOLD + 0.3 * RNG.normal(size=N))]
    noise = np.repeat([0.05, 1.0], N // 2)  # the student knows no German
    scored.append(result("student", np.array(scored[0].items["cosine"]) + noise * RNG.normal(size=N)))
    worst, best = find_segments([task], scored, {}, student="student", seed=0, margin=0.06)
    assert [(one.column, one.value, one.n_items) for one in (worst, best)] == [
        ("language", "de", N // 2),
        ("language", "en", N // 2),
    ]
    assert (worst.retention.verdict, best.retention.verdict) == ("FAIL", "PASS")
    assert find_segments([replace(task, sentences1=english * 2)], scored, {}, student="student", seed=0) == []


def test_typing_errors_are_a_segment() -> None:
    teacher, student = results(0.05)
    spoilt = [replace(one, task=MISSPELT + "T") for one in results(2.0)]
    found = find_segments([TASK], [teacher, student, *spoilt], {}, student="student", seed=0, margin=0.1)
    (typing,) = [segment for segment in found if segment.column == "typing"]
    assert (typing.task, typing.value, typing.n_items) == ("T", "with errors", N)


def test_agreement_has_segments_without_a_verdict() -> None:
    task = AgreementTask("agreement", [str(number) for number in range(N)], {"source": SOURCES})
    items = {"cosine": [0.5 if source == "s3" else 0.9 for source in SOURCES]}
    scored = [
        Result("agreement", role, role, {"cosine": float(np.mean(values["cosine"]))}, values)
        for role, values in {"teacher": {"cosine": [1.0] * N}, "student": items}.items()
    ]
    worst = find_segments([task], scored, {}, student="student", seed=0, margin=0.03)[0]
    assert "cosine" not in MAIN
    assert (worst.value, worst.student, worst.retention.verdict) == ("s3", pytest.approx(0.5), None)


def test_models_are_compared_by_what_both_have() -> None:
    """A student that is not in its teacher's space has no cosine to it."""
    texts = [str(number) for number in range(N)]
    task = AgreementTask("agreement", texts, {"source": SOURCES})
    overlap = [0.2] * 7 + [0.9] * (N - 7)
    scored = [
        Result("agreement", "teacher", "t", {"cosine": 1.0, "overlap@10": 1.0}, {"cosine": [1.0] * N} | whole(1.0)),
        Result("agreement", "student", "s", {"overlap@10": float(np.mean(overlap))}, {"overlap@10": overlap}),
    ]
    assert {one.metric for one in find_segments([task], scored, {}, student="student", seed=0)} == {"overlap@10"}
    worst = find_disagreements([task], scored)[0]
    assert (worst["value"], worst["teacher"], worst["student"]) == ("overlap@10", 1.0, 0.2)


def whole(value: float) -> dict[str, list[float]]:
    return {"overlap@10": [value] * N}


def test_verdicts_on_segments_are_corrected_for_those_of_the_same_student() -> None:
    """At the edge: one of 40 is not sure, the only one of its student is."""
    edge = Segment("T", "source", "a", "ndcg@10", 60, 1.0, 0.92, Retention(0.92, 0.905, 0.935))
    sure = replace(edge, role="other", retention=Retention(1.0, 0.99, 1.01))
    unjudged = [replace(sure, metric="cosine", role="student")] * 40
    alone = judge_segments([edge, *unjudged, *[sure] * 40], 0.06)[0]
    among = judge_segments([edge, *[replace(sure, role="student")] * 39], 0.06)[0]
    assert (alone.retention.verdict, among.retention.verdict) == ("FAIL", "UNDECIDED")


def test_misspelt_texts_have_an_error_in_fifteen_letters_or_so() -> None:
    texts = ["the quick brown fox jumps over the lazy dog"] * 200
    spoilt = misspell(StsTask("T", texts, texts, [1.0] * 200), seed=0)
    assert isinstance(spoilt, StsTask)
    changed = sum(first != second for first, second in zip(spoilt.sentences1, texts, strict=True))
    assert 150 < changed <= 200
    assert all(abs(len(text) - 43) < 12 for text in spoilt.sentences1)
    assert misspell(StsTask("T", texts, texts, [1.0] * 200), seed=0) == spoilt
    search = RetrievalTask("R", texts[:1], texts[:1], [{0: 1.0}])
    assert misspell(search, seed=0).documents == texts[:1]  # type: ignore[union-attr]
    assert misspell(StsTask("T", ["a"], ["b"], [1.0]), seed=3).sentences1[0]  # type: ignore[union-attr]
    clusters = ClusteringTask("K", texts, ["x"] * 200)
    assert misspell(clusters, seed=0).texts != texts  # type: ignore[union-attr]


def test_pieces_of_a_word() -> None:
    measure = make_piece_measure(make_tokenizer().backend_tokenizer)
    assert measure(["ship wave", "abc", ""]).tolist() == [1.0, 3.0, 0.0]


def test_distance_from_a_corpus_is_to_its_nearest_centre() -> None:
    def embed(texts: list[str]) -> np.ndarray:
        angles = np.radians([float(text) for text in texts])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("f4")

    measure = make_distance_measure(embed, ["0", "60"])  # type: ignore[arg-type]
    assert measure(["0", "60", "90"]) == pytest.approx([0, 0, 1 - np.cos(np.radians(30))], abs=1e-6)


def test_what_was_trained_on_is_counted() -> None:
    sts = StsTask("S", ["A  text", "b"], ["c", "a text"], [1, 2])
    classes = ClassificationTask("C", ["x", "y"], ["1", "2"], ["z"], ["1"])
    assert find_contamination([sts, classes], ["a Text ", "d"]) == {"S": 1}


def test_the_items_that_differ_most_are_shown_with_their_texts() -> None:
    task = RetrievalTask("R", [f"q{n}" for n in range(6)], ["d"], [{0: 1.0}] * 6)
    values = {"teacher": [1.0] * 6, "student": [1.0, 0.2, 0.9, 0.5, 1.0, 0.0]}
    scored = [
        Result("R", role, role, {"ndcg@10": float(np.mean(some))}, {"ndcg@10": some}) for role, some in values.items()
    ]
    found = find_disagreements([task], scored)
    assert [(item["texts"], item["student"]) for item in found] == [(["q5"], 0.0), (["q1"], 0.2), (["q3"], 0.5)]
