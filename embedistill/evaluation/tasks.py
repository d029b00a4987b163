"""What models are compared on: similarity, search, classification, clustering, pairs, and agreement with a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from embedistill.choices import Kind
from embedistill.files import fingerprint

_EXPERIMENTS, _OF_A_LABEL, _SEED = 10, 8, 42
_BESIDE = {"columns", "query_ids", "document_ids"}  # what a task has beside its texts and judgements

Columns = Mapping[str, Sequence[str]]
"""What more is known of the items, such as their source, by column: segments of the comparison."""


@dataclass(frozen=True)
class StsTask:
    """Semantic textual similarity: pairs of sentences and how alike people find them."""

    name: str
    sentences1: Sequence[str]
    sentences2: Sequence[str]
    scores: Sequence[float]
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class PairTask:
    """Pair classification: pairs of sentences, and whether they mean the same."""

    name: str
    sentences1: Sequence[str]
    sentences2: Sequence[str]
    labels: Sequence[bool]
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class RetrievalTask:
    """Search: queries, documents, and for each query the relevance of documents by their number.

    The ids are those of the data, where it has any.
    """

    name: str
    queries: Sequence[str]
    documents: Sequence[str]
    relevance: Sequence[dict[int, float]]
    columns: Columns = field(default_factory=dict)
    query_ids: Sequence[str] = ()
    document_ids: Sequence[str] = ()


@dataclass(frozen=True)
class ClassificationTask:
    """Texts and their classes, and others of these classes that a probe is fitted on."""

    name: str
    fitted_texts: Sequence[str]
    fitted_labels: Sequence[str]
    texts: Sequence[str]
    labels: Sequence[str]
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class ClusteringTask:
    """Texts and the topics that clusters of their embeddings should find."""

    name: str
    texts: Sequence[str]
    labels: Sequence[str]
    columns: Columns = field(default_factory=dict)


@dataclass(frozen=True)
class AgreementTask:
    """How near a model's embeddings of some texts, and their nearest neighbours, are to the teacher's."""

    name: str
    texts: Sequence[str]
    columns: Columns = field(default_factory=dict)
    kind: Kind = "document"


Task = StsTask | PairTask | RetrievalTask | ClassificationTask | ClusteringTask | AgreementTask


def list_texts(task: Task) -> dict[Kind, list[str]]:
    """Return all texts of a task by what they are to the models."""
    match task:
        case StsTask() | PairTask():
            return {"plain": [*task.sentences1, *task.sentences2]}
        case RetrievalTask():
            return {"query": list(task.queries), "document": list(task.documents)}
        case ClassificationTask():
            fitted = sorted({number for numbers in draw_experiments(task) for number in numbers})
            return {"plain": [*(task.fitted_texts[number] for number in fitted), *task.texts]}
        case ClusteringTask():
            return {"plain": list(task.texts)}
        case AgreementTask():
            return {task.kind: list(task.texts)}


def list_items(task: Task) -> list[tuple[str, ...]]:
    """Return the texts of each item that a model gets a value on: a pair, a query, or a text."""
    match task:
        case StsTask() | PairTask():
            return list(zip(task.sentences1, task.sentences2, strict=True))
        case RetrievalTask():
            return [(query,) for query in task.queries]
        case ClassificationTask() | ClusteringTask() | AgreementTask():
            return [(text,) for text in task.texts]


def draw_experiments(task: ClassificationTask) -> list[list[int]]:
    """Return the numbers of the texts that each probe is fitted on: ten times eight of a class, as mteb does."""
    random = np.random.default_rng(_SEED)
    of_label: dict[str, list[int]] = {}
    for number, label in enumerate(task.fitted_labels):
        of_label.setdefault(label, []).append(number)
    return [
        [int(number) for numbers in of_label.values() for number in random.permutation(numbers)[:_OF_A_LABEL]]
        for _ in range(_EXPERIMENTS)
    ]


def fingerprint_task(task: Task) -> str:
    """Return the sha256 of a task's texts and judgements; its further columns and ids do not count."""
    content: dict[str, Any] = {one.name: getattr(task, one.name) for one in fields(task) if one.name not in _BESIDE}
    if isinstance(task, AgreementTask) and task.kind == "document":
        del content["kind"]  # which tasks of before had not
    return fingerprint(content)


def make_known_item_task(name: str, pairs: Iterable[tuple[str, str]], documents: Sequence[str]) -> RetrievalTask | None:
    """Make a retrieval task of (query, document) pairs: each query has to find its own document among all.

    Queries that stand with more than one document are left out, as there is no telling which is meant. None where fewer
    than two are left.
    """
    numbers = {text: number for number, text in enumerate(dict.fromkeys(documents))}
    wanted: dict[str, set[int]] = {}
    for query, document in pairs:
        wanted.setdefault(query, set()).add(numbers[document])
    clear = {query: items for query, items in wanted.items() if len(items) == 1}
    if len(clear) < 2:
        return None
    return RetrievalTask(name, list(clear), list(numbers), [dict.fromkeys(items, 1.0) for items in clear.values()])
