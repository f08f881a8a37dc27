"""The policy file, the audit log and the review queue of a running server."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import grpc
import pytest

from gptjet.proto.v1 import admin_pb2, admin_pb2_grpc
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import PolicyBlockedError, UnavailableError
from gptjet.service.config import ServerConfig
from gptjet.service.governance.governance import Governance, GovernanceError
from gptjet.service.governance.review import ReviewQueue
from gptjet.service.rpc.server import Server

from .conftest import RULES, StartGoverned, StartServer, decisions


async def test_flagged_output_passes_and_waits_for_review(start_governed: StartGoverned) -> None:
    running = await start_governed()
    for _ in range(2):
        answer = await running.client.generate("rs", max_new_tokens=4, request_id="r-7")
        assert answer.text == "tuvw"
    queue = ReviewQueue(running.folder / "review.sqlite")
    (item,) = queue.items()
    assert (item.rule, item.status, item.seen, item.request_id) == ("watch", "pending", 2, "r-7")
    assert (item.start, item.end, item.excerpt) == (1, 3, None)
    queue.close()
    content = b"".join(path.read_bytes() for path in running.folder.iterdir())
    assert b"tuv" not in content


async def test_a_rejected_text_is_blocked_from_then_on(start_governed: StartGoverned) -> None:
    rules = RULES.replace("version = 1", "version = 1\n[review]\nblock_rejected = true")
    running = await start_governed(rules)
    assert (await running.client.generate("rs", max_new_tokens=4)).text == "tuvw"
    queue = ReviewQueue(running.folder / "review.sqlite")
    (item,) = queue.items()
    queue.decide(item.id, "rejected", "ada")
    recorder = running.server.governance._recorder
    await running.until(lambda: bool(recorder.rejected))
    with pytest.raises(PolicyBlockedError, match="watch"):
        await running.client.generate("rs", max_new_tokens=4)
    queue.decide(item.id, "approved", "ada")
    await running.until(lambda: not recorder.rejected)
    assert (await running.client.generate("rs", max_new_tokens=4)).text == "tuvw"
    queue.close()


async def test_the_log_has_no_redacted_prompt_even_where_prompts_are_logged(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed(log_prompts=True)
    await running.client.generate("John Doe a", max_new_tokens=1)
    assert (await running.request_line(method="Generate"))["prompt"] == "<n> a"
    with pytest.raises(PolicyBlockedError):
        await running.client.generate("top secret", max_new_tokens=1)
    line = await running.request_line(code="PERMISSION_DENIED")
    assert "prompt" not in line


async def test_excerpts_are_kept_only_where_that_is_configured(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed(governance_excerpts=True)
    await running.client.generate("rs", max_new_tokens=4)
    (record,) = decisions(running)
    assert record["excerpts"] == ["rstuv"]


async def test_without_a_policy_nothing_is_made(start_server: StartServer) -> None:
    running = await start_server()
    assert running.server.governance is None
    assert (await running.client.generate("abc", max_new_tokens=8)).text == "defghijk"


async def test_a_policy_that_is_not_usable_stops_the_start(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("version = 1\nrules = 3\n")
    config = ServerConfig(
        port=0, backend="mock", governance_policy=policy, governance_dir=tmp_path / "g"
    )
    server = Server(config)
    with pytest.raises(GovernanceError, match="rules"):
        await server.start()
    await server.drain(0.0)


async def test_a_changed_policy_file_is_in_force_soon_and_a_bad_one_is_not(
    start_governed: StartGoverned, logs: list[MutableMapping[str, Any]]
) -> None:
    running = await start_governed()
    governance = running.server.governance
    running.policy.write_text("version = 1\n[[rules]\n")

    def complained() -> bool:
        return any("not usable" in line["event"] for line in logs)

    await running.until(complained)
    with pytest.raises(PolicyBlockedError):
        await running.client.generate("abc", max_new_tokens=8)
    before = governance.policy
    running.policy.write_text(RULES.replace('"fgh"', '"xyz"'))
    await running.until(lambda: governance.policy is not before)
    assert (await running.client.generate("abc", max_new_tokens=8)).text == "defghijk"


async def test_an_administrators_reload_says_whether_the_policy_is_another(
    start_governed: StartGoverned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else the server may see the change first, and a reload would find it in use.
    monkeypatch.setattr(Governance, "_reload_if_changed", lambda self: None)
    running = await start_governed(admin_socket=tmp_path / "a")

    async def reload() -> tuple[str, str, str]:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'a'}") as channel:
            stub: Any = admin_pb2_grpc.AdminStub(channel)
            (files,) = (await stub.Reload(admin_pb2.ReloadRequest(), timeout=20)).files
        return files.kind, admin_pb2.ReloadedFiles.Outcome.Name(files.outcome), files.reason

    assert await reload() == ("policy", "OUTCOME_UNCHANGED", "")
    running.policy.write_text(RULES.replace('"fgh"', '"xyz"'))
    assert await reload() == ("policy", "OUTCOME_RELOADED", "")
    assert await reload() == ("policy", "OUTCOME_UNCHANGED", "")
    running.policy.write_text("version = 3")
    kind, outcome, reason = await reload()
    assert (kind, outcome) == ("policy", "OUTCOME_REFUSED")
    assert "version" in reason


async def test_a_running_stream_keeps_the_policy_it_began_with(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed(backend=MockBackend(decode_ms=20))
    stream = running.client.generate_stream("a", max_new_tokens=20)
    chunks = aiter(stream)
    await anext(chunks)
    running.policy.write_text(RULES.replace('"fgh"', '"xyz"'))
    assert running.server.governance.reload().ok
    with pytest.raises(PolicyBlockedError):
        async for _ in chunks:
            pass


@pytest.mark.parametrize("fail_open", [False, True])
async def test_an_audit_log_that_cannot_be_written_refuses_or_lets_pass_as_configured(
    start_governed: StartGoverned, monkeypatch: pytest.MonkeyPatch, fail_open: bool
) -> None:
    import os

    running = await start_governed(governance_fail_open=fail_open)
    governance = running.server.governance
    real_write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if b"decision" in data:
            raise OSError(28, "No space left on device")
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    if fail_open:
        assert (await running.client.generate("rs", max_new_tokens=4)).text == "tuvw"
        await running.until(lambda: governance.counters.failed == 1)
    else:
        with pytest.raises(UnavailableError, match="No space left"):
            await running.client.generate("rs", max_new_tokens=4)
        assert governance.counters.failed == 1
    # No rule concerns this one.
    assert (await running.client.generate("k", max_new_tokens=2)).text == "lm"
    # A text that is blocked is blocked either way.
    with pytest.raises((PolicyBlockedError, UnavailableError)):
        await running.client.generate("top secret", max_new_tokens=2)
    monkeypatch.setattr(os, "write", real_write)
    assert (await running.client.generate("rs", max_new_tokens=4)).text == "tuvw"


async def test_a_disk_that_hangs_holds_up_a_request_no_longer_than_the_timeout(
    start_governed: StartGoverned, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os
    import threading

    running = await start_governed(governance_timeout_s=0.1)
    release = threading.Event()
    real_write = os.write

    def hanging(descriptor: int, data: bytes) -> int:
        if b"decision" in data:
            release.wait(10)
        return real_write(descriptor, data)

    monkeypatch.setattr(os, "write", hanging)
    with pytest.raises(UnavailableError, match="in time"):
        await running.client.generate("rs", max_new_tokens=4)
    assert (await running.client.generate("k", max_new_tokens=2)).text == "lm"
    assert running.server.governance.counters.timed_out == 1
    release.set()
