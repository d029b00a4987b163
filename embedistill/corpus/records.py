"""A record of a corpus, and corpora on disk."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from embedistill.files import written_aside

Split = Literal["train", "holdout"]


@dataclass(frozen=True)
class Record:
    """One text to search for, where it came from, a short text that should find it, and a text that it should not."""

    text: str
    source: str = ""
    query: str | None = None
    negative: str | None = None

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
    def texts(self) -> list[str]:
        """What a teacher encodes of it: the document, and query and negative where there are such."""
        return [text for text in (self.document, self.query, self.negative) if text]


def save_corpus(path: Path, splits: dict[Split, list[Record]]) -> None:
    """Write records to one parquet file with the columns text, source, query, negative, split."""
    rows = [(record, split) for split, records in splits.items() for record in records]
    table = pa.table(
        {
            "text": pa.array([record.text for record, _ in rows], pa.string()),
            "source": pa.array([record.source for record, _ in rows], pa.string()),
            "query": pa.array([record.query for record, _ in rows], pa.string()),
            "negative": pa.array([record.negative for record, _ in rows], pa.string()),
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


def normalise(text: str) -> str:
    """Return a text without what two copies of it may differ in: case and space."""
    return " ".join(text.casefold().split())
