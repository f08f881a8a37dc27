"""The policy file: what may stand in it, with bounds, and errors that name the rule and the key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gptjet.service.governance.patterns import MOST_WINDOW

Direction = Literal["input", "output"]
Action = Literal["block", "redact", "flag"]
DIRECTIONS: tuple[Direction, ...] = ("input", "output")

_MOST_FILE_BYTES = 64 * 1024 * 1024
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class PolicyError(Exception):
    """The policy file is not usable; one line a problem, each naming its rule and key."""


class RuleSettings(BaseModel):
    """One `[[rules]]` of the file. It has one kind: patterns, personal data, length or language."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=_NAME)
    on: tuple[Direction, ...] = Field(default=DIRECTIONS, min_length=1)
    action: Action
    # Never empty: what stood before and behind would be joined to something new.
    replacement: str | None = Field(default=None, min_length=1, max_length=64)

    phrases: tuple[str, ...] = ()
    phrases_file: Path | None = None
    regexes: tuple[str, ...] = ()
    window: int | None = Field(default=None, ge=1, le=MOST_WINDOW)
    fold: bool = True
    whole_words: bool = False

    personal_data: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()

    max_characters: int | None = Field(default=None, ge=1, le=2**31)

    languages: tuple[str, ...] = ()
    min_characters: int = Field(default=40, ge=1, le=4096)
    min_probability: float = Field(default=0.8, ge=0.0, le=1.0)

    @field_validator("on")
    @classmethod
    def _each_once(cls, value: tuple[Direction, ...]) -> tuple[Direction, ...]:
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = {
            "phrases, phrases_file or regexes": self.has_patterns,
            "personal_data": bool(self.personal_data),
            "max_characters": self.max_characters is not None,
            "languages": bool(self.languages),
        }
        kinds = [name for name, there in given.items() if there]
        if len(kinds) != 1:
            raise ValueError(
                f"a rule has one of {'; '.join(given)}; this one has "
                f"{' and '.join(kinds) or 'none'}"
            )
        if self.regexes and self.window is None:
            raise ValueError("regexes need a window: the most characters that one may match")
        if self.action == "redact" and not (self.has_patterns or self.personal_data):
            raise ValueError("a rule on length or language can block or flag, not redact")
        if self.replacement is not None and self.action != "redact":
            raise ValueError("replacement is for action = 'redact'")
        self._refuse_unused()
        return self

    @property
    def has_patterns(self) -> bool:
        """It is a list of phrases and regular expressions."""
        return bool(self.phrases or self.phrases_file or self.regexes)

    def _refuse_unused(self) -> None:
        """A key that another kind of rule has would be silently without effect."""
        patterns = {"window", "fold", "whole_words"}
        unused = set() if self.has_patterns else patterns & self.model_fields_set
        if self.has_patterns and not self.regexes:
            unused |= {"window"} & self.model_fields_set
        if not self.personal_data:
            unused |= {"regions"} & self.model_fields_set
        if not self.languages:
            unused |= {"min_characters", "min_probability"} & self.model_fields_set
        if unused:
            raise ValueError(f"{', '.join(sorted(unused))}: without effect in a rule of this kind")


class ReviewSettings(BaseModel):
    """`[review]`: what becomes of a match that somebody has decided on before."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    # A text that a flag rule found and a reviewer rejected is blocked from then on.
    block_rejected: bool = False


class PolicySettings(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    version: Literal[1]
    review: ReviewSettings = ReviewSettings()
    rules: tuple[RuleSettings, ...] = Field(min_length=1, max_length=1000)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [rule.name for rule in self.rules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"rules: two have the name {', '.join(twice)}")
        return self


def read_settings(path: Path) -> PolicySettings:
    """Read and check the file itself; raises PolicyError."""
    try:
        content = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise PolicyError(f"{path}: not valid TOML: {error}") from error
    try:
        return PolicySettings(**content)
    except ValidationError as error:
        raise PolicyError("\n".join(_describe(path, content, error))) from error
    except TypeError as error:  # a key of the file that is no string cannot be: TOML has none
        raise PolicyError(f"{path}: {error}") from error


def read_text(path: Path) -> str:
    """A file of the policy; raises PolicyError."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_FILE_BYTES + 1)
        if len(content) > _MOST_FILE_BYTES:
            raise PolicyError(f"{path}: must be at most {_MOST_FILE_BYTES} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise PolicyError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise PolicyError(f"{path}: not UTF-8: {error}") from error


def read_phrases(path: Path) -> tuple[str, ...]:
    """One phrase a line; empty lines and those that begin with # are left out."""
    lines = (line.strip() for line in read_text(path).splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _describe(path: Path, content: dict[str, object], error: ValidationError) -> list[str]:
    lines = []
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        rules = content.get("rules")
        if len(where) > 1 and where[0] == "rules" and isinstance(rules, list):
            rule = rules[int(where[1])]
            name = rule.get("name") if isinstance(rule, dict) else None
            where[:2] = [f"rule {name!r}" if isinstance(name, str) else f"rule {int(where[1]) + 1}"]
        message = problem["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
        lines.append(": ".join([str(path), *where, message]))
    return lines
