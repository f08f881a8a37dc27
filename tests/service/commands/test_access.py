"""Commands that show a token, `gptjet admin`, and what `gptjet serve` shows of its settings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from gptjet.service.commands.connection import ConnectionFlags
from gptjet.service.commands.terminal import ExitCode
from gptjet.service.rpc.access.tokens import new_token
from gptjet.service.rpc.access.tokens_file import editing

Invoke = Callable[..., Awaitable[Result]]


def add(path: Path, name: str, **fields: Any) -> str:
    text, kept = new_token(name, **fields)
    with editing(path, create=True) as tokens:
        tokens.append(kept)
    return text


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    return tmp_path / "tokens.toml"


@pytest.fixture
def token(tokens_file: Path) -> str:
    return add(tokens_file, "web")


@pytest.fixture
async def target(start_server: Any, token: str, tokens_file: Path) -> str:
    return (await start_server(tokens_file=tokens_file)).target


async def test_a_token_is_taken_from_flag_file_and_environment(
    invoke: Invoke, target: str, token: str, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(token + "\n")
    wrong = tmp_path / "wrong"
    wrong.write_text("nonsense")
    ways: list[tuple[tuple[str, ...], dict[str, str]]] = [
        (("--token", token), {}),
        (("--token-file", str(file)), {}),
        ((), {"GPTJET_TOKEN": token}),
        ((), {"GPTJET_TOKEN_FILE": str(file)}),
        # A flag wins over the environment, the token over its file.
        (("--token-file", str(file)), {"GPTJET_TOKEN": "nonsense"}),
        (("--token", token), {"GPTJET_TOKEN_FILE": str(wrong)}),
        ((), {"GPTJET_TOKEN": token, "GPTJET_TOKEN_FILE": str(wrong)}),
    ]
    for flags, env in ways:
        result = await invoke("models", "--server", target, *flags, env=env)
        assert result.exit_code == ExitCode.OK, (flags, env, result.stderr)
        assert token not in result.output


async def test_without_a_good_token_the_server_refuses_and_says_why(
    invoke: Invoke, target: str, token: str
) -> None:
    result = await invoke("generate", "abc", "--server", target)
    assert result.exit_code == ExitCode.REFUSED
    assert f"{target} refused: a bearer token is needed" in result.stderr
    result = await invoke("generate", "abc", "--server", target, "--token", "nonsense")
    assert result.exit_code == ExitCode.REFUSED
    assert "the token is not valid" in result.stderr
    assert "nonsense" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "abc", "--max-new-tokens", "2"),
        ("score", "ab", "-c", "c", "-c", "d"),
        ("sentiment", "abc", "--no-explain"),
        ("models",),
    ],
)
async def test_every_command_that_asks_a_server_shows_the_token(
    invoke: Invoke, target: str, token: str, arguments: tuple[str, ...]
) -> None:
    result = await invoke(*arguments, "--server", target, "--token", token)
    assert result.exit_code == ExitCode.OK, result.stderr
    assert (await invoke(*arguments, "--server", target)).exit_code == ExitCode.REFUSED


async def test_load_shows_the_token_and_keeps_it_out_of_its_results(
    start_cli: Any, target: str, token: str, tmp_path: Path
) -> None:
    out, file = tmp_path / "load.jsonl", tmp_path / "token"
    file.write_text(token)
    process = await start_cli(
        *("load", "--requests", "2", "--concurrency", "1", "--out", str(out), "--json"),
        *("--server", target, "--token-file", str(file)),
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == ExitCode.OK, stderr.decode()
    assert json.loads(stdout)["statuses"] == {"OK": 2}
    assert token not in out.read_text()


@pytest.mark.parametrize(
    ("flags", "env", "problem"),
    [
        (
            ("--server", "gpu-box:1", "--token", "secret-text"),
            {},
            "--token: a token is not sent in plain text to gpu-box:1",
        ),
        (
            ("--server", "gpu-box:1"),
            {"GPTJET_TOKEN": "secret-text"},
            "GPTJET_TOKEN: a token is not sent in plain text to gpu-box:1",
        ),
        (("--token", "a b secret-text"), {}, "--token: the token must be 1 to 4096 visible"),
        (("--token", "x", "--token-file", "y"), {}, "--token and --token-file: one of the two"),
        (("--token-file", "/nonexistent"), {}, "--token-file: /nonexistent: No such file"),
        ((), {"GPTJET_TOKEN_FILE": "/nonexistent"}, "GPTJET_TOKEN_FILE: /nonexistent: No such"),
        (("--tls-cert", "x"), {}, "--tls-cert and --tls-key must be given together"),
    ],
)
async def test_a_token_that_cannot_be_sent_ends_the_command_with_code_2(
    invoke: Invoke, flags: tuple[str, ...], env: dict[str, str], problem: str
) -> None:
    result = await invoke("models", *flags, env=env)
    assert result.exit_code == ExitCode.USAGE
    assert problem in result.stderr
    assert "secret-text" not in result.output


async def test_plain_text_to_another_machine_can_be_allowed(invoke: Invoke) -> None:
    result = await invoke(
        *("models", "--server", "192.0.2.1:1", "--token", "x", "--timeout", "0.2"),
        "--allow-plaintext-token",
    )
    assert result.exit_code in (ExitCode.TIMEOUT, ExitCode.UNREACHABLE)


async def test_help_does_not_show_a_token_of_the_environment(invoke: Invoke) -> None:
    for command in (("models",), ("admin", "status")):
        result = await invoke(*command, "--help", env={"GPTJET_TOKEN": "secret-text"})
        assert "--token" in result.stdout
        assert "secret-text" not in result.output
    assert "secret-text" not in repr(ConnectionFlags(token="secret-text"))


async def test_serve_shows_its_settings_and_takes_them_from_flag_environment_and_file(
    invoke: Invoke, tmp_path: Path
) -> None:
    config = tmp_path / "gptjet.toml"
    config.write_text('tokens_file = "from-file"\nadmin_port = 1\ntoken_requests_per_minute = 11\n')
    result = await invoke(
        *("serve", "--print-config", "--json", "--config", str(config), "--admin-port", "3"),
        env={
            "GPTJET_ADMIN_PORT": "2",
            "GPTJET_TOKEN_REQUESTS_PER_MINUTE": "22",
            "GPTJET_OPEN_HEALTH": "true",
            # What a health check in the same container shows is no setting of the server.
            "GPTJET_TOKEN": "secret-text",
            "GPTJET_TOKEN_FILE": "/a/token",
            "GPTJET_ADMIN": "127.0.0.1:1",
        },
    )
    assert result.exit_code == ExitCode.OK, result.stderr
    shown = json.loads(result.stdout)
    assert shown["admin_port"] == {"value": 3, "source": "--admin-port"}
    assert shown["token_requests_per_minute"]["value"] == 22
    assert shown["tokens_file"] == {"value": "from-file", "source": str(config)}
    assert shown["open_health"]["value"] is True
    assert "secret-text" not in result.stdout
    help_text = (await invoke("serve", "--help")).stdout
    for flag in ("--tokens-file", "--open-health", "--admin-socket", "--access-reload-s"):
        assert flag in help_text
    panels = [help_text.index(f" {name} ─") for name in ("Model", "Network", "TLS", "Access")]
    assert panels == sorted(panels)


async def test_admin_shows_status_reloads_and_sets_the_log_level(
    invoke: Invoke, start_server: Any, token: str, tokens_file: Path, tmp_path: Path
) -> None:
    operator = add(tokens_file, "op", scopes=["admin"])
    running = await start_server(
        tokens_file=tokens_file, admin_port=0, token_concurrent_streams=9, access_reload_s=3600.0
    )
    server = f"127.0.0.1:{running.server.admin_port}"

    async def admin(*arguments: str, shown: str = operator) -> Result:
        return await invoke(
            "admin", *arguments, env={"GPTJET_ADMIN": server, "GPTJET_TOKEN": shown}
        )

    table = (await admin("status")).stdout
    assert "serving, 0 running, 0 waiting" in table
    assert running.target in table
    assert "0 in flight of 9" in table
    status = json.loads((await admin("status", "--json")).stdout)
    assert [entry["name"] for entry in status["tokens"]] == ["web", "op"]
    assert status["certificate"] is None
    assert (await admin("reload")).stdout == "tokens: unchanged\n"
    add(tokens_file, "new")
    assert (await admin("reload")).stdout == "tokens: reloaded\n"
    tokens_file.write_text("broken")
    result = await admin("reload")
    assert result.exit_code == ExitCode.REFUSED
    assert "tokens: refused: " in result.stdout
    assert "not valid TOML" in (await admin("status")).stdout
    before = (await admin("log-level")).stdout.strip()
    try:
        assert (await admin("log-level", "error")).stdout == f"error (was {before})\n"
        assert (await admin("log-level")).stdout == "error\n"
    finally:
        await admin("log-level", before)
    assert (await admin("log-level", "loud")).exit_code == ExitCode.USAGE
    result = await admin("drain", "--grace-s", "9999")
    assert result.exit_code == ExitCode.USAGE
    assert "grace_s: must be 0 to 3600, got 9999" in result.stderr
    for shown, reason in ((token, "lacks the scope 'admin'"), ("x", "the token is not valid")):
        result = await admin("drain", shown=shown)
        assert result.exit_code == ExitCode.REFUSED
        assert reason in result.stderr
    assert not running.server.stop_asked.is_set()
    result = await admin("drain", "--grace-s", "1.5")
    assert result.stdout == "draining: 0 running, 0 waiting, 1.5 s of grace\n"
    assert running.server.stop_asked.is_set()


async def test_admin_says_when_nobody_or_somebody_else_answers(invoke: Invoke, target: str) -> None:
    result = await invoke("admin", "status", "--admin", "unix:/nonexistent.sock")
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "no administration answers at unix:/nonexistent.sock" in result.stderr
    result = await invoke("admin", "status")
    assert result.exit_code == ExitCode.USAGE
    assert "--admin" in result.stderr


async def test_admin_at_the_callers_port_is_named(invoke: Invoke, start_server: Any) -> None:
    running = await start_server()
    result = await invoke("admin", "status", "--admin", running.target)
    assert result.exit_code == ExitCode.FAILURE
    assert "is no administration: not the port that callers use?" in result.stderr


async def test_admin_drain_waits_for_the_end(
    invoke: Invoke, start_cli: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    socket = tmp_path_factory.mktemp("s") / "a.sock"
    process = await start_cli(
        *("serve", "--backend", "mock", "--port", "0", "--admin-socket", str(socket))
    )
    async with asyncio.timeout(60):
        while not socket.exists():
            await asyncio.sleep(0.05)
    result = await invoke("admin", "drain", "--wait", "--admin", f"unix:{socket}")
    assert result.exit_code == ExitCode.OK, result.stderr
    assert await asyncio.wait_for(process.wait(), 20) == ExitCode.OK
