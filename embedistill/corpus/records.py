"""A record of a corpus, and corpora on disk."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from embedistill.choices import Kind
from embedistill.files import written_aside

Split = Literal["train", "holdout"]


@dataclass(frozen=True)
class Record:
    """One text, where it came from, what it is, a short text that should find it, and one that it should not.

    A text is a document to search for, unless its kind says that it is a query itself.
    """

    text: str
    source: str = ""
    query: str | None = None
    negative: str | None = None
    kind: Kind = "document"

    @property
    def document(self) -> str:
        """The text without its own query, so that finding it is more than matching a copy.

        One of a single word is left out where the text begins with it, as with a title; elsewhere it is any word.
        """
        if not self.query or self.query not in self.text:
            return self.text
        start = r"(?<!\w)" if len(self.query.split()) > 1 else r"\A"
        rest, found = re.subn(rf"{start}{re.escape(self.query)}(?!\w)", "", self.text, count=1)
        return " ".join(rest.split()) if found else self.text

    @property
    def parts(self) -> list[tuple[Kind, str]]:
        """What a teacher encodes of it, and as what: the document, and query and negative where there are such."""
        parts: list[tuple[Kind, str | None]] = [
            (self.kind, self.document),
            ("query", self.query),
            ("document", self.negative),
        ]
        return [(kind, text) for kind, text in parts if text]

    @property
    def texts(self) -> list[str]:
        """The texts of its parts."""
        return [text for _, text in self.parts]


def save_corpus(path: Path, splits: dict[Split, list[Record]]) -> None:
    """Write records to one parquet file with the columns text, source, query, negative, kind, split."""
    rows = [(record, split) for split, records in splits.items() for record in records]
    table = pa.table(
        {
            "text": pa.array([record.text for record, _ in rows], pa.string()),
            "source": pa.array([record.source for record, _ in rows], pa.string()),
            "query": pa.array([record.query for record, _ in rows], pa.string()),
            "negative": pa.array([record.negative for record, _ in rows], pa.string()),
            "kind": pa.array([record.kind for record, _ in rows], pa.string()),
            "split": pa.array([split for _, split in rows], pa.string()),
        }
    )
    with written_aside(path) as part:
        pq.write_table(table, part, compression="zstd")


def load_corpus(path: Path) -> dict[Split, list[Record]]:
    """Read what `save_corpus` wrote."""
    splits: dict[Split, list[Record]] = {"train": [], "holdout": []}
    for row in pq.read_table(path).to_pylist():
        splits[row.pop("split")].append(Record(**row))
    return splits


def choose_kind(records: Sequence[Record]) -> tuple[list[Record], Kind]:
    """Return the records of the kind that most are of, documents where there are as many of each, and that kind."""
    kinds = Counter(record.kind for record in records)
    kind: Kind = "query" if kinds["query"] > kinds["document"] else "document"
    return [record for record in records if record.kind == kind], kind


def normalise(text: str) -> str:
    """Return a text without what two copies of it may differ in: case and space."""
    return " ".join(text.casefold().split())
