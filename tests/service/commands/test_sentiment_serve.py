"""`gptjet sentiment serve` as a process: the page, its model server, signals, and refusals."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from gptjet.service.apps.sentiment.web.run import address

Start = Any
Invoke = Any
PATIENCE_S = 120.0


async def page_of(process: asyncio.subprocess.Process) -> httpx2.AsyncClient:
    """A client of the page at the address that the process prints."""
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        line = (await process.stdout.readline()).decode()
    assert line.startswith("The page is at http://127.0.0.1:"), line
    return httpx2.AsyncClient(base_url=line.split()[4], timeout=PATIENCE_S)


async def until_state(http: httpx2.AsyncClient, state: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await http.get("/api/state")).json()["state"] != state:
            await asyncio.sleep(0.1)


def children(process: asyncio.subprocess.Process) -> list[Any]:
    return psutil.Process(process.pid).children()


async def test_one_command_serves_the_page_on_the_embedded_checkpoint_and_stops_cleanly(
    start_cli: Start,
) -> None:
    process = await start_cli("sentiment", "serve", "--port", "0")
    async with await page_of(process) as http:
        assert "How does this text sound?" in (await http.get("/")).text
        await until_state(http, "ready")
        body = {"text": "The food was wonderful and the service was extraordinary."}
        answer = (await http.post("/api/classify", json=body)).text
        assert '"label": "positive"' in answer
        assert "event: explanation" in answer
        assert "event: result" in answer
    (server,) = children(process)
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(PATIENCE_S):
        assert await process.wait() == 0
    assert not server.is_running()


async def test_a_model_server_that_is_killed_is_started_again_at_the_same_address(
    start_cli: Start,
) -> None:
    process = await start_cli("sentiment", "serve", "--port", "0", "--backend", "mock")
    async with await page_of(process) as http:
        await until_state(http, "ready")
        (server,) = children(process)
        server.kill()
        await until_state(http, "gone")
        await until_state(http, "ready")
        (second,) = children(process)
        assert second.pid != server.pid
    process.send_signal(signal.SIGINT)
    async with asyncio.timeout(PATIENCE_S):
        assert await process.wait() == 0
    assert process.stderr is not None
    notes = (await process.stderr.read()).decode()
    assert "the model server ended with exit code -9; starting it again in 1 s" in notes
    assert "Traceback" not in notes


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death")
async def test_a_page_that_is_killed_leaves_no_model_server(start_cli: Start) -> None:
    process = await start_cli("sentiment", "serve", "--port", "0", "--backend", "mock")
    async with await page_of(process) as http:
        await until_state(http, "ready")
    (server,) = children(process)
    process.kill()
    await process.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, [server], timeout=15)
    for left in alive:
        left.kill()
    assert not alive


async def test_stopping_ends_an_answer_that_is_being_made(start_cli: Start, tmp_path: Path) -> None:
    template = tmp_path / "endless.toml"
    template.write_text(
        'name = "endless"\nversion = "1"\nprompt = "{text}:"\nanswer = "{explanation}"\n'
        "max_new_tokens = 400\nmax_text_tokens = 50\n"
        '[[labels]]\nname = "a"\ncontinuation = "a"\n[[labels]]\nname = "b"\ncontinuation = "b"\n',
        encoding="utf-8",
    )
    process = await start_cli("sentiment", "serve", "--port", "0", "--template", str(template))
    async with await page_of(process) as http:
        await until_state(http, "ready")
        async with http.stream("POST", "/api/classify", json={"text": "x"}) as response:
            lines = response.aiter_lines()
            await anext(lines)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE_S):
                assert await process.wait() == 0


async def test_a_signal_while_the_model_server_starts_leaves_nothing_behind(
    start_cli: Start,
) -> None:
    process = await start_cli("sentiment", "serve", "--port", "0")
    async with asyncio.timeout(PATIENCE_S):
        while not children(process):
            await asyncio.sleep(0.02)
        (server,) = children(process)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert not server.is_running()


async def test_a_model_that_cannot_be_loaded_ends_the_command(
    start_cli: Start, tmp_path: Path
) -> None:
    """The model server listens before it loads; what it cannot load, it never can."""
    process = await start_cli(
        "sentiment", "serve", "--port", "0", "--model", str(tmp_path / "nothing")
    )
    async with asyncio.timeout(PATIENCE_S):
        code = await process.wait()
    assert code == 2
    assert process.stderr is not None
    assert "nothing" in (await process.stderr.read()).decode()


async def test_a_port_in_use_is_told(invoke: Invoke) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = await invoke("sentiment", "serve", "--port", str(port), "--server", "x:1")
    assert result.exit_code == 2
    assert f"--port: {port} is in use on 127.0.0.1; choose another, or 0 for any" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "nope"], "--template: no template is named 'nope'"),
        (
            ["--template", "embedded", "--template", "embedded"],
            "--template: two templates are named 'embedded'",
        ),
        (["--server", "x:1", "--model", "y"], "--model is for a server beside the page; x:1 has"),
        (["--tls"], "--tls needs --server"),
        (["--host", "192.0.2.1"], "--host: cannot listen on 192.0.2.1"),
        (["--host", "no such host"], "--host: cannot listen on no such host"),
    ],
)
async def test_flags_that_cannot_be_are_refused_by_name(
    invoke: Invoke, arguments: list[str], message: str
) -> None:
    result = await invoke("sentiment", "serve", "--port", "0", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


async def test_waiting_for_a_server_that_does_not_come_ends_the_command(start_cli: Start) -> None:
    arguments = ["--server", "127.0.0.1:1", "--wait", "0.2"]
    process = await start_cli("sentiment", "serve", "--port", "0", *arguments)
    async with asyncio.timeout(PATIENCE_S):
        assert await process.wait() == 3
    assert process.stderr is not None
    assert "no server answers at 127.0.0.1:1" in (await process.stderr.read()).decode()


def test_the_address_is_one_that_a_browser_here_can_open() -> None:
    assert [address(host, 1) for host in ("127.0.0.1", "0.0.0.0", "::1", "::", "box")] == [
        "http://127.0.0.1:1/",
        "http://127.0.0.1:1/",
        "http://[::1]:1/",
        "http://[::1]:1/",
        "http://box:1/",
    ]
