"""Many texts at once: a bounded number in flight, results in order, patience with a busy server."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

from gptjet.service.apps.sentiment.classify import SentimentClassifier
from gptjet.service.apps.sentiment.result import SentimentResult, TextError
from gptjet.service.client import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    ResourceExhaustedError,
    UnavailableError,
)

# What is wrong with one row, and no reason to stop the others.
ROW_ERRORS = (TextError, InvalidRequestError, DeadlineExceededError, InternalError)
# Of these, what may as well be the server's fault: many rows in a row are not to blame for it.
SERVER_ERRORS = (DeadlineExceededError, InternalError)

# Results that wait, finished, for an earlier one: this many for each that is in flight.
_WINDOW = 4
# A server may be busy or loading this long before a text is given up.
_PATIENCE_S = 600.0
_DEFAULT_PAUSE_S = 1.0
_TRIES_AFTER_FAILURE = 2

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ServerGoneError(Exception):
    """The server does not answer any more, or stays busy."""


async def in_order(
    items: Iterable[_Item], function: Callable[[_Item], Awaitable[_Result]], concurrency: int
) -> AsyncGenerator[_Result]:
    """`function` of each item, in the items' order, with `concurrency` of them running.

    Items are taken as they are needed. The first failure, in order, is raised after the results
    before it were given; closing the iterator cancels what runs.
    """
    slots = asyncio.Semaphore(concurrency)
    window: deque[asyncio.Task[_Result]] = deque()

    async def run(item: _Item) -> _Result:
        async with slots:
            return await function(item)

    waiting = iter(items)
    try:
        while True:
            while len(window) < concurrency * _WINDOW:
                try:
                    item = next(waiting)
                except StopIteration:
                    break
                window.append(asyncio.create_task(run(item)))
            if not window:
                return
            yield await window[0]
            window.popleft()
    finally:
        for task in window:
            task.cancel()
        await asyncio.gather(*window, return_exceptions=True)


async def classify_patiently(
    classifier: SentimentClassifier, text: str, *, seed: int = 0
) -> SentimentResult:
    """`classify`, again where the server is busy (after the time it names) or fails once.

    Raises ROW_ERRORS for what is this text's, ServerGoneError, and what `classify` raises besides.
    """
    waited_s = 0.0
    failures = 0
    while True:
        try:
            return await classifier.classify(text, seed=seed)
        except InternalError:
            failures += 1
            if failures == _TRIES_AFTER_FAILURE:
                raise
        except (ResourceExhaustedError, UnavailableError) as error:
            pause_s = error.retry_after_s
            if pause_s is None and isinstance(error, UnavailableError):
                raise ServerGoneError(f"the server went away: {error.message}") from error
            # A little more than it asks for, so that not all come back in the same moment.
            pause_s = (pause_s or _DEFAULT_PAUSE_S) * random.uniform(1.0, 1.5)
            if waited_s + pause_s > _PATIENCE_S:
                raise ServerGoneError(f"the server stays busy: {error.message}") from error
            await asyncio.sleep(pause_s)
            waited_s += pause_s
