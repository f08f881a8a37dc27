"""A policy, ready to be applied: its rules by direction, and the matchers they share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from gptjet.service.governance.automaton import Automaton, Found, PatternMatcher
from gptjet.service.governance.language import LanguageMatcher, LengthMatcher, known_languages
from gptjet.service.governance.libraries import MissingLibraryError
from gptjet.service.governance.patterns import Graph, PatternError
from gptjet.service.governance.personal_data import Finder, PersonalDataMatcher, make_finders
from gptjet.service.governance.policy_file import (
    DIRECTIONS,
    Action,
    Direction,
    PolicyError,
    PolicySettings,
    RuleSettings,
    read_phrases,
    read_settings,
)

# What a replaced text leaves to the reader.
_REPLACEMENT = "[{name}]"


class Matcher(Protocol):
    """Finds what some rules look for in one text that arrives in pieces; see automaton.Found."""

    @property
    def hold(self) -> int:
        """Where the text begins of which something is still to be found."""
        ...

    def push(self, text: str) -> list[Found]:
        """Take the next piece."""
        ...

    def finish(self) -> list[Found]:
        """The text has ended."""
        ...

    def copy(self) -> Self:
        """The same place of the same text."""
        ...


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. `context` says that it reads on from a text before: a prompt before an output."""

    name: str
    kind: str
    action: Action
    replacement: str
    directions: tuple[Direction, ...]
    context: bool


class Chain:
    """The rules of one direction.

    enforces  some rule may block or redact, so that text is held back until it is certain
    context   how many characters before a text can matter to it
    """

    def __init__(self, policy: PolicySettings, compiled: Sequence[_Compiled], whole: bool) -> None:
        self.rules = tuple(part.rule for part in compiled)
        self.block_rejected = policy.review.block_rejected
        self._whole = whole
        enforcing = [self._enforces(part.rule) for part in compiled]
        self.enforces = any(enforcing)
        self.may_block = self.block_rejected or any(r.action == "block" for r in self.rules)
        self._automata: list[tuple[Automaton, bool]] = []
        self._finders: dict[bool, list[tuple[int, list[Finder]]]] = {}
        self._others: list[tuple[int, RuleSettings]] = []
        self.context = 0
        graphs: dict[tuple[bool, bool], Graph] = {}
        for owner, part in enumerate(compiled):
            settings = part.settings
            if settings.has_patterns:
                key = (settings.fold, enforcing[owner])
                graph = graphs.setdefault(key, Graph(folded=settings.fold))
                self.context = max(self.context, part.add_to(graph, owner))
            elif settings.personal_data:
                self._finders.setdefault(enforcing[owner], []).append((owner, part.finders))
                self.context = max(self.context, _PERSONAL_DATA_CONTEXT)
            else:
                self._others.append((owner, settings))
        self._automata = [(Automaton(graph), key[1]) for key, graph in graphs.items()]
        self._verdicts: dict[str, bool] = {}

    def matchers(
        self, context: int, *, patterns_only: bool = False
    ) -> tuple[list[tuple[Matcher, bool]], list[tuple[Matcher, bool]]]:
        """New matchers: those that read `context` characters before the text first, and the others.

        With each goes whether text is to be held back for it.
        """
        reading: list[tuple[Matcher, bool]] = [
            (PatternMatcher(automaton, -context), holds) for automaton, holds in self._automata
        ]
        if patterns_only:
            return reading, []
        reading += [
            (PersonalDataMatcher(finders, -context), holds)
            for holds, finders in self._finders.items()
        ]
        others: list[tuple[Matcher, bool]] = []
        for owner, settings in self._others:
            if settings.max_characters is not None:
                others.append((LengthMatcher(owner, settings.max_characters), False))
                continue
            holds = self._enforces(self.rules[owner])
            matcher = LanguageMatcher(
                owner,
                frozenset(settings.languages),
                settings.min_characters,
                settings.min_probability,
                whole=self._whole or not holds,
            )
            others.append((matcher, holds))
        return reading, others

    def forbids(self, text: str) -> bool:
        """Whether a text by itself, such as a token's, has something to block or redact."""
        known = self._verdicts.get(text)
        if known is None:
            if len(self._verdicts) >= _MOST_VERDICTS:
                self._verdicts.clear()
            reading = [matcher for matcher, holds in self.matchers(0)[0] if holds]
            known = any(m.push(text) or m.finish() for m in reading)
            self._verdicts[text] = known
        return known

    def _enforces(self, rule: Rule) -> bool:
        return rule.action != "flag" or (self.block_rejected and rule.context)


