"""Many texts at once: a bounded number in flight, results in order, patience with a busy server."""

from __future__ import annotations

import asyncio
import contextlib
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
    PolicyBlockedError,
    QueueFullError,
    QuotaExceededError,
    ResourceExhaustedError,
    UnavailableError,
)

# What is wrong with one row, and no reason to stop the others.
ROW_ERRORS = (
    TextError,
    InvalidRequestError,
    PolicyBlockedError,
    DeadlineExceededError,
    InternalError,
    ResourceExhaustedError,
)
# Of these, what may as well be the server's fault: many rows in a row are not to blame for it.
SERVER_ERRORS = (DeadlineExceededError, InternalError, ResourceExhaustedError)
# So many rows in a row that the server failed at: it is the server and not the rows.
FAILURES_IN_A_ROW = 5

# Results that wait, finished, for an earlier one: this many for each that is in flight.
_WINDOW = 4
# A server may be busy or loading this long before a text is given up.
_PATIENCE_S = 600.0
_DEFAULT_PAUSE_S = 1.0
_TRIES_AFTER_FAILURE = 2

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class ServerGoneError(Exception):
    """The server does not answer any more, stays busy, refuses all, or fails at row after row."""


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
            # Not `await window[0]`: cancelled there, it ends first, and the next takes its slot.
            await asyncio.wait({window[0]})
            yield window[0].result()
            window.popleft()
    finally:
        for task in window:
            task.cancel()
        await asyncio.gather(*window, return_exceptions=True)


async def while_server_works(
    results: AsyncGenerator[_Result],
    server_failed: Callable[[_Result], bool | None],
    describe: Callable[[_Result], str],
) -> AsyncGenerator[_Result]:
    """`results`, until the server failed at FAILURES_IN_A_ROW of them: ServerGoneError then.

    server_failed  whether the server failed at a result's row; None: it was not asked
    describe       a failed row and its error, in words

    Results are held back while the server fails: those that ended the run were not given, and are
    made again by whoever goes on after the last that was.
    """
    held: list[_Result] = []
    failures = 0
    async with contextlib.aclosing(results):
        async for result in results:
            held.append(result)
            failed = server_failed(result)
            if failed:
                failures += 1
            elif failed is False:
                failures = 0
            if failures == FAILURES_IN_A_ROW:
                raise ServerGoneError(
                    f"the server fails: {failures} rows one after the other, the last on "
                    f"{describe(result)}"
                )
            if failures == 0:
                for one in held:
                    yield one
                held.clear()
    for one in held:
        yield one


async def classify_patiently(
    classifier: SentimentClassifier, text: str, *, seed: int = 0
) -> SentimentResult:
    """`classify`, again where the server is busy (after the time it names) or fails once.

    A quota that comes back is waited for as a busy server is; one that does not ends it.

    Raises ROW_ERRORS for what is this text's, ServerGoneError, and what `classify` raises besides.
    """
    waited_s = 0.0
    failures = 0
    while True:
        try:
            return await classifier.classify(text, seed=seed)
        except (QueueFullError, QuotaExceededError, UnavailableError) as error:
            pause_s = error.retry_after_s
            if pause_s is None and isinstance(error, UnavailableError):
                raise ServerGoneError(f"the server went away: {error.message}") from error
            if pause_s is None and isinstance(error, QuotaExceededError):
                raise ServerGoneError(f"the server refuses more: {error.message}") from error
            # A little more than it asks for, so that not all come back in the same moment.
            pause_s = (pause_s or _DEFAULT_PAUSE_S) * random.uniform(1.0, 1.5)
            if waited_s + pause_s > _PATIENCE_S:
                raise ServerGoneError(f"the server stays busy: {error.message}") from error
            await asyncio.sleep(pause_s)
            waited_s += pause_s
        except (InternalError, ResourceExhaustedError):
            failures += 1
            if failures == _TRIES_AFTER_FAILURE:
                raise
