"""The page on a real loopback socket, in the test's own event loop or in a thread of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import pytest
from sse_starlette.sse import AppStatus

from gptjet.service.apps.sentiment.template import parse_template
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
        server = PageServer(create_app(lambda: used, WebSettings(**ROOMY | settings)), lambda: None)
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


MOCK_TEMPLATE = """
name = "alphabet"
version = "1"
prompt = "Text: {text}\\nLabel:"
answer = "{explanation}"
max_new_tokens = 120
[[labels]]
name = "first"
continuation = "ab"
[[labels]]
name = "second"
continuation = "b"
"""


@pytest.fixture
def mock_template() -> Any:
    """For the mock backend, which goes on with the alphabet: all of it is the explanation."""
    return parse_template(MOCK_TEMPLATE.encode(), "alphabet")


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
    """`live_page(on=make_source, max_chars=100, ...)`: the page; on `source` by default."""
    ends: list[Callable[[], None]] = []

    def start(*, on: Callable[[], Any] | None = None, **settings: Any) -> LivePage:
        listening = listen("127.0.0.1", 0)
        started = threading.Event()
        server = PageServer(
            create_app(on or (lambda: source), WebSettings(**ROOMY | settings)), started.set
        )
        loops: list[asyncio.AbstractEventLoop] = []

        async def serve() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listening])

        thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        thread.start()
        assert started.wait(PATIENCE_S)

        def end() -> None:
            server.should_exit = True
            thread.join(PATIENCE_S)
            listening.close()

        ends.append(end)
        return LivePage(f"http://127.0.0.1:{listening.getsockname()[1]}", source, loops[0])

    yield start
    for end in ends:
        end()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, one for all tests of a worker; skips where there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
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


AXE = Path(__file__).parents[5] / ".ci" / "axe" / "node_modules" / "axe-core" / "axe.min.js"


class Browser:
    """The page in Chromium, in a visitor's terms."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1280, dark: bool = False) -> None:
        """Load the page and wait for the server's state."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get("about:blank")  # the same address with another fragment loads nothing anew
        self.driver.get(url)
        self.until("document.querySelector('#server').dataset.state !== 'asking'")

    def js(self, expression: str, *arguments: Any) -> Any:
        return self.driver.execute_script(f"return {expression}", *arguments)

    def until(self, expression: str, *arguments: Any) -> None:
        """Wait for what is certain to come."""
        end = time.monotonic() + 3 * PATIENCE_S
        while not self.js(expression, *arguments):
            assert time.monotonic() < end, f"never: {expression}\n{self.text('body')}"
            time.sleep(0.02)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.js("document.querySelector(arguments[0]).textContent.trim()", selector))

    def is_shown(self, selector: str) -> bool:
        return bool(self.find(selector).is_displayed())

    def type(self, words: str) -> None:
        """Into the text box, as keys."""
        box = self.find("#text")
        box.clear()
        box.send_keys(words)

    def paste(self, words: str) -> None:
        """Into the text box at once; keys of the driver cannot have every character."""
        self.driver.execute_script(
            "const box = document.querySelector('#text'); box.value = arguments[0];"
            "box.dispatchEvent(new Event('input', {bubbles: true}))",
            words,
        )

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    @property
    def focused(self) -> str:
        """Id of the element with the focus, or its text."""
        return str(self.js("document.activeElement.id || document.activeElement.textContent"))

    def phase(self, *phases: str) -> None:
        """Wait until the answer is in one of these phases."""
        self.until("arguments[0].includes(document.querySelector('#result').dataset.phase)", phases)

    def choose(self, file: Path) -> None:
        self.find("#file").send_keys(str(file))
        self.until(
            "!document.querySelector('#table-form').hidden"
            " || !document.querySelector('#file-problem').hidden"
        )

    def complaints(self) -> list[str]:
        """What the browser's console says: policy violations, errors of scripts, failed loads."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def audit(self) -> list[str]:
        """axe-core's serious and critical findings, one line each."""
        if not AXE.exists():
            pytest.skip("no axe-core: make axe")
        self.driver.execute_script(AXE.read_text(encoding="utf-8"))
        found = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {resultTypes: ['violations']}).then((r) => done(r.violations))"
        )
        return [
            f"{finding['impact']}: {finding['id']}: {node['html']}"
            for finding in found
            if finding["impact"] in ("serious", "critical")
            for node in finding["nodes"]
        ]


def wait_until(condition: Callable[[], Any]) -> None:
    """As `until`, for tests that drive a browser."""
    end = time.monotonic() + 3 * PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def browser(chromium: Any) -> Browser:
    chromium.get_log("browser")  # of the test before
    return Browser(chromium)


@pytest.fixture
def quiet_console(browser: Browser) -> Iterator[None]:
    """Whatever a test does, the console stays empty: no script error, no breach of the policy."""
    yield
    # A refusal and a server that is away are loads that fail; the tests that make one expect it.
    loads = ("Failed to load resource", "net::ERR_")
    assert [c for c in browser.complaints() if not any(load in c for load in loads)] == []
