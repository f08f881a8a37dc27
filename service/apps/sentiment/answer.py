"""Reads a generated answer while it comes: its explanation, and the label and words in that."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gptjet.service.apps.sentiment.template import PromptTemplate

_SLOT = re.compile(r"\{(label|explanation)\}")


@dataclass(frozen=True, slots=True)
class Answer:
    """What of an answer is there. `label` is a label's name, None where none is stated."""

    explanation: str
    label: str | None


@dataclass(frozen=True, slots=True)
class Highlight:
    """Words that an explanation names and the text has: `text[start:end]`, in characters."""

    words: str
    start: int
    end: int


def read_answer(template: PromptTemplate, generated: str, *, ended: bool = True) -> Answer:
    """The parts of `generated`, by the template's `answer`.

    While it has not `ended`, what could still turn out to be the start of what follows the
    explanation is held back: an explanation only ever grows.
    """
    slots = _slots(template.answer, generated, ended)
    explanation = slots.get("explanation", "").strip()
    stated = _stated(template, explanation)
    return Answer(explanation, stated or template.label_named(slots.get("label", "")))


def _slots(shape: str, generated: str, ended: bool) -> dict[str, str]:
    """What stands in each slot. Literal parts count without the spaces around them."""
    pieces = _SLOT.split(shape)  # literal, slot, literal, slot, ..., literal
    found: dict[str, str] = {}
    position = 0
    first = pieces[0].strip()
    if first and generated.lstrip().startswith(first):
        position = generated.index(first) + len(first)
    for index in range(1, len(pieces), 2):
        literal = pieces[index + 1].rstrip(" ")
        if not literal:
            found[pieces[index]] = generated[position:]
            break
        end = generated.find(literal, position)
        if end < 0:
            rest = generated[position:]
            held = 0 if ended else _overlap(rest, literal)
            found[pieces[index]] = rest[: len(rest) - held]
            break
        found[pieces[index]] = generated[position:end]
        position = end + len(literal)
    return found


def _overlap(text: str, literal: str) -> int:
    """How many characters at the end of `text` are a beginning of `literal`."""
    longest = min(len(text), len(literal))
    return next((n for n in range(longest, 0, -1) if literal.startswith(text[-n:])), 0)


def _stated(template: PromptTemplate, explanation: str) -> str | None:
    """The label that the explanation's own words state: the last such statement, the longest."""
    best: tuple[int, int] | None = None
    name: str | None = None
    for label in template.labels:
        for pattern in label.states:
            for match in re.finditer(pattern, explanation):
                rank = (match.end(), -match.start())
                if best is None or rank > best:
                    best, name = rank, label.name
    return name


def named_words(template: PromptTemplate, explanation: str) -> tuple[str, ...]:
    """The words that an explanation names, in its order, each once."""
    if not template.named_words:
        return ()
    listed = [match[1] for match in re.finditer(template.named_words, explanation)]
    words = [word for part in listed for word in re.split(r", | and ", part) if word.strip()]
    return tuple(dict.fromkeys(words))


def check_named(
    template: PromptTemplate, explanation: str, text: str
) -> tuple[tuple[Highlight, ...], tuple[str, ...]]:
    """(words of the explanation with their place in `text`, words that are not in it).

    Whole words, whatever their case and the spaces between them. Models name words that a text
    does not have; those must not be quoted as if it had.
    """
    highlights: list[Highlight] = []
    missing: list[str] = []
    for words in named_words(template, explanation):
        pattern = r"\s+".join(map(re.escape, words.split()))
        match = re.search(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)
        if match is None:
            missing.append(words)
        else:
            highlights.append(Highlight(match[0], match.start(), match.end()))
    return tuple(highlights), tuple(missing)
