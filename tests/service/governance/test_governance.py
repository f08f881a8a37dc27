"""Governance over its life: a folder that is not usable, what is recorded, what is counted."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from gptjet.service.governance import recorder as recorder_module
from gptjet.service.governance.audit import read_log
from gptjet.service.governance.governance import (
    BlockedError,
    FieldText,
    Governance,
    GovernanceError,
    GovernanceSettings,
)
from gptjet.service.governance.recorder import RecordError
from gptjet.service.governance.review import ReviewQueue

Start = Callable[..., Awaitable[Governance]]

RULES = """
version = 1
[[rules]]
name = "word"
action = "redact"
phrases = ["foo"]
[[rules]]
name = "watch"
action = "flag"
phrases = ["bar"]
[[rules]]
name = "long"
action = "block"
max_characters = 20000
"""


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`await start(rules, **settings)`: a started Governance in tmp_path / "g"."""
    started: list[Governance] = []

    async def make(rules: str = RULES, **settings: Any) -> Governance:
        path = tmp_path / "policy.toml"
        path.write_text(rules)
        governance = Governance(
            GovernanceSettings(policy=path, **{"folder": tmp_path / "g"} | settings)
        )
        governance.start()
        started.append(governance)
        return governance

    yield make
    for governance in started:
        await asyncio.to_thread(governance.close)


async def judge(governance: Governance, text: str, **field: Any) -> str:
    (result,) = await governance.judge(
        [FieldText("prompt", text, **field)], "input", request_id="r-1", method="Generate"
    )
    return result


async def test_a_thousand_matches_are_one_record_with_their_number(
    start: Start, tmp_path: Path
) -> None:
    governance = await start()
    assert await judge(governance, "foo bar " * 1000) == "[word] bar " * 1000
    records = [r for r in read_log(tmp_path / "g" / "audit.jsonl") if r["event"] == "decision"]
    assert [(r["rule"], r["action"], r["count"]) for r in records] == [
        ("word", "redact", 1000),
        ("watch", "flag", 1000),
    ]
    assert records[0]["spans"][:2] == [[0, 3], [8, 11]]
    assert len(records[0]["spans"]) == 16
    assert len(set(records[0]["digests"])) == 1
    assert records[0]["request_id"] == "r-1"
    assert "excerpts" not in records[0]
    assert governance.decided()["input", "word", "redact"] == 1
    assert governance.counters.written == 2


async def test_the_digest_of_a_text_needs_the_key_of_the_folder(
    start: Start, tmp_path: Path
) -> None:
    one = await start(folder=tmp_path / "one")
    two = await start(folder=tmp_path / "two")
    again = await start(folder=tmp_path / "one")
    digest = one._digests.of("r", "Foo")
    assert digest == again._digests.of("r", "FOO")
    assert digest != two._digests.of("r", "Foo")
    assert digest != one._digests.of("other", "Foo")
    assert (tmp_path / "one" / "digest.key").stat().st_mode & 0o777 == 0o600


async def test_a_key_that_is_cut_short_stops_the_start(start: Start, tmp_path: Path) -> None:
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "digest.key").write_bytes(b"short")
    with pytest.raises(GovernanceError, match="32 bytes"):
        await start()


@pytest.mark.parametrize("fail_open", [False, True])
async def test_a_folder_that_is_not_usable_stops_the_start_unless_failing_open(
    start: Start, tmp_path: Path, fail_open: bool
) -> None:
    (tmp_path / "g").write_text("a file, no folder")
    if not fail_open:
        with pytest.raises(GovernanceError, match="governance_dir"):
            await start()
        return
    governance = await start(fail_open=True)
    assert await judge(governance, "a foo") == "a [word]"
    async with asyncio.timeout(60):
        while governance.counters.failed != 1:
            await asyncio.sleep(0.01)
    (tmp_path / "g").unlink()
    assert await judge(governance, "a bar") == "a bar"
    async with asyncio.timeout(60):
        # The audit log is written first, and the queue after it.
        while governance.counters.written != 1 or governance.num_pending != 1:
            await asyncio.sleep(0.01)
    queue = ReviewQueue(tmp_path / "g" / "review.sqlite", must_exist=True)
    assert len(queue.items()) == 1
    queue.close()


async def test_a_review_queue_that_is_broken_refuses_and_is_tried_again(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    governance = await start()
    real_add = ReviewQueue.add

    def broken(self: ReviewQueue, flagged: Any) -> None:
        raise recorder_module.ReviewError("disk I/O error")

    monkeypatch.setattr(ReviewQueue, "add", broken)
    with pytest.raises(RecordError, match="disk I/O error"):
        await judge(governance, "a bar")
    assert governance.counters.review_failed == 1
    assert await judge(governance, "a foo") == "a [word]"
    monkeypatch.setattr(ReviewQueue, "add", real_add)
    assert await judge(governance, "a bar") == "a bar"


@pytest.mark.parametrize("fail_open", [False, True])
async def test_a_hanging_disk_bounds_what_waits_and_what_is_kept(
    start: Start, monkeypatch: pytest.MonkeyPatch, fail_open: bool
) -> None:
    monkeypatch.setattr(recorder_module, "MOST_WAITING", 4)
    governance = await start(fail_open=fail_open, timeout_s=0.2)
    release = threading.Event()
    real_write = os.write

    def hanging(descriptor: int, data: bytes) -> int:
        if b"decision" in data:
            release.wait(20)
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", hanging)
    results = await asyncio.gather(
        *(judge(governance, "a foo") for _ in range(20)), return_exceptions=True
    )
    if fail_open:
        assert results == ["a [word]"] * 20
    else:
        assert all(isinstance(result, RecordError) for result in results)
        assert governance.counters.timed_out >= 4
    # One is being written, four wait.
    assert governance.counters.dropped >= 15
    release.set()
    async with asyncio.timeout(60):
        while governance.counters.written < 5 - (governance.counters.dropped > 15):
            await asyncio.sleep(0.01)
    assert await judge(governance, "a foo") == "a [word]"


async def test_what_cannot_be_rewritten_is_blocked_by_a_redact_rule(start: Start) -> None:
    governance = await start()
    with pytest.raises(BlockedError, match="word"):
        await judge(governance, "a foo", rewritable=False)
    assert await judge(governance, "a bar", rewritable=False) == "a bar"


async def test_a_long_text_is_judged_off_the_event_loop(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    governance = await start()
    threads: list[str] = []
    real = governance._judge

    def noted(item: Any, chain: Any) -> Any:
        threads.append(threading.current_thread().name)
        return real(item, chain)

    monkeypatch.setattr(governance, "_judge", noted)
    await judge(governance, "a" * 100)
    await judge(governance, "a" * 10_000)
    assert threads[0] == "MainThread"
    assert threads[1] != "MainThread"
    with pytest.raises(BlockedError, match="long"):
        await judge(governance, "a" * 20_001)


async def test_reload_says_what_became_of_it_and_a_bad_file_changes_nothing(
    start: Start, tmp_path: Path
) -> None:
    governance = await start()
    before = governance.policy
    (tmp_path / "policy.toml").write_text("version = 3")
    result = governance.reload()
    assert not result.ok
    assert "version" in result.message
    assert governance.policy is before
    (tmp_path / "policy.toml").unlink()
    assert "No such file" in governance.reload().message
    (tmp_path / "policy.toml").write_text(RULES.replace("foo", "qux"))
    result = governance.reload()
    assert (result.ok, result.message) == (True, "3 rules")
    assert await judge(governance, "foo qux") == "foo [word]"
    assert governance.reload().message == "3 rules, as before"
