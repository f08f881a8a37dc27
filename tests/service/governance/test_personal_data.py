"""Personal data are found whole, however a stream cuts them, and prose is left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjet.service.governance.guard import Guard
from gptjet.service.governance.personal_data import PersonalDataMatcher, make_finders
from gptjet.service.governance.policy import Policy
from gptjet.service.governance.policy_file import PolicyError

MakePolicy = Callable[[str], Policy]

FINDERS = [(0, make_finders(["card", "email", "iban", "ip", "phone", "us.ssn"], ["US", "DE"]))]

# Those of telephone numbers take a while over a page of digits.
QUICK_FINDERS = [(0, make_finders(["card", "email", "iban"], []))]

DATA = [
    "4111 1111 1111 1111",
    "4111-1111-1111-1111",
    "378282246310005",
    "jane.doe+x@mail.example.org",
    "GB29 NWBK 6016 1331 9268 19",
    "DE89370400440532013000",
    "+1 650-253-0000",
    "(650) 253-0000",
    "+49 30 901820",
    "192.168.10.1",
    "2001:db8::ff00:42:8329",
    "536-90-4399",
    "\uff14111 1111 1111 1111",
    "4111\u20131111\u20131111\u20131111",
]


def redact(text: str, cuts: list[int], finders: Any = FINDERS) -> str:
    matcher = PersonalDataMatcher(finders)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    found = [item for a, b in pairwise(places) for item in matcher.push(text[a:b])]
    covered = {p for item in [*found, *matcher.finish()] for p in range(item.start, item.end)}
    return "".join("#" if position in covered else text[position] for position in range(len(text)))


@pytest.mark.parametrize("datum", DATA)
@pytest.mark.parametrize("template", ["{}", "My number is {}, thanks.", "see:\n{}\nend", "x ({})."])
def test_each_kind_is_found_whole_in_every_split(datum: str, template: str) -> None:
    text = template.format(datum)
    expected = template.format("#" * len(datum))
    # A bracket before a telephone number is part of how it is written.
    allowed = {expected, template.replace("(", "#").format("#" * len(datum))}
    assert redact(text, []) in allowed | {expected.replace("#)", "##")}
    assert redact(text, list(range(len(text)))) == redact(text, [])


@pytest.mark.parametrize(
    "text",
    [
        "In 2024 the 12 men of unit 7 walked 1500 m.",
        "4111 1111 1111 1112 is no card",  # the check digit
        "GB29 NWBK 6016 1331 9268 18 is no account",
        "version 1.2.3, at 12:30:45, a@b, @name, 300.1.2.3",
        "The C++ of A.B.C. e.g. this",
    ],
)
def test_what_only_looks_alike_is_left(text: str) -> None:
    assert redact(text, []) == text


PIECES = st.lists(
    st.one_of(
        st.sampled_from(DATA),
        st.text("0123456789", min_size=1, max_size=20),
        st.text("ab AB12@.-+(): \n", max_size=12),
        st.sampled_from(["the ", "NWBK ", " ", "  ", "\n", ", "]),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(pieces=PIECES, cuts=st.lists(st.integers(0, 120), max_size=8))
@example(pieces=["1" * 700], cuts=[300, 600])
@example(pieces=["a1 " * 300, "4111 1111 1111 1111"], cuts=[511, 512, 900])
def test_a_split_changes_nothing(pieces: list[str], cuts: list[int]) -> None:
    text = "".join(pieces)
    assert redact(text, cuts) == redact(text, []) == redact(text, list(range(len(text))))


@pytest.mark.parametrize("datum", DATA[:6])
@pytest.mark.parametrize("filler", ["7 ", "1234 "])
def test_a_datum_is_found_wherever_in_a_long_run_of_numbers_it_stands(
    datum: str, filler: str
) -> None:
    """Segments are cut at 512 characters: every place around the first cuts."""
    for before in (*range(470, 520, len(filler)), *range(880, 940, len(filler))):
        text = filler * (before // len(filler)) + datum
        assert redact(text, [], QUICK_FINDERS).endswith("#" * len(datum)), before


def test_prose_is_held_back_for_a_word_and_a_number_until_it_has_ended() -> None:
    matcher = PersonalDataMatcher(FINDERS)
    held = []
    for position, character in enumerate("an apple 12 34 is"):
        matcher.push(character)
        held.append(position + 1 - matcher.hold)
    #               a  n     a  p  p  l  e     1  2     3  4     i  s
    assert held == [1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_datum_over_the_end_of_the_prompt_is_redacted_in_the_output(
    make_policy: MakePolicy,
) -> None:
    policy = make_policy(
        '[[rules]]\nname = "p"\naction = "redact"\npersonal_data = ["card"]\nreplacement = "#"'
    )
    guard = Guard(policy.chains["output"], lambda _r, _m: False, "My card is 4111 1111 11")
    guard.push("11 1111, and so on")
    guard.finish()
    assert guard.release() == "#, and so on"


def test_a_kind_or_region_that_there_is_not_is_named(make_policy: MakePolicy) -> None:
    rule = '[[rules]]\nname = "p"\naction = "redact"\npersonal_data = ["{}"]\nregions = ["{}"]'
    with pytest.raises(PolicyError, match=r"rule 'p': 'shoe' is no kind.*us\.ssn"):
        make_policy(rule.format("shoe", "US"))
    with pytest.raises(PolicyError, match=r"'xx\.yy' is no kind"):
        make_policy(rule.format("xx.yy", "US"))
    with pytest.raises(PolicyError, match="XX: no region"):
        make_policy(rule.format("phone", "XX"))


@pytest.mark.parametrize(
    ("module", "rule", "package"),
    [
        ("phonenumbers", 'personal_data = ["phone"]', "phonenumberslite"),
        ("stdnum.luhn", 'personal_data = ["card"]', "python-stdnum"),
        ("py3langid.langid", 'languages = ["en"]', "py3langid"),
    ],
)
def test_a_library_that_is_not_installed_is_named_with_the_extra(
    make_policy: MakePolicy,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    rule: str,
    package: str,
) -> None:
    from gptjet.service.governance import language

    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PolicyError, match=rf"rule 'p': needs {package}.*gptjet\[governance\]"):
        make_policy(f'[[rules]]\nname = "p"\naction = "flag"\n{rule}')


def test_a_policy_without_such_rules_imports_none_of_the_libraries(make_policy: MakePolicy) -> None:
    import subprocess

    policy = make_policy('[[rules]]\nname = "p"\naction = "block"\nphrases = ["x"]')
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from gptjet.service.governance.governance import load_policy\n"
        f"load_policy(Path({str(policy.path)!r}))\n"
        "print([m for m in ('phonenumbers', 'stdnum', 'py3langid', 'numpy', 'torch', 'grpc')"
        " if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")
