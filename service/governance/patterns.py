"""Phrases and regular expressions as one automaton's graph (Thompson 1968).

Python's own parser reads the expression; what it finds becomes states with edges, so that matching
takes a number of steps that the text cannot drive up: there is no backtracking. Left out is what a
stream cannot decide within a bound: look-arounds, back-references, anchors, repetition without an
upper limit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from gptjet.service.governance.folding import FOLDED, fold, is_word

MOST_STATES = 200_000
MOST_STATES_OF_ONE_EXPRESSION = 5_000
MOST_WINDOW = 1_024

# When an edge without a character may be taken.
ALWAYS, AT_BOUNDARY, INSIDE = 0, 1, 2

# The tree of `re` has no public name; tests/service/governance compares it with re's own matches.
_parser: Any = importlib.import_module("re._parser")
_constants: Any = importlib.import_module("re._constants")
_IGNORECASE, _DOTALL, _ASCII = 2, 16, 256


_MOST_SHOWN = 80


class PatternError(ValueError):
    """A pattern that cannot be used; the message says which part and what would do instead."""


class Graph:
    """States of a nondeterministic automaton for many patterns; 0 is the start.

    literal[s]  character -> states that follow
    classes[s]  (test of a character, state that follows)
    empty[s]    (condition, state that follows without a character)
    accepts[s]  owners whose pattern is complete here

    `folded` says that it reads folded characters; patterns are folded as they are added.
    """

    def __init__(self, *, folded: bool) -> None:
        self.folded = folded
        self.literal: list[dict[str, list[int]]] = []
        self.classes: list[list[tuple[Callable[[str], bool], int]]] = []
        self.empty: list[list[tuple[int, int]]] = []
        self.accepts: list[list[int]] = []
        # After a state of a phrase, the one where a word has ended there, too.
        self._word_ends: dict[int, int] = {}
        start = self._new()
        # Phrases share their beginnings: one tree for those of whole words, one for the others.
        self._trees = {False: self._new(), True: self._new()}
        # A phrase that begins with no letter has no boundary of words before it.
        self._empty_edge(start, self._trees[False])
        self._empty_edge(start, self._trees[True], AT_BOUNDARY)

    def add_phrase(self, phrase: str, owner: int, *, whole_words: bool) -> int:
        """Add a literal text; returns its length in characters as they are matched."""
        text = fold(phrase).strip(" ") if self.folded else phrase
        if not text:
            raise PatternError(f"{_shown(phrase)} has no character that is looked at")
        state = self._trees[whole_words and is_word(text[0])]
        for character in text:
            following = self.literal[state].get(character)
            if following is None:
                following = self.literal[state][character] = [self._new()]
            state = following[0]
        if whole_words and is_word(text[-1]):
            if state not in self._word_ends:
                self._word_ends[state] = self._new()
                self._empty_edge(state, self._word_ends[state], AT_BOUNDARY)
            state = self._word_ends[state]
        if owner not in self.accepts[state]:
            self.accepts[state].append(owner)
        return len(text)

    def add_expression(self, expression: str, owner: int, window: int) -> int:
        """Add a regular expression; returns the longest match in characters, at most `window`."""
        try:
            tree = _parser.parse(expression)
        except Exception as error:
            raise PatternError(f"{_shown(expression)} is no regular expression: {error}") from error
        if tree.state.flags & _ASCII:
            raise PatternError(f"{_shown(expression)}: the flag (?a) is not known here")
        try:
            return self._add_tree(expression, tree, owner, window)
        except RecursionError as error:
            raise PatternError(f"{_shown(expression)} is nested too deeply") from error

    def _add_tree(self, expression: str, tree: Any, owner: int, window: int) -> int:
        shortest, longest = _Widths(expression, self.folded).of(tree)
        if shortest == 0:
            raise PatternError(f"{_shown(expression)} matches the empty text")
        if longest > window:
            raise PatternError(
                f"{_shown(expression)} can match {longest} characters, more than its window of "
                f"{window}"
            )
        builder = _Builder(self, expression, len(self.accepts) + MOST_STATES_OF_ONE_EXPRESSION)
        start = self._new()
        self._empty_edge(0, start)
        end = builder.add(tree, start, tree.state.flags)
        self.accepts[end].append(owner)
        return longest

    def _new(self) -> int:
        if len(self.accepts) >= MOST_STATES:
            raise PatternError(f"the patterns together need more than {MOST_STATES} states")
        self.literal.append({})
        self.classes.append([])
        self.empty.append([])
        self.accepts.append([])
        return len(self.accepts) - 1

    def _empty_edge(self, source: int, target: int, condition: int = ALWAYS) -> None:
        self.empty[source].append((condition, target))


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= _MOST_SHOWN else pattern[: _MOST_SHOWN - 1] + "…")


class _Builder:
    """Adds one expression's tree to a graph."""

    def __init__(self, graph: Graph, expression: str, most_states: int) -> None:
        self._graph = graph
        self._expression = expression
        self._most_states = most_states

    def add(self, tree: Any, state: int, flags: int) -> int:
        """Edges for a sequence of items from `state` on; returns the state after them."""
        for operation, argument in tree:
            state = self._add_item(str(operation), argument, state, flags)
        return state

    def _add_item(self, operation: str, argument: Any, state: int, flags: int) -> int:
        match operation:
            case "LITERAL":
                return self._add_literal(chr(argument), state, flags)
            case "NOT_LITERAL" | "IN" | "ANY":
                return self._add_class(_test_of(operation, argument, flags), state)
            case "BRANCH":
                end = self._new()
                for branch in argument[1]:
                    self._graph.empty[self.add(branch, state, flags)].append((ALWAYS, end))
                return end
            case "SUBPATTERN":
                _, added, removed, inner = argument
                return self.add(inner, state, (flags | added) & ~removed)
            case "MAX_REPEAT" | "MIN_REPEAT":
                low, high, inner = argument
                return self._add_repeat(low, high, inner, state, flags)
            case "AT":
                end = self._new()
                boundary = str(argument) == "AT_BOUNDARY"
                self._graph.empty[state].append((AT_BOUNDARY if boundary else INSIDE, end))
                return end
        raise AssertionError(f"{operation} was let through")

    def _add_literal(self, character: str, state: int, flags: int) -> int:
        if not self._graph.folded:
            if flags & _IGNORECASE:
                return self._add_class(_caseless(character), state)
            return self._literal_edge(character, state)
        for part in FOLDED[character]:
            state = self._literal_edge(part, state)
        return state

    def _add_repeat(self, low: int, high: int, inner: Any, state: int, flags: int) -> int:
        for _ in range(low):
            state = self.add(inner, state, flags)
        ends = [state]
        for _ in range(high - low):
            state = self.add(inner, state, flags)
            ends.append(state)
        end = self._new()
        for reached in ends:
            self._graph.empty[reached].append((ALWAYS, end))
        return end

    def _literal_edge(self, character: str, state: int) -> int:
        end = self._new()
        self._graph.literal[state].setdefault(character, []).append(end)
        return end

    def _add_class(self, test: Callable[[str], bool], state: int) -> int:
        end = self._new()
        folded = self._graph.folded
        self._graph.classes[state].append((_also_upper(test) if folded else test, end))
        return end

    def _new(self) -> int:
        if len(self._graph.accepts) >= self._most_states:
            raise PatternError(
                f"{_shown(self._expression)} needs more than {MOST_STATES_OF_ONE_EXPRESSION} "
                "states: make its repetitions smaller"
            )
        return self._graph._new()


