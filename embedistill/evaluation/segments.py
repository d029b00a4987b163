"""Where a student is worse than on average: retention by kind of text, the worst first."""

from __future__ import annotations

import importlib.util
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from embedistill.corpus.filtering import load_classifier
from embedistill.corpus.selection import find_centres
from embedistill.evaluation.comparison import MAIN, Drawn, Retention, choose_metric, decide, draw, retain
from embedistill.evaluation.metrics import Items, Values, count_items, metric_value
from embedistill.evaluation.retrieval import Embeddings
from embedistill.evaluation.scoring import TEACHER, Result
from embedistill.evaluation.tasks import (
    ClassificationTask,
    ClusteringTask,
    PairTask,
    RetrievalTask,
    StsTask,
    Task,
    list_items,
)

MISSPELT = "misspelt "
"""Before the name of a task: the same with typing errors."""

_PARTS = 4
_CHARACTERS = 1_000  # that a text's words are judged by
_FEWEST = 50  # items: of fewer nothing is said
_RESAMPLES = 1_000
_CENTRES = 256
_LETTERS_AN_ERROR = 15
_RARE_LANGUAGE = 20  # a language of fewer than one text in so many is taken for an error

Measure = Callable[[Sequence[str]], Values]
"""From texts to a number each, by which they are told apart."""


@dataclass(frozen=True)
class Segment:
    """How much of the teacher a student keeps on a part of a task's items.

    The interval is one of 95 %; the verdict is corrected for the number of segments (Bonferroni).

    Attributes:
        task: Its name.
        column: What the items are told apart by, such as length.
        value: Which of them these are.
        metric: The task's main metric, or its first where it has none.
        n_items: How many.
        teacher: The teacher's metric on them.
        student: The student's.
        retention: Student / teacher.
        role: Of the student, where there are several.
    """

    task: str
    column: str
    value: str
    metric: str
    n_items: int
    teacher: float
    student: float
    retention: Retention
    role: str = "student"


def find_segments(
    tasks: Sequence[Task],
    results: Sequence[Result],
    measures: Mapping[str, Measure],
    *,
    student: str,
    seed: int,
    margin: float | None = None,
) -> list[Segment]:
    """Return the segments of tasks, the least kept first.

    Args:
        tasks: Their own columns make segments, so does what `measures` tell of their texts, in quarters, and so do
            their languages, where py3langid is installed and tells several.
        results: Of teacher and student on them, and on them with typing errors.
        measures: By name, such as length: from texts to numbers.
        student: The role that is compared with the teacher.
        seed: Of the resamples.
        margin: What a segment may lose: with it, each has a verdict.
    """
    found: list[Segment] = []
    by_task = {(result.task, result.role): result for result in results}
    for task in tasks:
        for name in (task.name, MISSPELT + task.name):
            if {(name, TEACHER), (name, student)} <= by_task.keys():
                pair = by_task[name, TEACHER], by_task[name, student]
                typing = {"typing": ["with errors"] * count_items(pair[0].items)}
                columns = _list_columns(task, pair[0], measures) if name == task.name else typing
                for column, labels in columns.items():
                    found += _compare(task.name, pair, column, labels, seed)
    return judge_segments(found, margin)


def judge_segments(segments: Sequence[Segment], margin: float | None) -> list[Segment]:
    """Return segments with their verdicts, the least kept first.

    A verdict is corrected for the number of segments of main metrics that the same student has (Bonferroni).
    """
    counts = Counter(segment.role for segment in segments if segment.metric in MAIN)
    ordered = sorted(segments, key=lambda segment: segment.retention.value)
    return [_judge(segment, counts[segment.role], margin) for segment in ordered]


def tell_languages(texts: Sequence[str]) -> list[str] | None:
    """Return the language of each text as ISO 639-1 has it, "not told" of short texts.

    A language of fewer than a twentieth of the texts is taken for an error. None where fewer than two are left, or
    py3langid is not installed.
    """
    if importlib.util.find_spec("py3langid") is None:
        return None
    classify = load_classifier("segments by language")
    found = [classify(text) for text in texts]
    told = {language for language, count in Counter(found).items() if language and count * _RARE_LANGUAGE >= len(texts)}
    return [language if language in told else "not told" for language in found] if len(told) > 1 else None


def count_characters(texts: Sequence[str]) -> Values:
    """Return the length of each text."""
    return np.array([len(text) for text in texts], np.float64)


def make_piece_measure(tokenizer: Tokenizer) -> Measure:
    """Return what measures how many pieces a tokenizer makes of a word, on average: 1 where it knows them all."""

    def measure(texts: Sequence[str]) -> Values:
        heads = [text[:_CHARACTERS] for text in texts]
        n_words = [max(1, len(re.findall(r"\w+|[^\w\s]", head))) for head in heads]
        encoded = tokenizer.encode_batch(heads, add_special_tokens=False)
        return np.array([len(some.ids) / words for some, words in zip(encoded, n_words, strict=True)])

    return measure


