"""Score one model on tasks: every distinct text is encoded once, every item keeps its value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedistill.choices import IndexKind, Kind
from embedistill.errors import EmbedistillError
from embedistill.evaluation.metrics import (
    RETRIEVED,
    cosines,
    metric_names,
    metric_value,
    neighbour_overlap,
    score_rankings,
)
from embedistill.evaluation.probes import NEIGHBOURS, agree, classify, cluster, compare_similarities
from embedistill.evaluation.retrieval import Embeddings, search_exactly, search_index
from embedistill.evaluation.tasks import (
    AgreementTask,
    ClassificationTask,
    ClusteringTask,
    PairTask,
    RetrievalTask,
    StsTask,
    Task,
    draw_experiments,
    fingerprint_task,
    list_texts,
)
from embedistill.files import read_json, write_json, written_aside

SCHEMA_VERSION = 2
TEACHER = "teacher"
QUERIES, DOCUMENTS = "queries", "documents"
"""Behind a role: its queries on the teacher's documents, or the teacher's queries on its documents."""

Encoder = Callable[[Sequence[str], Kind], Embeddings]
"""From texts of a kind to unit vectors (n_texts, dim)."""


@dataclass(frozen=True)
class Result:
    """What one model did on one task: the metrics, and one value an item to believe them by.

    `task_sha256` is that of the task's texts and judgements: results with the same one are of the same items. `details`
    are figures without items: the costs of an index, whose documents are in it, the distribution of similarities.
    """

    task: str
    role: str
    model: str
    metrics: dict[str, float]
    items: dict[str, list[float]]
    task_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def score_model(
    tasks: Sequence[Task],
    encode: Encoder,
    *,
    role: str,
    model: str,
    teacher: Encoder | None = None,
    teacher_space: Callable[[Embeddings], Embeddings] | None = None,
    asymmetric: bool = False,
    borrows: bool = False,
    index: IndexKind = "flat",
    versions: dict[str, str] | None = None,
) -> list[Result]:
    """Score a model on tasks.

    Args:
        tasks: What to score it on.
        encode: The model.
        role: teacher, student, untrained, or another model's name.
        model: Its path or id.
        teacher: The teacher; agreement tasks need it, and retrieval is compared with its rankings.
        teacher_space: Maps the teacher's vectors into the model's space; with it the cosine to the teacher is taken.
        asymmetric: Give retrieval two more results: of the role's queries on the teacher's documents, and the reverse.
        borrows: Have it search the teacher's documents with its queries, and encode no documents; needs a teacher and
            its space.
        index: The FAISS index that is searched; the teacher's ranking for comparison is always exact.
        versions: Of the software, for the record.

    Raises:
        EmbedistillError: Some of its vectors are not finite, which no metric could be trusted with.
    """
    lookup = _encode_once(tasks, encode, f"{role} {model}".strip(), documents=not borrows)
    scoring = _Scoring(lookup, teacher, teacher_space, index, asymmetric, borrows)
    results = []
    for task in tasks:
        sha256 = fingerprint_task(task)
        for part, (items, details) in scoring.score(task).items():
            metrics = {name: metric_value(items, name) for name in metric_names(items)}
            name = f"{role} {part}".strip()
            results.append(Result(task.name, name, model, metrics, items, sha256, versions or {}, details))
    return results


_Scored = tuple[dict[str, list[Any]], dict[str, Any]]  # values an item, and details


@dataclass(frozen=True)
class _Scoring:
    lookup: Encoder
    teacher: Encoder | None
    teacher_space: Callable[[Embeddings], Embeddings] | None
    index: IndexKind
    asymmetric: bool
    borrows: bool

    def score(self, task: Task) -> Mapping[str, _Scored]:
        """Return what comes behind the role's name, "" for the model alone, with what was found."""
        match task:
            case StsTask() | PairTask():
                first, second = self.lookup(task.sentences1, "plain"), self.lookup(task.sentences2, "plain")
                judged = {"score": list(task.scores)} if isinstance(task, StsTask) else {"label": list(task.labels)}
                return {"": ({"cosine": cosines(first, second), **judged}, {})}
            case ClassificationTask():
                return {"": ({"accuracy": self._classify(task)}, {})}
            case ClusteringTask():
                names = sorted(set(task.labels))
                found = cluster(self.lookup(task.texts, "plain"), len(names))
                return {"": ({"cluster": found, "label": [names.index(label) for label in task.labels]}, {})}
            case RetrievalTask():
                return self._search(task)
            case AgreementTask() if self.teacher:
                vectors, teacher = self.lookup(task.texts, task.kind), self.teacher(task.texts, task.kind)
                target = self.teacher_space(teacher) if self.teacher_space else None
                details = {"similarities": compare_similarities(vectors, teacher)}
                return {"": (agree(vectors, teacher, target), details)}
        return {}

    def _classify(self, task: ClassificationTask) -> list[float]:
        texts, found = self.lookup(task.texts, "plain"), []
        for numbers in draw_experiments(task):
            fitted = self.lookup([task.fitted_texts[number] for number in numbers], "plain")
            found.append(classify(fitted, [task.fitted_labels[number] for number in numbers], texts, task.labels))
        return [float(value) for value in np.mean(found, axis=0)]

    def _search(self, task: RetrievalTask) -> Mapping[str, _Scored]:
        queries = self.lookup(task.queries, "query")
        reference = mapped = None
        if self.teacher:
            theirs = self.teacher(task.documents, "document"), self.teacher(task.queries, "query")
            reference = search_exactly(*theirs, NEIGHBOURS)
            mapped = [self.teacher_space(vectors) for vectors in theirs] if self.teacher_space else None
        if self.borrows and mapped:
            sides = {"": (mapped[0], queries)}
        else:
            documents = self.lookup(task.documents, "document")
            sides = {"": (documents, queries)}
            if self.asymmetric and mapped:
                sides |= {QUERIES: (mapped[0], queries), DOCUMENTS: (documents, mapped[1])}
        borrowed = {"documents": TEACHER} if self.borrows else {}
        found: dict[str, _Scored] = {}
        for part, (searched, asked) in sides.items():
            ranking, costs = search_index(searched, asked, RETRIEVED, self.index)
            items = score_rankings(ranking, task.relevance, NEIGHBOURS)
            if reference is not None:
                items[f"overlap@{NEIGHBOURS}"] = neighbour_overlap(ranking[:, :NEIGHBOURS], reference)
            nearest = cosines(asked, searched[ranking[:, 0]])
            found[part] = items, {"index": asdict(costs), "nearest": nearest, **borrowed}
        return found


