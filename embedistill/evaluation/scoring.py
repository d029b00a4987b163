"""Score one model on tasks: every distinct text is encoded once, every item keeps its value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from embedistill.evaluation.metrics import (
    Ranking,
    cosines,
    metric_names,
    metric_value,
    neighbour_overlap,
    score_rankings,
)
from embedistill.evaluation.tasks import AgreementTask, RetrievalTask, StsTask, Task
from embedistill.files import fingerprint, read_json, write_json
from embedistill.teacher import Kind

SCHEMA_VERSION = 1
NEIGHBOURS = 10

Embeddings = npt.NDArray[np.float32]
Encoder = Callable[[Sequence[str], Kind], Embeddings]
"""From texts of a kind to unit vectors (n_texts, dim)."""


@dataclass(frozen=True)
class Result:
    """What one model did on one task: the metrics, and one value an item to believe them by.

    `task_sha256` is that of the task's texts and judgements: results with the same one are of the same items.
    """

    task: str
    role: str
    model: str
    metrics: dict[str, float]
    items: dict[str, list[float]]
    task_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def score_model(
    tasks: Sequence[Task],
    encode: Encoder,
    *,
    role: str,
    model: str,
    teacher: Encoder | None = None,
    teacher_space: Callable[[Embeddings], Embeddings] | None = None,
    versions: dict[str, str] | None = None,
) -> list[Result]:
    """Score a model on tasks.

    Args:
        tasks: What to score it on.
        encode: The model.
        role: teacher, student, untrained, or another model's name.
        model: Its path or id.
        teacher: The teacher; agreement tasks need it.
        teacher_space: Maps the teacher's vectors into the model's space; without it no cosine to the teacher is taken.
        versions: Of the software, for the record.
    """
    texts: dict[Kind, dict[str, int]] = {}
    for task in tasks:
        for kind, some in task.texts_by_kind.items():
            rows = texts.setdefault(kind, {})
            for text in some:
                rows.setdefault(text, len(rows))
    vectors = {kind: encode(list(rows), kind) for kind, rows in texts.items()}

    def lookup(wanted: Sequence[str], kind: Kind) -> Embeddings:
        return vectors[kind][[texts[kind][text] for text in wanted]]

    results = []
    for task in tasks:
        match task:
            case StsTask():
                items = {
                    "cosine": cosines(lookup(task.sentences1, "plain"), lookup(task.sentences2, "plain")),
                    "score": list(task.scores),
                }
            case RetrievalTask():
                ranking = search_exactly(lookup(task.documents, "document"), lookup(task.queries, "query"), NEIGHBOURS)
                items = score_rankings(ranking, task.relevance, NEIGHBOURS)
            case AgreementTask():
                if teacher is None:
                    continue
                items = _agreement(lookup(task.texts, "document"), teacher(task.texts, "document"), teacher_space)
        metrics = {name: metric_value(items, name) for name in metric_names(items)}
        results.append(Result(task.name, role, model, metrics, items, fingerprint(asdict(task)), versions or {}))
    return results


def search_exactly(documents: Embeddings, queries: Embeddings, k: int) -> Ranking:
    """Return the numbers of the k documents with the largest inner product, shape (n_queries, k), by FAISS."""
    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(np.ascontiguousarray(documents))
    _, numbers = index.search(np.ascontiguousarray(queries), min(k, len(documents)))
    return np.asarray(numbers, np.int64)


def save_result(result: Result, folder: Path) -> None:
    """Write `<folder>/<task>/<role>.json`."""
    write_json(folder / result.task / f"{result.role.replace('/', '--')}.json", asdict(result))


def load_results(folder: Path) -> list[Result]:
    """Read every result below a folder."""
    return [Result(**read_json(path)) for path in sorted(folder.glob("*/*.json"))]


def _agreement(
    vectors: Embeddings, teacher: Embeddings, teacher_space: Callable[[Embeddings], Embeddings] | None
) -> dict[str, list[Any]]:
    neighbours, reference = (_nearest(matrix, min(NEIGHBOURS, len(matrix) - 1)) for matrix in (vectors, teacher))
    items = {f"overlap@{NEIGHBOURS}": neighbour_overlap(neighbours, reference)}
    if teacher_space:
        items = {"cosine": cosines(vectors, teacher_space(teacher)), **items}
    return items


def _nearest(vectors: Embeddings, k: int) -> Ranking:
    """Return each row's k nearest others."""
    found = search_exactly(vectors, vectors, k + 1)
    return np.array([[other for other in row if other != number][:k] for number, row in enumerate(found)], np.int64)
