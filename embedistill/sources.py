"""What a recipe's corpus is read from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from embedistill.corpus.reading import Columns, describe_source, list_files, read_corpus, read_pairs
from embedistill.corpus.records import Record
from embedistill.recipe import REMOTE_SOURCES, CorpusSection


def check_corpus(section: CorpusSection) -> None:
    """Make sure that what a corpus is read from is there, and that the first record of each file can be read.

    Raises:
        UsageError: It is not, or it cannot.
    """
    describe_source(section.sources)
    for file in list_files(Path(section.pairs)) if section.pairs else []:
        next(_read_pairs(section, file), None)
    for source in [section.source] if isinstance(section.source, str) else section.source:
        if not source.startswith(REMOTE_SOURCES):
            for file in list_files(Path(source)):
                next(_read_source(section, str(file)), None)


def read_records(section: CorpusSection) -> Iterator[Record | None]:
    """Yield the records of a recipe's corpus; those of pairs first, so that no text is taken without its anchor."""
    if section.pairs:
        yield from _read_pairs(section, Path(section.pairs))
    yield from _read_source(section, section.source)


def _read_pairs(section: CorpusSection, path: Path) -> Iterator[Record | None]:
    yield from read_pairs(path, max_characters=section.max_characters, bad_rows=section.bad_rows)


def _read_source(section: CorpusSection, source: str | list[str]) -> Iterator[Record | None]:
    columns = Columns(
        section.text_column,
        section.query_column,
        source=section.source_column,
        kind=section.kind,
        max_characters=section.max_characters,
        bad_rows=section.bad_rows,
    )
    yield from read_corpus(source, columns)
