"""Tokens that are made, changed and revoked under a running server."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import GptjetError, UnauthenticatedError
from gptjet.service.config import ServerConfig
from gptjet.service.rpc.access import interceptor
from gptjet.service.rpc.access.control import Outcome, Tokens
from gptjet.service.rpc.access.tokens_file import editing
from gptjet.service.rpc.listen import ListenError
from gptjet.service.rpc.server import Server

from .conftest import in_two_days

MakeToken = Callable[..., str]
# Long enough that only what a test asks for is looked at.
NEVER_S = 3600.0


async def test_a_token_made_revoked_or_given_other_limits_is_so_without_a_restart(
    start_server: Any, tokens_file: Path, make_token: MakeToken
) -> None:
    first = make_token("first", requests_per_minute=1000)
    running = await start_server(tokens_file=tokens_file, access_reload_s=0.05)
    old = running.new_client(token=first, retry=None)
    await old.get_model()
    second = make_token("second")
    new = running.new_client(token=second, retry=None)

    async def eventually(works: Callable[[], Awaitable[bool]]) -> None:
        async with asyncio.timeout(20):
            while not await works():
                await asyncio.sleep(0.02)

    async def new_is_let_in() -> bool:
        try:
            await new.get_model()
        except UnauthenticatedError:
            return False
        return True

    async def old_is_refused() -> bool:
        try:
            await old.get_model()
        except UnauthenticatedError as error:
            return error.message == "the token has been revoked"
        return False

    await eventually(new_is_let_in)
    with editing(tokens_file) as tokens:
        tokens[0] = tokens[0].model_copy(update={"revoked": datetime.now(UTC)})
    await eventually(old_is_refused)
    await new.get_model()
    quota = running.server.access.tokens.quotas.quota_of(
        running.server.access.tokens.tokens.token[1]
    )
    assert quota.requests_left is None
    with editing(tokens_file) as tokens:
        tokens[1] = tokens[1].model_copy(update={"requests_per_minute": 5})
    await running.until(lambda: quota.requests_left == 5)


async def test_a_token_ends_by_the_clock_without_a_look_at_the_file(
    start_server: Any,
    tokens_file: Path,
    make_token: MakeToken,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = make_token("brief", expires=datetime.now(UTC) + timedelta(hours=1))
    running = await start_server(tokens_file=tokens_file, access_reload_s=NEVER_S)
    client = running.new_client(token=token, retry=None)
    await client.get_model()
    monkeypatch.setattr(interceptor, "datetime", in_two_days())
    with pytest.raises(UnauthenticatedError, match="the token expired at"):
        await client.get_model()


@pytest.mark.parametrize(
    "method", ["gptjet.v1.TextGeneration/Generate", "grpc.health.v1.Health/Check"]
)
@pytest.mark.parametrize("change", ["revoked", "expired", "without the scope"])
async def test_a_call_opened_before_its_token_ended_is_not_served(
    start_server: Any,
    tokens_file: Path,
    make_token: MakeToken,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    change: str,
) -> None:
    """The headers come while the token is good, the request when it is no longer."""
    seen = 0
    authenticate = Tokens.authenticate

    def counting(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        return authenticate(*arguments)

    monkeypatch.setattr(Tokens, "authenticate", counting)
    token = make_token("web")
    running = await start_server(tokens_file=tokens_file, access_reload_s=NEVER_S)
    async with grpc.aio.insecure_channel(running.target) as channel:
        call: Any = channel.stream_stream(f"/{method}")(
            metadata=(("authorization", f"Bearer {token}"),), timeout=20
        )
        await running.until(lambda: seen == 1)
        now = datetime.now(UTC)
        changes = {
            "revoked": {"revoked": now},
            "expired": {"expires": now},
            "without the scope": {"scopes": ["admin"]},
        }
        with editing(tokens_file) as tokens:
            tokens[0] = tokens[0].model_copy(update=changes[change])
        await running.server.access.reload()
        is_generate = method.endswith("Generate")
        await call.write(pb.GenerateRequest(text="a").SerializeToString() if is_generate else b"")
        await call.done_writing()
        with contextlib.suppress(grpc.RpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        code = await call.code()
    if change == "without the scope":
        # Health asks for a good token and no scope.
        expected = grpc.StatusCode.PERMISSION_DENIED if is_generate else grpc.StatusCode.OK
    else:
        expected = grpc.StatusCode.UNAUTHENTICATED
    assert code is expected
    if is_generate:
        line = await running.request_line(method="Generate")
        assert line["code"] == expected.name
        assert "prompt_tokens" not in line


def slow_backend() -> MockBackend:
    """One whose longest stream takes ten seconds or more."""
    return MockBackend(decode_ms=5, max_context=8192, num_kv_blocks=2048)


_ENDS: dict[str, tuple[dict[str, Any] | None, grpc.StatusCode, str]] = {
    "revoked": (
        {"revoked": datetime(2026, 1, 1, tzinfo=UTC)},
        grpc.StatusCode.UNAUTHENTICATED,
        "ended while it ran: the token has been revoked",
    ),
    "removed": (
        None,
        grpc.StatusCode.UNAUTHENTICATED,
        "ended while it ran: the token is not valid",
    ),
    "expired": (
        {"expires": datetime(2026, 1, 1, tzinfo=UTC)},
        grpc.StatusCode.UNAUTHENTICATED,
        "ended while it ran: the token expired at 2026-01-01 00:00:00 UTC",
    ),
    "without the scope": (
        {"scopes": ["admin"]},
        grpc.StatusCode.PERMISSION_DENIED,
        "ended while it ran: token leaver lacks the scope 'generate' (it has admin)",
    ),
}


@pytest.mark.parametrize("change", _ENDS)
async def test_a_running_stream_ends_with_its_token_and_others_do_not(
    start_server: Any, tokens_file: Path, make_token: MakeToken, change: str
) -> None:
    update, code, message = _ENDS[change]
    leaver, stayer = make_token("leaver", concurrent_streams=1), make_token("stayer")
    running = await start_server(
        backend=slow_backend(), tokens_file=tokens_file, access_reload_s=NEVER_S
    )
    left = running.new_client(token=leaver, retry=None).generate_stream("a", max_new_tokens=8000)
    stays = running.new_client(token=stayer, retry=None).generate_stream("a", max_new_tokens=150)
    await anext(left)
    await anext(stays)
    engine = running.server.engine
    assert engine.num_running == 2
    with editing(tokens_file) as tokens:
        if update is None:
            del tokens[0]
        else:
            tokens[0] = tokens[0].model_copy(update=update)
    known = running.server.access.tokens
    quota = known.quotas.quota_of(known.tokens.token[0])
    await running.server.access.reload()
    with pytest.raises(GptjetError) as caught:
        async for _ in left:
            pass
    assert (caught.value.code, caught.value.message) == (code, message)
    await running.until(lambda: quota.in_flight == 0)
    line = await running.request_line(caller="leaver")
    assert (line["code"], line["error"]) == (code.name, message)
    assert line["finish_reason"] == "cancelled"
    (ended,) = (line for line in running.logs if line["event"].startswith("running calls ended"))
    assert ended["calls"] == 1
    assert len([chunk async for chunk in stays]) == 149
    await running.until(lambda: engine.num_running == 0)
    manager = engine.engine.scheduler.block_manager
    assert manager.num_free_blocks == manager.num_blocks


@pytest.mark.parametrize("waits", ["Generate", "Score", "Watch"])
async def test_a_call_that_waits_ends_with_its_token(
    start_server: Any, tokens_file: Path, make_token: MakeToken, waits: str
) -> None:
    """In the queue, for its only answer, or for health to change."""
    token = make_token("web")
    running = await start_server(
        backend=slow_backend(), tokens_file=tokens_file, access_reload_s=NEVER_S,
        max_sequences=1,
    )  # fmt: skip
    holder = running.new_client(token=make_token("holder"), retry=None)
    await running.server.access.reload()
    held = holder.generate_stream("a", max_new_tokens=8000)
    await anext(held)
    metadata = (("authorization", f"Bearer {token}"),)
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub: Any = pb_grpc.TextGenerationStub(channel)
        calls = {
            "Generate": lambda: stub.Generate(
                pb.GenerateRequest(text="a"), metadata=metadata, timeout=60
            ),
            "Score": lambda: stub.Score(
                pb.ScoreRequest(text="a" * 400, candidates=[{"text": "b" * 400}] * 64),
                metadata=metadata,
                timeout=60,
            ),
            "Watch": lambda: health_pb2_grpc.HealthStub(channel).Watch(
                health_pb2.HealthCheckRequest(), metadata=metadata, timeout=60
            ),
        }
        call = calls[waits]()
        if waits == "Watch":
            await call.read()
        else:
            await running.until(lambda: running.server.waiting + running.server.running == 2)
        with editing(tokens_file) as tokens:
            tokens[0] = tokens[0].model_copy(update={"revoked": datetime.now(UTC)})
        await running.server.access.reload()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "revoked" in await call.details()
    await running.until(lambda: running.server.waiting + running.server.running == 1)
    assert await anext(held)
    held.cancel()


async def test_a_stream_outlives_its_token_by_no_more_than_a_look_at_the_file(
    start_server: Any,
    tokens_file: Path,
    make_token: MakeToken,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = make_token("brief", expires=datetime.now(UTC) + timedelta(hours=1))
    running = await start_server(
        backend=slow_backend(), tokens_file=tokens_file, access_reload_s=0.05
    )
    client = running.new_client(token=token, retry=None, timeout_s=60.0)
    stream = client.generate_stream("a", max_new_tokens=8000)
    await anext(stream)
    monkeypatch.setattr(interceptor, "datetime", in_two_days())
    with pytest.raises(UnauthenticatedError, match="ended while it ran: the token expired at"):
        async for _ in stream:
            pass
    await running.until(lambda: running.server.engine.num_running == 0)


async def test_a_reload_that_its_caller_cancels_changes_the_limits_all_the_same(
    start_server: Any,
    tokens_file: Path,
    make_token: MakeToken,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = make_token("web", requests_per_minute=1000)
    running = await start_server(tokens_file=tokens_file, access_reload_s=NEVER_S)
    await running.new_client(token=token, retry=None).get_model()
    access = running.server.access
    quota = access.tokens.quotas.quota_of(access.tokens.tokens.token[0])
    with editing(tokens_file) as tokens:
        tokens[0] = tokens[0].model_copy(update={"requests_per_minute": 5})
    reading, go_on = threading.Event(), threading.Event()
    reload = Tokens.reload

    def slow(self: Tokens) -> bool:
        reading.set()
        assert go_on.wait(20)
        return reload(self)

    monkeypatch.setattr(Tokens, "reload", slow)
    asked = asyncio.create_task(running.server.reload())
    await running.until(reading.is_set)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    assert asked.cancelled()
    go_on.set()
    await running.until(lambda: access.tokens.tokens.token[0].requests_per_minute == 5)
    await running.until(lambda: quota.limits.requests_per_minute == 5)
    # The next reload finds nothing new, and so could not make up for it.
    (result,) = await access.reload()
    assert result.outcome is Outcome.UNCHANGED


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[[token]]\nname = 'wel", "not valid TOML"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[[token]]\nname = 'web'\n", "id: Field required"),
        (None, "No such file"),
    ],
    ids=["half written", "no text", "fields missing", "gone"],
)
async def test_a_broken_tokens_file_is_one_line_at_the_start_and_ignored_at_a_reload(
    start_server: Any,
    tokens_file: Path,
    make_token: MakeToken,
    content: bytes | None,
    reason: str,
) -> None:
    token = make_token()
    running = await start_server(tokens_file=tokens_file, access_reload_s=NEVER_S)
    client = running.new_client(token=token, retry=None)
    tokens_file.unlink()
    if content is not None:
        tokens_file.write_bytes(content)
    for _ in range(3):
        (result,) = await running.server.access.reload()
        assert result.outcome is Outcome.REFUSED
        assert reason in result.reason
    await client.get_model()
    with pytest.raises(UnauthenticatedError):
        await running.client.get_model()
    complaints = [line for line in running.logs if line["log_level"] == "error"]
    assert [line["event"] for line in complaints] == [
        "tokens not reloaded, the old ones stay in use"
    ]
    server = Server(ServerConfig(port=0, tokens_file=tokens_file))
    with pytest.raises(ListenError, match=reason) as caught:
        await server.start()
    assert "\n" not in str(caught.value)
    await server.drain(0.0)


async def test_an_emptied_tokens_file_lets_nobody_in(
    start_server: Any, tokens_file: Path, make_token: MakeToken
) -> None:
    token = make_token()
    running = await start_server(tokens_file=tokens_file, access_reload_s=NEVER_S)
    tokens_file.write_text("")
    (result,) = await running.server.access.reload()
    assert result.outcome is Outcome.RELOADED
    with pytest.raises(UnauthenticatedError):
        await running.new_client(token=token, retry=None).get_model()
    other = await start_server(tokens_file=tokens_file)
    events = [line["event"] for line in other.logs]
    assert "no token is usable: nobody can call" in events


async def test_looks_go_on_after_a_bug_in_one(
    start_server: Any, tokens_file: Path, make_token: MakeToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_token()
    running = await start_server(tokens_file=tokens_file, access_reload_s=0.05)

    def bug() -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(running.server.access.tokens, "reload", bug)
    await running.until(
        lambda: any(line["event"] == "looking at the files failed" for line in running.logs)
    )
    monkeypatch.undo()
    second = make_token("second")
    await running.until(lambda: len(running.server.access.tokens.tokens.token) == 2)
    await running.new_client(token=second, retry=None).get_model()


async def test_tokens_in_the_clear_beyond_this_machine_are_warned_of(
    start_server: Any, tokens_file: Path, make_token: MakeToken
) -> None:
    make_token()
    running = await start_server(tokens_file=tokens_file, host="0.0.0.0")
    events = [line["event"] for line in running.logs]
    assert "tokens are sent in the clear: set tls_cert and tls_key" in events
