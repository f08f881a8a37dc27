"""The command line beside a server of the test's event loop, and in processes of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from typer.testing import CliRunner, Result

from gptjet.service.cli import app

Invoke = Callable[..., Awaitable[Result]]
Start = Callable[..., Awaitable[asyncio.subprocess.Process]]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("GPTJET_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def invoke() -> Invoke:
    """`await invoke("generate", "abc", stdin=b"...", env={...})`: in a thread of this process."""

    async def run(
        *arguments: str, stdin: bytes | None = None, env: dict[str, str] | None = None
    ) -> Result:
        return await asyncio.to_thread(
            CliRunner().invoke, app, arguments, input=stdin, env={"COLUMNS": "200"} | (env or {})
        )

    return run


@pytest.fixture
async def start_cli() -> AsyncIterator[Start]:
    """`await start_cli("generate", "abc")`: a process, for signals and pipes; killed at the end."""
    started: list[asyncio.subprocess.Process] = []

    async def start(*arguments: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gptjet.service.cli", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            # With it every write is a flush, and nobody would see that ours is missing.
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()
