"""Read records from files, folders, the Hub, or installed packages."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedistill import hub
from embedistill.choices import Kind, OnBad
from embedistill.corpus.docstrings import find_packages, read_docstrings
from embedistill.corpus.records import Record
from embedistill.errors import EmbedistillError, UsageError
from embedistill.progress import progress_bar

SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")
_PARQUET_ROWS = 8_192
_HUB = "hf:org/dataset[:config][:split][#text column]"
_PAIRS = "call its columns anchor, positive and, if there is one, negative"
_OVER = "\0"  # what a row of a .csv has beyond its columns
_SPLITS = {"train", "validation", "test", "dev"}
HALF_PAIR = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can hold and UTF-8 cannot."""

Row = tuple[str, Mapping[str, Any]]
"""Where a row stands, and its columns."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a source are read, what its texts are, and what to do with a bad row or a missing column."""

    text: str = "text"
    query: str | None = None
    negative: str | None = None
    source: str = "source"
    kind: Kind = "document"
    max_characters: int = 100_000
    bad_rows: OnBad = "error"
    name_them: str = "set corpus.text_column, query_column or source_column"


def describe_source(source: str | Sequence[str]) -> list[Any]:
    """Return what changes when the content of a source does: files with size and time, packages with version.

    Raises:
        UsageError: The source does not exist or is of no known kind.
    """
    if not isinstance(source, str):
        return [describe_source(one) for one in source]
    kind, _, name = source.partition(":")
    match kind:
        case "docstrings":
            return [[package.name, package.version] for package in find_packages(_names(name))]
        case "hf":
            return [source]
        case _:
            files = [(file, file.stat()) for file in list_files(Path(source))]
            return [[str(file), status.st_size, status.st_mtime_ns] for file, status in files]


def read_corpus(source: str | Sequence[str], columns: Columns) -> Iterator[Record | None]:
    """Yield the records of a source, in its order; None stands for a bad row that is skipped.

    Args:
        source: A .txt, .csv, .jsonl or .parquet file (.gz too), a folder of them, docstrings:[package,package], or
            hf:org/dataset[:config][:split][#text column]; or several of these.
        columns: Which columns to read.

    Raises:
        UsageError: A file that cannot be read as what its name says, a missing column, or a bad row.
        EmbedistillError: The Hub does not answer.
    """
    if not isinstance(source, str):
        for one in source:
            yield from read_corpus(one, columns)
        return
    kind, _, name = source.partition(":")
    match kind:
        case "docstrings":
            packages = find_packages(_names(name))
            with progress_bar("Reading docstrings", len(packages), "packages") as advance:
                for package in packages:
                    yield from read_docstrings(package)
                    advance(1)
        case "hf":
            dataset, _, column = name.partition("#")
            columns = replace(columns, text=column) if column else columns
            yield from _to_records(_hub_rows(dataset), columns, dataset)
        case _:
            for file in list_files(Path(source)):
                yield from _to_records(_file_rows(file, columns), columns, file.name.split(".")[0])


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _to_records(rows: Iterable[Row], columns: Columns, source: str) -> Iterator[Record | None]:
    for number, (where, row) in enumerate(rows):
        if number == 0:
            _check_columns(where, row, columns)
        problem = _find_problem(where, row, columns)
        if problem and columns.bad_rows == "error":
            raise problem
        if problem:
            yield None
        else:
            text, query, negative = (
                ((row.get(column) if column else None) or "").strip()
                for column in (columns.text, columns.query, columns.negative)
            )
            where_from = row.get(columns.source)
            named = source if where_from is None or where_from == "" else str(where_from)
            yield Record(text, named, query or None, negative or None, columns.kind)


def read_pairs(path: Path, *, max_characters: int, bad_rows: OnBad) -> Iterator[Record | None]:
    """Yield a record for each pair of a file: its positive is the text, its anchor the query; as `read_corpus`.

    Args:
        path: With the columns anchor and positive, and negative where there are negatives, of all rows or of some.
        max_characters: A longer text is a bad row.
        bad_rows: What becomes of one.
    """
    for file in list_files(path):
        columns = Columns(
            "positive", "anchor", "negative", max_characters=max_characters, bad_rows=bad_rows, name_them=_PAIRS
        )
        yield from _to_records(_file_rows(file, columns), columns, file.name.split(".")[0])


def _check_columns(where: str, row: Mapping[str, Any], columns: Columns) -> None:
    """Stop where the first row has not the columns that were asked for."""
    asked = columns.source if columns.source != Columns.source else None  # the usual one may be missing
    for column in (columns.text, columns.query, asked):
        if column and column not in row:
            names = ", ".join(str(name) for name in row)
            raise UsageError(where, f"no column {column!r}", f"one of: {names}", columns.name_them)


def _find_problem(where: str, row: Mapping[str, Any], columns: Columns) -> UsageError | None:
    """Say what is wrong with a row, if anything: it need not have a query or a negative."""
    if _OVER in row:
        found = f"beyond its columns {', '.join(row[_OVER])!r:.60}"
        do = 'put a cell with a comma in it in quotes: "...", or set corpus.bad_rows=skip to leave such rows out'
        return UsageError(where, found, "a cell for each column", do)
    cells = [(columns.text, row.get(columns.text))]
    cells += [(name, row.get(name)) for name in (columns.query, columns.negative) if name and row.get(name) is not None]
    problems = (_find_fault(where, column, value, columns.max_characters) for column, value in cells)
    return next((problem for problem in problems if problem), None)


