"""Faults on a real server process: what its callers, its health and its supervisor see."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gptjet.service.backends.mock import MockBackend
from gptjet.service.cli import app
from gptjet.service.client import (
    Client,
    GptjetError,
    HealthStatus,
    InternalError,
    QueueFullError,
    ResourceExhaustedError,
    UnavailableError,
)
from gptjet.service.commands.terminal import ExitCode
from gptjet.service.observability.setup import Observability
from gptjet.service.rpc import process
from gptjet.service.rpc import server as server_module

Serve = Callable[..., Any]
PATIENCE_S = 20.0


def outcome(client: Client, prompt: str = "a", **options: Any) -> str | GptjetError:
    try:
        return client.generate(prompt, **options).text
    except GptjetError as error:
        return error


def error_id_in(error: GptjetError) -> str:
    found = re.search(r"error id ([0-9a-f]{12})", str(error))
    assert found, str(error)
    return found[1]


def test_the_exit_codes_are_the_command_lines() -> None:
    assert process.EXIT_ENGINE == ExitCode.ENGINE


def test_a_failed_step_is_internal_with_an_id_in_the_log_and_the_server_goes_on(
    serve_process: Serve,
) -> None:
    server = serve_process("mock:fail_at_step=4,decode_ms=1")
    with server.connect() as client:
        error = outcome(client, max_new_tokens=9)
        assert isinstance(error, InternalError)
        assert error_id_in(error) in server.text()
        assert "step 4 fails" in server.text()
        assert outcome(client, max_new_tokens=3) == "bcd"
        assert client.health() is HealthStatus.SERVING


def test_nan_fails_its_own_request_by_name(serve_process: Serve) -> None:
    server = serve_process("mock:nan_at_step=40,decode_ms=2")
    with server.connect() as client, ThreadPoolExecutor(4) as pool:
        options = {"max_new_tokens": 60}
        results = list(pool.map(lambda _: outcome(client, **options), range(4)))
    errors = [result for result in results if isinstance(result, GptjetError)]
    assert len(errors) == 1
    assert isinstance(errors[0], InternalError)
    assert "not finite" in str(errors[0])
    assert len({result for result in results if isinstance(result, str)}) == 1


def test_a_prompt_without_memory_is_resource_exhausted_and_others_are_served(
    serve_process: Serve,
) -> None:
    server = serve_process("mock:oom_above_tokens=100,max_prefill_batch_size=4,decode_ms=1")
    with server.connect() as client, ThreadPoolExecutor(8) as pool:
        prompts = ["a" * 101, "b" * 30, "c" * 30, "d" * 30, "e" * 200, "f" * 100, "g", "h"]
        results = list(pool.map(lambda p: outcome(client, p, max_new_tokens=2), prompts))
        for position in (0, 4):
            error = results[position]
            assert isinstance(error, ResourceExhaustedError)
            assert not isinstance(error, QueueFullError)
            assert error_id_in(error) in server.text()
        assert results[1:4] == ["cd", "de", "ef"]
        assert results[5:] == ["gh", "hi", "ij"]
        assert client.health() is HealthStatus.SERVING


@pytest.mark.parametrize("paged", [0, 1])
def test_decode_steps_without_memory_fail_nobody(serve_process: Serve, paged: int) -> None:
    server = serve_process(f"mock:oom_above_sequences=3,paged={paged},decode_ms=1")
    with server.connect() as client, ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda _: outcome(client, max_new_tokens=30), range(12)))
    assert set(texts) == {"bcdefghijklmnopqrstuvwxyzabcde"}
    assert "out of memory in a decode step" in server.text()


def test_a_hung_step_tells_callers_then_health_and_exits_for_its_supervisor(
    serve_process: Serve,
) -> None:
    flags = ("--step-timeout-s", "1", "--failure-grace-s", "5", "--max-sequences", "1")
    server = serve_process("mock:hang_at_step=5", *flags)
    with server.connect() as client, ThreadPoolExecutor(3) as pool:
        running = pool.submit(outcome, client, max_new_tokens=20)
        waiting = [pool.submit(outcome, client, max_new_tokens=20) for _ in range(2)]
        results = [running.result(), *(future.result() for future in waiting)]
        server.wait_for_health(client, HealthStatus.NOT_SERVING)
        told = [error for error in results if isinstance(error, InternalError)]
        queued = [error for error in results if isinstance(error, UnavailableError)]
        assert (len(told), len(queued)) == (1, 2)
        assert "(step_timeout_s)" in str(told[0])
        assert error_id_in(told[0]) in server.text()
        assert "mock_faults.py" in server.text()  # where it hangs
        refused = outcome(client)
        assert isinstance(refused, UnavailableError)
        assert "(step_timeout_s)" in str(refused)
    assert server.wait() == ExitCode.ENGINE


def test_a_dead_engine_thread_tells_callers_and_exits_for_its_supervisor(
    serve_process: Serve,
) -> None:
    flags = ("--failure-grace-s", "0.5", "--max-sequences", "2")
    server = serve_process("mock:die_at_step=300,decode_ms=5", *flags)
    with server.connect() as client, ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: outcome(client, max_new_tokens=400), range(6)))
    assert all(isinstance(result, InternalError | UnavailableError) for result in results)
    assert sum(isinstance(result, InternalError) for result in results) == 2
    assert server.wait() == ExitCode.ENGINE
    assert "the engine has failed" in server.text()


def test_a_device_that_fails_for_good_ends_the_process(serve_process: Serve) -> None:
    flags = ("--failure-grace-s", "0", "--max-failed-steps", "3")
    server = serve_process("mock:fail_from_step=1", *flags)
    with server.connect() as client:
        for _ in range(3):
            assert isinstance(outcome(client), InternalError)
    assert server.wait() == ExitCode.ENGINE
    assert "(max_failed_steps)" in server.text()


def test_sigterm_in_the_grace_period_of_a_failure_ends_it_at_once(serve_process: Serve) -> None:
    flags = ("--failure-grace-s", "600", "--max-failed-steps", "1")
    server = serve_process("mock:fail_from_step=1", *flags)
    with server.connect() as client:
        assert isinstance(outcome(client), InternalError)
        server.wait_for_health(client, HealthStatus.NOT_SERVING)
        begun = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == ExitCode.ENGINE
        assert time.monotonic() - begun < 60


# --- in this process ---


class HangingBackend(MockBackend):
    """Decodes until `hang` is set, and then waits for `go_on`."""

    def __init__(self) -> None:
        super().__init__(decode_ms=20)
        self.hang, self.go_on = threading.Event(), threading.Event()

    def decode(self, batch: Any) -> Any:
        if self.hang.is_set():
            self.go_on.wait(PATIENCE_S)
        return super().decode(batch)


@pytest.fixture
def hanging() -> Iterator[HangingBackend]:
    backend = HangingBackend()
    yield backend
    backend.go_on.set()


async def test_a_server_whose_engine_has_failed_says_so_to_its_administrator(
    start_server: Any, hanging: HangingBackend, tmp_path: Path
) -> None:
    socket = tmp_path / "admin"
    running = await start_server(backend=hanging, step_timeout_s=0.2, admin_socket=socket)

    def ask() -> tuple[str, str]:
        flags = ["admin", "status", "--admin", f"unix:{socket}"]
        table, document = (
            CliRunner().invoke(app, [*flags, *more], env={"COLUMNS": "200"}).stdout
            for more in ([], ["--json"])
        )
        return table.split(",")[0].split()[-1], json.loads(document)["state"]

    async def told() -> str:
        shown, state = await asyncio.to_thread(ask)
        assert shown == state
        return state

    assert await told() == "serving"
    hanging.hang.set()
    with pytest.raises(InternalError):
        await running.client.generate("a", max_new_tokens=9)
    assert await told() == "failed"
    # That it ends for it hides nothing.
    running.server.ask_to_stop(0.0)
    assert await told() == "failed"
    assert await running.client.health() is HealthStatus.NOT_SERVING


async def test_a_server_that_is_told_to_stop_is_draining_and_not_failed(start_server: Any) -> None:
    running = await start_server()
    running.server.ask_to_stop(0.0)
    assert running.server.state == "draining"


async def test_a_hang_while_draining_is_not_logged_as_all_finished(
    start_server: Any, hanging: HangingBackend
) -> None:
    running = await start_server(backend=hanging, step_timeout_s=0.4)
    stream = running.client.generate_stream("a", max_new_tokens=400)
    await anext(stream)
    hanging.hang.set()
    draining = asyncio.create_task(running.server.drain(PATIENCE_S))
    with pytest.raises(InternalError):
        async for _ in stream:
            pass
    await draining
    (line,) = (entry for entry in running.logs if entry["event"] == "drained")
    assert line["all_finished"] is False


async def test_a_backend_that_does_not_close_does_not_keep_the_server(
    start_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(server_module, "_STEP_S", 0.3)
    close = threading.Event()

    class Backend(MockBackend):
        def close(self) -> None:
            close.wait(PATIENCE_S)

    running = await start_server(backend=Backend(), port_file=tmp_path / "port")
    assert not await running.server.drain(0.0)
    assert not close.is_set()
    close.set()
    assert "the backend does not close" in [entry["event"] for entry in running.logs]
    assert list(tmp_path.iterdir()) == []


async def test_a_part_that_fails_to_stop_keeps_no_other_from_it(
    start_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = {"port_file": tmp_path / "port", "admin_socket": tmp_path / "admin"}
    running = await start_server(**settings)

    async def broken(*_: Any) -> Any:
        raise KeyError("a bug where none can be")

    with monkeypatch.context() as patch:
        patch.setattr(Observability, "close", broken)
        patch.setattr(running.server, "_drain_engine", broken)
        with pytest.raises(KeyError):
            await running.server.drain(0.0)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UnavailableError):
        await running.client.generate("a")