def make_distance_measure(embed: Callable[[Sequence[str]], Embeddings], corpus: Sequence[str]) -> Measure:
    """Return what measures how far texts are from a corpus: 1 - cosine to the nearest centre of its clusters."""
    vectors = embed(corpus)
    centres = find_centres(vectors, min(_CENTRES, len(vectors)))

    def measure(texts: Sequence[str]) -> Values:
        similarities, _ = centres.search(embed(texts), 1)
        return 1 - np.asarray(similarities[:, 0], np.float64)

    return measure


def misspell(task: Task, seed: int) -> Task:
    """Return a task with typing errors: of its sentences, its queries, or the texts to classify or cluster.

    Texts alone stay as they are. In every fifteenth letter or so two letters change places, one is left out, or one
    stands twice.
    """
    random = np.random.default_rng(seed)

    def spoil(texts: Sequence[str]) -> list[str]:
        return [_misspell(text, random) for text in texts]

    match task:
        case StsTask() | PairTask():
            return replace(task, sentences1=spoil(task.sentences1), sentences2=spoil(task.sentences2))
        case RetrievalTask():
            return replace(task, queries=spoil(task.queries))
        case ClassificationTask() | ClusteringTask():
            return replace(task, texts=spoil(task.texts))
    return task


def _misspell(text: str, random: np.random.Generator) -> str:
    letters = list(text)
    for place in np.flatnonzero(random.random(len(letters)) < 1 / _LETTERS_AN_ERROR):
        if not letters[place].isalpha():
            continue
        match random.integers(3):
            case 0 if place + 1 < len(letters):
                letters[place], letters[place + 1] = letters[place + 1], letters[place]
            case 1 if len(text) > 1:
                letters[place] = ""
            case _:
                letters[place] *= 2
    return "".join(letters) or text


def _list_columns(task: Task, teacher: Result, measures: Mapping[str, Measure]) -> dict[str, Sequence[str]]:
    """Return by column what each item is."""
    texts = [" ".join(some) for some in list_items(task)]
    columns: dict[str, Sequence[str]] = dict(task.columns)
    if "language" not in columns and (languages := tell_languages(texts)):
        columns["language"] = languages
    for name, measure in measures.items():
        columns[name] = _quarter(measure(texts))
    if nearest := teacher.details.get("nearest"):  # of pairs not: a band of similarities is hard to rank for anyone
        columns["similarity of the nearest"] = _quarter(np.asarray(nearest, np.float64))
    return columns


def _quarter(values: Values) -> list[str]:
    """Return which quarter of the values each is in, with the quarter's ends."""
    inner = np.quantile(values, np.arange(1, _PARTS) / _PARTS)
    parts = np.searchsorted(inner, values, side="left")
    ends = {int(part): (values[parts == part].min(), values[parts == part].max()) for part in np.unique(parts)}
    names = {part: f"{low:.4g} to {high:.4g}" for part, (low, high) in ends.items()}
    return [names[int(part)] for part in parts]


def _compare(
    task: str, pair: tuple[Result, Result], column: str, labels: Sequence[str], seed: int
) -> Iterator[Segment]:
    """Yield the segments of a column that have enough items, and on which the teacher is above zero."""
    metric = choose_metric(*pair)
    rows_of: dict[str, list[int]] = {}
    for row, value in enumerate(labels):
        rows_of.setdefault(value, []).append(row)
    for value, rows in rows_of.items():
        if len(rows) < _FEWEST:
            continue
        parts = [replace(result, items=_take(result.items, rows)) for result in pair]
        parts = [replace(part, metrics={metric: metric_value(part.items, metric)}) for part in parts]
        (drawn,) = draw(parts, _RESAMPLES, seed)
        kept = retain(drawn, None)
        if kept and _is_sure(drawn):
            teacher, student = (part.metrics[metric] for part in parts)
            role = pair[1].role
            yield Segment(task, column, value, metric, len(rows), teacher, student, kept[role], role)


def _take(items: Items, rows: Any) -> dict[str, list[Any]]:
    return {name: np.asarray(column)[rows].tolist() for name, column in items.items()}


def _is_sure(drawn: Drawn) -> bool:
    """Say whether the teacher is surely above zero: a ratio to what may be nothing says nothing."""
    return bool(drawn.values[TEACHER] > 4 * drawn.draws[TEACHER].std())


def _judge(segment: Segment, n_segments: int, margin: float | None) -> Segment:
    if margin is None or segment.metric not in MAIN:
        return segment
    kept = segment.retention
    z = statistics.NormalDist().inv_cdf
    wider = z(1 - 0.025 / n_segments) / z(0.975)
    low, high = (kept.value + wider * (end - kept.value) for end in (kept.low, kept.high))
    return replace(segment, retention=replace(kept, verdict=decide(low, high, margin)))
