"""What a caller shows, and whether it is let in."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gptjet.service.rpc.access.errors import PermissionDeniedError, UnauthenticatedError
from gptjet.service.rpc.access.tokens import Authenticator, Token, TokenSet, new_token

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
TEXT, KEPT = new_token("web", now=NOW)
OTHER_TEXT, OTHER = new_token("other", now=NOW)


def authenticator(*tokens: Token) -> Authenticator:
    return Authenticator(TokenSet(token=tokens or (KEPT, OTHER)))


def shown(value: str) -> list[tuple[str, str | bytes]]:
    return [("user-agent", "a test"), ("authorization", value)]


def refusal(metadata: Any, *tokens: Token, now: datetime = NOW) -> str:
    with pytest.raises(UnauthenticatedError) as caught:
        authenticator(*tokens).authenticate(metadata, now)
    return str(caught.value)


def test_a_token_holds_256_random_bits_and_its_id() -> None:
    match = re.fullmatch(r"gptjet_([0-9a-f]{12})_([0-9a-f]{64})", TEXT)
    assert match is not None
    assert match[1] == KEPT.id
    assert len(bytes.fromhex(match[2])) * 8 == 256
    assert len({new_token("x")[0] for _ in range(100)}) == 100


def test_the_hash_is_kept_and_neither_token_nor_hash_is_shown() -> None:
    secret = TEXT.rpartition("_")[2]
    assert KEPT.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert secret not in KEPT.model_dump_json()
    assert KEPT.sha256 not in repr(KEPT)
    assert KEPT.sha256 not in repr(TokenSet(token=(KEPT,)))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_right_token_is_found_whatever_the_schemes_case(scheme: str) -> None:
    assert authenticator().authenticate(shown(f"{scheme} {TEXT}"), NOW) == KEPT
    assert authenticator().authenticate(shown(f"{scheme} {OTHER_TEXT}"), NOW) == OTHER


ALTERED: dict[str, tuple[str, str]] = {
    "nothing": ("", "must be 'Bearer"),
    "no scheme": (TEXT, "must be 'Bearer"),
    "another scheme": (f"Basic {TEXT}", "must be 'Bearer"),
    "scheme alone": ("Bearer", "is not valid"),
    "scheme and space": ("Bearer ", "is not valid"),
    "two spaces": (f"Bearer  {TEXT}", "is not valid"),
    "space behind": (f"Bearer {TEXT} ", "is not valid"),
    "line break behind": (f"Bearer {TEXT}\n", "is not valid"),
    "two tokens": (f"Bearer {TEXT},{OTHER_TEXT}", "is not valid"),
    "capitals": (f"Bearer {TEXT.upper()}", "is not valid"),
    "too short": (f"Bearer {TEXT[:-1]}", "is not valid"),
    "an Arabic digit": (f"Bearer {TEXT[:-1]}٣", "is not valid"),
    "too long": (f"Bearer {TEXT}0", "is not valid"),
    "last digit": (f"Bearer {TEXT[:-1]}{'0' if TEXT[-1] != '0' else '1'}", "is not valid"),
    "another's secret": (f"Bearer {TEXT[:20]}{OTHER_TEXT[20:]}", "is not valid"),
    "zeros": (f"Bearer gptjet_{'0' * 12}_{'0' * 64}", "is not valid"),
    "the hash": (f"Bearer {KEPT.sha256}", "is not valid"),
    "a million characters": ("Bearer " + "a" * 1_000_000, "is not valid"),
}


# By name: the tokens are other ones in each process that runs tests.
@pytest.mark.parametrize("name", ALTERED)
def test_anything_else_is_refused_without_repeating_it(name: str) -> None:
    value, reason = ALTERED[name]
    message = refusal(shown(value))
    assert reason in message
    assert len(message) < 100
    for part in value.split():
        assert len(part) < 8 or part not in message


def test_without_a_token_or_with_two_the_caller_is_told_what_is_needed() -> None:
    assert "a bearer token is needed" in refusal([])
    assert "a bearer token is needed" in refusal([("x-authorization", f"Bearer {TEXT}")])
    # Also where both are good: whoever stands in front of the server may have looked at the other.
    both = [*shown(f"Bearer {TEXT}"), ("authorization", f"Bearer {TEXT}")]
    assert "one authorization is needed, got 2" in refusal(both)
    assert "is not valid" in refusal([("authorization", f"Bearer {TEXT}".encode())])


def test_an_expired_and_a_revoked_token_open_nothing_and_only_their_owner_is_told() -> None:
    expired = KEPT.model_copy(update={"expires": NOW})
    revoked = KEPT.model_copy(update={"revoked": NOW - timedelta(days=1)})
    good, wrong = shown(f"Bearer {TEXT}"), shown(f"Bearer {TEXT[:-1]}-")
    assert authenticator(expired).authenticate(good, NOW - timedelta(seconds=1)) == expired
    assert refusal(good, expired) == "the token expired at 2026-11-22 12:00:00 UTC"
    assert refusal(good, revoked) == "the token has been revoked"
    assert refusal(wrong, expired) == refusal(wrong, revoked) == "the token is not valid"


def test_an_unknown_id_and_a_wrong_secret_take_the_same_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the time of the answer would say which ids there are."""
    compared: list[tuple[str, str]] = []

    def compare(left: str, right: str) -> bool:
        compared.append((left, right))
        return left == right

    monkeypatch.setattr("gptjet.service.rpc.access.tokens.hmac.compare_digest", compare)
    refusal(shown(f"Bearer gptjet_{'0' * 12}_{'0' * 64}"))
    refusal(shown(f"Bearer {TEXT[:20]}{OTHER_TEXT[20:]}"))
    authenticator().authenticate(shown(f"Bearer {TEXT}"), NOW)
    assert len(compared) == 3
    assert {len(digest) for pair in compared for digest in pair} == {64}


def test_a_digest_of_zeros_in_the_file_is_no_way_in_for_unknown_ids() -> None:
    """It is what an unknown id is compared with."""
    zeros = KEPT.model_copy(update={"sha256": "0" * 64})
    assert "is not valid" in refusal(shown(f"Bearer gptjet_{'0' * 12}_{'0' * 64}"), zeros)


@given(st.text(max_size=200))
def test_no_text_but_the_token_is_let_in(value: str) -> None:
    assert refusal(shown(value))
    assert refusal(shown(f"Bearer {value}"))


def test_a_scope_that_is_lacking_is_named() -> None:
    KEPT.require("generate")
    with pytest.raises(PermissionDeniedError, match="token web lacks the scope 'admin'"):
        KEPT.require("admin")


@pytest.mark.parametrize(
    "fields",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "a\n"},
        {"name": "-a"},
        {"name": "a" * 65},
        {"scopes": []},
        {"scopes": ["everything"]},
        {"requests_per_minute": 0},
        {"tokens_per_minute": 10**9 + 1},
        {"concurrent_streams": -1},
        {"expires": datetime(2027, 1, 1)},
    ],
)
def test_a_field_out_of_its_limits_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        new_token(**{"name": "web"} | fields)


def test_a_name_can_be_given_again_once_its_token_is_revoked() -> None:
    revoked = KEPT.model_copy(update={"revoked": NOW})
    _, again = new_token("web")
    assert len(TokenSet(token=(revoked, again)).token) == 2
    assert len(TokenSet(token=(again, revoked)).token) == 2
    with pytest.raises(ValidationError, match="two tokens have the name 'web'"):
        TokenSet(token=(KEPT, again))
    with pytest.raises(ValidationError, match="two tokens have the id"):
        TokenSet(token=(revoked, KEPT))
