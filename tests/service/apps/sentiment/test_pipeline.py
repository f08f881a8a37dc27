"""Many at once: order, bounds, patience."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import pytest

from gptjet.service.apps.sentiment import pipeline
from gptjet.service.apps.sentiment.classify import SentimentClassifier
from gptjet.service.apps.sentiment.pipeline import (
    ServerGoneError,
    classify_patiently,
    in_order,
)
from gptjet.service.apps.sentiment.template import load_template
from gptjet.service.client import (
    InternalError,
    QueueFullError,
    QuotaExceededError,
    UnavailableError,
)

from .conftest import FakeClient, unavailable


async def test_results_come_in_order_whatever_ends_first_and_no_more_run_than_allowed() -> None:
    running = most = taken = 0

    async def work(number: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(7 * number % 5):
            await asyncio.sleep(0)
        running -= 1
        return number

    def numbers() -> Any:
        nonlocal taken
        while taken < 100:
            yield taken
            taken += 1

    seen = []
    async for result in in_order(numbers(), work, 3):
        seen.append(result)
        assert taken - result <= 4 * 3  # what waits in memory is bounded
    assert seen == list(range(100))
    assert most == 3


async def test_a_failure_comes_after_the_results_before_it_and_the_rest_is_cancelled() -> None:
    cancelled = []

    async def work(number: int) -> int:
        if number == 2:
            raise RuntimeError("two")
        try:
            await asyncio.sleep(0 if number < 2 else 3600)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    seen = []

    async def run() -> None:
        async with contextlib.aclosing(in_order(range(5), work, 5)) as results:
            async for result in results:
                seen.append(result)

    with pytest.raises(RuntimeError, match="two"):
        await run()
    assert seen == [0, 1]
    assert cancelled == [3, 4]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the pipeline wanted to wait; it does not."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        found.append(seconds)
        await sleep(0)

    monkeypatch.setattr(pipeline.asyncio, "sleep", pause)
    return found


def classifier_of(client: FakeClient) -> SentimentClassifier:
    return SentimentClassifier(client, load_template("embedded"))  # type: ignore[arg-type]


async def test_a_busy_or_loading_server_is_asked_again_after_the_time_it_names(
    client: FakeClient, pauses: list[float]
) -> None:
    client.errors = [
        QueueFullError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=2.0),
        UnavailableError(grpc.StatusCode.UNAVAILABLE, "loading", retry_after_s=4.0),
    ]
    result = await classify_patiently(classifier_of(client), "good")
    assert result.label == "positive"
    assert 2.0 <= pauses[0] <= 3.0
    assert 4.0 <= pauses[1] <= 6.0


async def test_a_server_that_is_gone_or_busy_for_ever_is_given_up(
    client: FakeClient, pauses: list[float]
) -> None:
    client.errors = [unavailable()]
    with pytest.raises(ServerGoneError, match="the server went away: gone"):
        await classify_patiently(classifier_of(client), "good")
    assert pauses == []
    client.errors = [
        QueueFullError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", retry_after_s=100.0)
    ] * 10
    with pytest.raises(ServerGoneError, match="the server stays busy: full"):
        await classify_patiently(classifier_of(client), "good")
    assert sum(pauses) <= 600


async def test_a_failure_of_the_server_is_tried_once_more(client: FakeClient) -> None:
    failure = InternalError(grpc.StatusCode.INTERNAL, "id 5")
    client.errors = [failure]
    assert (await classify_patiently(classifier_of(client), "good")).label == "positive"
    client.errors = [failure, failure]
    with pytest.raises(InternalError):
        await classify_patiently(classifier_of(client), "good")


async def test_a_quota_is_waited_for_where_it_comes_back_and_ends_the_run_where_it_does_not(
    client: FakeClient, pauses: list[float]
) -> None:
    refused = grpc.StatusCode.RESOURCE_EXHAUSTED
    client.errors = [QuotaExceededError(refused, "1000 tokens a minute", retry_after_s=8.0)]
    assert (await classify_patiently(classifier_of(client), "good")).label == "positive"
    assert 8.0 <= sum(pauses) <= 12.0
    pauses.clear()
    client.errors = [QuotaExceededError(refused, "1000 tokens in all")]
    with pytest.raises(ServerGoneError, match="the server refuses more: 1000 tokens in all"):
        await classify_patiently(classifier_of(client), "good")
    assert pauses == []