# Each vocabulary has some ten thousand tokens.
_MOST_VERDICTS = 65_536
_PERSONAL_DATA_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy file that was read and found usable. `digest` tells two versions of it apart."""

    path: Path
    digest: str
    settings: PolicySettings
    chains: dict[Direction, Chain]
    files: tuple[Path, ...]

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules in the order of the file."""
        return tuple(_rule(settings) for settings in self.settings.rules)


def load_policy(path: Path) -> Policy:
    """Read and compile a policy file; raises PolicyError with one line a problem."""
    settings = read_settings(path)
    problems: list[str] = []
    compiled: list[_Compiled] = []
    files = [path]
    for rule in settings.rules:
        try:
            compiled.append(_Compiled(rule, path.parent))
        except (PatternError, MissingLibraryError, ValueError) as error:
            problems.append(f"{path}: rule {rule.name!r}: {error}")
        except PolicyError as error:
            problems.append(f"{path}: rule {rule.name!r}: phrases_file: {error}")
        if rule.phrases_file is not None:
            files.append(path.parent / rule.phrases_file)
    if problems:
        raise PolicyError("\n".join(problems))
    chains: dict[Direction, Chain] = {}
    for direction in DIRECTIONS:
        chosen = [part for part in compiled if direction in part.rule.directions]
        try:
            chains[direction] = Chain(settings, chosen, whole=direction == "input")
        except PatternError as error:
            raise PolicyError(f"{path}: {error}") from error
    _refuse_replacements(path, chains)
    digest = hashlib.sha256(settings.model_dump_json().encode())
    for part in compiled:
        digest.update("\n".join(part.phrases).encode(errors="surrogatepass"))
    return Policy(path, digest.hexdigest()[:16], settings, chains, tuple(files))


def _refuse_replacements(path: Path, chains: dict[Direction, Chain]) -> None:
    """What is put in the place of a text must not be what a rule takes out."""
    problems = {
        f"{path}: rule {rule.name!r}: replacement {rule.replacement!r} is what a rule blocks or "
        f"redacts in the {direction}"
        for direction, chain in chains.items()
        for rule in chain.rules
        if rule.action == "redact" and chain.forbids(rule.replacement)
    }
    if problems:
        raise PolicyError("\n".join(sorted(problems)))


class _Compiled:
    """One rule of the file, checked by itself."""

    def __init__(self, settings: RuleSettings, folder: Path) -> None:
        self.settings = settings
        self.rule = _rule(settings)
        self.finders: list[Finder] = []
        self.phrases = settings.phrases
        if settings.phrases_file is not None:
            self.phrases += read_phrases(folder / settings.phrases_file)
            if not self.phrases:
                raise ValueError(f"phrases_file: {settings.phrases_file} has no phrase")
        if settings.has_patterns:
            self.add_to(Graph(folded=settings.fold), 0)
        if settings.personal_data:
            self.finders = make_finders(settings.personal_data, settings.regions)
        if settings.languages:
            unknown = sorted(set(settings.languages) - known_languages())
            if unknown:
                raise ValueError(f"languages: {', '.join(unknown)}: cannot be told apart")

    def add_to(self, graph: Graph, owner: int) -> int:
        """Add the rule's patterns; returns the length of the longest match."""
        longest = 0
        for phrase in self.phrases:
            length = graph.add_phrase(phrase, owner, whole_words=self.settings.whole_words)
            longest = max(longest, length)
        for expression in self.settings.regexes:
            window = self.settings.window
            assert window is not None
            longest = max(longest, graph.add_expression(expression, owner, window))
        return longest


def _rule(settings: RuleSettings) -> Rule:
    kind = "patterns"
    if settings.personal_data:
        kind = "personal data"
    elif settings.max_characters is not None:
        kind = "length"
    elif settings.languages:
        kind = "language"
    replacement = settings.replacement
    if replacement is None:
        replacement = _REPLACEMENT.format(name=settings.name)
    return Rule(
        name=settings.name,
        kind=kind,
        action=settings.action,
        replacement=replacement,
        directions=settings.on,
        context=kind in ("patterns", "personal data"),
    )
