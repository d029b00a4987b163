"""Where tasks come from: a folder of sets, a file of one's own, or the Hub."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from embedistill import hub
from embedistill.corpus.reading import HALF_PAIR, read_text_lines
from embedistill.errors import EmbedistillError, MissingError, UsageError
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
from embedistill.files import is_jsonl, write_text
from embedistill.progress import note

_Row = dict[str, Any]
_STS_COLUMNS = ("sentence1", "sentence2", "score")
_PAIR_COLUMNS = ("sentence1", "sentence2", "label")
_TEXT_COLUMNS = ("text", "label")
_SEARCH_COLUMNS = ("query", "documents", "relevance")
_SEGMENT_COLUMNS = ("source", "subset", "category", "genre", "language")
_NOT_TEST = (".train", ".dev", ".val")


def check_folder(folder: Path) -> None:
    """Raise a UsageError where the folder of sets is not there."""
    if not folder.is_dir():
        raise UsageError(f"evaluation.data: {folder}", "no such folder", do="check the path, or --data")


def list_tasks(folder: Path) -> list[str]:
    """Return the names of the tasks in a folder, those for training and development left out.

    Raises:
        UsageError: There is no such folder.
    """
    check_folder(folder)
    names = [path.name.removesuffix(".gz").removesuffix(".jsonl") for path in _list_files(folder)]
    names = [name.removesuffix(".test") for name in names]
    return [name for name in dict.fromkeys(names) if not name.endswith(_NOT_TEST)]


def load_task(name: str, folder: Path | None) -> Task:
    """Load a task by name: from a file of one's own, from a folder, or an STS set from the Hub.

    A folder has `sts/NAME.jsonl` and `pairs/NAME.jsonl` (sentence1, sentence2, and score or label), `retrieval/NAME/`
    in BEIR form, `classification/NAME.train.jsonl` beside `NAME.test.jsonl`, and `clustering/NAME.jsonl` (text, label);
    every file may be a .gz, and a NAME.jsonl a NAME.test.jsonl. A file of one's own has rows of sentence1, sentence2
    and score, of a query, its documents and their relevance, or of a text alone. A column source, subset, category,
    genre or language makes segments.

    Raises:
        UsageError: There is no such task, or something is wrong in its data.
        EmbedistillError: The Hub does not answer.
    """
    if is_jsonl(name):
        return _load_own(Path(name))
    if folder is None:
        return _load_from_hub(name)
    check_folder(folder)
    if (folder / "retrieval" / name).is_dir():
        return _load_retrieval(name, folder / "retrieval" / name)
    readers: dict[str, Callable[[str, Path], Task]] = {
        "sts": _load_sts,
        "pairs": _load_pairs,
        "classification": _load_classification,
        "clustering": _load_clustering,
    }
    for kind, read in readers.items():
        for place in (folder / kind / f"{name}.test.jsonl", folder / kind / f"{name}.jsonl"):
            if path := find_file(place):
                return read(name, path)
    found = ", ".join(list_tasks(folder)) or "none there"
    raise MissingError(f"evaluation.tasks: {name}", f"not in {folder}", f"one of: {found}")


def find_file(path: Path) -> Path | None:
    """Return the path of a file or of its .gz, whichever there is."""
    return next((found for found in (path, path.with_name(f"{path.name}.gz")) if found.is_file()), None)


def describe_tasks(names: Iterable[str], folder: Path | None) -> list[Any]:
    """Return what changes when the data of tasks does: their names, and their files with size and time."""
    description: list[Any] = []
    for name in names:
        files = [Path(name)] if is_jsonl(name) else []
        files += sorted(folder.glob(f"*/{name}.*")) + sorted(folder.glob(f"retrieval/{name}/**/*")) if folder else []
        description.append([name, *([str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files)])
    return description


def load_tasks(names: Iterable[str], folder: Path | None, *, skip_missing: bool) -> list[Task]:
    """Load tasks by name; those that are not there are an error, or are left out with a line that says so.

    Raises:
        UsageError: There is no such task, something is wrong in its data, or two have one name.
        EmbedistillError: The Hub does not answer.
    """
    tasks = []
    for name in names:
        try:
            tasks.append(load_task(name, folder))
        except EmbedistillError as error:
            if not skip_missing or (isinstance(error, UsageError) and not isinstance(error, MissingError)):
                raise
            note(f"Task {name} is left out: {error}")
    check_names(task.name for task in tasks)
    return tasks


def check_names(names: Iterable[str]) -> None:
    """Raise a UsageError where two tasks have one name: the figures of one would take the place of the other's."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UsageError("tasks", f"{', '.join(repeated)} more than once", "a name each", "rename the file")