def _find_fault(where: str, column: str, value: Any, max_characters: int) -> UsageError | None:
    mend = "mend the row, or set corpus.bad_rows=skip to leave such rows out"
    if not isinstance(value, str):
        found = "null" if value is None else f"{type(value).__name__} {value!r:.60}"
        return UsageError(where, f"{column} is {found}", "a string", mend)
    if HALF_PAIR.search(value):
        return UsageError(where, f"{column} has half of a surrogate pair", "text that UTF-8 can hold", mend)
    if len(value) > max_characters:
        return UsageError(where, f"{column} has {len(value):,} characters", f"at most {max_characters:,}", mend)
    return None


def list_files(path: Path) -> list[Path]:
    """Return a file, or the files below a folder that can be read, in the order of their names.

    Raises:
        UsageError: There is no such file.
    """
    if not path.exists():
        raise UsageError(f"corpus: {path}", "no such file or folder", do="check corpus.source, or corpus.pairs")
    if path.is_file():
        if _suffix(path) not in SUFFIXES:
            raise UsageError(
                str(path), f"a {path.suffix or 'nameless'} file", f"{', '.join(SUFFIXES)} (.gz too)", "convert it"
            )
        return [path]
    files = sorted(file for file in _walk(path) if _suffix(file) in SUFFIXES)
    if not files:
        raise UsageError(str(path), "a folder with no such file", f"{', '.join(SUFFIXES)} (.gz too)")
    return files


def _walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder; one that cannot be read is an error."""

    def stop(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=stop, followlinks=False):
        yield from (Path(place) / name for name in names)


def _suffix(path: Path) -> str:
    inner = path.with_suffix("").suffix
    return inner if path.suffix == ".gz" and inner != ".parquet" else path.suffix


def _file_rows(path: Path, columns: Columns) -> Iterator[Row]:
    try:
        match _suffix(path):
            case ".parquet":
                yield from _parquet_rows(path, columns)
            case ".jsonl":
                yield from _jsonl_rows(path)
            case ".csv":
                yield from _csv_rows(path)
            case _:
                yield from ((where, {"text": line}) for where, line in read_text_lines(path) if line.strip())
    except (gzip.BadGzipFile, EOFError, zlib.error, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the file system's
        raise UsageError(str(path), str(error), f"a {_suffix(path)} file", "check how it was written") from None


def read_text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield where each line of a text file stands, and the line; .gz is unpacked, what is not UTF-8 is an error."""
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            if b"\0" in line:
                raise UsageError(where, "a NUL byte: a binary file", "text in UTF-8", "check the path")
            try:
                yield where, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{line[error.start]:02x} is not UTF-8"
                do = f"convert it, such as: iconv -f latin1 -t utf-8 {path.name}"
                raise UsageError(where, found, "text in UTF-8", do) from None


def _jsonl_rows(path: Path) -> Iterator[Row]:
    for where, line in read_text_lines(path):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, and brackets as deep
                found = f"not JSON: {getattr(error, 'msg', str(error)[:60])}"
                raise UsageError(where, found, "one object a line", "mend the line") from None
            if not isinstance(row, dict):
                raise UsageError(where, f"a JSON {type(row).__name__}", "an object with a text column", "mend the line")
            yield where, row


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # max_characters is the limit, and names the row
    begun: list[str] = []  # where the row at work does

    def read_lines() -> Iterator[str]:
        for where, line in read_text_lines(path):
            if not begun and line.strip("\r\n"):
                begun.append(where)
            yield line

    reader = csv.DictReader(read_lines(), restkey=_OVER, strict=True)
    try:
        if reader.fieldnames:
            begun.clear()
        for row in reader:
            yield begun[0], row
            begun.clear()
    except csv.Error as error:
        do = "mend the row that begins there, where a quote within quotes is doubled, or write the file anew"
        raise UsageError(begun[0] if begun else str(path), f"not CSV: {error}", "rows of columns", do) from None


def _parquet_rows(path: Path, columns: Columns) -> Iterator[Row]:
    number, wanted = 0, {columns.text, columns.query, columns.negative, columns.source}
    with path.open("rb") as stream:
        file = pq.ParquetFile(stream)
        there = file.schema_arrow.names
        read = [name for name in there if name in wanted] if columns.text in there else there
        for batch in file.iter_batches(_PARQUET_ROWS, columns=read):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:row {number}", row


def _hub_rows(name: str) -> Iterator[Row]:
    """Yield the rows of a dataset. One whose split is cut short, as train[:1000], is not downloaded as a whole."""
    import datasets

    path, config, split = _parse_hub_name(name)
    where = f"corpus.source: hf:{name}"
    if not hub.reachable():
        raise EmbedistillError(where, "the Hub does not answer", do="check the network, or name a local file")
    cut = re.fullmatch(r"(\w+)\[:(\d+)\]", split)
    try:
        if cut:
            loaded: Any = datasets.load_dataset(path, config, split=cut[1], streaming=True)
        else:
            loaded = datasets.load_dataset(path, config, split=split)
        for number, row in enumerate(itertools.islice(loaded, int(cut[2]) if cut else None), start=1):
            yield f"hf:{name}:row {number}", row
    except Exception as error:
        raise UsageError(where, str(error), _HUB, "check the name") from error


def _parse_hub_name(name: str) -> tuple[str, str | None, str]:
    """Split org/dataset[:config][:split]; one part alone is a split where it is named like one, as train[:1000] is."""
    path, *rest = re.split(r":(?![^\[]*\])", name)
    match rest:
        case []:
            return path, None, "train"
        case [part] if part.split("[")[0] in _SPLITS:
            return path, None, part
        case [config]:
            return path, config, "train"
        case [config, split]:
            return path, config, split
        case _:
            raise UsageError(f"corpus.source: hf:{name}", "too many parts", _HUB)
