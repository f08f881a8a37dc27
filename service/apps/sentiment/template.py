"""Prompts as data: a template file says what is asked, of which labels, and how answers look.

A template is a TOML file; `templates/` holds those that
ship, and a path names one of a user's own.
"""

from __future__ import annotations

import difflib
import re
import tomllib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

DEFAULT_TEMPLATE = "embedded"
UNCERTAIN = "uncertain"

_FOLDER = "templates"
_SLOT = re.compile(r"\{(\w+)\}")
_MARKER = re.compile(r"^([^\n{}:]{1,40}):", re.MULTILINE)
# Tokenizers of this family read such text as one token that no text of a user's may contain.
_SPECIAL_TOKEN = re.compile(r"<\|([^<>|]*)\|>")
# A character and the marks that combine with it (of the blocks that hold nothing else).
_LETTER = re.compile(
    "(?s:.)[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f\u3099\u309a]*"
)
_SHOWN_AS = {"Cc": " ", "Cf": ""}
_MAX_LABELS = 64  # the candidates that one Score call takes


class TemplateError(ValueError):
    """A template cannot be used; the message names the file and the key."""


@dataclass(frozen=True, slots=True)
class Label:
    """One answer: its name for people, its words for the model, how an explanation states it."""

    name: str
    continuation: str
    states: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example of a few-shot prompt. `label` is a label's name."""

    text: str
    label: str
    explanation: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """One prompt, its labels and its answers. The keys of the file are these fields.

    prompt            with {text} once, and {examples} where there are any; labels are scored after
    labels            2 to 64
    example           one example in `prompt`: {text}, {label}
    explain_prompt    what the explanation is generated after; `prompt` where it is empty
    explain_example   one example in `explain_prompt`: {text}, {explanation}, {label}
    answer            the shape of what is generated: {explanation}, perhaps {label}; "" for none
    named_words       regular expression; group 1 is a list of words that an explanation names
    neutral_text      a text without content, for contextual calibration
    calibrate         whether the labels' log-probabilities after `neutral_text` are subtracted
    uncertain_margin  "uncertain" where the two best probabilities are closer than this, in [0, 1]
    max_text_tokens   a longer text is split, even where the context has room; None: the context
    """

    name: str
    version: str
    prompt: str
    labels: tuple[Label, ...]
    description: str = ""
    language: str = ""
    examples: tuple[Example, ...] = ()
    example: str = ""
    explain_prompt: str = ""
    explain_example: str = ""
    answer: str = ""
    named_words: str = ""
    neutral_text: str = "N/A"
    calibrate: bool = False
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 64
    temperature: float = 0.0
    uncertain_margin: float = 0.1
    max_text_tokens: int | None = None

    def __post_init__(self) -> None:
        _check(self)

    def render(self, text: str) -> str:
        """The prompt whose next words are a label; `text` is made safe first."""
        examples = "".join(
            _fill(self.example, text=e.text, label=e.label, explanation=e.explanation)
            for e in self.examples
        )
        return _fill(self.prompt, examples=examples, text=self.one_line(text))

    def render_explain(self, text: str) -> str:
        """The prompt whose next words are an answer; `text` is made safe first."""
        if not self.explain_prompt:
            return self.render(text)
        examples = "".join(
            _fill(self.explain_example, text=e.text, label=e.label, explanation=e.explanation)
            for e in self.examples
        )
        return _fill(self.explain_prompt, examples=examples, text=self.one_line(text))

    def one_line(self, text: str) -> str:
        """`text` as it stands in a prompt: one line that cannot pass for a part of the template.

        Line breaks and control characters become spaces, format characters, which nobody sees
        (category Cf), go; "Sentiment:" and the template's other line starts lose their colon, in
        whatever width or style of letter they are written (NFKC); special tokens of the tokenizer
        are taken apart.
        """
        shown = "".join(_SHOWN_AS.get(unicodedata.category(c), c) for c in text)
        shown = " ".join(shown.split())
        shown = _SPECIAL_TOKEN.sub(r"< \1 >", shown)
        return self._without_markers(shown)

    def label_named(self, words: str) -> str | None:
        """The name of the label that `words` begin with, the longest one; None if there is none."""
        folded = words.strip().casefold()
        found = [
            (len(spelling), label.name)
            for label in self.labels
            for spelling in (label.continuation.strip().casefold(), label.name.casefold())
            if re.match(rf"{re.escape(spelling)}(?!\w)", folded)
        ]
        return max(found, key=lambda pair: pair[0])[1] if found else None

    def _without_markers(self, text: str) -> str:
        """`text` with " -" for the colon of each marker; all else is left as it was written."""
        if self._markers is None:
            return text
        folded, places = _folded(text)
        pieces: list[str] = []
        start = 0
        for match in self._markers.finditer(folded):
            pieces += [text[start : places[match.end(1)]], " -"]
            start = places[match.end()]
        return "".join([*pieces, text[start:]])

    @cached_property
    def _markers(self) -> re.Pattern[str] | None:
        parts = (self.prompt, self.example, self.explain_prompt, self.explain_example, self.answer)
        starts = {start.strip() for part in parts for start in _MARKER.findall(part)}
        # "### Response" is one without its signs, too: a model takes the one for the other.
        names = starts | {re.sub(r"^\W+", "", start) for start in starts}
        names.discard("")
        if not names:
            return None
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        spaced = (
            r"\s+".join(map(re.escape, unicodedata.normalize("NFKC", name).split()))
            for name in longest_first
        )
        return re.compile(rf"(?<!\w)({'|'.join(spaced)})\s*:", re.IGNORECASE)


