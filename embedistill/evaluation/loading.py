"""Where tasks come from: a folder of sets, a file of one's own, or the Hub."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from embedistill import hub
from embedistill.corpus.reading import read_text_lines
from embedistill.errors import EmbedistillError, UsageError
from embedistill.evaluation.tasks import (
    AgreementTask,
    ClassificationTask,
    ClusteringTask,
    Columns,
    PairTask,
    RetrievalTask,
    StsTask,
    Task,
)
from embedistill.files import write_text
from embedistill.progress import note

_Row = dict[str, Any]
_STS_COLUMNS = ("sentence1", "sentence2", "score")
_PAIR_COLUMNS = ("sentence1", "sentence2", "label")
_TEXT_COLUMNS = ("text", "label")
_SEARCH_COLUMNS = ("query", "documents", "relevance")
_SEGMENT_COLUMNS = ("source", "subset", "category", "genre", "language")
_NOT_TEST = (".train", ".dev", ".val")


def list_tasks(folder: Path) -> list[str]:
    """Return the names of the tasks in a folder, those for training and development left out."""
    names = [path.name.removesuffix(".gz").removesuffix(".jsonl") for path in _list_files(folder)]
    names = [name.removesuffix(".test") for name in names]
    return [name for name in names if not name.endswith(_NOT_TEST)]


def load_task(name: str, folder: Path | None) -> Task:
    """Load a task by name: from a file of one's own, from a folder, or an STS set from the Hub.

    A folder has `sts/NAME.jsonl` and `pairs/NAME.jsonl` (sentence1, sentence2, and score or label), `retrieval/NAME/`
    in BEIR form, `classification/NAME.train.jsonl` beside `NAME.test.jsonl`, and `clustering/NAME.jsonl` (text, label);
    every .jsonl may be a .jsonl.gz. A file of one's own has rows of sentence1, sentence2 and score, of a query, its
    documents and their relevance, or of a text alone. A column source, subset, category,
    genre or language makes segments.

    Raises:
        UsageError: There is no such task, or something is wrong in its data.
        EmbedistillError: The Hub does not answer.
    """
    if is_file(name):
        return _load_own(Path(name))
    if folder is None:
        return _load_from_hub(name)
    if not folder.is_dir():
        raise UsageError(f"evaluation.data: {folder}", "no such folder", do="check the path")
    readers: dict[str, Callable[[str, Path], Task]] = {
        f"sts/{name}.jsonl": _load_sts,
        f"pairs/{name}.jsonl": _load_pairs,
        f"retrieval/{name}": _load_retrieval,
        f"classification/{name}.test.jsonl": _load_classification,
        f"clustering/{name}.jsonl": _load_clustering,
    }
    for place, read in readers.items():
        for path in (folder / place, folder / f"{place}.gz"):
            if path.exists():
                return read(name, path)
    found = ", ".join(list_tasks(folder)) or "none there"
    raise UsageError(f"evaluation.tasks: {name}", f"not in {folder}", f"one of: {found}")


def is_file(name: str) -> bool:
    """Say whether a task is named by a file of one's own."""
    return name.endswith((".jsonl", ".jsonl.gz"))


def describe_tasks(names: Iterable[str], folder: Path | None) -> list[Any]:
    """Return what changes when the data of tasks does: their names, and their files with size and time."""
    description: list[Any] = []
    for name in names:
        files = [Path(name)] if is_file(name) else []
        files += sorted(folder.glob(f"*/{name}.*")) + sorted(folder.glob(f"retrieval/{name}/**/*")) if folder else []
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


def _list_files(folder: Path) -> list[Path]:
    kinds = ("sts", "pairs", "classification", "clustering")
    files = [path for kind in kinds for path in sorted(folder.glob(f"{kind}/*.jsonl*"))]
    return files + sorted(path for path in folder.glob("retrieval/*") if path.is_dir())


def _load_own(path: Path) -> Task:
    """Load a file of one's own; its columns say what it is."""
    if not path.is_file():
        raise UsageError(f"evaluation.tasks: {path}", "no such file", do="check the path")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    first = next((line for _, line in read_text_lines(path) if line.strip()), "{}")
    keys = set(_parse(f"{path}:1", first))
    if set(_STS_COLUMNS) <= keys:
        return _load_sts(name, path)
    if set(_PAIR_COLUMNS) <= keys:
        return _load_pairs(name, path)
    if set(_SEARCH_COLUMNS) <= keys:
        return _load_search(name, path)
    rows = _read_rows(path, ("text",))
    if len(rows) < 2:
        raise UsageError(str(path), f"{len(rows)} texts", "two at the very least")
    return AgreementTask(name, [row["text"] for row in rows], _segment_columns(rows))


def _load_sts(name: str, path: Path) -> StsTask:
    return _to_sts(name, str(path), _read_rows(path, _STS_COLUMNS))


def _to_sts(name: str, where: str, rows: Sequence[_Row]) -> StsTask:
    if len(rows) < 2:
        raise UsageError(where, f"{len(rows)} pairs", "two at the very least")
    first, second, scores = ([row[key] for row in rows] for key in _STS_COLUMNS)
    return StsTask(name, first, second, [float(score) for score in scores], _segment_columns(rows))


