"""What the policy does, in the metrics: decisions, what waits for review, what is not recorded."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gptjet.service.client import PolicyBlockedError, UnavailableError
from gptjet.service.governance.audit import AuditLog
from gptjet.service.governance.review import ReviewQueue

from .conftest import RULES, StartGoverned, decisions

StartServer = Callable[..., Awaitable[Any]]

# The last of these alone.
WATCHING = "version = 1\n[[rules]]" + RULES.split("[[rules]]")[-1]


def governance_series(running: Any) -> dict[tuple[str, ...], float]:
    """Of a scrape, what the policy did: (name, direction, rule, action) where it has labels."""
    return {
        (sample.name.removeprefix("gptjet_governance_"), *sample.labels.values()): sample.value
        for family in running.server.observability.metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("gptjet_governance_")
    }


async def test_decisions_and_what_waits_for_review_are_in_the_metrics(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed(metrics_port=0)
    assert governance_series(running) == {
        ("decisions_total", "input", "no-secret", "block"): 0,
        ("decisions_total", "input", "name", "redact"): 0,
        ("decisions_total", "input", "watch", "flag"): 0,
        ("decisions_total", "output", "no-fgh", "block"): 0,
        ("decisions_total", "output", "name", "redact"): 0,
        ("decisions_total", "output", "watch", "flag"): 0,
        ("unrecorded_total",): 0,
        ("reviews_pending",): 0,
    }
    for prompt in ("top secret", "abc"):
        with pytest.raises(PolicyBlockedError):
            await running.client.generate(prompt, max_new_tokens=9)
    found = governance_series(running)
    assert found["decisions_total", "input", "no-secret", "block"] == 1
    assert found["decisions_total", "output", "no-fgh", "block"] == 1


async def test_a_rule_that_finds_something_twice_in_a_text_has_decided_once(
    start_governed: StartGoverned,
) -> None:
    """One at once and one more at the text's end are two records of one decision."""
    running = await start_governed(WATCHING, metrics_port=0)
    answer = await running.client.generate("s", max_new_tokens=40)
    assert answer.text.count("uv") == 2
    assert len(decisions(running)) == 2
    assert governance_series(running)["decisions_total", "output", "watch", "flag"] == 1


async def test_a_decision_about_a_stream_that_its_caller_leaves_is_counted(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed(WATCHING, metrics_port=0)
    stream = running.client.generate_stream("s", max_new_tokens=400)
    async for chunk in stream:
        if "w" in chunk.text:
            break
    stream.cancel()
    key = ("decisions_total", "output", "watch", "flag")
    await running.until(lambda: governance_series(running)[key] == 1)


async def test_what_reviewers_decide_is_no_longer_pending(start_governed: StartGoverned) -> None:
    rules = WATCHING.replace('"uv"', '"uv", "cd", "ij"')
    running = await start_governed(rules, metrics_port=0)
    # The server's own findings, one after the other, and a reviewer's decision in another process.
    for number, prompt in enumerate(("rs", "ab", "gh"), 1):
        await running.client.generate(prompt, max_new_tokens=4)
        await running.until(lambda n=number: governance_series(running)["reviews_pending",] == n)
    queue = ReviewQueue(running.folder / "review.sqlite")
    queue.decide(queue.items()[0].id, "approved", "ada")
    queue.close()
    await running.until(lambda: governance_series(running)["reviews_pending",] == 2)


async def test_decisions_that_cannot_be_written_are_in_the_metrics(
    start_governed: StartGoverned, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await start_governed(metrics_port=0)

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(AuditLog, "append", full)
    with pytest.raises(UnavailableError):
        await running.client.generate("top secret")
    assert governance_series(running)["unrecorded_total",] == 1


async def test_without_a_policy_there_are_no_series_of_one(start_server: StartServer) -> None:
    running = await start_server(metrics_port=0)
    assert governance_series(running) == {}
