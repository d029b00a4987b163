"""What a page is put together from: the template knows how to write each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of plain text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kind: ClassVar[str] = "points"
    texts: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        caption: What it shows.
        columns: Their names.
        rows: Cells as text; the first of a row names it.
        prose: Numbers of the columns that hold words: set to the left, and broken over lines.
        open_rows: How many are seen at first; the others are folded away.
    """

    kind: ClassVar[str] = "grid"
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: Collection[int] = (0,)
    open_rows: int = 40


@dataclass(frozen=True)
class About:
    """What a picture is.

    Attributes:
        name: Its id on the page.
        label: What it shows, for those who do not see it.
        caption: What stands below it.
    """

    name: str
    label: str
    caption: str


@dataclass(frozen=True)
class Figure:
    """A picture."""

    kind: ClassVar[str] = "figure"
    about: About
    svg: Markup


@dataclass(frozen=True)
class Source:
    """Text that stands as it is in a file."""

    kind: ClassVar[str] = "source"
    label: str
    text: str


@dataclass(frozen=True)
class Quotes:
    """Texts from the data, with a heading of their own."""

    kind: ClassVar[str] = "quotes"
    title: str
    texts: Sequence[str]


@dataclass(frozen=True)
class Beside:
    """Parts that stand beside each other where there is room."""

    kind: ClassVar[str] = "beside"
    parts: Sequence[Part]
    narrow: bool = False


@dataclass(frozen=True)
class Folded:
    """Parts behind a line that opens them."""

    kind: ClassVar[str] = "folded"
    summary: str
    parts: Sequence[Part]


Part = Paragraph | Points | Grid | Figure | Source | Quotes | Beside | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading.

    Attributes:
        anchor: Its id.
        title: Its heading.
        parts: What it holds; without any it is left out.
        verdict: What gives the heading its colour.
    """

    anchor: str
    title: str
    parts: Sequence[Part]
    verdict: str = ""
