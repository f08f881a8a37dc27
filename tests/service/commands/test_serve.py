"""`gptjet serve`: its flags are the server's settings, and its process ends as it says."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from typer.testing import Result

from gptjet.service.cli import load_command
from gptjet.service.client import AsyncClient
from gptjet.service.commands import server_settings
from gptjet.service.commands.terminal import ExitCode
from gptjet.service.config import ServerConfig

Invoke = Callable[..., Awaitable[Result]]
Start = Callable[..., Awaitable[asyncio.subprocess.Process]]

OWN_FLAGS = {"config", "print_config", "as_json", "help"}


def test_flags_and_settings_are_the_same() -> None:
    flags = {parameter.name for parameter in load_command("serve").params}
    assert flags - OWN_FLAGS == set(ServerConfig.model_fields)


def test_every_flag_shows_what_its_setting_says_with_its_limits_and_default() -> None:
    texts = {parameter.name: parameter.help for parameter in load_command("serve").params}
    for name, field in ServerConfig.model_fields.items():
        assert texts[name].startswith(field.description)
    assert "; 0 to 65535 " in texts["port"]
    assert texts["port"].endswith("[default: 50051][/dim]")
    assert texts["reflection"].endswith("[default: on][/dim]")
    assert "default: None" not in "".join(texts.values())


def test_panels_name_settings_that_exist() -> None:
    named = [name for names in server_settings._PANELS.values() for name in names]
    assert set(named) <= set(ServerConfig.model_fields)
    assert len(named) == len(set(named))


async def test_print_config_says_where_each_value_comes_from(
    invoke: Invoke, tmp_path: Path
) -> None:
    file = tmp_path / "gptjet.toml"
    file.write_text('host = "0.0.0.0"\nport = 1\nmax_n = 2\n')
    result = await invoke(
        *("serve", "--print-config", "--json", "--config", str(file), "--port", "3"),
        env={"GPTJET_MAX_N": "4", "GPTJET_PORT": "5"},
    )
    shown = json.loads(result.stdout)
    assert shown["port"] == {"value": 3, "source": "--port"}
    assert shown["max_n"] == {"value": 4, "source": "GPTJET_MAX_N"}
    assert shown["host"] == {"value": "0.0.0.0", "source": str(file)}
    assert shown["model"] == {"value": "embedded", "source": "default"}
    assert set(shown) == set(ServerConfig.model_fields)


async def test_printed_settings_are_a_file_that_gives_the_same_settings(
    invoke: Invoke, tmp_path: Path
) -> None:
    flags = ["--port", "7", "--no-reflection", "--grace-s", "1.5", "--model", 'a "quoted"\\name']
    first = (await invoke("serve", "--print-config", *flags)).stdout
    assert tomllib.loads(first)["model"] == 'a "quoted"\\name'
    file = tmp_path / "gptjet.toml"
    file.write_text(first)
    again = (await invoke("serve", "--dry-run", "--config", str(file))).stdout
    assert tomllib.loads(again) == tomllib.loads(first)
    assert "# kv_cache_tokens is unset" in first
    assert re.search(r"^port = 7 +# --port$", first, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "env", "problems"),
    [
        (
            ["--port", "70000", "--max-n", "0"],
            {},
            ["--port: must be less than or equal to 65535, got 70000", "--max-n: must be", "got 0"],
        ),
        ([], {"GPTJET_PROT": "1"}, ["GPTJET_PROT: there is no such setting; did you mean port"]),
        (["--config", "/nonexistent.toml"], {}, ["/nonexistent.toml: No such file"]),
        (["--tls-cert", "x.pem"], {}, ["tls_cert and tls_key must be given together"]),
        (["--json"], {}, ["--json is for --print-config"]),
        (["--log-level", "loud"], {}, ["'--log-level'", "'loud' is not one of"]),
        (["--port", "many"], {}, ["'--port'", "integer"]),
    ],
)
async def test_bad_settings_are_named_with_their_limit_and_end_with_code_2(
    invoke: Invoke, flags: list[str], env: dict[str, str], problems: list[str]
) -> None:
    result = await invoke("serve", *flags, env=env)
    assert result.exit_code == ExitCode.USAGE
    assert not result.stdout
    for problem in problems:
        assert problem in result.stderr


async def test_the_clients_variable_is_no_unknown_setting_of_the_server(invoke: Invoke) -> None:
    result = await invoke("serve", "--print-config", env={"GPTJET_SERVER": "elsewhere:1"})
    assert result.exit_code == ExitCode.OK


async def _until_port_file(path: Path) -> int:
    async with asyncio.timeout(30):
        while not path.exists():
            await asyncio.sleep(0.02)
    return int(path.read_text())


async def test_it_serves_until_ctrl_c_and_exits_0(start_cli: Start, tmp_path: Path) -> None:
    file = tmp_path / "port"
    process = await start_cli(
        *("serve", "--backend", "mock", "--port", "0", "--port-file", str(file))
    )
    client = AsyncClient(f"127.0.0.1:{await _until_port_file(file)}")
    await client.wait_until_serving(20)
    assert (await client.generate("abc", max_new_tokens=3)).text == "def"
    await client.close()
    process.send_signal(signal.SIGINT)  # the demo's test sends SIGTERM
    assert await asyncio.wait_for(process.wait(), 20) == ExitCode.OK


async def _ends_with_one_error_line(process: asyncio.subprocess.Process) -> str:
    _, log = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == ExitCode.USAGE
    lines = [line for line in log.decode().splitlines() if "[error" in line]
    assert len(lines) == 1, log.decode()
    assert "Traceback" not in log.decode()
    return lines[0]


async def test_a_port_in_use_is_one_line_and_code_2(start_cli: Start) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        process = await start_cli("serve", "--backend", "mock", "--port", port)
        line = await _ends_with_one_error_line(process)
    assert f"port {port} on 127.0.0.1 is in use" in line


async def test_a_missing_checkpoint_is_one_line_and_code_2(
    start_cli: Start, tmp_path: Path
) -> None:
    missing = str(tmp_path / "nothing")
    process = await start_cli("serve", "--port", "0", "--model", missing)
    assert missing in await _ends_with_one_error_line(process)
