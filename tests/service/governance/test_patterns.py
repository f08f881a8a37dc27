"""The automaton finds exactly what `re` finds, and refuses what a stream cannot decide."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjet.service.governance.automaton import Automaton, Found, PatternMatcher
from gptjet.service.governance.folding import fold
from gptjet.service.governance.patterns import Graph, PatternError

EXPRESSIONS = (
    "a",
    "ab{1,3}",
    "a(?:b|1a){0,3}b",
    r"\bab?\b",
    r"\Ba",
    r"\d{2,4}",
    r"[ab]{1,3}1",
    r"[^ab ]{1,2}",
    r"(a|ab)(1|b1)",
    r"\w{2}\s\w",
    r"\W[a-b]",
    r"(?i)A[B-C]",
    r"(?i:É)b|a",
    r"a.{0,3}?b",
    r"\b1|a_\b",
    "é1",
)
TEXTS = st.text("ab1_ éB\n", max_size=14)


def found_in(graph: Graph, text: str) -> set[tuple[int, int, int]]:
    matcher = PatternMatcher(Automaton(graph))
    found = [*matcher.push(text), *matcher.finish()]
    assert [item.seen for item in found] == sorted(item.seen for item in found)
    return {(item.owner, item.start, item.end) for item in found}


def earliest_by_re(expression: str, owner: int, text: str) -> set[tuple[int, int, int]]:
    """For each end the earliest beginning of a match, by trying every part of the text."""
    spans = set()
    for end in range(len(text) + 1):
        scoped = expression.replace("(?i)", "(?i:", 1) + ")" * expression.startswith("(?i)")
        whole = re.compile(f"(?:{scoped})(?=(?s:.{{{len(text) - end}}})\\Z)")
        for start in range(end):
            if whole.match(text, start):
                spans.add((owner, start, end))
                break
    return spans


@settings(max_examples=300, deadline=None)
@given(chosen=st.lists(st.sampled_from(EXPRESSIONS), min_size=1, max_size=4), text=TEXTS)
def test_every_match_of_re_is_found_and_nothing_else(chosen: list[str], text: str) -> None:
    graph = Graph(folded=False)
    expected: set[tuple[int, int, int]] = set()
    for owner, expression in enumerate(chosen):
        graph.add_expression(expression, owner, 64)
        expected |= earliest_by_re(expression, owner, text)
    assert covered(found_in(graph, text)) == covered(expected)


def covered(spans: set[tuple[int, int, int]]) -> dict[int, set[int]]:
    """The characters that each owner's matches cover; one that lies in another tells no more."""
    characters: dict[int, set[int]] = {}
    for owner, start, end in spans:
        characters.setdefault(owner, set()).update(range(start, end))
    return characters


@settings(max_examples=200, deadline=None)
@given(
    phrases=st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=5),
    text=TEXTS,
    whole_words=st.booleans(),
)
def test_phrases_are_found_like_their_escaped_expressions(
    phrases: list[str], text: str, whole_words: bool
) -> None:
    graph = Graph(folded=False)
    expected: set[tuple[int, int, int]] = set()
    for owner, phrase in enumerate(phrases):
        graph.add_phrase(phrase, owner, whole_words=whole_words)
        expression = re.escape(phrase)
        if whole_words:
            before = r"\b" if re.match(r"\w", phrase) else ""
            after = r"\b" if re.search(r"\w\Z", phrase) else ""
            expression = before + expression + after
        expected |= earliest_by_re(expression, owner, text)
    assert covered(found_in(graph, text)) == covered(expected)


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 30), max_size=5))
def test_a_split_of_the_text_changes_nothing(text: str, cuts: list[int]) -> None:
    graph = Graph(folded=True)
    graph.add_phrase("ss a", 0, whole_words=True)
    graph.add_expression(r"[0-9a-f]{2,6}\b", 1, 8)
    automaton = Automaton(graph)
    matcher, twin = PatternMatcher(automaton), PatternMatcher(automaton)
    pieces: list[Found] = []
    last = 0
    for cut in sorted({min(cut, len(text)) for cut in cuts} | {len(text)}):
        pieces += twin.push(text[last:cut])
        last = cut
    assert [*pieces, *twin.finish()] == [*matcher.push(text), *matcher.finish()]


@pytest.mark.parametrize(
    ("phrase", "text", "span"),
    [
        ("evil plan", "an EVIL  PLAN", (3, 13)),
        ("evil plan", "e\u0301vil\n\tpla\u0300n", (0, 12)),
        ("straße", "STRASSE", (0, 7)),
        ("strasse", "die Straße.", (4, 10)),
        ("\uff45\uff56\uff49\uff4c", "an evil", (3, 7)),
        ("evil", "an \uff45\u200b\uff56\u00ad\uff49\u2060\uff4c!", (3, 10)),
        ("fish", "ﬁsh", (0, 3)),
        ("x f", "x ﬁ", (0, 3)),  # the ligature is one character: all of it, or nothing
        ("naïve", "NAIVE", (0, 5)),
    ],
)
def test_folding_sees_through_case_width_accents_and_what_has_no_glyph(
    phrase: str, text: str, span: tuple[int, int]
) -> None:
    graph = Graph(folded=True)
    graph.add_phrase(phrase, 7, whole_words=False)
    assert found_in(graph, text) == {(7, *span)}