class _Widths:
    """How short and how long the matches of a tree are; refuses what cannot be matched here."""

    def __init__(self, expression: str, folded: bool) -> None:
        self._expression = expression
        self._folded = folded

    def of(self, tree: Any) -> tuple[int, int]:
        """Shortest and longest match in characters; raises PatternError for what is left out."""
        shortest = longest = 0
        for operation, argument in tree:
            low, high = self._of_item(str(operation), argument)
            shortest, longest = shortest + low, longest + high
        return shortest, longest

    def _of_item(self, operation: str, argument: Any) -> tuple[int, int]:
        match operation:
            case "LITERAL":
                width = len(FOLDED[chr(argument)]) if self._folded else 1
                return width, width
            case "NOT_LITERAL" | "IN" | "ANY":
                return 1, 1
            case "BRANCH":
                widths = [self.of(branch) for branch in argument[1]]
                return min(low for low, _ in widths), max(high for _, high in widths)
            case "SUBPATTERN":
                return self.of(argument[3])
            case "MAX_REPEAT" | "MIN_REPEAT":
                return self._of_repeat(*argument)
            case "AT" if str(argument) in ("AT_BOUNDARY", "AT_NON_BOUNDARY"):
                return 0, 0
        left_out = _LEFT_OUT.get(operation, operation)
        raise PatternError(f"{_shown(self._expression)}: {left_out} cannot be matched in a stream")

    def _of_repeat(self, low: int, high: int, inner: Any) -> tuple[int, int]:
        if high is _constants.MAXREPEAT or high > MOST_WINDOW:
            raise PatternError(
                f"{_shown(self._expression)} repeats without a limit of at most {MOST_WINDOW}: "
                "write {1,40} instead of +, {0,40} instead of *"
            )
        shortest, longest = self.of(inner)
        if longest == 0:
            raise PatternError(f"{_shown(self._expression)} repeats what matches no character")
        return shortest * low, longest * high


