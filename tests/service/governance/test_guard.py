"""What leaves of a text: nothing that is blocked or redacted, everything else, in any split."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.governance.folding import fold
from gptjet.service.governance.guard import Guard
from gptjet.service.governance.policy import Chain, Policy, load_policy
from gptjet.service.governance.policy_file import Direction
from gptjet.service.governance.sequence_guard import SequenceGuard

MakePolicy = Callable[[str], Policy]

RULES = r"""
version = 1
[[rules]]
name = "b"
action = "block"
phrases = ["evil", "e b"]
[[rules]]
name = "w"
action = "redact"
replacement = "#"
whole_words = true
phrases = ["vil", "il e", "b"]
[[rules]]
name = "n"
action = "redact"
regexes = ['\d{2,4}v?']
window = 5
replacement = "*"
[[rules]]
name = "f"
action = "flag"
phrases = ["le"]
"""


def chain_of(rules: str, direction: Direction = "output") -> Chain:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.toml"
        path.write_text(rules, encoding="utf-8")
        return load_policy(path).chains[direction]


CHAIN = chain_of(RULES)
REDACTING = chain_of(RULES.replace('"block"', '"flag"'))


def never(_rule: str, _matched: str) -> bool:
    return False


def apply(chain: Chain, pieces: Iterable[str], context: str = "") -> tuple[str, Guard]:
    guard = Guard(chain, never, context)
    out = []
    for piece in pieces:
        guard.push(piece)
        out.append(guard.release())
    guard.finish()
    out.append(guard.release())
    return "".join(out), guard


def split(text: str, cuts: Iterable[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[a:b] for a, b in pairwise(places)]


TEXTS = st.text("evilb 12é\u200b", max_size=24)
CUTS = st.lists(st.integers(0, 24), max_size=8)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS, cuts=CUTS)
def test_what_leaves_does_not_depend_on_the_split(text: str, cuts: list[int]) -> None:
    whole, guard = apply(CHAIN, [text])
    pieces, twin = apply(CHAIN, split(text, cuts))
    one_by_one, _ = apply(CHAIN, text)
    assert whole == pieces == one_by_one
    assert guard.findings == twin.findings


@settings(max_examples=500, deadline=None)
@given(text=TEXTS, cuts=CUTS)
def test_a_blocked_phrase_never_leaves_and_what_left_before_it_is_the_text(
    text: str, cuts: list[int]
) -> None:
    out, guard = apply(CHAIN, split(text, cuts))
    assert "evil" not in fold(out)
    assert "e b" not in fold(out)
    forbidden = any(phrase in fold(text) for phrase in ("evil", "e b"))
    assert (guard.blocked is not None) == forbidden
    if guard.blocked is not None:
        assert guard.blocked.start < guard.blocked.end <= len(text)
        assert fold(text[guard.blocked.start : guard.blocked.end]) in ("evil", "e b")
        redacted, _ = apply(REDACTING, [text])
        assert redacted.startswith(out)


@settings(max_examples=500, deadline=None)
@given(text=TEXTS, cuts=CUTS)
def test_no_allowed_character_is_lost_or_reordered(text: str, cuts: list[int]) -> None:
    """The output is the text with each stretch of redact findings replaced, worked out here."""
    out, guard = apply(REDACTING, split(text, cuts))
    spans = [(f.start, f.end, f.rule.replacement) for f in guard.findings if f.action == "redact"]
    order = {"#": 0, "*": 1}
    spans.sort(key=lambda span: (span[0], order[span[2]]))
    expected, position = "", 0
    while spans:
        start, end, replacement = spans.pop(0)
        while spans and spans[0][0] < end:
            end = max(end, spans.pop(0)[1])
        expected += text[position:start] + replacement
        position = end
    assert out == expected + text[position:]


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40), cuts=CUTS)
def test_any_text_without_a_match_comes_out_as_it_is(text: str, cuts: list[int]) -> None:
    chain = chain_of(
        'version = 1\n[[rules]]\nname = "x"\naction = "redact"\nphrases = ["\\uE000q", "ab\\uE000"]'
    )
    assert apply(chain, split(text, cuts))[0] == text or "\ue000" in text


@settings(max_examples=300, deadline=None)
@given(prompt=TEXTS, text=TEXTS, cuts=CUTS)
def test_a_phrase_that_begins_in_the_context_is_found_and_the_context_is_never_given_out(
    prompt: str, text: str, cuts: list[int]
) -> None:
    out, guard = apply(REDACTING, split(text, cuts), context=prompt)
    together = Guard(REDACTING, never)
    together.push(prompt + text)
    together.finish()
    wanted = {
        (f.rule.name, max(f.start - len(prompt), 0), f.end - len(prompt))
        for f in together.findings
        if f.end > len(prompt)
    }
    assert {(f.rule.name, f.start, f.end) for f in guard.findings} == wanted
    assert len(out) <= len(text) or "#" in out or "*" in out


def test_text_is_held_back_only_while_it_may_become_a_match() -> None:
    guard = Guard(CHAIN, never)
    seen = []
    for character in "evi evade 1 x":
        guard.push(character)
        seen.append(guard.release())
    # "evi" may become "evil", "e " may become "e b", and a digit may be the first of two.
    assert seen == ["", "", "", "evi ", "", "", "eva", "d", "", "", "e ", "1 ", "x"]


def test_a_blocked_text_ends_where_the_reader_of_single_characters_would_be() -> None:
    out, guard = apply(CHAIN, ["12 ok ev", "il 34"])
    assert out == "* ok "
    assert guard.blocked is not None
    assert (guard.blocked.rule.name, guard.blocked.start, guard.blocked.end) == ("b", 6, 10)
    guard.push("more")
    guard.finish()
    assert guard.release() == ""


def test_a_rejected_match_of_a_flag_rule_blocks_where_the_policy_says_so() -> None:
    rules = RULES.replace("version = 1", "version = 1\n[review]\nblock_rejected = true")
    asked: list[tuple[str, str]] = []

    def is_rejected(rule: str, matched: str) -> bool:
        asked.append((rule, matched))
        return True

    guard = Guard(chain_of(rules), is_rejected)
    guard.push("a LE b")
    guard.finish()
    assert guard.release() == "a "
    assert guard.blocked is not None
    assert (guard.blocked.action, guard.blocked.rule.action) == ("block", "flag")
    assert asked == [("f", "LE")]


# --- tokens ---

TOKENS = ByteTokenizer()


def run_tokens(
    chain: Chain, ids: list[int], per_step: list[int], stop_at: int | None = None
) -> tuple[str, list[int], list[int], SequenceGuard[int]]:
    """Text, ids and "log-probabilities" (each id's position) that leave.

    stop_at  characters of the text after which a stop string has cut it off
    """
    from gptjet.service.engine.detokenizer import Detokenizer

    guard: SequenceGuard[int] = SequenceGuard(chain, never, TOKENS.token_bytes)
    detokenizer = Detokenizer(TOKENS)
    out, left, logprobs, delivered, position = "", [], [], 0, 0
    sizes = iter(per_step)
    while True:
        size = max(1, next(sizes, 1))
        step = ids[position : position + size]
        final = position + size >= len(ids)
        text = "".join(detokenizer.push(token_id) for token_id in step)
        if final:
            text += detokenizer.flush()
        if stop_at is not None:
            text = text[: max(0, stop_at - delivered)]
        delivered += len(text)
        numbered = list(range(position, position + len(step)))
        cleared = guard.push(text, step, numbered, final=final)
        out += cleared.text
        left += cleared.token_ids
        logprobs += cleared.logprobs
        position += size
        if final or guard.blocked is not None:
            return out, left, logprobs, guard


IDS = st.lists(
    st.sampled_from([*b"evilb 12", 0xC3, 0xA9, 0xE2, 0x80, 0x8B, 0xFF, 256]), max_size=24
)


@settings(max_examples=500, deadline=None)
@given(ids=IDS, per_step=st.lists(st.integers(1, 4), max_size=10))
def test_token_ids_never_say_what_the_text_must_not(ids: list[int], per_step: list[int]) -> None:
    out, left, logprobs, guard = run_tokens(CHAIN, ids, per_step)
    assert "evil" not in fold(out)
    kept = iter(range(len(ids)))
    assert all(position in kept for position in logprobs), "reordered"
    assert left == [ids[position] for position in logprobs]
    redacted, _ = apply(CHAIN, [TOKENS.decode(ids)])
    assert out == redacted
    text = TOKENS.decode(ids)
    for finding in guard.findings:
        if finding.action == "flag":
            continue
        # The bytes of the characters that the finding covers have not left.
        gone = set(range(len(ids))) - set(logprobs)
        assert len(gone) >= len(text[finding.start : finding.end].encode()) or "\ufffd" in text


@settings(max_examples=300, deadline=None)
@given(ids=IDS, per_step=st.lists(st.integers(1, 4), max_size=10))
def test_every_token_leaves_where_nothing_is_found(ids: list[int], per_step: list[int]) -> None:
    chain = chain_of('version = 1\n[[rules]]\nname = "x"\naction = "block"\nphrases = ["evilx"]')
    out, left, logprobs, _ = run_tokens(chain, ids, per_step)
    assert out == TOKENS.decode(ids)
    assert left == ids
    assert logprobs == list(range(len(ids)))


def test_ids_after_a_stop_string_do_not_say_a_blocked_phrase() -> None:
    out, left, _, guard = run_tokens(CHAIN, list(b"ok evil"), [1] * 9, stop_at=5)
    assert out == "ok "
    assert bytes(left) == b"ok "
    assert guard.blocked is not None


def test_ids_of_a_redacted_word_and_their_log_probabilities_are_withheld() -> None:
    out, left, logprobs, _ = run_tokens(REDACTING, list("a 12v é".encode()), [1] * 9)
    assert out == "a * é"
    assert bytes(left).decode() == "a  é"
    assert logprobs == [0, 1, 5, 6, 7]


def test_an_echoed_prompt_is_judged_and_joined_to_the_output() -> None:
    guard: SequenceGuard[int] = SequenceGuard(REDACTING, never, TOKENS.token_bytes)
    echoed = guard.push("a 12", list(b"a 12"), [0, 1, 2, 3], is_prompt=True)
    assert (echoed.text, bytes(echoed.token_ids)) == ("a ", b"a ")
    rest = guard.push("3 b c", list(b"3 b c"), list(range(5)), final=True)
    assert (rest.text, bytes(rest.token_ids)) == ("* # c", b"  c")
    assert rest.logprobs == (1, 3, 4)


def test_ids_are_withheld_where_they_do_not_determine_their_text() -> None:
    guard: SequenceGuard[int] = SequenceGuard(CHAIN, never, lambda token_id: None)
    cleared = guard.push("ok 12", [1, 2], [1, 2], final=True)
    assert cleared.text == "ok *"
    assert cleared.token_ids == cleared.logprobs == ()


def test_flags_alone_hold_nothing_back(make_policy: MakePolicy) -> None:
    chain = make_policy('[[rules]]\nname = "f"\naction = "flag"\nphrases = ["evil"]').chains[
        "output"
    ]
    guard: SequenceGuard[int] = SequenceGuard(chain, never, TOKENS.token_bytes)
    first = guard.push("ev", list(b"ev"), [1, 2])
    assert (first.text, first.token_ids, first.logprobs) == ("ev", tuple(b"ev"), (1, 2))
    guard.push("il", list(b"il"), [3, 4], final=True)
    assert [(f.rule.name, f.start, f.end, f.matched) for f in guard.findings] == [
        ("f", 0, 4, "evil")
    ]


def test_text_that_is_not_the_tokens_is_a_bug_and_not_passed_on() -> None:
    guard: SequenceGuard[int] = SequenceGuard(CHAIN, never, TOKENS.token_bytes)
    with pytest.raises(RuntimeError, match="not the text"):
        guard.push("other", list(b"evi"), [])