def _folded(text: str) -> tuple[str, list[int]]:
    """`text` in NFKC, and for each of its characters, and its end, where that begins in `text`.

    A letter is folded with the marks that combine with it, so that "e" and an accent are one.
    """
    folded: list[str] = []
    places: list[int] = []
    for match in _LETTER.finditer(text):
        letter = unicodedata.normalize("NFKC", match[0])
        folded.append(letter)
        places += [match.start()] * len(letter)
    return "".join(folded), [*places, len(text)]


def list_templates() -> tuple[str, ...]:
    """Names of the templates that ship, the default one first."""
    folder = resources.files(__package__) / _FOLDER
    names = sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name[-5:] == ".toml")
    return tuple(sorted(names, key=lambda name: name != DEFAULT_TEMPLATE))


def load_template(name_or_path: str | Path = DEFAULT_TEMPLATE) -> PromptTemplate:
    """A template that ships, by its name, or one of a user's own, by its path.

    Raises TemplateError naming the key that is wrong.
    """
    wanted = str(name_or_path)
    if isinstance(name_or_path, Path) or wanted.endswith(".toml") or "/" in wanted:
        path = Path(name_or_path)
        try:
            return parse_template(path.read_bytes(), str(path))
        except OSError as error:
            raise TemplateError(f"{path}: {error.strerror}") from None
    known = list_templates()
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise TemplateError(f"no template is named {wanted!r}: {hint}; a file's name ends in .toml")
    file = resources.files(__package__) / _FOLDER / f"{wanted}.toml"
    return parse_template(file.read_bytes(), wanted)


def parse_template(content: bytes, source: str) -> PromptTemplate:
    """The template in a TOML file's bytes. Raises TemplateError; `source` is named in it."""
    try:
        table = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TemplateError(f"{source}: not a TOML file in UTF-8: {error}") from None
    try:
        values = _values(table, PromptTemplate, "")
        values["labels"] = tuple(
            Label(**_values(entry, Label, f"labels[{index}]."))
            for index, entry in enumerate(_tables(table, "labels"))
        )
        values["examples"] = tuple(
            Example(**_values(entry, Example, f"examples[{index}]."))
            for index, entry in enumerate(_tables(table, "examples"))
        )
        return PromptTemplate(**values)
    except TemplateError as error:
        raise TemplateError(f"{source}: {error}") from None


_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "text"),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "int | None": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "tuple[str, ...]": ((list,), "a list of texts"),
}