_LEFT_OUT = {
    "AT": r"the anchors ^, $, \A and \Z",
    "ASSERT": "look-ahead and look-behind",
    "ASSERT_NOT": "look-ahead and look-behind",
    "GROUPREF": "back-references",
    "GROUPREF_EXISTS": "conditions on groups",
    "ATOMIC_GROUP": "atomic groups",
    "POSSESSIVE_REPEAT": "possessive repetition",
}

_Test = Callable[[str], bool]


def _test_of(operation: str, argument: Any, flags: int) -> _Test:
    if operation == "ANY":
        return _anything if flags & _DOTALL else _no_newline
    if operation == "NOT_LITERAL":
        items, negated = [("LITERAL", argument)], True
    else:
        items = [(str(name), value) for name, value in argument]
        negated = items[0][0] == "NEGATE"
        items = items[1:] if negated else items
    test = _any_of([_item_test(name, value) for name, value in items])
    if flags & _IGNORECASE:
        test = _any_case(test)
    return _not(test) if negated else test


def _item_test(name: str, value: Any) -> _Test:
    match name:
        case "LITERAL":
            literal = chr(value)
            return lambda character: character == literal
        case "RANGE":
            first, last = chr(value[0]), chr(value[1])
            return lambda character: first <= character <= last
        case "CATEGORY":
            return _CATEGORIES[str(value)]
    raise PatternError(f"{name} is not known in a class of characters")


def _any_of(tests: Iterable[_Test]) -> _Test:
    chosen = tuple(tests)
    return lambda character: any(test(character) for test in chosen)


def _not(test: _Test) -> _Test:
    negated = _Negated()
    negated.test = test
    return negated


class _Negated:
    """A class with ^; kept apart, since "also in upper case" means the opposite for it."""

    test: _Test

    def __call__(self, character: str) -> bool:
        return not self.test(character)


def _any_case(test: _Test) -> _Test:
    return lambda c: test(c) or test(c.lower()[:1]) or test(c.upper()[:1])


def _also_upper(test: _Test) -> _Test:
    """[A-Z] for a text whose letters are all small."""
    if isinstance(test, _Negated):
        return _not(_also_upper(test.test))
    return lambda c: test(c) or (len(c.upper()) == 1 and test(c.upper()))


def _caseless(character: str) -> _Test:
    wanted = character.casefold()
    return lambda c: c.casefold() == wanted


def _anything(_character: str) -> bool:
    return True


def _no_newline(character: str) -> bool:
    return character != "\n"


def _word(character: str) -> bool:
    return character.isalnum() or character == "_"


_CATEGORIES: dict[str, _Test] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_NOT_DIGIT": _not(str.isdecimal),
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_NOT_SPACE": _not(str.isspace),
    "CATEGORY_WORD": _word,
    "CATEGORY_NOT_WORD": _not(_word),
}