def save_sts(task: StsTask, folder: Path) -> None:
    """Write an STS set to a folder in the form that `load_task` reads."""
    rows = zip(task.sentences1, task.sentences2, task.scores, strict=True)
    lines = [json.dumps(dict(zip(_STS_COLUMNS, row, strict=True)), ensure_ascii=False) + "\n" for row in rows]
    write_text(folder / "sts" / f"{task.name}.jsonl", "".join(lines))


def _list_files(folder: Path) -> list[Path]:
    kinds = ("sts", "pairs", "classification", "clustering")
    files = [path for kind in kinds for path in sorted(folder.glob(f"{kind}/*")) if is_jsonl(path.name)]
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
    first, second, scores = ([row[key] for row in rows] for key in _STS_COLUMNS)
    if len({float(score) for score in scores}) < 2:
        found = f"{len(rows)} pairs with the same score"
        raise UsageError(where, found, "two different scores at the very least: there is nothing to rank")
    return StsTask(name, first, second, [float(score) for score in scores], _segment_columns(rows))


def _load_pairs(name: str, path: Path) -> PairTask:
    rows = _read_rows(path, _PAIR_COLUMNS)
    first, second, labels = ([row[key] for row in rows] for key in _PAIR_COLUMNS)
    if not {str(label) for label in labels} == {"0", "1"}:
        raise UsageError(str(path), f"labels {', '.join(sorted({str(label) for label in labels})[:5])}", "0 and 1")
    return PairTask(name, first, second, [str(label) == "1" for label in labels], _segment_columns(rows))


def _load_classification(name: str, path: Path) -> ClassificationTask:
    beside = find_file(path.with_name(f"{name}.train.jsonl"))
    if beside is None:
        raise UsageError(str(path), f"no {name}.train.jsonl beside it", "texts with labels to fit a probe on")
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
    corpus, asked, judgements = (
        _find_part(folder, part) for part in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
    )
    documents, queries = _read_by_id(corpus), _read_by_id(asked)
    numbers = {document: number for number, document in enumerate(documents)}
    relevance: dict[str, dict[int, float]] = {}
    lines = iter(read_text_lines(judgements))
    where, header = next(lines, (str(judgements), ""))
    if header.split("\t")[0] in queries:
        found, do = f"a judgement, {header.rstrip()!r}", "put query-id, corpus-id and score first, with tabs"
        raise UsageError(where, found, "the names of the columns, as BEIR has them", do)
    for where, line in lines:
        row = line.rstrip("\r\n")
        fields = row.split("\t")
        if len(fields) != 3 or fields[0] not in queries or fields[1] not in numbers or not _is_number(fields[2]):
            raise UsageError(where, repr(row), "a query, a document of the corpus, a score; with tabs")
        relevance.setdefault(fields[0], {})[numbers[fields[1]]] = float(fields[2])
    judged = _keep_answered(judgements, relevance)
    rows = [queries[query] for query in judged]
    return RetrievalTask(
        name,
        [row["text"] for row in rows],
        [f"{row.get('title') or ''} {row['text']}".strip() for row in documents.values()],
        list(judged.values()),
        _segment_columns(rows),
        query_ids=list(judged),
        document_ids=list(documents),
    )


def _find_part(folder: Path, part: str) -> Path:
    found = find_file(folder / part)
    if found is None:
        raise UsageError(str(folder), f"no {part}", "corpus.jsonl, queries.jsonl and qrels/test.tsv, as BEIR has them")
    return found


