"""What the classifier gives: events while it works, and the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from gptjet.service.apps.sentiment.answer import Highlight


class TextError(ValueError):
    """A text cannot be classified; the message names the field and the limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentimentResult:
    """The answer for one text.

    label             a label's name, or "uncertain", with `uncertain_reason`
    scored_label      the most probable label, also where `label` is "uncertain"
    probabilities     of every label, 1 in sum; label name -> p
    explanation       the model's own words, "" where none was asked for or none came
    explained_label   the label that the explanation states, None where it states none
    num_parts         1, or into how many parts a long text was split
    explained_part    which of them the explanation is about, from 0
    pooling           how several parts became one answer, in words; None for one part
    highlights        words that the explanation names and the text has, with their place
    missing_words     words that it names and the text does not have
    ttft_ms           from the server, of the explanation; None without one
    tokens_per_second the same; None also for fewer than two tokens
    seed              what repeats the explanation
    """

    text: str
    label: str
    scored_label: str
    probabilities: dict[str, float]
    uncertain_reason: str | None
    explanation: str
    explained_label: str | None
    highlights: tuple[Highlight, ...]
    missing_words: tuple[str, ...]
    num_parts: int
    explained_part: int
    pooling: str | None
    ttft_ms: float | None
    tokens_per_second: float | None
    template: str
    template_version: str
    seed: int
    model: str

    def as_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Scored:
    """The labels are scored. `label` may still become "uncertain" by what the explanation says."""

    label: str
    probabilities: dict[str, float]
    uncertain_reason: str | None = None
    num_parts: int = 1


@dataclass(frozen=True, slots=True)
class ExplanationDelta:
    """What a step added to the explanation."""

    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event."""

    result: SentimentResult


Event: TypeAlias = Scored | ExplanationDelta | Finished
