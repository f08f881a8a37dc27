"""The page on a real loopback socket, in the test's own event loop or in a thread of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from sse_starlette.sse import AppStatus

from gptjet.service.apps.sentiment.web.app import create_app
from gptjet.service.apps.sentiment.web.run import PageServer, listen
from gptjet.service.apps.sentiment.web.settings import WebSettings

PATIENCE_S = 20.0
# Roomy, so that only the tests of limits meet them.
ROOMY: dict[str, Any] = {"requests_per_minute": 6000, "burst": 1000, "streams_per_client": 100}


def _load(name: str) -> ModuleType:
    # Test folders are no packages: --import-mode=importlib.
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


fake_source = _load("fake_source")


@dataclass
class Page:
    """A page that runs: its address, an HTTP client on it, and where its answers come from."""

    url: str
    http: httpx2.AsyncClient
    source: Any

    async def events(self, path: str, **request: Any) -> list[tuple[str, dict[str, Any]]]:
        """All events of an answer."""
        async with self.http.stream("POST", path, **request) as response:
            assert response.status_code == 200, await response.aread()
            return [event async for event in read_events(response)]

    async def classify(self, text: str, **fields: Any) -> list[tuple[str, dict[str, Any]]]:
        return await self.events("/api/classify", json={"text": text, **fields})

    async def refusal(self, path: str, **request: Any) -> tuple[int, dict[str, Any]]:
        """(status, error) of a request that is refused."""
        response = await self.http.post(path, **request)
        return response.status_code, response.json()["error"]


async def read_events(response: httpx2.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


@pytest.fixture(autouse=True)
def _streams_may_run() -> Iterator[None]:
    """sse-starlette ends every stream of the process once a server of it was told to stop."""
    AppStatus.should_exit = False
    yield
    AppStatus.should_exit = False


@pytest.fixture
def source() -> Any:
    return fake_source.FakeSource()


@pytest.fixture
async def open_page(source: Any) -> AsyncIterator[Callable[..., Awaitable[Page]]]:
    """`await open_page(max_chars=100, ...)`: the page on `source`, with these settings."""
    stops: list[Callable[[], Awaitable[None]]] = []

    async def start(*, on: Any = None, **settings: Any) -> Page:
        used = source if on is None else on
        listening = listen("127.0.0.1", 0)
        server = PageServer(
            create_app(lambda: used, WebSettings(**ROOMY | settings)), lambda: None
        )
        running = asyncio.create_task(server.serve(sockets=[listening]))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        http = httpx2.AsyncClient(base_url=url, timeout=PATIENCE_S)

        async def stop() -> None:
            await http.aclose()
            server.should_exit = True
            await running
            listening.close()

        stops.append(stop)
        async with asyncio.timeout(PATIENCE_S):
            while not server.started:
                await asyncio.sleep(0.01)
        return Page(url, http, used)

    yield start
    for stop in stops:
        await stop()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that is certain to come; not a measure of how fast it comes."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(name="until")
def _until() -> Callable[[Callable[[], bool]], Awaitable[None]]:
    return until


# ---- in a browser -------------------------------------------------------------------------------


@dataclass
class LivePage:
    """A page in a thread with an event loop of its own, for tests that drive a browser."""

    url: str
    source: Any
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], Any]) -> Any:
        """Run `function` in the page's event loop, where its source may be changed."""

        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(PATIENCE_S)


@pytest.fixture
def live_page(source: Any) -> Iterator[Callable[..., LivePage]]:
    """`live_page(max_chars=100, ...)`: the page on `source`, with these settings."""
    ends: list[Callable[[], None]] = []

    def start(**settings: Any) -> LivePage:
        listening = listen("127.0.0.1", 0)
        started = threading.Event()
        server = PageServer(
            create_app(lambda: source, WebSettings(**ROOMY | settings)), started.set
        )
        loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=lambda: loop.run_until_complete(server.serve(sockets=[listening])), daemon=True
        )
        thread.start()
        assert started.wait(PATIENCE_S)

        def end() -> None:
            server.should_exit = True
            thread.join(PATIENCE_S)
            listening.close()
            loop.close()

        ends.append(end)
        return LivePage(f"http://127.0.0.1:{listening.getsockname()[1]}", source, loop)

    yield start
    for end in ends:
        end()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, one for all tests of a worker; skips where there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        if os.environ.get("CI"):
            pytest.fail("CI needs Chromium: apt-get install chromium chromium-driver")
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    running = webdriver.Chrome(options=options, service=service)
    running.set_page_load_timeout(60)
    running.downloads = downloads
    yield running
    running.quit()
