"""The page on real GPTJet servers: what leaving costs there, and what is seen when one dies."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.apps.sentiment.web.source import GrpcSource
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import AsyncClient

OpenPage = Any
StartServer = Any
PATIENCE_S = 30.0


def grpc_source(target: str, template: Any) -> GrpcSource:
    return GrpcSource(AsyncClient(target, retry=None), [template], max_chars=1000)


async def test_words_of_a_real_server_come_with_its_label_and_its_timings(
    open_page: OpenPage, start_server: StartServer, mock_template: Any
) -> None:
    """After "Label:" the mock finds "a" likeliest, and goes on with the alphabet."""
    running = await start_server()
    page = await open_page(on=grpc_source(running.target, mock_template))
    events = await page.classify("x")
    result = events[-1][1]
    assert (events[0][1]["label"], result["label"]) == ("first", "first")
    assert result["explanation"].startswith("abcdefghijklmnopqrstuvwxyzab")
    assert len(result["explanation"]) == 120
    assert result["ttft_ms"] > 0
    assert result["model"] == "toy"
    state = (await page.http.get("/api/state")).json()
    assert (state["state"], state["model"]["max_context"]) == ("ready", 512)
    assert (await page.http.post("/api/tokens", json={"text": "four"})).json() == {"tokens": 4}


async def test_leaving_the_page_ends_the_servers_request(
    open_page: OpenPage, start_server: StartServer, mock_template: Any
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=50))
    page = await open_page(on=grpc_source(running.target, mock_template))
    async with page.http.stream("POST", "/api/classify", json={"text": "x"}) as response:
        async for line in response.aiter_lines():
            if line == "event: explanation":
                break
    await running.request_line(method="GenerateStream", code="CANCELLED")
    await running.until(lambda: not running.backend.cached)  # and its KV cache is free


async def test_leaving_a_file_ends_the_servers_requests(
    open_page: OpenPage, start_server: StartServer, mock_template: Any
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=20))
    page = await open_page(on=grpc_source(running.target, mock_template), rows_in_flight=2)
    content = b"text\n" + b"x\n" * 50
    async with page.http.stream(
        "POST", "/api/table/classify", content=content, headers={"content-type": "text/csv"}
    ) as response:
        lines = response.aiter_lines()  # once it is gone, so is the response
        await anext(lines)
        await running.until(lambda: len(running.backend.cached) == 2)
    await running.request_line(method="GenerateStream", code="CANCELLED")
    await running.until(lambda: not running.backend.cached)


async def test_a_server_without_its_model_is_loading(
    open_page: OpenPage, start_server: StartServer, mock_template: Any
) -> None:
    running = await start_server(attach=False)
    page = await open_page(on=grpc_source(running.target, mock_template))
    assert (await page.http.get("/api/state")).json()["state"] == "loading"
    ((name, error),) = await page.classify("x")
    assert (name, error["code"]) == ("error", "loading")
    assert error["retry_after_s"] > 0


async def test_no_server_at_all_is_told_without_its_address(
    open_page: OpenPage, mock_template: Any
) -> None:
    page = await open_page(on=grpc_source("127.0.0.1:1", mock_template))
    assert (await page.http.get("/api/state")).json()["state"] == "gone"
    ((name, error),) = await page.classify("x")
    assert (name, error["code"], error["message"]) == (
        "error",
        "gone",
        "the model server does not answer",
    )


@pytest.fixture
def mock_server() -> Iterator[Any]:
    """A server in a process of its own, fifty milliseconds a token."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("mock_server.py")), "50"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.target = process.stdout.readline().strip()  # type: ignore[attr-defined]
    yield process
    process.kill()
    process.communicate()


@pytest.mark.xdist_group("chromium")
def test_a_server_process_that_is_killed_in_the_middle_is_told_in_the_browser(
    live_page: Any, browser: Any, mock_server: Any, mock_template: Any
) -> None:
    page = live_page(on=lambda: grpc_source(mock_server.target, mock_template))
    browser.open(page.url)
    browser.type("x")
    browser.click("#classify")
    browser.until("document.querySelector('#explanation').textContent.length > 5")
    assert browser.text("#verdict") == "First"
    mock_server.kill()
    browser.phase("failed")
    assert browser.text("#result-note") == (
        "The model server went away in the middle of the answer, which is incomplete."
    )
    assert browser.text("#explanation").startswith("abcdef")
    assert browser.is_shown("#again")
    browser.until("document.querySelector('#server').dataset.state === 'gone'")
    assert "Trying again" in browser.text("#server-words")
