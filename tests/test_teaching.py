from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedistill.architectures import ARCHITECTURES
from embedistill.corpus.records import Record
from embedistill.errors import UsageError
from embedistill.recipe import TrainingSection
from embedistill.teaching import _default_pairs, check_training, list_lessons, make_batching, texts_by_kind

RECORDS = [Record("alone"), Record("d1", query="q1", negative="n1"), Record("d2", query="q2")]


def encode(texts: list[str], **_: object) -> np.ndarray:
    """Embed the documents as the teacher does, and both queries far from where it has them."""
    return np.eye(6, dtype=np.float32)[[1, 2, 3, 0, 0]]


STUDENT: Any = SimpleNamespace(prompts={"query": "q: "}, default_prompt_name=None, encode=encode)


def test_partners_are_rows_of_the_texts_that_a_training_is_on() -> None:
    found = list_lessons(
        STUDENT,
        RECORDS,
        texts_by_kind(RECORDS),
        lambda rows: np.eye(6, dtype=np.float32)[rows],
        projection=None,
        on="pairs",
    )
    assert found.inputs == ["d1", "n1", "d2", "q: q1", "q: q2"]
    assert found.partners.tolist() == [[3, -1], [-1, -1], [4, -1], [0, 1], [2, -1]]
    assert found.targets(np.array([1, 3])).argmax(1).tolist() == [2, 4]
    for order in ("queries-last", "error"):
        batching = make_batching(TrainingSection(curriculum=order), STUDENT, found, 1)
        assert batching.difficulty.tolist() == [0, 0, 0, 1, 1]


def test_texts_that_pairs_link_are_kin_and_the_first_document_is_the_positive() -> None:
    records = [Record("alone"), Record("d1", query="q"), Record("d2", query="q", negative="n"), Record("d2", query="r")]
    texts = texts_by_kind(records)
    assert texts == {"document": ["alone", "d1", "d2", "n"], "query": ["q", "r"]}
    found = list_lessons(
        STUDENT, records, texts, lambda rows: np.eye(7, dtype=np.float32)[rows], projection=None, on="all"
    )
    assert found.partners[:, 0].tolist() == [-1, 4, 4, -1, 1, 2]
    many = [Record(f"d{number}", query="Introduction") for number in range(101)]  # which tells nothing of them
    texts = texts_by_kind(many)
    widely = list_lessons(
        STUDENT, many, texts, lambda rows: np.eye(102, dtype=np.float32)[rows], projection=None, on="all"
    )
    assert len(set(widely.kin.tolist())) == 102
    alone, first, second, negative, query, other = found.kin.tolist()
    assert first == second == query == other
    assert len({alone, negative, query}) == 3


def test_a_second_training_on_queries_wants_texts_that_are_queries_or_have_some() -> None:
    section = TrainingSection.model_validate({"then": {"on": "queries"}})
    for records in ([Record("a", kind="query")], [Record("d", query="q")]):
        check_training(section, records, [], [])
    with pytest.raises(UsageError, match=r"training\.then\.on: queries: no text has a query"):
        check_training(section, [Record("alone")], [], [])


def test_attention_is_refused_before_anything_is_encoded_where_an_architecture_has_none_to_compare() -> None:
    section = TrainingSection.model_validate({"objectives": {"attention": 0.1}, "relation_heads": 4})
    check_training(section, [Record("a")], [32, 32], [2, 4], [ARCHITECTURES["mpnet"]])
    with pytest.raises(UsageError, match=r"training\.objectives\.attention: a model whose queries, keys and"):
        check_training(section, [Record("a")], [32, 32], [2, 4], [ARCHITECTURES["modernbert"]])


def test_each_layer_follows_the_one_of_its_teacher_that_it_was_made_of() -> None:
    teacher: Any = [SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(num_hidden_layers=12)))]
    assert _default_pairs(teacher, [0, 4, 8, 11]) == [(2, 8), (3, 11)]
    assert _default_pairs(teacher, [0, 1, 5]) == [(1, 1), (2, 11)]