def _encode_once(tasks: Sequence[Task], encode: Encoder, name: str, *, documents: bool) -> Encoder:
    """Encode the distinct texts of all tasks, those of retrieval with their documents or without; look them up."""
    rows: dict[Kind, dict[str, int]] = {}
    for task in tasks:
        for kind, some in list_texts(task).items():
            if isinstance(task, RetrievalTask) and kind == "document" and not documents:
                continue
            of_kind = rows.setdefault(kind, {})
            for text in some:
                of_kind.setdefault(text, len(of_kind))
    vectors = {kind: encode(list(of_kind), kind) for kind, of_kind in rows.items()}
    for kind, of_kind in rows.items():
        bad = np.flatnonzero(~np.isfinite(vectors[kind]).all(axis=1))
        if len(bad):
            first = list(of_kind)[bad[0]]
            found = f"{len(bad):,} of {len(of_kind):,} vectors are not finite, such as that of {first!r:.80}"
            raise EmbedistillError(name, found, "numbers", "check its weights: SentenceTransformer(path).encode(...)")
    return lambda texts, kind: vectors[kind][[rows[kind][text] for text in texts]]


def save_results(results: Sequence[Result], folder: Path) -> None:
    """Write `<folder>/<task>/<role>.json`, all of them or none."""
    with written_aside(folder) as part:
        for result in results:
            write_json(part / result.task / f"{result.role.replace('/', '--')}.json", asdict(result))


def load_results(folder: Path) -> list[Result]:
    """Read every result below a folder."""
    return [Result(**read_json(path)) for path in sorted(folder.glob("*/*.json"))]