def test_without_folding_only_the_very_characters_match() -> None:
    graph = Graph(folded=False)
    graph.add_phrase("Evil", 0, whole_words=False)
    assert found_in(graph, "evil EVIL E\u0301vil Evil") == {(0, 16, 20)}


def test_voiced_kana_and_devanagari_vowels_are_no_accents() -> None:
    assert fold("か") != fold("が")
    assert fold("कि") != fold("का")


def test_classes_of_capitals_match_folded_text() -> None:
    graph = Graph(folded=True)
    graph.add_expression("AKIA[A-Z2-7]{4}", 0, 16)
    assert found_in(graph, "akiaBC27 x") == {(0, 0, 8)}
    graph = Graph(folded=True)
    graph.add_expression("x[^A-Z]y", 0, 16)
    assert found_in(graph, "xay x1y") == {(0, 4, 7)}


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("a+", "{1,40}"),
        ("a*", "{0,40}"),
        ("(?:ab){2,}", "without a limit"),
        ("a{0,3}", "empty text"),
        ("a{20}", "window of 10"),
        ("^a", "anchors"),
        ("a$", "anchors"),
        ("(?=a)b", "look-ahead"),
        ("(?<!a)b", "look-ahead"),
        (r"(a)\1", "back-references"),
        ("(?>ab)", "atomic"),
        ("a{1,3}+", "possessive"),
        ("(?a)b", "(?a)"),
        ("(a", "no regular expression"),
        ("(?:){3}a", "no character"),
    ],
)
def test_what_a_stream_cannot_decide_is_refused_with_the_reason(
    expression: str, words: str
) -> None:
    with pytest.raises(PatternError) as error:
        Graph(folded=True).add_expression(expression, 0, 10)
    assert words in str(error.value)
    assert repr(expression) in str(error.value)


def test_an_expression_of_too_many_states_is_refused() -> None:
    with pytest.raises(PatternError, match="states"):
        Graph(folded=True).add_expression("(?:ab|cd|ef|gh|ij|kl){1,500}", 0, 1000)


def test_a_phrase_that_is_listed_twice_takes_no_more_room() -> None:
    graph = Graph(folded=True)
    for _ in range(3):
        graph.add_phrase("Evil plan", 0, whole_words=True)
        states = len(graph.accepts)
        graph.add_phrase("EVIL  plan", 0, whole_words=True)
        assert len(graph.accepts) == states
    assert found_in(graph, "evil plan") == {(0, 0, 9)}


def test_an_expression_that_backtracking_would_never_finish_is_matched_at_once() -> None:
    """(a|a){1,30}b over a's: two to the thirty ways for `re`, one step a character here."""
    graph = Graph(folded=False)
    graph.add_expression("(?:a|a|[ab]){1,30}!", 0, 31)
    assert found_in(graph, "a" * 10_000 + "!") == {(0, 9970, 10_001)}


def test_many_different_texts_do_not_grow_the_automaton_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gptjet.service.governance import automaton as module

    monkeypatch.setattr(module, "_MOST_STATES", 8)
    graph = Graph(folded=False)
    graph.add_expression("[ab]{1,3}[bc]{1,3}d", 0, 8)
    automaton = Automaton(graph)
    text = "abcabdbbcdabababcccdbcd" * 20
    matcher, fresh = PatternMatcher(automaton), PatternMatcher(Automaton(graph))
    found = matcher.push(text)
    assert len(automaton._states) <= 8
    monkeypatch.setattr(module, "_MOST_STATES", 4096)
    assert found == fresh.push(text)


def test_a_text_of_ever_new_characters_takes_no_more_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from gptjet.service.governance import automaton as module

    monkeypatch.setattr(module, "_MOST_STEPS", 50)
    graph = Graph(folded=False)
    graph.add_phrase("evil", 0, whole_words=False)
    automaton = Automaton(graph)
    matcher = PatternMatcher(automaton)
    text = "".join(map(chr, range(0x4E00, 0x5E00))) + "evil"
    assert [tuple(item[:3]) for item in matcher.push(text + "x")] == [(0, 4096, 4100)]
    assert sum(len(state.steps) for state in automaton._states.values()) <= 50


def test_an_expression_that_is_nested_too_deeply_is_refused() -> None:
    depth = 100_000
    with pytest.raises(PatternError, match="recursion"):
        Graph(folded=True).add_expression("(" * depth + "a|bc" + ")" * depth, 0, 9)
