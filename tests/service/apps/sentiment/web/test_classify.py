"""One text through the page's routes: its events, its refusals, and what leaving it does."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from gptjet.service.apps.sentiment.web.events import answer_events
from gptjet.service.client import (
    PermissionDeniedError,
    PolicyBlockedError,
    QuotaExceededError,
    UnauthenticatedError,
)

OpenPage = Any
Until = Any


async def test_an_answer_comes_as_scored_then_the_explanation_then_the_result(
    open_page: OpenPage,
) -> None:
    page = await open_page()
    events = await page.classify("a wonderful day", seed=7, template="gpt-j")
    names = [name for name, _ in events]
    assert names == ["scored", *["explanation"] * (len(names) - 2), "result"]
    assert len(names) > 3
    scored, result = events[0][1], events[-1][1]
    assert (scored["label"], scored["probabilities"]["positive"]) == ("positive", 0.94)
    assert "".join(fields["text"] for _, fields in events[1:-1]) == result["explanation"]
    assert (result["template"], result["seed"]) == ("gpt-j", 7)
    assert result["highlights"] == [{"words": "wonderful", "start": 2, "end": 11}]
    assert page.source.asked == [("a wonderful day", "gpt-j", 7, True)]


async def test_words_come_while_the_answer_is_still_being_made(open_page: OpenPage) -> None:
    page = await open_page()
    page.source.hold = asyncio.Event()
    async with page.http.stream("POST", "/api/classify", json={"text": "wonderful"}) as response:
        async with asyncio.timeout(20):
            async for line in response.aiter_lines():
                if "positive" in line and "sound" not in line:
                    break
        assert page.source.running == 1  # it holds before the end
        page.source.hold.set()


async def test_leaving_an_answer_closes_its_stream_on_the_server(
    open_page: OpenPage, until: Until
) -> None:
    page = await open_page()
    page.source.hold = asyncio.Event()  # nothing is sent any more: only the connection's end tells
    async with page.http.stream("POST", "/api/classify", json={"text": "wonderful"}) as response:
        lines = response.aiter_lines()  # once it is gone, so is the response
        await anext(lines)
        await until(lambda: page.source.running == 1)
    await until(lambda: page.source.running == 0)
    assert page.source.closed == ["wonderful"]


async def test_closing_the_events_closes_the_classifiers_stream_before_it_returns(
    source: Any,
) -> None:
    """As it is closed where a visitor takes nothing any more: nothing is cancelled then."""
    events = answer_events(source.classifier(source.templates[0], explain=True), "wonderful", 0)
    await anext(events)
    assert source.running == 1
    await events.aclose()
    assert source.running == 0


async def test_a_server_that_goes_away_in_the_middle_is_told_after_the_words_that_came(
    open_page: OpenPage,
) -> None:
    page = await open_page()
    events = await page.classify("wonderful [die]")
    assert [name for name, _ in events] == ["scored", "explanation", "explanation", "error"]
    error = events[-1][1]
    assert (error["code"], error["retry_after_s"]) == ("gone", 2.0)
    assert error["message"] == "the model server does not answer"  # and no address of its
    assert page.source.times_lost == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            QuotaExceededError(grpc.StatusCode.RESOURCE_EXHAUSTED, "tokens of web: 5", (), 30.0),
            "quota",
            "the quota of this page at the model server is used up",
        ),
        (
            PolicyBlockedError(grpc.StatusCode.PERMISSION_DENIED, "text: blocked by rule 'x'"),
            "blocked",
            "the model server's policy does not let this pass: text: blocked by rule 'x'",
        ),
        (
            UnauthenticatedError(grpc.StatusCode.UNAUTHENTICATED, "no token"),
            "no_access",
            "the model server does not let this page in: its token is missing or not good",
        ),
        (
            PermissionDeniedError(grpc.StatusCode.PERMISSION_DENIED, "scope score"),
            "no_access",
            "the model server does not let this page in: its token is missing or not good",
        ),
    ],
)
async def test_what_the_server_does_not_allow_is_told_as_that_and_not_as_its_failure(
    open_page: OpenPage, error: Exception, code: str, message: str
) -> None:
    page = await open_page()
    page.source.raises["wonderful"] = error
    ((name, fields),) = await page.classify("wonderful")
    assert (name, fields["code"], fields["message"]) == ("error", code, message)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("[refuse]", "invalid", "text: is refused for the test"),
        ("[bug]", "failed", "the page's server failed"),
    ],
)
async def test_an_error_of_the_classifier_is_told_in_words(
    open_page: OpenPage, words: str, code: str, message: str
) -> None:
    page = await open_page()
    ((name, error),) = await page.classify(words)
    assert (name, error["code"], error["message"]) == ("error", code, message)


async def test_a_full_queue_is_told_with_the_time_to_wait(open_page: OpenPage) -> None:
    page = await open_page()
    page.source.queue_full = 1
    ((name, error),) = await page.classify("wonderful")
    assert (name, error["code"], error["retry_after_s"]) == ("error", "busy", 0.01)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({}, 400, "text: must be a string"),
        ({"text": 5}, 400, "text: must be a string"),
        ({"text": " \n\t"}, 400, "the text is empty"),
        ({"text": "x" * 101}, 413, "the text has 101 characters; the limit is 100"),
        ({"text": "\ud800"}, 400, "the text has half of a surrogate pair"),
        ({"text": "x", "seed": -1}, 400, "seed: must be a whole number from 0 to"),
        ({"text": "x", "seed": 2**63}, 400, "seed: must be a whole number from 0 to"),
        ({"text": "x", "seed": "1e3"}, 400, "seed: must be a whole number from 0 to"),
        ({"text": "x", "seed": True}, 400, "seed: must be a whole number from 0 to"),
        ({"text": "x", "template": "nope"}, 400, "template: must be one of embedded, gpt-j"),
        ({"text": "x", "template": "../../secret.toml"}, 400, "template: must be one of"),
        ({"text": "x", "template": ["embedded"]}, 400, "template: must be one of"),
    ],
)
async def test_a_field_out_of_its_limits_is_named(
    open_page: OpenPage, fields: dict[str, Any], status: int, message: str
) -> None:
    import json

    page = await open_page(max_chars=100)
    got, error = await page.refusal(
        "/api/classify",
        content=json.dumps(fields),
        headers={"content-type": "application/json"},
    )
    assert got == status
    assert message in error["message"]
    assert page.source.asked == []


async def test_a_text_of_the_greatest_length_fits_however_it_is_written(
    open_page: OpenPage,
) -> None:
    """An astral character is 12 bytes in JSON's escapes, and one character of the limit."""
    page = await open_page(max_chars=500)
    text = "\U0001f600" * 500
    events = await page.classify(text)
    assert events[-1][1]["text"] == text


