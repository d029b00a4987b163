"""All models on all tasks: who is compared, how they did, where they differ, and what of it was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from embedistill.choices import Encodes, IndexKind, Kind
from embedistill.corpus.records import normalise
from embedistill.encoding.local import LocalEncoder, encode_here
from embedistill.errors import EmbedistillError, UsageError
from embedistill.evaluation.comparison import choose_metric
from embedistill.evaluation.costs import ModelFacts, Start, describe_model, measure_speed, measure_start
from embedistill.evaluation.metrics import AVERAGE_PRECISION, SPEARMAN, Values
from embedistill.evaluation.retrieval import Embeddings
from embedistill.evaluation.scoring import TEACHER, Encoder, Result, score_model
from embedistill.evaluation.segments import MISSPELT, misspell
from embedistill.evaluation.tasks import AgreementTask, ClusteringTask, RetrievalTask, Task, list_items, list_texts
from embedistill.progress import note
from embedistill.student.head import Matrix, project, solve_ridge
from embedistill.student.saving import load_projection
from embedistill.teacher import LocatedModel, embed_cheaply, encode, find_prompt, has_words

STUDENT, UNTRAINED = "student", "untrained"
WORDS, PCA = "word vectors", "teacher's PCA"
FIT_TEXTS = 5_000
"""What the head of the word vectors is solved on."""
_RIDGE = 1e-2
_SPEED_TEXTS, _FEWEST_SPEED_TEXTS, _SPEED_CHARACTERS = 64, 16, 20_000
_SHOWN, _OF_A_TASK = 10, 3


@dataclass(frozen=True)
class Candidate:
    """A model to compare.

    Attributes:
        role: teacher, student, untrained, or a baseline's name.
        name: Its id or path.
        encode: It.
        space: Maps the teacher's vectors into its space, where it has a place there.
        model: What is measured; None for a floor that is no model of its own.
        folder: Where that is on disk.
    """

    role: str
    name: str
    encode: Encoder
    space: Callable[[Embeddings], Embeddings] | None = None
    model: SentenceTransformer | None = None
    folder: Path | None = None


def make_candidate(
    role: str,
    located: LocatedModel,
    space: Callable[[Embeddings], Embeddings] | None = None,
    products: torch.dtype = torch.float32,
) -> Candidate:
    """Return a model that encodes by itself, without padding where it can.

    Args:
        role: student, untrained, or a baseline's name.
        located: The model.
        space: Maps the teacher's vectors into its space, where it has a place there.
        products: Number format of the products of layers that run without padding; all else is in fp32.
    """
    encoder = LocalEncoder(located, torch.float32, products)
    encode_all = partial(encode_here, encoder, role.rpartition("/")[2])
    return Candidate(role, located.name, encode_all, space, encoder.model, located.path)


def make_floors(
    student: Path,
    teacher: SentenceTransformer,
    encode_all: Encoder,
    sample: Callable[[SentenceTransformer], tuple[Sequence[str], Matrix]],
) -> list[Candidate]:
    """Return what a student has to be better than, and the best that it can do at its dimension.

    These are the mean of the teacher's word vectors with a solved head, where it has any, and the teacher at the
    student's dimension, where that is another than its own.

    Args:
        student: The student's folder.
        teacher: Whose word vectors they are.
        encode_all: Encodes with the teacher.
        sample: Returns texts that the teacher encoded, as it sees them, and its vectors of these.
    """
    projection = load_projection(student)
    space = partial(project, projection=projection)
    floors = []
    if has_words(teacher):
        texts, vectors = sample(teacher)
        head = solve_ridge(embed_cheaply(teacher, texts[:FIT_TEXTS]), space(vectors[:FIT_TEXTS]), _RIDGE)

        def encode_words(some: Sequence[str], kind: Kind) -> Embeddings:
            return project(embed_cheaply(teacher, [find_prompt(teacher, kind) + text for text in some]), head)

        floors.append(Candidate(WORDS, WORDS, encode_words, space))
    if projection is not None:
        floors.append(Candidate(PCA, PCA, lambda some, kind: space(encode_all(some, kind)), space))
    return floors


def score_all(
    tasks: Sequence[Task],
    candidates: Sequence[Candidate],
    *,
    teacher: Encoder | None,
    index: IndexKind,
    misspelt: bool,
    documents: Encodes = "student",
    seed: int,
    versions: dict[str, str],
) -> list[Result]:
    """Score every candidate on every task; with `misspelt` teacher and student on the tasks with typing errors too.

    Where the documents are the teacher's, all that have a place in its space search these with queries of their own.

    Raises:
        UsageError: A student with no place in the teacher's space shall search there.
    """
    if documents == TEACHER and any(one.space is None for one in candidates if one.role == STUDENT):
        found, expected = "a student that is not in its teacher's space", "one that was made for it"
        raise UsageError("documents: teacher", found, expected, "leave it out: the student searches its own")
    spoilt = [replace(misspell(task, seed), name=MISSPELT + task.name) for task in tasks if misspelt]
    spoilt = [task for task in spoilt if not isinstance(task, AgreementTask)]
    results = []
    for one in candidates:
        some = [*tasks, *(spoilt if one.role in {TEACHER, STUDENT} else [])]
        results += score_model(
            some,
            one.encode,
            role=one.role,
            model=one.name,
            teacher=teacher,
            teacher_space=one.space,
            asymmetric=one.role == STUDENT,
            borrows=documents == TEACHER and one.space is not None,
            index=index,
            versions=versions,
        )
    return results


def measure_candidates(candidates: Sequence[Candidate], texts: Sequence[str]) -> list[ModelFacts]:
    """Return what the candidates cost, measured in turns on the same texts."""
    models = {one.role: (one, one.model, one.folder) for one in candidates if one.model and one.folder}
    speeds = measure_speed({role: partial(encode, model) for role, (_, model, _) in models.items()}, texts)
    return [
        describe_model(role, one.name, model, folder, speed=speeds[role], start=_try_start(folder, texts))
        for role, (one, model, folder) in models.items()
    ]


def _try_start(folder: Path, texts: Sequence[str]) -> Start | None:
    """Return what it costs to start a model; None, with a line that says so, where it cannot be had."""
    try:
        return measure_start(folder, texts)
    except EmbedistillError as error:
        note(f"Start and memory are not measured: {error}")
        return None


def choose_texts(tasks: Sequence[Task], documents: Encodes = "student") -> list[str]:
    """Return some of the texts of tasks to measure speed on, the same every time: fewer where they are long.

    Documents of retrieval tasks are among them where the student encodes such.
    """
    encoded: set[str] = set()
    for task in tasks:
        some = list_texts(task)
        if documents == TEACHER and isinstance(task, RetrievalTask):
            del some["document"]
        encoded |= {text for of_kind in some.values() for text in of_kind}
    texts = sorted(encoded)
    order = np.random.default_rng(0).permutation(len(texts))
    chosen = [texts[number] for number in order[:_SPEED_TEXTS]]
    n_within = int((np.cumsum([len(text) for text in chosen]) <= _SPEED_CHARACTERS).sum())
    return chosen[: max(n_within, _FEWEST_SPEED_TEXTS)]


def find_contamination(tasks: Sequence[Task], trained: Iterable[str]) -> dict[str, int]:
    """Return for each task how many of its distinct texts were trained on, but for case and space; those with any."""
    seen = {normalise(text) for text in trained}
    counts = {
        task.name: len({normalise(text) for some in list_texts(task).values() for text in some} & seen)
        for task in tasks
    }
    return {name: count for name, count in counts.items() if count}


def find_disagreements(tasks: Sequence[Task], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the items on which teacher and student differ most, three of a task at most: task, texts and values.

    Of pairs the values are the ranks of their cosines, as shares; else the metric of the item.
    """
    found: list[dict[str, Any]] = []
    for task in tasks:
        peers = {result.role: result for result in results if result.task == task.name}
        if not {TEACHER, STUDENT} <= peers.keys() or isinstance(task, ClusteringTask):  # clusters have no names
            continue
        name = choose_metric(peers[TEACHER], peers[STUDENT])
        metric, teacher = _item_values(peers[TEACHER], name)
        _, student = _item_values(peers[STUDENT], name)
        texts = list_items(task)
        for row in np.argsort(-np.abs(student - teacher), kind="stable")[:_OF_A_TASK]:
            values = {"teacher": round(float(teacher[row]), 4), "student": round(float(student[row]), 4)}
            found.append({"task": task.name, "value": metric, "texts": list(texts[row]), **values})
    found.sort(key=lambda item: -abs(item["student"] - item["teacher"]))
    return found[:_SHOWN]


def _item_values(result: Result, metric: str) -> tuple[str, Values]:
    if metric in {SPEARMAN, AVERAGE_PRECISION}:
        order = np.argsort(np.argsort(result.items["cosine"], kind="stable"), kind="stable")
        return "rank of the cosine", order / max(1, len(order) - 1)
    return metric, np.asarray(result.items[metric], np.float64)


def describe_details(results: Sequence[Result]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """Return the details of results by task and role, those of single items left out."""
    details: dict[str, dict[str, Mapping[str, Any]]] = {}
    for result in results:
        kept = {name: value for name, value in result.details.items() if name != "nearest"}
        if kept:
            details.setdefault(result.task, {})[result.role] = kept
    return details
