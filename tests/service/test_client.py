"""The client against our server with the mock, and what it refuses to send at all."""

from __future__ import annotations

import asyncio
import dataclasses
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from gptjet.service import client_types
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import (
    AsyncClient,
    Client,
    FinishReason,
    HealthStatus,
    InvalidRequestError,
    RetryPolicy,
    TlsOptions,
    UnavailableError,
)
from gptjet.service.engine import request

StartServer = Callable[..., Awaitable[Any]]


# --- against our server ---


async def test_sync_client_does_what_the_async_one_does(start_server: StartServer) -> None:
    running = await start_server()

    def use() -> None:
        with Client(running.target, retry=None, timeout_s=20) as client:
            client.wait_until_serving(10)
            assert client.health() is HealthStatus.SERVING
            assert client.generate("abc", max_new_tokens=3).text == "def"
            with client.generate_stream(list(b"abc"), max_new_tokens=3) as stream:
                assert [token.text for token in stream] == ["d", "e", "f"]
            assert stream.summary is not None
            assert stream.summary.finish_reason is FinishReason.LENGTH
            assert stream.text == "def"
            assert client.tokenize("ab").ids == (97, 98)
            assert client.detokenize([97, 98]) == "ab"
            assert client.get_model().max_context == 512
            with pytest.raises(InvalidRequestError, match="top_p"):
                client.generate("a", top_p=3.0)

    await asyncio.to_thread(use)


async def test_one_sync_client_serves_many_threads(start_server: StartServer) -> None:
    running = await start_server()

    def use() -> list[str]:
        with (
            Client(running.target, retry=None, timeout_s=20) as client,
            ThreadPoolExecutor(8) as pool,
        ):
            letters = [chr(ord("a") + i) for i in range(20)]
            return list(pool.map(lambda c: client.generate(c, max_new_tokens=4).text, letters))

    texts = await asyncio.to_thread(use)
    assert texts == ["".join(chr(ord("a") + i + k) for k in range(1, 5)) for i in range(20)]


async def test_breaking_out_and_closing_cancels_the_rpc(start_server: StartServer) -> None:
    backend = MockBackend(max_context=100_000, decode_ms=5)
    running = await start_server(backend=backend)

    def use() -> None:
        with Client(running.target, retry=None, timeout_s=20) as client:
            stream = client.generate_stream("a", max_new_tokens=50_000)
            for _ in stream:
                break
            stream.close()
            assert list(stream) == []  # over, and no error
            assert stream.summary is None
            stream.close()
            # Before the client is closed, which would cancel it too.
            asyncio.run_coroutine_threadsafe(
                running.until(lambda: not backend.cached), loop
            ).result()

    loop = asyncio.get_running_loop()
    await asyncio.to_thread(use)
    assert (await running.request_line(code="CANCELLED"))["finish_reason"] == "cancelled"


async def test_cancel_from_another_thread_ends_the_iteration(start_server: StartServer) -> None:
    running = await start_server(backend=MockBackend(max_context=100_000, decode_ms=5))

    def use() -> int:
        with Client(running.target, retry=None, timeout_s=20) as client:
            stream = client.generate_stream("a", max_new_tokens=50_000)
            next(stream)
            threading.Timer(0.05, stream.cancel).start()
            return len(list(stream))

    assert await asyncio.to_thread(use) < 49_999


async def test_aclose_while_another_task_iterates_ends_the_iteration(
    start_server: StartServer,
) -> None:
    running = await start_server(backend=MockBackend(max_context=100_000, decode_ms=5))
    stream = running.client.generate_stream("a", max_new_tokens=50_000)

    async def read() -> int:
        return len([token async for token in stream])

    reading = asyncio.create_task(read())
    await running.until(lambda: len(stream.text) > 2)
    await stream.aclose()
    assert await reading < 50_000


async def test_cancelled_task_stays_cancelled(start_server: StartServer) -> None:
    backend = MockBackend(max_context=100_000, decode_ms=5)
    running = await start_server(backend=backend)
    stream = running.client.generate_stream("a", max_new_tokens=50_000)

    async def read() -> None:
        async for _ in stream:
            pass

    reading = asyncio.create_task(read())
    await running.until(lambda: len(stream.text) > 2)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await running.until(lambda: not backend.cached)


async def test_wait_until_serving_outlasts_loading(start_server: StartServer) -> None:
    from gptjet.service.engine.tokenizer import ByteTokenizer

    running = await start_server(attach=False)
    waiting = asyncio.create_task(running.client.wait_until_serving(20))
    await running.request_line(method="grpc.health.v1.Health/Check")
    assert not waiting.done()
    await running.server.attach(running.backend, ByteTokenizer())
    await waiting