async def test_a_seed_may_be_written_in_digits_as_large_numbers_lose_theirs_in_javascript(
    open_page: OpenPage,
) -> None:
    page = await open_page()
    await page.classify("x", seed=str(2**63 - 1))
    assert page.source.asked[0][2] == 2**63 - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "the body is not JSON in UTF-8"),
        (b"\xff\xfe", "the body is not JSON in UTF-8"),
        (b"[" * 100_000, "the body is not JSON in UTF-8"),
        (b"[]", "the body must be a JSON object"),
    ],
)
async def test_a_body_that_is_not_json_is_refused(
    open_page: OpenPage, content: bytes, message: str
) -> None:
    page = await open_page()
    status, error = await page.refusal(
        "/api/classify", content=content, headers={"content-type": "application/json"}
    )
    assert (status, error["message"]) == (400, message)


async def test_tokens_are_counted_as_the_text_stands_in_the_prompt(open_page: OpenPage) -> None:
    page = await open_page()
    response = await page.http.post("/api/tokens", json={"text": "one\n\n two"})
    assert response.json() == {"tokens": 2}


async def test_the_state_names_the_model_the_templates_and_the_limits(
    open_page: OpenPage,
) -> None:
    page = await open_page(max_chars=123)
    fields = (await page.http.get("/api/state")).json()
    assert fields["state"] == "ready"
    assert fields["model"]["name"] == "fake-gptj"
    assert [template["name"] for template in fields["templates"]] == ["embedded", "gpt-j"]
    assert fields["templates"][0]["labels"] == ["negative", "neutral", "positive"]
    assert fields["limits"]["max_chars"] == 123


@pytest.mark.parametrize("state", ["loading", "gone"])
async def test_the_state_of_a_server_that_is_not_ready_has_no_model(
    open_page: OpenPage, state: str
) -> None:
    page = await open_page()
    page.source.state_now = state
    fields = (await page.http.get("/api/state")).json()
    assert (fields["state"], fields["model"]) == (state, None)


async def test_the_state_is_busy_while_no_other_answer_can_begin(
    open_page: OpenPage, until: Until
) -> None:
    page = await open_page(max_streams=1)
    page.source.hold = asyncio.Event()
    running = asyncio.create_task(page.classify("wonderful"))
    await until(lambda: page.source.running == 1)
    assert (await page.http.get("/api/state")).json()["state"] == "busy"
    page.source.hold.set()
    await running
    assert (await page.http.get("/api/state")).json()["state"] == "ready"
