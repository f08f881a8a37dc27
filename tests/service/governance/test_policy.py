"""The policy file: what it may say, and what it is told of a mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gptjet.service.governance.guard import Guard
from gptjet.service.governance.policy import Policy, load_policy
from gptjet.service.governance.policy_file import Direction, PolicyError

MakePolicy = Callable[[str], Policy]

GERMAN = "Das ist ein Satz auf Deutsch und nicht auf Englisch, und er ist recht lang."
ENGLISH = "This is a sentence in English and not in German, and it is rather long."


def rule(text: str, name: str = "r") -> str:
    return f'[[rules]]\nname = "{name}"\n{text}\n'


def run(policy: Policy, text: str, direction: Direction = "input") -> tuple[str, list[str]]:
    guard = Guard(policy.chains[direction], lambda _rule, _matched: False)
    out = []
    for character in text:
        guard.push(character)
        out.append(guard.release())
    guard.finish()
    out.append(guard.release())
    return "".join(out), [f"{f.rule.name} {f.action}" for f in guard.findings]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("action = 'block'", "a rule has one of"),
        ("action = 'block'\nphrases = ['a']\nmax_characters = 3", "a rule has one of"),
        ("action = 'burn'\nphrases = ['a']", "must be 'block', 'redact' or 'flag'"),
        ("action = 'block'\nregexes = ['a']", "regexes need a window"),
        ("action = 'block'\nregexes = ['a+']\nwindow = 5", "{1,40} instead of +"),
        ("action = 'block'\nregexes = ['a']\nwindow = 5000", "window: must be less than"),
        ("action = 'redact'\nmax_characters = 3", "not redact"),
        ("action = 'redact'\nlanguages = ['en']", "not redact"),
        ("action = 'flag'\nlanguages = ['xx']", "languages: xx: cannot be told apart"),
        ("action = 'block'\nphrases = ['a']\nreplacement = 'x'", "replacement is for"),
        ("action = 'redact'\nphrases = ['a']\nreplacement = ''", "replacement: String should"),
        ("action = 'redact'\nphrases = ['a']\nreplacement = 'xAx'", "is what a rule blocks"),
        ("action = 'block'\nphrases = ['\\u200b']", "no character that is looked at"),
        ("action = 'block'\nphrases = ['a']\nwindow = 3", "window: without effect"),
        ("action = 'block'\nmax_characters = 3\nfold = true", "fold: without effect"),
        ("action = 'block'\nphrases = ['a']\nregions = ['US']", "regions: without effect"),
        ("action = 'block'\nphrases = ['a']\nmin_characters = 9", "min_characters: without"),
        ("action = 'block'\nphrasse = ['a']", "phrasse: Extra inputs"),
        ("action = 'block'\non = []\nphrases = ['a']", "on: "),
        ("action = 'block'\nphrases_file = 'none.txt'", "none.txt: No such file"),
    ],
)
def test_a_mistake_is_named_with_its_rule_and_key(
    make_policy: MakePolicy, text: str, words: str
) -> None:
    with pytest.raises(PolicyError) as error:
        make_policy(rule(text.replace("\\u200b", "\u200b")))
    assert words in str(error.value)
    assert "rule 'r'" in str(error.value)


def test_several_mistakes_are_all_named(make_policy: MakePolicy) -> None:
    with pytest.raises(PolicyError) as error:
        make_policy(
            rule("action = 'block'\nregexes = ['a+']\nwindow = 5", "one")
            + rule("action = 'flag'\nlanguages = ['xx']", "two")
        )
    first, second = str(error.value).splitlines()
    assert "'one'" in first
    assert "'two'" in second


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("version = 1\n", "rules"),
        ("version = 2\n[[rules]]\nname='a'\naction='flag'\nphrases=['b']", "version"),
        ("version = ", "not valid TOML"),
        ("version = 1\nrules = 3\n", "rules"),
        ("version = 1\nrules = [3]\n", "rule 1"),
        (
            "version = 1\n[[rules]]\nname='a'\naction='flag'\nphrases=['b']\n" * 1
            + "[[rules]]\nname='a'\naction='flag'\nphrases=['b']",
            "two have the name a",
        ),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(content)
    with pytest.raises(PolicyError) as error:
        load_policy(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="No such file"):
        load_policy(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(PolicyError, match="not UTF-8"):
        load_policy(tmp_path / "binary.toml")


def test_phrases_come_from_a_file_beside_the_policy(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    (tmp_path / "words.txt").write_text("# a comment\n\nbad word\n  Übel \n", encoding="utf-8")
    policy = make_policy(rule("action = 'redact'\nphrases_file = 'words.txt'\nreplacement = '#'"))
    assert run(policy, "a Bad  Word, ubel!")[0] == "a #, #!"
    digest = policy.digest
    (tmp_path / "words.txt").write_text("other")
    assert load_policy(policy.path).digest != digest


def test_a_rule_holds_in_the_directions_it_names(make_policy: MakePolicy) -> None:
    policy = make_policy(
        rule("action = 'redact'\nphrases = ['aa']\non = ['input']\nreplacement = '#'")
    )
    assert run(policy, "baab", "input")[0] == "b#b"
    assert policy.chains["output"].rules == ()


def test_a_text_that_is_too_long_is_blocked_at_the_character_that_is_too_many(
    make_policy: MakePolicy,
) -> None:
    policy = make_policy(rule("action = 'block'\nmax_characters = 5"))
    assert run(policy, "12345", "output") == ("12345", [])
    assert run(policy, "1234567", "output") == ("12345", ["r block"])


def test_an_output_in_another_language_is_blocked_before_any_of_it_leaves(
    make_policy: MakePolicy,
) -> None:
    policy = make_policy(rule("action = 'block'\nlanguages = ['en']\nmin_characters = 40"))
    assert run(policy, GERMAN, "output") == ("", ["r block"])
    assert run(policy, ENGLISH, "output") == (ENGLISH, [])
    assert run(policy, "Das ist kurz.", "output") == ("Das ist kurz.", [])


def test_the_language_of_a_prompt_is_that_of_all_of_it(make_policy: MakePolicy) -> None:
    policy = make_policy(rule("action = 'flag'\nlanguages = ['en']\nmin_characters = 40"))
    assert run(policy, GERMAN) == (GERMAN, ["r flag"])
    assert run(policy, ENGLISH + " " + GERMAN[:20]) == (ENGLISH + " " + GERMAN[:20], [])


def test_a_flagged_language_holds_no_output_back(make_policy: MakePolicy) -> None:
    chain = make_policy(rule("action = 'flag'\nlanguages = ['en']")).chains["output"]
    guard = Guard(chain, lambda _r, _m: False)
    guard.push("Da")
    assert guard.release() == "Da"
