"""A document as Markdown; plots are linked as files beside it."""

from __future__ import annotations

import re

from gptjet.benchmarks.report.document import Document, Figure, Paragraph, Table


def render(document: Document) -> str:
    """The whole file."""
    lines = [f"# {document.title}", "", _text(document.subtitle), ""]
    for section in document.sections:
        lines += [f"## {section.title}", ""]
        for part in section.parts:
            match part:
                case Paragraph():
                    lines += [
                        f"> **Note.** {_text(part.text)}" if part.is_warning else _text(part.text),
                        "",
                    ]
                case Table():
                    lines += [*_table(part), ""]
                case Figure():
                    lines += [
                        f"![{_text(part.alternative)}](plots/{part.name}.svg)",
                        "",
                        f"*{_text(part.caption)} ({part.kind})*",
                        "",
                    ]
    return "\n".join(lines)


def _table(table: Table) -> list[str]:
    rule = [
        "---" if index < table.num_text_columns else "---:" for index in range(len(table.columns))
    ]
    return [
        f"**{_text(table.caption)}** ({table.kind})",
        "",
        _row(table.columns),
        _row(tuple(rule)),
        *(_row(row) for row in table.rows),
    ]


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_text(cell).replace("|", "\\|") for cell in cells) + " |"


def _text(text: str) -> str:
    """One line; what would start HTML or emphasis is escaped."""
    return re.sub(r"([<*_`\[\]])", r"\\\1", " ".join(text.split()))