async def test_wait_until_serving_says_in_the_end_what_it_saw(start_server: StartServer) -> None:
    running = await start_server(attach=False)
    with pytest.raises(UnavailableError, match=r"after 1\.5 s: not_serving"):
        await running.client.wait_until_serving(1.5)
    async with AsyncClient("127.0.0.1:1", retry=None) as nobody:
        with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1 does not serve.*connect"):
            await nobody.wait_until_serving(1.5)


# --- what never leaves the client ---


@pytest.mark.parametrize(
    ("prompt", "options", "field", "description"),
    [
        ("a", {"max_new_tokens": -1}, "sampling_params.max_new_tokens", "0 to 4294967295, got -1"),
        ("a", {"max_new_tokens": 1.5}, "sampling_params.max_new_tokens", "an integer, got 1.5"),
        ("a", {"max_new_tokens": True}, "sampling_params.max_new_tokens", "an integer, got True"),
        ("a", {"top_k": 2**31}, "sampling_params.top_k", "got 2147483648"),
        ("a", {"seed": 2**64}, "sampling_params.seed", "got 18446744073709551616"),
        ("a", {"temperature": "hot"}, "sampling_params.temperature", "a number, got 'hot'"),
        ("a", {"temperature": 1e300}, "sampling_params.temperature", "fit float32"),
        ("a", {"echo": 1}, "sampling_params.echo", "True or False, got 1"),
        ("a", {"stop": ["x", 3]}, "sampling_params.stop[1]", "must be text, got int"),
        ("a", {"stop": 3}, "sampling_params.stop", "must be a list, got 3"),
        ("a", {"stop_token_ids": [-5]}, "sampling_params.stop_token_ids[0]", "got -5"),
        ("a", {"logit_bias": {-1: 0.0}}, "sampling_params.logit_bias[-1]", "got -1"),
        ("a", {"logit_bias": {1: None}}, "sampling_params.logit_bias[1]", "a number, got None"),
        ("a", {"request_id": "\ud800"}, "request_id", "lone surrogate"),
        ("a\ud800", {}, "text", "lone surrogate at character 1"),
        ([1, -1], {}, "token_ids.ids[1]", "0 to 4294967295, got -1"),
        (["a"], {}, "token_ids.ids[0]", "an integer, got 'a'"),
    ],
)
def test_value_its_field_cannot_hold_is_named(
    prompt: Any, options: dict[str, Any], field: str, description: str
) -> None:
    with Client("127.0.0.1:1", retry=None) as client:  # nobody is asked
        for call in (client.generate, client.generate_stream):
            with pytest.raises(InvalidRequestError) as caught:
                call(prompt, **options)
            (violation,) = caught.value.violations
            assert violation.field == field
            assert description in violation.description
            assert field in str(caught.value)


def test_unknown_option_is_a_type_error_with_a_near_match() -> None:
    with (
        Client("127.0.0.1:1", retry=None) as client,
        pytest.raises(TypeError, match=r"'max_tokens'; did you mean .*max_new_tokens"),
    ):
        client.generate("a", max_tokens=3)  # type: ignore[call-arg]


async def test_options_of_other_types_that_mean_the_same(start_server: StartServer) -> None:
    running = await start_server()
    answer = await running.client.generate(
        np.array([97, 98, 99]),
        max_new_tokens=np.int64(5),
        temperature=np.float32(0),
        stop="hd",  # one string, not its characters
        top_k=None,
    )
    assert answer.text == "defgh"


def test_tls_options_are_checked() -> None:
    with pytest.raises(ValueError, match="given together"):
        Client("localhost:1", tls=TlsOptions(client_cert=b"x"))


@pytest.mark.parametrize(
    "values", [{"max_attempts": 6}, {"initial_backoff_s": 0.001}, {"multiplier": 0.5}]
)
def test_retry_policy_grpc_would_ignore_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RetryPolicy(**values)


def test_importing_the_client_brings_neither_torch_nor_the_engine() -> None:
    code = (
        "import gptjet.service.client, sys; "
        "heavy = ('torch', 'numpy', 'transformers', 'pydantic', 'structlog'); "
        "ours = ('gptjet.service.engine', 'gptjet.service.rpc'); "
        "print([m for m in sys.modules if m.split('.')[0] in heavy or m.startswith(ours)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["Timings", "SequenceSummary", "Speculation", "TokenLogprob"])
def test_the_clients_types_have_the_engines_fields(name: str) -> None:
    """`gptjet generate --in-process` turns the one into the other, field by field."""
    ours, theirs = getattr(client_types, name), getattr(request, name)
    assert [f.name for f in dataclasses.fields(ours)] == [
        f.name for f in dataclasses.fields(theirs)
    ]


def test_the_clients_options_and_reasons_are_the_engines() -> None:
    names = {field.name for field in dataclasses.fields(request.SamplingParams)}
    assert set(client_types.SamplingOptions.__annotations__) == names
    own = {reason.value for reason in client_types.FinishReason} - {"unspecified"}
    assert own == {reason.value for reason in request.FinishReason}