def _load_pairs(name: str, path: Path) -> PairTask:
    rows = _read_rows(path, _PAIR_COLUMNS)
    first, second, labels = ([row[key] for row in rows] for key in _PAIR_COLUMNS)
    if not {str(label) for label in labels} == {"0", "1"}:
        raise UsageError(str(path), f"labels {', '.join(sorted({str(label) for label in labels})[:5])}", "0 and 1")
    return PairTask(name, first, second, [str(label) == "1" for label in labels], _segment_columns(rows))


def _load_classification(name: str, path: Path) -> ClassificationTask:
    beside = path.with_name(path.name.replace(".test.jsonl", ".train.jsonl"))
    if not beside.is_file():
        raise UsageError(str(path), f"no {beside.name} beside it", "texts with labels to fit a probe on")
    fitted, rows = (_read_rows(file, _TEXT_COLUMNS) for file in (beside, path))
    known = {str(row["label"]) for row in fitted}
    strange = sorted({str(row["label"]) for row in rows} - known)
    if strange or len(known) < 2:
        found = f"labels {', '.join(strange[:5])}" if strange else f"{len(known)} label"
        raise UsageError(str(path), found, f"the labels of {beside.name}, two or more")
    labels, texts = [str(row["label"]) for row in rows], [row["text"] for row in rows]
    of_fitted = [row["text"] for row in fitted], [str(row["label"]) for row in fitted]
    return ClassificationTask(name, *of_fitted, texts, labels, _segment_columns(rows))


def _load_clustering(name: str, path: Path) -> ClusteringTask:
    rows = _read_rows(path, _TEXT_COLUMNS)
    labels = [str(row["label"]) for row in rows]
    if len(set(labels)) < 2:
        raise UsageError(str(path), f"{len(set(labels))} label", "two at the very least")
    return ClusteringTask(name, [row["text"] for row in rows], labels, _segment_columns(rows))


def _load_retrieval(name: str, folder: Path) -> RetrievalTask:
    corpus = folder / "corpus.jsonl.gz" if (folder / "corpus.jsonl.gz").is_file() else folder / "corpus.jsonl"
    documents = {
        row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in _read_rows(corpus, ("_id", "text"))
    }
    queries = {row["_id"]: row for row in _read_rows(folder / "queries.jsonl", ("_id", "text"))}
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
    rows = [queries[query] for query in judged]
    texts = [row["text"] for row in rows]
    return RetrievalTask(name, texts, list(documents.values()), list(judged.values()), _segment_columns(rows))


def _load_search(name: str, path: Path) -> RetrievalTask:
    """Load rows of a query, some documents, and the relevance of each; all rows' documents together are the corpus."""
    numbers: dict[str, int] = {}
    relevance: list[dict[int, float]] = []
    rows = []
    for where, row in _iter_rows(path, ("query",)):
        documents, grades = row.get("documents"), row.get("relevance")
        if not isinstance(documents, list) or not isinstance(grades, list) or len(documents) != len(grades):
            raise UsageError(where, "documents and relevance", "two lists of the same length")
        if not all(isinstance(document, str) for document in documents) or not all(map(_is_number, grades)):
            raise UsageError(where, "documents and relevance", "texts and numbers")
        judged = [numbers.setdefault(document, len(numbers)) for document in documents]
        if any(float(grade) > 0 for grade in grades):
            rows.append(row)
            relevance.append(dict(zip(judged, map(float, grades), strict=True)))
    if len(rows) < 2:
        raise UsageError(str(path), f"{len(rows)} queries with a relevant document", "two at the very least")
    return RetrievalTask(name, [row["query"] for row in rows], list(numbers), relevance, _segment_columns(rows))


def _segment_columns(rows: Sequence[_Row]) -> Columns:
    """Return the columns that rows may be told apart by: there in all of them, with more than one value."""
    columns = {name: [str(row.get(name, "")) for row in rows] for name in _SEGMENT_COLUMNS if name in rows[0]}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def _read_rows(path: Path, keys: tuple[str, ...]) -> list[_Row]:
    return [row for _, row in _iter_rows(path, keys)]


def _iter_rows(path: Path, keys: tuple[str, ...]) -> Iterable[tuple[str, _Row]]:
    """Yield the objects of a .jsonl file; "score" has to be a number, a label anything, every other key a string."""
    for where, line in read_text_lines(path):
        if line.strip():
            row = _parse(where, line)
            if not set(keys) <= set(row):
                raise UsageError(where, ", ".join(row), f"an object with {', '.join(keys)}")
            _check_row(where, row, keys)
            yield where, row


def _parse(where: str, line: str) -> _Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(where, f"not JSON: {error}", "one object a line") from None
    if not isinstance(row, dict):
        raise UsageError(where, type(row).__name__, "one object a line")
    return row


def _check_row(where: str, row: _Row, keys: tuple[str, ...]) -> None:
    for key in keys:
        if key == "score" and not _is_number(row[key]):
            raise UsageError(where, f"score is {row[key]!r:.60}", "a number")
        if key == "label" and not isinstance(row[key], str | int):
            raise UsageError(where, f"label is {row[key]!r:.60}", "a string or a whole number")
        if key not in {"score", "label"} and not isinstance(row[key], str):
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
