"""Who may ask: host names, other sites, sizes and rates; and what every answer carries."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from gptjet.service.apps.sentiment.web.errors import PageError
from gptjet.service.apps.sentiment.web.guards import host_name
from gptjet.service.apps.sentiment.web.limits import RateLimit, StreamLimit
from gptjet.service.apps.sentiment.web.settings import WebSettings

OpenPage = Any
Until = Any


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/static/main.js", 200),
        ("GET", "/api/state", 200),
        ("GET", "/nothing", 404),
        ("GET", "/api/classify", 405),
        ("GET", "/static/../app.py", 404),
        ("GET", "/static/%2e%2e/app.py", 404),
    ],
)
async def test_every_answer_has_the_policy_headers(
    open_page: OpenPage, method: str, path: str, status: int
) -> None:
    page = await open_page()
    response = await page.http.request(method, path)
    assert response.status_code == status
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert "server" not in response.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost", 200),
        ("LocalHost:99", 200),
        ("app.localhost", 200),
        ("[::1]:8080", 200),
        ("192.168.1.7", 200),
        ("sentiment.example.org", 200),
        ("sentiment.example.org.", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("notlocalhost", 421),
        ("[::1", 421),
    ],
)
async def test_only_names_that_are_the_pages_own_are_answered(
    open_page: OpenPage, host: str, status: int
) -> None:
    """A site that points its own name here (DNS rebinding) comes with that name."""
    page = await open_page(allowed_hosts=frozenset({"Sentiment.Example.org"}))
    response = await page.http.get("/api/state", headers={"host": host})
    assert response.status_code == status


def test_a_host_header_is_read_without_port_and_brackets() -> None:
    assert [host_name(h) for h in ("A.b:1", "[::1]:2", "", "[x")] == ["a.b", "::1", "", ""]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        pytest.param({}, 200, id="a program"),
        pytest.param({"sec-fetch-site": "same-origin"}, 200, id="the page"),
        pytest.param({"origin": "SELF"}, 200, id="the page in an older browser"),
        pytest.param({"sec-fetch-site": "cross-site"}, 403, id="another site"),
        pytest.param({"sec-fetch-site": "same-site"}, 403, id="another port of this host"),
        pytest.param({"sec-fetch-site": "none"}, 403, id="typed"),
        pytest.param({"origin": "https://evil.example"}, 403, id="another origin"),
        pytest.param({"origin": "null"}, 403, id="a sandbox"),
        pytest.param({"origin": "http://["}, 403, id="no address"),
        pytest.param({"origin": "http://127.0.0.1:1"}, 403, id="another port"),
        pytest.param(
            {"sec-fetch-site": "same-origin", "origin": "https://evil.example"}, 403, id="both"
        ),
    ],
)
@pytest.mark.parametrize("path", ["/api/classify", "/api/tokens"])
async def test_another_site_cannot_drive_the_page(
    open_page: OpenPage, path: str, headers: dict[str, str], status: int
) -> None:
    page = await open_page()
    sent = {name: page.url if value == "SELF" else value for name, value in headers.items()}
    response = await page.http.post(path, json={"text": "wonderful"}, headers=sent)
    assert response.status_code == status
    assert bool(page.source.asked) == (status == 200 and path == "/api/classify")


async def test_a_form_cannot_post_a_text(open_page: OpenPage) -> None:
    """A kind of body that forms have would come without the browser asking first."""
    page = await open_page()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        status, error = await page.refusal(
            "/api/classify", content=b'{"text":"x"}', headers={"content-type": kind}
        )
        assert (status, error["code"]) == (415, "wrong_kind")


async def test_a_body_above_its_limit_is_refused_before_it_is_read(open_page: OpenPage) -> None:
    page = await open_page(max_chars=100, max_csv_bytes=1024)
    json_body = b'{"text":"' + b"x" * 10_000 + b'"}'
    status, error = await page.refusal(
        "/api/classify", content=json_body, headers={"content-type": "application/json"}
    )
    assert (status, error["message"]) == (413, "the body is larger than 5 KiB, which is the limit")

    async def chunks() -> Any:  # no Content-Length: only counting helps
        for _ in range(100):
            yield b"text,stars\n" * 100

    status, error = await page.refusal(
        "/api/table", content=chunks(), headers={"content-type": "text/csv"}
    )
    assert (status, error["message"]) == (413, "the body is larger than 1 KiB, which is the limit")


async def test_a_body_that_does_not_come_is_given_up(open_page: OpenPage) -> None:
    page = await open_page(body_timeout_s=0.2)
    reader, writer = await asyncio.open_connection(*page.url.removeprefix("http://").split(":"))
    writer.write(
        b"POST /api/classify HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{"
    )
    async with asyncio.timeout(20):
        line = await reader.readline()
    assert line.split()[1] == b"408"
    writer.close()


async def test_too_many_requests_are_told_when_to_come_back(open_page: OpenPage) -> None:
    page = await open_page(burst=2, requests_per_minute=6)
    for _ in range(2):
        await page.classify("wonderful")
    response = await page.http.post("/api/classify", json={"text": "wonderful"})
    error = response.json()["error"]
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 10
    assert error["message"].startswith("too many requests: 6 a minute are allowed; try again in")
    assert len(page.source.asked) == 2


async def test_one_client_cannot_hold_all_answers_and_an_ended_one_frees_its_place(
    open_page: OpenPage, until: Until
) -> None:
    page = await open_page(streams_per_client=2)
    page.source.hold = asyncio.Event()
    running = [asyncio.create_task(page.classify("wonderful")) for _ in range(2)]
    await until(lambda: page.source.running == 2)
    status, error = await page.refusal("/api/classify", json={"text": "wonderful"})
    assert (status, error["code"]) == (429, "too_many_streams")
    page.source.hold.set()
    await asyncio.gather(*running)
    assert (await page.classify("wonderful"))[-1][0] == "result"


async def test_a_place_is_freed_by_an_answer_that_was_left(
    open_page: OpenPage, until: Until
) -> None:
    page = await open_page(streams_per_client=1)
    page.source.hold = asyncio.Event()

    async def is_answered_and_left() -> bool:
        async with page.http.stream("POST", "/api/classify", json={"text": "x"}) as response:
            if response.status_code == 429:
                return False
            assert response.status_code == 200
            await until(lambda: page.source.running == 1)
        await until(lambda: page.source.running == 0)
        return True

    for _ in range(3):
        async with asyncio.timeout(20):
            while not await is_answered_and_left():  # a response ends after its source
                await asyncio.sleep(0.01)


def test_a_budget_refills_with_time_and_is_each_clients_own() -> None:
    now_s = 0.0
    limit = RateLimit(per_minute=60, burst=2, now_s=lambda: now_s)
    limit.take("a", 2)
    limit.take("b")
    with pytest.raises(PageError) as refused:
        limit.take("a")
    assert refused.value.retry_after_s == 1
    now_s = 1.0
    limit.take("a")
    with pytest.raises(PageError):
        limit.take("a")
    now_s = 1000.0
    limit.take("a", 5)  # more than a full budget: all of it
    with pytest.raises(PageError):
        limit.take("a")


def test_the_memory_of_clients_is_bounded() -> None:
    limit = RateLimit(per_minute=60, burst=1, now_s=lambda: 0.0)
    for number in range(10_050):
        limit.take(str(number))
    assert len(limit._budgets) == 10_000


def test_places_are_counted_in_all_and_for_each_client() -> None:
    limit = StreamLimit(per_client=2, in_all=3)
    with contextlib.ExitStack() as held:
        held.enter_context(limit.hold("a"))
        held.enter_context(limit.hold("a"))
        with pytest.raises(PageError) as refused:
            held.enter_context(limit.hold("a"))
        assert (refused.value.status, refused.value.code) == (429, "too_many_streams")
        held.enter_context(limit.hold("b"))
        with pytest.raises(PageError) as refused:
            held.enter_context(limit.hold("c"))
        assert (refused.value.status, refused.value.code) == (503, "busy")
    assert limit.running == 0


@pytest.mark.parametrize(
    "name", ["max_chars", "max_csv_bytes", "max_csv_rows", "rows_in_flight", "max_streams"]
)
def test_a_limit_below_one_is_refused(name: str) -> None:
    fields: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        WebSettings(**fields)
