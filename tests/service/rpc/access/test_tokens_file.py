"""The tokens file: written whole or not at all, and read back; what is broken in it is named."""

from __future__ import annotations

import multiprocessing
import os
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjet.service.rpc.access import tokens_file as module
from gptjet.service.rpc.access.errors import AccessError
from gptjet.service.rpc.access.tokens import MAX_LIMIT, SCOPES, TokenSet, new_token
from gptjet.service.rpc.access.tokens_file import editing, parse, read, read_bytes, render

MakeToken = Callable[..., str]

_LIMITS = st.none() | st.integers(1, MAX_LIMIT)
_TIMES = st.none() | st.datetimes(
    datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "scopes": st.lists(st.sampled_from(SCOPES), min_size=1, max_size=2),
                "expires": _TIMES,
                "requests_per_minute": _LIMITS,
                "tokens_per_minute": _LIMITS,
                "concurrent_streams": _LIMITS,
            }
        ),
        max_size=4,
    )
)
def test_what_is_written_is_read_back(fields: list[dict[str, Any]]) -> None:
    tokens = TokenSet(
        token=tuple(new_token(f"n{index}", **given)[1] for index, given in enumerate(fields))
    )
    assert parse(render(tokens).encode(), Path("x")) == tokens


def test_the_file_is_its_owners_and_holds_no_token(
    make_token: MakeToken, tokens_file: Path
) -> None:
    before = os.umask(0)
    try:
        text = make_token("web", requests_per_minute=3)
    finally:
        os.umask(before)
    assert stat.S_IMODE(tokens_file.stat().st_mode) == 0o600
    assert text.rpartition("_")[2] not in tokens_file.read_text()
    assert [path.name for path in tokens_file.parent.iterdir()] == ["tokens.toml"]


def test_an_edit_keeps_the_link_that_names_the_file(
    make_token: MakeToken, tokens_file: Path
) -> None:
    make_token("web")
    link = tokens_file.with_name("link.toml")
    link.symlink_to(tokens_file)
    with editing(link) as tokens:
        tokens.clear()
    assert link.is_symlink()
    assert read(tokens_file).token == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_edit_by_root_leaves_the_file_to_its_owner(
    make_token: MakeToken, tokens_file: Path
) -> None:
    make_token("web")
    os.chown(tokens_file, 4321, 4322)
    make_token("other")
    assert (tokens_file.stat().st_uid, tokens_file.stat().st_gid) == (4321, 4322)


def test_a_failed_edit_leaves_the_file_as_it_was(
    make_token: MakeToken, tokens_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_token("web")
    before = tokens_file.read_bytes()
    with pytest.raises(ZeroDivisionError), editing(tokens_file) as tokens:
        raise ZeroDivisionError(tokens.clear())
    with pytest.raises(AccessError, match="two tokens have the name"), editing(tokens_file) as same:
        same += [new_token("x")[1], new_token("x")[1]]

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(AccessError, match="No space left"), editing(tokens_file) as tokens:
        tokens.clear()
    assert tokens_file.read_bytes() == before
    assert [path.name for path in tokens_file.parent.iterdir()] == ["tokens.toml"]


def _add(path: Path, count: int, who: str) -> None:
    for index in range(count):
        with editing(path, create=True) as tokens:
            tokens.append(new_token(f"{who}{index}")[1])


def test_editors_at_the_same_time_lose_no_token(tokens_file: Path) -> None:
    context = multiprocessing.get_context("fork")
    editors = [context.Process(target=_add, args=(tokens_file, 10, who)) for who in "abc"]
    for editor in editors:
        editor.start()
    for editor in editors:
        editor.join(60)
        assert editor.exitcode == 0
    names = {token.name for token in read(tokens_file).token}
    assert names == {f"{who}{index}" for who in "abc" for index in range(10)}


def good(**changes: str) -> str:
    fields = {
        "id": '"0123456789ab"',
        "name": '"web"',
        "sha256": f'"{"a" * 64}"',
        "scopes": '["generate"]',
        "created": "2026-11-22T00:00:00Z",
    } | changes
    return "[[token]]\n" + "".join(f"{name} = {value}\n" for name, value in fields.items())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[token]\n", "not valid TOML"),
        ("a" * 9_000_000, "must be at most 8388608 bytes"),
        (good() + good(name='"other"'), "two tokens have the id '0123456789ab'"),
        (good() + good(id='"0123456789ac"'), "two tokens have the name 'web'"),
        (good(colour='"red"'), r"token\[0\] \('web'\): colour: Extra inputs are not permitted"),
        ("[tokens]\n", "tokens: Extra inputs"),
        ("token = 3\n", "token: Input should be a valid tuple"),
        ("[[token]]\n", r"token\[0\]: id: Field required; token\[0\]: name"),
        (good(sha256='"deadbeef"'), "sha256: String should match pattern"),
        (good(scopes='["root"]'), r"scopes.0: Input should be 'generate' or 'admin'"),
        (good(requests_per_minute="0"), "requests_per_minute: Input should be greater"),
        (good(requests_per_minute='"9"'), "requests_per_minute: Input should be a valid integer"),
        (good(expires="2027-01-01T00:00:00"), "expires: Input should have timezone info"),
        (good(name='"\\u001b[31m"'), "name: String should match"),
        ("'\x27' = 1\n[[token]]", "not valid TOML"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_field(
    tokens_file: Path, text: str, problem: str
) -> None:
    tokens_file.write_text(text)
    with pytest.raises(AccessError, match=problem) as caught:
        read(tokens_file)
    message = str(caught.value)
    assert str(tokens_file) in message
    assert "\n" not in message
    for secret in ("a" * 64, "deadbeef"):
        assert secret not in message


def test_a_file_that_is_no_text_is_an_error(tokens_file: Path) -> None:
    tokens_file.write_bytes(b"\x00\xff\xfe")
    with pytest.raises(AccessError, match="not UTF-8 at byte 1"):
        read(tokens_file)


def test_a_file_that_is_not_there_says_how_to_make_one(tokens_file: Path) -> None:
    with pytest.raises(AccessError, match=r"No such file or directory; make one with `gptjet tok"):
        read_bytes(tokens_file)
    with pytest.raises(AccessError, match="Is a directory"):
        read_bytes(tokens_file.parent)
    with pytest.raises(AccessError, match="No such file"), editing(tokens_file):
        pass
    missing = tokens_file.parent / "none" / "tokens.toml"
    with pytest.raises(AccessError, match="none: No such file"), editing(missing, create=True):
        pass


def test_a_file_that_anyone_may_write_is_refused(make_token: MakeToken, tokens_file: Path) -> None:
    """Whoever can write it can let themselves in."""
    make_token()
    tokens_file.chmod(0o666)
    with pytest.raises(AccessError, match=r"anyone may write it \(mode 0666\)"):
        read(tokens_file)
    tokens_file.chmod(0o644)
    assert len(read(tokens_file).token) == 1


def test_times_are_kept_in_utc(make_token: MakeToken, tokens_file: Path) -> None:
    make_token(expires=datetime(2027, 1, 1, tzinfo=UTC) + timedelta(hours=2))
    assert "expires = 2027-01-01T02:00:00Z" in tokens_file.read_text()
