"""A document as one HTML file that opens without a network: styles and plots are inside it."""

from __future__ import annotations

import re
from html import escape

from gptjet.benchmarks.report.document import Document, Figure, Paragraph, Section, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --line: #d0d7de; --page: #fff;
  --band: #f6f8fa; --measured: #0072b2; --published: #a8500a; --modelled: #6a3d9a;
  --derived: #00664b; --recorded: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d;
  --page: #0d1117; --band: #151b23; --measured: #58b4e9; --published: #f0a35e;
  --modelled: #c9a6f0; --derived: #4ad1a5; --recorded: #9198a1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .8rem; padding-top: .6rem;
  border-top: 1px solid var(--line); }
p { max-width: 48rem; }
.subtitle { color: var(--dim); margin-top: 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; padding: 0; list-style: none; }
a { color: var(--measured); }
.warning { border-left: .3rem solid var(--published); background: var(--band);
  padding: .6rem 1rem; }
.scroll { overflow-x: auto; margin: 0 0 1.6rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .2rem 0 .5rem; font-weight: 600; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.wide { white-space: normal; min-width: 16rem; }
thead th { background: var(--band); vertical-align: bottom; white-space: normal; }
thead th.number { max-width: 9rem; }
.text { text-align: left; } .number { text-align: right; }
tbody tr:hover { background: var(--band); }
.kind { font-size: .72rem; font-weight: 600; letter-spacing: .03em; border: 1px solid currentColor;
  border-radius: .25rem; padding: .05rem .4rem; margin-left: .5rem; white-space: nowrap; }
.measured { color: var(--measured); } .published { color: var(--published); }
.modelled { color: var(--modelled); } .derived { color: var(--derived); }
.recorded { color: var(--recorded); }
figure { margin: 0 0 2rem; } figcaption { color: var(--dim); font-size: .9rem; max-width: 60rem; }
figure svg { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .4rem; }
summary { cursor: pointer; font-weight: 600; margin: .3rem 0; }
@media print { body { max-width: none; padding: 0; } .scroll { overflow: visible; } }
"""
_WIDE_TEXT = 36


def render(document: Document) -> str:
    """The whole file."""
    ids = {id(section): f"s{number}" for number, section in enumerate(document.sections, start=1)}
    links = "".join(
        f'<li><a href="#{ids[id(section)]}">{escape(section.title)}</a></li>'
        for section in document.sections
    )
    body = "\n".join(_section(section, ids[id(section)]) for section in document.sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(document.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(document.title)}</h1>\n<p class="subtitle">'
        f'{escape(document.subtitle)}</p></header>\n<nav aria-label="Sections">'
        f"<ul>{links}</ul></nav>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section, anchor: str) -> str:
    parts = []
    for part in section.parts:
        match part:
            case Paragraph():
                mark = ' class="warning"' if part.is_warning else ""
                parts.append(f"<p{mark}>{escape(part.text)}</p>")
            case Table():
                parts.append(_table(part))
            case Figure():
                parts.append(_figure(part))
    inside = "\n".join(parts)
    return f'<section id="{anchor}"><h2>{escape(section.title)}</h2>\n{inside}\n</section>'


def _table(table: Table) -> str:
    head = "".join(
        f'<th scope="col" class="{_align(index, table)}">{escape(name)}</th>'
        for index, name in enumerate(table.columns)
    )
    rows = "\n".join(
        "<tr>" + "".join(_cell(text, index, table) for index, text in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    badge = f'<span class="kind {table.kind}">{table.kind}</span>'
    caption = f"{escape(table.caption)} {badge}"
    inner = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    if table.folded:
        return (
            f"<details><summary>{caption}</summary>"
            f'<div class="scroll"><table>{inner}</table></div></details>'
        )
    return f'<div class="scroll"><table><caption>{caption}</caption>{inner}</table></div>'


def _cell(text: str, index: int, table: Table) -> str:
    wide = " wide" if len(text) > _WIDE_TEXT else ""
    return f'<td class="{_align(index, table)}{wide}">{escape(text)}</td>'


def _align(index: int, table: Table) -> str:
    return "text" if index < table.num_text_columns else "number"


def _figure(figure: Figure) -> str:
    # The SVG's own XML head and DOCTYPE name an address, and this file must need none.
    svg = re.sub(r"^.*?(?=<svg)", "", figure.svg, count=1, flags=re.DOTALL)
    # Two plots define the same ids (clip paths, glyphs); in one file they must differ.
    svg = re.sub(r'\b(id="|xlink:href="#|href="#|url\(#)', rf"\g<1>{figure.name}-", svg)
    label = f'role="img" aria-label="{escape(figure.alternative)}"'
    svg = svg.replace("<svg ", f"<svg {label} ", 1)
    badge = f'<span class="kind {figure.kind}">{figure.kind}</span>'
    return f"<figure>{svg}<figcaption>{escape(figure.caption)} {badge}</figcaption></figure>"
