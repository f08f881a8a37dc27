"""`gptjet tokens`: makes, lists and revokes; the token itself is seen once."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import Result

from gptjet.service.commands.terminal import ExitCode
from gptjet.service.rpc.access.tokens_file import read

Invoke = Callable[..., Awaitable[Result]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


async def test_a_token_is_printed_alone_and_its_hash_is_kept(invoke: Invoke, file: Path) -> None:
    result = await invoke(
        *("tokens", "create", "web", "--file", str(file), "--expires-in", "90d"),
        *("--requests-per-minute", "60", "--tokens-per-minute", "5000"),
        *("--concurrent-streams", "4", "--scope", "generate", "--scope", "admin"),
    )
    assert result.exit_code == ExitCode.OK
    token = result.stdout.removesuffix("\n")
    assert "\n" not in token
    (kept,) = read(file).token
    assert kept.sha256 == hashlib.sha256(token.encode()).hexdigest()
    assert token not in file.read_text()
    assert (kept.name, kept.scopes) == ("web", ["generate", "admin"])
    assert (kept.requests_per_minute, kept.tokens_per_minute) == (60, 5000)
    assert kept.concurrent_streams == 4
    assert kept.expires is not None
    assert abs(kept.expires - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=5)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "shown this once" in result.stderr


async def test_list_shows_states_and_limits_and_nothing_that_lets_anybody_in(
    invoke: Invoke, file: Path
) -> None:
    where = ("--file", str(file))
    tokens = [(await invoke("tokens", "create", name, *where)).stdout.strip() for name in "abc"]
    assert (await invoke("tokens", "revoke", "a", *where)).exit_code == ExitCode.OK
    identity = read(file).token[1].id
    result = await invoke("tokens", "revoke", identity, *where)
    assert result.stdout == f"revoked b (id {identity})\n"
    table = (await invoke("tokens", "list", *where)).stdout.splitlines()
    assert [line.split()[0] for line in table] == ["NAME", "a", "b", "c"]
    assert "revoked 20" in table[1]
    assert "good" in table[3]
    shown = (await invoke("tokens", "list", "--json", *where)).stdout
    listed = json.loads(shown)
    assert [entry["usable"] for entry in listed] == [False, False, True]
    assert all("sha256" not in entry for entry in listed)
    for token, kept in zip(tokens, read(file).token, strict=True):
        assert token.rpartition("_")[2] not in shown + "".join(table)
        assert kept.sha256 not in shown + "".join(table)


async def test_a_name_is_free_again_after_its_token_is_revoked(invoke: Invoke, file: Path) -> None:
    where = ("--file", str(file))
    await invoke("tokens", "create", "web", *where)
    result = await invoke("tokens", "create", "web", *where)
    assert result.exit_code == ExitCode.USAGE
    assert "has a token 'web'; revoke it first" in result.stderr
    assert len(read(file).token) == 1
    await invoke("tokens", "revoke", "web", *where)
    assert (await invoke("tokens", "create", "web", *where)).exit_code == ExitCode.OK
    assert [token.revoked is None for token in read(file).token] == [False, True]
    assert (await invoke("tokens", "revoke", "web", *where)).exit_code == ExitCode.OK
    result = await invoke("tokens", "revoke", "web", *where)
    assert result.exit_code == ExitCode.USAGE
    assert "has no token 'web' that is not revoked" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("create", "a b"), "NAME: must be 1 to 64 letters"),
        (("create", "x", "--requests-per-minute", "0"), "--requests-per-minute: must be greater"),
        (("create", "x", "--tokens-per-minute", "1000000001"), "--tokens-per-minute: must be less"),
        (("create", "x", "--expires-in", "0d"), "--expires-in: must be like 90d, 12h or 30m"),
        (("create", "x", "--expires-in", "soon"), "at most 36500d, got 'soon'"),
        (("create", "x", "--expires-in", "999999999d"), "at most 36500d"),
        (("create", "x", "--scope", "root"), "'root' is not one of"),
        (("list",), "No such file or directory; make one with `gptjet tokens create`"),
        (("revoke", "x"), "No such file or directory"),
    ],
)
async def test_what_cannot_be_is_named_and_leaves_no_file(
    invoke: Invoke, file: Path, arguments: tuple[str, ...], problem: str
) -> None:
    result = await invoke("tokens", *arguments, "--file", str(file))
    assert result.exit_code == ExitCode.USAGE
    assert problem in result.stderr
    assert not result.stdout
    assert list(file.parent.iterdir()) == []


async def test_the_file_comes_from_the_servers_variable_too(invoke: Invoke, file: Path) -> None:
    await invoke("tokens", "create", "web", env={"GPTJET_TOKENS_FILE": str(file)})
    assert len(read(file).token) == 1
    result = await invoke("tokens", "list")
    assert result.exit_code == ExitCode.USAGE
    assert "--file" in result.stderr


async def test_a_broken_file_is_named_and_left_as_it_is(invoke: Invoke, file: Path) -> None:
    file.write_text("[[token]]\nname = 3\n")
    for arguments in (("create", "web"), ("list",), ("revoke", "web")):
        result = await invoke("tokens", *arguments, "--file", str(file))
        assert result.exit_code == ExitCode.USAGE
        assert "token[0]: id: Field required" in result.stderr
        assert not result.stdout, "no token is shown that is not kept"
    assert file.read_text() == "[[token]]\nname = 3\n"
