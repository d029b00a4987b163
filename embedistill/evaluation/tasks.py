"""What models are compared on, and where it comes from: a folder, the Hub, or the run's own held-out records."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedistill import hub
from embedistill.corpus.reading import read_text_lines
from embedistill.errors import EmbedistillError, UsageError
from embedistill.files import write_text
from embedistill.progress import note
from embedistill.teacher import Kind


@dataclass(frozen=True)
class StsTask:
    """Semantic textual similarity: pairs of sentences and how alike people find them."""

    name: str
    sentences1: Sequence[str]
    sentences2: Sequence[str]
    scores: Sequence[float]

    @property
    def texts_by_kind(self) -> dict[Kind, list[str]]:
        """All its texts."""
        return {"plain": [*self.sentences1, *self.sentences2]}


@dataclass(frozen=True)
class RetrievalTask:
    """Search: queries, documents, and for each query the relevance of documents by their number."""

    name: str
    queries: Sequence[str]
    documents: Sequence[str]
    relevance: Sequence[dict[int, float]]

    @property
    def texts_by_kind(self) -> dict[Kind, list[str]]:
        """All its texts."""
        return {"query": list(self.queries), "document": list(self.documents)}


@dataclass(frozen=True)
class AgreementTask:
    """How near a model's embeddings of some texts, and their nearest neighbours, are to the teacher's."""

    name: str
    texts: list[str]

    @property
    def texts_by_kind(self) -> dict[Kind, list[str]]:
        """All its texts."""
        return {"document": self.texts}


_STS_COLUMNS = ("sentence1", "sentence2", "score")

Task = StsTask | RetrievalTask | AgreementTask


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


def load_task(name: str, folder: Path | None) -> Task:
    """Load a task by name from a folder (`sts/NAME.jsonl`, `retrieval/NAME/` in BEIR form), or an STS set from the Hub.

    Raises:
        UsageError: The folder has no such task.
        EmbedistillError: The Hub does not answer.
    """
    if folder is None:
        return _load_from_hub(name)
    if not folder.is_dir():
        raise UsageError(f"evaluation.data: {folder}", "no such folder", do="check the path")
    if (folder / "sts" / f"{name}.jsonl").is_file():
        return _load_sts(name, folder / "sts" / f"{name}.jsonl")
    if (folder / "retrieval" / name).is_dir():
        return _load_retrieval(name, folder / "retrieval" / name)
    found = sorted(path.stem for path in folder.glob("sts/*.jsonl")) + sorted(
        path.name for path in folder.glob("retrieval/*")
    )
    raise UsageError(f"evaluation.tasks: {name}", f"not in {folder}", f"one of: {', '.join(found) or 'none there'}")


def describe_tasks(names: Iterable[str], folder: Path | None) -> list[Any]:
    """Return what changes when the data of tasks does: their names, and their files with size and time."""
    description: list[Any] = []
    for name in names:
        files = (
            sorted(folder.glob(f"sts/{name}.jsonl")) + sorted(folder.glob(f"retrieval/{name}/**/*")) if folder else []
        )
        description.append([name, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files)])
    return description


def load_tasks(names: Iterable[str], folder: Path | None, *, skip_missing: bool) -> list[Task]:
    """Load tasks by name; those that cannot be had are an error, or are left out with a line that says so."""
    tasks = []
    for name in names:
        try:
            tasks.append(load_task(name, folder))
        except EmbedistillError as error:
            if not skip_missing:
                raise
            note(f"Task {name} is left out: {error}")
    return tasks


def save_sts(task: StsTask, folder: Path) -> None:
    """Write an STS set to a folder in the form that `load_task` reads."""
    rows = zip(task.sentences1, task.sentences2, task.scores, strict=True)
    lines = [json.dumps(dict(zip(_STS_COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    write_text(folder / "sts" / f"{task.name}.jsonl", "".join(lines))


def _load_sts(name: str, path: Path) -> StsTask:
    return _to_sts(name, str(path), _read_lines(path, _STS_COLUMNS))


def _to_sts(name: str, where: str, rows: Sequence[dict[str, Any]]) -> StsTask:
    if len(rows) < 2:
        raise UsageError(where, f"{len(rows)} pairs", "two at the very least")
    columns = ([row[key] for row in rows] for key in _STS_COLUMNS)
    first, second, scores = columns
    return StsTask(name, first, second, [float(score) for score in scores])


def _load_retrieval(name: str, folder: Path) -> RetrievalTask:
    corpus = folder / "corpus.jsonl.gz" if (folder / "corpus.jsonl.gz").is_file() else folder / "corpus.jsonl"
    documents = {
        row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in _read_lines(corpus, ("_id", "text"))
    }
    queries = {row["_id"]: row["text"] for row in _read_lines(folder / "queries.jsonl", ("_id", "text"))}
    numbers = {document: number for number, document in enumerate(documents)}
    relevance: dict[str, dict[int, float]] = {}
    judgements = folder / "qrels" / "test.tsv"
    for line, row in enumerate(judgements.read_text(encoding="utf-8").splitlines()[1:], start=2):
        fields = row.split("\t")
        if len(fields) != 3 or fields[0] not in queries or fields[1] not in numbers or not _is_number(fields[2]):
            raise UsageError(f"{judgements}:{line}", repr(row), "a query, a document of the corpus, a score; with tabs")
        relevance.setdefault(fields[0], {})[numbers[fields[1]]] = float(fields[2])
    judged = {query: judged for query, judged in relevance.items() if any(score > 0 for score in judged.values())}
    if len(judged) < 2:
        raise UsageError(str(judgements), f"{len(judged)} queries with a relevant document", "two at the very least")
    return RetrievalTask(name, [queries[query] for query in judged], list(documents.values()), list(judged.values()))


def _read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Read the objects of a .jsonl file; "score" has to be a number, every other key a string."""
    rows = []
    for where, line in read_text_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(where, f"not JSON: {error}", "one object a line") from None
        if not isinstance(row, dict) or not set(keys) <= set(row):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise UsageError(where, found, f"an object with {', '.join(keys)}")
        _check_row(where, row, keys)
        rows.append(row)
    return rows


def _check_row(where: str, row: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if key == "score" and not _is_number(row[key]):
            raise UsageError(where, f"score is {row[key]!r:.60}", "a number")
        if key != "score" and not isinstance(row[key], str):
            raise UsageError(where, f"{key} is {row[key]!r:.60}", "a string")


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _load_from_hub(name: str) -> StsTask:
    if not hub.reachable():
        do = "name a folder that has it: evaluation.data=DIR or --data DIR"
        raise EmbedistillError(f"task {name}", "the Hub does not answer", do=do)
    import datasets
    import mteb

    try:
        metadata = mteb.get_task(name).metadata
    except KeyError:
        raise UsageError(f"evaluation.tasks: {name}", "not a task of mteb", do="check the name") from None
    if metadata.type != "STS":
        do = "name a folder that has it: evaluation.data=DIR or --data DIR"
        raise UsageError(f"evaluation.tasks: {name}", f"a task of type {metadata.type}", "an STS set", do)
    where = f"hf:{metadata.dataset['path']}"
    try:
        rows = datasets.load_dataset(metadata.dataset["path"], revision=metadata.dataset["revision"], split="test")
    except Exception as error:
        raise EmbedistillError(where, str(error), do="check the network, or name a folder: --data DIR") from error
    rows = list(rows)
    for number, row in enumerate(rows, start=1):
        _check_row(f"{where}:row {number}", row, _STS_COLUMNS)
    return _to_sts(name, where, rows)