def _read_by_id(path: Path) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for where, row in _iter_rows(path, ("_id", "text")):
        if row["_id"] in rows:
            raise UsageError(where, f"_id {row['_id']!r:.60} for the second time", "an _id of its own a row")
        rows[row["_id"]] = row
    return rows


def _keep_answered(path: Path, relevance: dict[str, dict[int, float]]) -> dict[str, dict[int, float]]:
    """Return the queries with a relevant document."""
    judged = {query: judged for query, judged in relevance.items() if any(score > 0 for score in judged.values())}
    if len(judged) < 2:
        raise UsageError(str(path), f"{len(judged)} queries with a relevant document", "two at the very least")
    return judged


def _load_search(name: str, path: Path) -> RetrievalTask:
    """Load rows of a query, some documents, and the relevance of each; all rows' documents together are the corpus.

    A query may have several rows. Of a document that is judged twice for a query the greater relevance counts.
    """
    numbers: dict[str, int] = {}
    relevance: dict[str, dict[int, float]] = {}
    rows: dict[str, _Row] = {}
    for where, row in _iter_rows(path, ("query",)):
        documents, grades = row.get("documents"), row.get("relevance")
        if not isinstance(documents, list) or not isinstance(grades, list) or len(documents) != len(grades):
            raise UsageError(where, "documents and relevance", "two lists of the same length")
        if not all(isinstance(document, str) for document in documents) or not all(map(_is_number, grades)):
            raise UsageError(where, "documents and relevance", "texts and numbers")
        rows.setdefault(row["query"], row)
        of_query = relevance.setdefault(row["query"], {})
        for document, grade in zip(documents, grades, strict=True):
            number = numbers.setdefault(document, len(numbers))
            of_query[number] = max(float(grade), of_query.get(number, -math.inf))
    judged = _keep_answered(path, relevance)
    columns = _segment_columns([rows[query] for query in judged])
    return RetrievalTask(name, list(judged), list(numbers), list(judged.values()), columns)


def _segment_columns(rows: Sequence[_Row]) -> Columns:
    """Return the columns that rows may be told apart by: there in all of them, with more than one value."""
    columns = {name: [str(row.get(name, "")) for row in rows] for name in _SEGMENT_COLUMNS if name in rows[0]}
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def _read_rows(path: Path, keys: tuple[str, ...]) -> list[_Row]:
    rows = [row for _, row in _iter_rows(path, keys)]
    if not rows:
        raise UsageError(str(path), "nothing in it", f"an object with {', '.join(keys)} a line")
    return rows


def _iter_rows(path: Path, keys: tuple[str, ...]) -> Iterable[tuple[str, _Row]]:
    """Yield the objects of a .jsonl file: a score is a number, a label a string or a whole number, the rest strings."""
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
        if isinstance(row[key], str) and HALF_PAIR.search(row[key]):
            do = "mend the line: a text was cut within a character"
            raise UsageError(where, f"{key} has half of a surrogate pair", "text that UTF-8 can hold", do)
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
        do = "check the name, or name a folder that has it: evaluation.data=DIR or --data DIR"
        raise MissingError(f"evaluation.tasks: {name}", "not a task of mteb", do=do) from None
    if metadata.type != "STS":
        do = "name a folder that has it: evaluation.data=DIR or --data DIR"
        raise MissingError(f"evaluation.tasks: {name}", f"a task of type {metadata.type}", "an STS set", do)
    where = f"hf:{metadata.dataset['path']}"
    try:
        rows = datasets.load_dataset(metadata.dataset["path"], revision=metadata.dataset["revision"], split="test")
    except Exception as error:
        raise EmbedistillError(where, str(error), do="check the network, or name a folder: --data DIR") from error
    rows = list(rows)
    for number, row in enumerate(rows, start=1):
        _check_row(f"{where}:row {number}", row, _STS_COLUMNS)
    return _to_sts(name, where, rows)
