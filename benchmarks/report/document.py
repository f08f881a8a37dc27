"""What a report is made of, before it is Markdown or HTML."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Kind(enum.StrEnum):
    """Where a table's or a figure's numbers come from."""

    MEASURED = "measured"
    PUBLISHED = "published"
    MODELLED = "modelled"
    DERIVED = "derived"
    RECORDED = "recorded"


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Plain text. `is_warning` marks what a reader must not miss."""

    text: str
    is_warning: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A caption, column names and rows of text. Numbers are aligned by `num_text_columns`."""

    caption: str
    kind: Kind
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text_columns: int = 1
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Figure:
    """A plot: its file name without ending, its SVG, and what it shows in words."""

    name: str
    kind: Kind
    caption: str
    alternative: str
    svg: str
    png: bytes


@dataclass(slots=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: list[Paragraph | Table | Figure] = field(default_factory=list)


@dataclass(slots=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: list[Section] = field(default_factory=list)

    def figures(self) -> list[Figure]:
        """Every figure, in order."""
        return [part for s in self.sections for part in s.parts if isinstance(part, Figure)]
