"""What of a recipe's training section goes into the training: the loss, the batches, the schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sentence_transformers import SentenceTransformer

from embedistill.architectures import Architecture
from embedistill.choices import Kind, Phase
from embedistill.corpus.records import Record
from embedistill.errors import UsageError
from embedistill.progress import note, progress_bar
from embedistill.ranks import world_size
from embedistill.recipe import LIVE, CourseSection, TrainingSection
from embedistill.student.head import Matrix, project
from embedistill.teacher import find_prompt
from embedistill.training.batches import Batching, Rows, Targets, find_neighbours, shorten, spread_from_centres
from embedistill.training.internals import Internals, check_attention
from embedistill.training.loop import Schedule
from embedistill.training.objectives import Course, DistillationLoss, Term

_CHUNK = 8192
_MOST_KIN = 100  # texts: what links more, such as a title that many have, tells nothing, and would leave no negatives


@dataclass(frozen=True)
class Lessons:
    """The texts that a student is trained on.

    Attributes:
        inputs: As the student sees them, with its prompts.
        queries: Whether each is a query, shape (n_texts,).
        targets: The teacher's vectors, in the student's space, by row of `inputs`.
        partners: Rows of each text's positive and negative, shape (n_texts, 2), -1: it has none.
        kin: A number of each text, shape (n_texts,): the same of texts that pairs link, directly or by way of others;
            of more than a hundred, each its own.
    """

    inputs: Sequence[str]
    queries: npt.NDArray[np.bool_]
    targets: Targets
    partners: Rows
    kin: Rows


def check_training(
    section: TrainingSection,
    records: Iterable[Record],
    widths: Sequence[int],
    layers: Sequence[int],
    architectures: Iterable[Architecture] = (),
) -> None:
    """Stop, before anything is encoded, where a training asks for what there is not.

    Args:
        section: The recipe's.
        records: What is trained on.
        widths: Hidden sizes of student and teacher, where both are known.
        layers: Their numbers of layers, where both are known.
        architectures: What they are, as far as it is known.

    Raises:
        UsageError: It says for what.
    """
    paired = any(record.query for record in records)
    has_queries = paired or any(record.kind == "query" for record in records)
    for on, _, phase in section.phases:
        where = f"training.then.on: {on}" if on != "all" else "training.objectives.pairs"
        is_there = has_queries if on == "queries" else paired
        if not is_there and (on != "all" or "pairs" in phase.objectives.used):
            raise UsageError(where, "no text has a query", "corpus.query_column or corpus.pairs, which make some")
        heads = section.relation_heads
        if "attention" in phase.objectives.used:
            check_attention(architectures)
            if any(width % heads for width in widths):
                found = f"{heads}, with hidden sizes {' and '.join(map(str, widths))}"
                raise UsageError("training.relation_heads", found, "a number that divides both")
    live = any(LIVE & set(phase.objectives.used) for _, _, phase in section.phases)
    if live and world_size() > 1:
        found = f"{world_size()} processes with the terms layers or attention, whose maps each would learn for itself"
        raise UsageError("training.objectives", found, "one process", "leave out torchrun, or these terms")
    wrong = [pair for pair in section.layer_pairs if any(one >= n for one, n in zip(pair, layers, strict=False))]
    if wrong:
        expected = f"layers of the student below {layers[0]}, of the teacher below {layers[1]}"
        raise UsageError("training.layer_pairs", f"{wrong[0]}", expected)


def list_lessons(
    student: SentenceTransformer,
    records: Iterable[Record],
    texts: Mapping[Kind, Sequence[str]],
    targets: Targets,
    *,
    projection: Matrix | None,
    on: Phase,
) -> Lessons:
    """Return the texts of a phase of the training, with what the teacher makes of them.

    Args:
        student: Its prompts stand before the texts.
        records: What the texts are of.
        texts: By kind.
        targets: The teacher's vectors, by row through the texts of all kinds in turn.
        projection: From the teacher's space to the student's.
        on: Which texts the phase is on.

    Raises:
        UsageError: There are fewer than two such texts.
    """
    queries = np.repeat([kind == "query" for kind in texts], [len(some) for some in texts.values()])
    partners, kin = _find_partners(records, texts)
    paired = partners[:, 0] >= 0
    paired[partners[paired, 1][partners[paired, 1] >= 0]] = True  # their hard negatives
    chosen = {"all": np.ones_like(queries), "queries": queries, "pairs": paired}[on]
    rows, inputs = np.flatnonzero(chosen), list_inputs(student, texts)
    if len(rows) < 2:
        raise UsageError(f"training.then.on: {on}", f"{len(rows)} texts to train on", "two at the very least")
    moved = np.full(len(inputs) + 1, -1)
    moved[rows] = np.arange(len(rows))
    return Lessons(
        inputs=[inputs[row] for row in rows],
        queries=queries[rows],
        targets=lambda batch: project(targets(rows[batch]), projection),
        partners=moved[partners[rows]],
        kin=kin[rows],
    )


def list_inputs(model: SentenceTransformer, texts_by_kind: Mapping[Kind, Sequence[str]]) -> list[str]:
    """Return texts as a model sees them, with its prompts."""
    return [find_prompt(model, kind) + text for kind, texts in texts_by_kind.items() for text in texts]


def _find_partners(records: Iterable[Record], texts: Mapping[Kind, Sequence[str]]) -> tuple[Rows, Rows]:
    """Return the rows of each text's positive and negative, shape (n_texts, 2), -1: it has none; and who is kin.

    Rows count through the texts of all kinds in turn. The positive of a query is the first of its documents, that of a
    document the first of its queries.
    """
    starts = np.cumsum([0, *(len(some) for some in texts.values())]).tolist()
    rows = {
        (kind, text): start + number
        for (kind, some), start in zip(texts.items(), starts, strict=False)
        for number, text in enumerate(some)
    }
    partners = np.full((starts[-1], 2), -1)
    links: list[tuple[int, int]] = []
    for record in records:
        query, document = rows.get(("query", record.query or "")), rows.get(("document", record.document))
        if query is not None and document is not None:
            links.append((query, document))
            if partners[query, 0] < 0:
                partners[query] = document, rows.get(("document", record.negative or ""), -1)
            if partners[document, 0] < 0:
                partners[document, 0] = query
    ends = np.array(links, np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(partners), len(partners)))
    kin = connected_components(graph, directed=False)[1].astype(np.int64)
    too_many = np.bincount(kin, minlength=1)[kin] > _MOST_KIN
    return partners, np.where(too_many, len(kin) + np.arange(len(kin)), kin)


def texts_by_kind(records: Iterable[Record]) -> dict[Kind, list[str]]:
    """Return the distinct texts of records by what they are; kinds that have none are left out."""
    texts: dict[Kind, dict[str, None]] = {"document": {}, "query": {}}
    for record in records:
        for kind, text in record.parts:
            texts[kind][text] = None
    return {kind: list(some) for kind, some in texts.items() if some}


def make_loss(
    section: TrainingSection,
    student: SentenceTransformer,
    teacher: SentenceTransformer | None,
    layers: Sequence[int] | None,
) -> DistillationLoss:
    """Return the weighted terms of a recipe for a student.

    Args:
        section: The recipe's.
        student: The model to train.
        teacher: The live teacher, where a term needs it.
        layers: The layers of the teacher that the student's were made of.
    """
    terms = section.objectives.used
    internals = None
    if teacher is not None:
        pairs = [(pair[0], pair[1]) for pair in section.layer_pairs] or _default_pairs(teacher, layers)
        heads = section.relation_heads if "attention" in terms else None
        internals = Internals(student, teacher, pairs, heads)
    temperature = section.temperature
    return DistillationLoss(
        student,
        cast(dict[Term, Course], {name: make_course(value) for name, value in terms.items()}),
        None if temperature == "learned" else make_course(temperature),
        section.matryoshka,
        balance=section.balance,
        internals=internals,
    )


def _default_pairs(teacher: SentenceTransformer, layers: Sequence[int] | None) -> list[tuple[int, int]]:
    """Pair the upper half of a student's layers with those they were made of, the last with the last."""
    if not layers:
        do = "name them: training.layer_pairs=[[0, 3], [1, 7]]"
        raise UsageError("training.layer_pairs", "none, for a student not made of the teacher's layers", do=do)
    last = teacher[0].model.config.num_hidden_layers - 1
    return [*list(enumerate(layers))[len(layers) // 2 : -1], (len(layers) - 1, last)]


def make_course(section: CourseSection) -> Course:
    """Return a number on its way through a training."""
    return Course(*section.ends, section.schedule)


def make_schedule(section: TrainingSection, share: float, seed: int, dtype: torch.dtype) -> Schedule:
    """Return how long, how fast and in what steps a student is trained, for a share of the time."""
    return Schedule(
        epochs=share * section.epochs,
        minutes=share * section.minutes if section.minutes else None,
        learning_rate=section.learning_rate,
        warmup=section.warmup,
        weight_decay=section.weight_decay,
        checkpoint_steps=section.checkpoint_steps,
        seed=seed,
        dtype=dtype,
        steps=max(1, round(share * section.steps)) if section.steps else None,
        dev_steps=section.dev_steps,
        max_grad_norm=section.max_grad_norm,
        report_to=tuple(section.report_to),
    )


def make_batching(section: TrainingSection, student: SentenceTransformer, lessons: Lessons, seed: int) -> Batching:
    """Return how texts are put into batches: beside which others, and in what order over the training."""
    neighbours = None
    if section.neighbours:
        note(f"Neighbours: {section.neighbours} of each of {len(lessons.inputs):,} texts")
        neighbours = find_neighbours(shorten(lessons.targets, len(lessons.inputs)), section.neighbours)
    return Batching(
        size=section.batch_size,
        tokens=section.batch_tokens,
        seed=seed,
        companions=lessons.partners if "pairs" in section.objectives.used else None,
        neighbours=neighbours,
        difficulty=_rate(section, student, lessons),
    )


def _rate(section: TrainingSection, student: SentenceTransformer, lessons: Lessons) -> Matrix | None:
    """Return how difficult each text is, shape (n_texts,); None: no order is wanted."""
    n_texts = len(lessons.inputs)
    match section.curriculum:
        case "none":
            return None
        case "length":
            return np.array([len(text) for text in lessons.inputs], np.float32)
        case "queries-last":
            return lessons.queries.astype(np.float32)
        case "centre":
            return spread_from_centres(shorten(lessons.targets, n_texts))
        case "error":
            return _measure_errors(student, lessons)


def _measure_errors(student: SentenceTransformer, lessons: Lessons) -> Matrix:
    """Return 1 - cosine to the teacher, shape (n_texts,)."""
    errors = np.empty(len(lessons.inputs), np.float32)
    with progress_bar("untrained student encodes", len(errors), "texts") as advance:
        for start in range(0, len(errors), _CHUNK):
            texts = list(lessons.inputs[start : start + _CHUNK])
            found = student.encode(texts, prompt="", normalize_embeddings=True, show_progress_bar=False)
            wanted = lessons.targets(np.arange(start, start + len(texts)))
            errors[start : start + len(texts)] = 1 - (found * wanted).sum(1)
            advance(len(texts))
    return errors
