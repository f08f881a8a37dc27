"""All patterns of a text at once, character by character, with what may still become a match.

A deterministic automaton made lazily from the graph (Aho, Sethi, Ullman 1986, 3.7.4): a state is a
set of the graph's states for each place of the text where a match may have begun, a step that was
taken before is one look-up. Where two beginnings are in the same state of the graph, only the
earlier one is kept: whatever the later one will match, it will match too, and more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from gptjet.service.governance.folding import EXACT, FOLDED, SPACE, is_word
from gptjet.service.governance.patterns import ALWAYS, AT_BOUNDARY, Graph

# Past these the steps are worked out anew: a text of ever new characters takes no more memory.
_MOST_STATES = 4_096
_MOST_STEPS = 131_072


class Found(NamedTuple):
    """A match: text[start:end] by the pattern of `owner`, certain once `seen` characters were."""

    owner: int
    start: int
    end: int
    seen: int


class _Step(NamedTuple):
    """Where a character leads. `kept`: which beginnings go on; `done`: (owner, beginning)."""

    state: _State
    kept: tuple[int, ...]
    begins: bool
    done: tuple[tuple[int, int], ...]


class _State:
    """One state; `steps` is filled as characters come."""

    __slots__ = ("after_word", "groups", "steps")

    def __init__(self, groups: tuple[frozenset[int], ...], after_word: bool) -> None:
        self.groups = groups
        self.after_word = after_word
        self.steps: dict[str, _Step] = {}

    @property
    def key(self) -> tuple[tuple[frozenset[int], ...], bool]:
        """Two states are the same where this is."""
        return self.groups, self.after_word


_Closure = tuple[tuple[int, ...], tuple[int, ...]]


class Automaton:
    """The steps of a graph, shared by every text that is matched; safe to use from threads."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.table = FOLDED if graph.folded else EXACT
        self.folded = graph.folded
        self._states: dict[tuple[tuple[frozenset[int], ...], bool], _State] = {}
        self._closures: dict[tuple[int, bool], _Closure] = {}
        self._num_steps = 0
        self.start = self._state((), False)

    def step(self, state: _State, character: str) -> _Step:
        """Work out the step and keep it in `state.steps`."""
        next_is_word = is_word(character)
        boundary = state.after_word != next_is_word
        done = self._done(state.groups, boundary)
        seen: set[int] = set()
        groups: list[frozenset[int]] = []
        kept: list[int] = []
        for index, group in enumerate((*state.groups, frozenset((0,)))):
            reached = self._move(group, boundary, character) - seen
            if reached:
                seen |= reached
                groups.append(frozenset(reached))
                kept.append(index)
        begins = bool(kept) and kept[-1] == len(state.groups)
        if begins:
            kept.pop()
        if self._num_steps >= _MOST_STEPS:
            self._forget()
        self._num_steps += 1
        step = _Step(self._state(tuple(groups), next_is_word), tuple(kept), begins, done)
        state.steps[character] = step
        return step

    def finish(self, state: _State) -> tuple[tuple[int, int], ...]:
        """(owner, beginning) of what is complete where the text ends."""
        return self._done(state.groups, state.after_word)

    def _state(self, groups: tuple[frozenset[int], ...], after_word: bool) -> _State:
        key = (groups, after_word)
        state = self._states.get(key)
        if state is None:
            if len(self._states) >= _MOST_STATES:
                self._forget()
            state = self._states[key] = _State(groups, after_word)
        return state

    def _forget(self) -> None:
        """States in use live on until their texts leave them, with no way to new ones."""
        for old in list(self._states.values()):
            old.steps = {}
        self._states = {self.start.key: self.start}
        self._num_steps = 0

    def _done(
        self, groups: Sequence[frozenset[int]], boundary: bool
    ) -> tuple[tuple[int, int], ...]:
        first: dict[int, int] = {}
        for index, group in enumerate(groups):
            for reached in group:
                for owner in self._closure(reached, boundary)[1]:
                    first.setdefault(owner, index)
        return tuple(sorted(first.items()))

    def _move(self, group: frozenset[int], boundary: bool, character: str) -> set[int]:
        graph = self._graph
        reached: set[int] = set()
        for source in group:
            for state in self._closure(source, boundary)[0]:
                reached.update(graph.literal[state].get(character, ()))
                reached.update(end for test, end in graph.classes[state] if test(character))
        return reached

    def _closure(self, source: int, boundary: bool) -> _Closure:
        """States with an edge, and owners that are complete, without reading a character."""
        key = (source, boundary)
        known = self._closures.get(key)
        if known is not None:
            return known
        graph, stack, seen = self._graph, [source], {source}
        owners: set[int] = set()
        while stack:
            state = stack.pop()
            owners.update(graph.accepts[state])
            for condition, target in graph.empty[state]:
                allowed = condition == ALWAYS or (condition == AT_BOUNDARY) == boundary
                if allowed and target not in seen:
                    seen.add(target)
                    stack.append(target)
        states = tuple(s for s in sorted(seen) if graph.literal[s] or graph.classes[s])
        closure = self._closures[key] = (states, tuple(sorted(owners)))
        return closure


class PatternMatcher:
    """The matches in one text that arrives in pieces.

    A match is any part of the text that a pattern fits, wherever it begins; of several that end
    together the earliest beginning is found. It is certain with the next character, which says
    whether a word goes on; characters that are ignored (folding) and follow a match belong to it.
    """

    __slots__ = ("_after_space", "_automaton", "_position", "_starts", "_state")

    def __init__(self, automaton: Automaton, position: int = 0) -> None:
        self._automaton = automaton
        self._state = automaton.start
        self._starts: tuple[int, ...] = ()
        self._position = position
        self._after_space = False

    @property
    def hold(self) -> int:
        """Where the text begins that a match may still cover."""
        return self._starts[0] if self._starts else self._position

    def push(self, text: str) -> list[Found]:
        """Take the next piece; what became certain, in the order it did."""
        found: list[Found] = []
        automaton, table, folded = self._automaton, self._automaton.table, self._automaton.folded
        state, starts, after_space = self._state, self._starts, self._after_space
        position = self._position
        for character in text:
            end = position
            for part in table[character]:
                if folded:
                    if part == SPACE:
                        if after_space:
                            continue
                        after_space = True
                    else:
                        after_space = False
                step = state.steps.get(part) or automaton.step(state, part)
                state = step.state
                for owner, index in step.done:
                    found.append(Found(owner, starts[index], end, position + 1))
                if step.begins:
                    starts = (*(starts[index] for index in step.kept), position)
                elif starts:
                    starts = tuple(starts[index] for index in step.kept)
                # A match that ends with another part of this character covers the whole of it.
                end = position + 1
            position += 1
        self._state, self._starts, self._after_space = state, starts, after_space
        self._position = position
        return found

    def finish(self) -> list[Found]:
        """The text has ended: what is complete now."""
        done = self._automaton.finish(self._state)
        end = self._position
        found = [Found(owner, self._starts[index], end, end) for owner, index in done]
        self._starts = ()
        return found

    def copy(self) -> PatternMatcher:
        """The same place of the same text, to go on from twice."""
        twin = PatternMatcher(self._automaton)
        twin._state, twin._starts = self._state, self._starts
        twin._position, twin._after_space = self._position, self._after_space
        return twin