def _values(table: Mapping[str, Any], kind: type[Any], prefix: str) -> dict[str, Any]:
    """The table's plain values as the fields of `kind`. Raises TemplateError."""
    known = {field.name: field for field in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known)
            hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
            raise TemplateError(f"{prefix}{key}: there is no such key{hint}")
        if str(known[key].type) not in _KINDS:
            continue
        types, words = _KINDS[str(known[key].type)]
        wrong_bool = isinstance(value, bool) and bool not in types
        if not isinstance(value, types) or wrong_bool:
            raise TemplateError(f"{prefix}{key}: must be {words}, got {value!r}")
        if isinstance(value, list):
            if not all(isinstance(item, str) for item in value):
                raise TemplateError(f"{prefix}{key}: must be {words}, got {value!r}")
            value = tuple(value)
        values[key] = value
    for name, field in known.items():
        required = field.default is field.default_factory  # both MISSING
        if required and name not in table:
            raise TemplateError(f"{prefix}{name}: is missing")
    return values


def _tables(table: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise TemplateError(f"{key}: must be a list of tables, [[{key}]]")
    return entries


def _check(template: PromptTemplate) -> None:
    """Raises TemplateError for the first key that is out of its limits."""
    slots = {
        "prompt": {"text"} | ({"examples"} if template.examples else set()),
        "explain_prompt": {"text"} | ({"examples"} if template.examples else set()),
        "example": {"text", "label"},
        "explain_example": {"text", "label", "explanation"},
        "answer": {"label", "explanation"},
    }
    for key, allowed in slots.items():
        value = getattr(template, key)
        found = _SLOT.findall(value)
        for slot in found:
            if slot not in allowed:
                raise TemplateError(
                    f"{key}: has no slot {{{slot}}}; its slots are {_braced(allowed)}"
                )
            if found.count(slot) > 1:
                raise TemplateError(f"{key}: has {{{slot}}} more than once")
        must = {"answer": {"explanation"}}.get(key, allowed)
        if (value or key == "prompt") and not must <= set(found):
            raise TemplateError(f"{key}: must have {_braced(must - set(found))}")
    names = [label.name for label in template.labels]
    if not 2 <= len(names) <= _MAX_LABELS:
        raise TemplateError(f"labels: must be 2 to {_MAX_LABELS}, got {len(names)}")
    for index, label in enumerate(template.labels):
        if not label.name.strip() or label.name == UNCERTAIN or names.count(label.name) > 1:
            raise TemplateError(
                f"labels[{index}].name: must be a name of its own, not {UNCERTAIN!r}, "
                f"got {label.name!r}"
            )
        if not label.continuation.strip():
            raise TemplateError(f"labels[{index}].continuation: must not be empty")
        for pattern in label.states:
            _check_pattern(f"labels[{index}].states", pattern, groups=0)
    for index, example in enumerate(template.examples):
        if example.label not in names:
            raise TemplateError(
                f"examples[{index}].label: must be one of {', '.join(names)}, got {example.label!r}"
            )
    if template.examples and not template.example:
        raise TemplateError("example: is missing; it says how [[examples]] stand in the prompt")
    if template.explain_prompt and template.examples and not template.explain_example:
        raise TemplateError("explain_example: is missing; explain_prompt has {examples}")
    if template.named_words:
        _check_pattern("named_words", template.named_words, groups=1)
    _check_number(template, "max_new_tokens", 1, 100_000)
    _check_number(template, "temperature", 0, 10)
    _check_number(template, "uncertain_margin", 0, 1)
    if template.max_text_tokens is not None:
        _check_number(template, "max_text_tokens", 8, 1_000_000)
    if any(not stop for stop in template.stop):
        raise TemplateError("stop: must not hold an empty text")
    if not template.neutral_text.strip() and template.calibrate:
        raise TemplateError("neutral_text: must not be empty where calibrate is true")


def _check_pattern(key: str, pattern: str, *, groups: int) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TemplateError(f"{key}: not a regular expression: {error}: {pattern!r}") from None
    if compiled.groups < groups:
        raise TemplateError(f"{key}: must have a group ( ) around the words, got {pattern!r}")


def _check_number(template: PromptTemplate, key: str, low: float, high: float) -> None:
    value = getattr(template, key)
    if not low <= value <= high:
        raise TemplateError(f"{key}: must be {low} to {high}, got {value}")


def _fill(pattern: str, **slots: str) -> str:
    # Not str.format: a text may have braces, and is put in untouched.
    return _SLOT.sub(lambda match: slots[match[1]], pattern)


def _braced(slots: set[str]) -> str:
    return ", ".join(f"{{{slot}}}" for slot in sorted(slots))
