"""Every row of the bad-input table over the wire: code, field, and the limit in the description."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import (
    AsyncClient,
    GptjetError,
    InvalidRequestError,
    QueueFullError,
    ResourceExhaustedError,
    TokenChunk,
    UnavailableError,
)

StartServer = Callable[..., Awaitable[Any]]

# The mock has a context of 32 here, 257 ids, and one token a byte.
ROWS: list[tuple[str, Any, dict[str, Any], str, str]] = [
    ("empty_text", "", {}, "prompt", "at least one token"),
    ("no_token_ids", [], {}, "prompt", "at least one token"),
    ("prompt_is_the_context", "x" * 32, {}, "prompt", "context of 32"),
    ("text_over_the_context", "x" * 33, {}, "prompt", "context of 32"),
    ("ids_over_the_context", [1] * 33, {}, "prompt", "context of 32"),
    ("max_new_tokens", "a", {"max_new_tokens": 0}, "sampling_params.max_new_tokens", "1 or more"),
    (
        "prompt_and_output_over_the_context",
        "x" * 30,
        {"max_new_tokens": 3},
        "sampling_params.max_new_tokens",
        "context of 32",
    ),
    ("temperature", "a", {"temperature": -0.1}, "sampling_params.temperature", "got -0.1"),
    ("temperature_nan", "a", {"temperature": float("nan")}, "sampling_params.temperature", "nan"),
    ("top_p_zero", "a", {"top_p": 0.0}, "sampling_params.top_p", "in (0, 1], got 0"),
    ("top_p_above_1", "a", {"top_p": 1.1}, "sampling_params.top_p", "in (0, 1], got 1.1"),
    ("top_k", "a", {"top_k": -1}, "sampling_params.top_k", "0 (off) or more, got -1"),
    ("stop_count", "a", {"stop": ["x"] * 17}, "sampling_params.stop", "at most 16"),
    ("stop_empty", "a", {"stop": ["x", ""]}, "sampling_params.stop[1]", "must not be empty"),
    ("prompt_id", [1, 257], {}, "token_ids.ids[1]", "below the vocabulary of 257, got 257"),
    (
        "stop_token_id",
        "a",
        {"stop_token_ids": [999]},
        "sampling_params.stop_token_ids[0]",
        "vocabulary of 257",
    ),
    (
        "logit_bias_id",
        "a",
        {"logit_bias": {300: 1.0}},
        "sampling_params.logit_bias[300]",
        "vocabulary of 257",
    ),
    ("n_zero", "a", {"n": 0}, "sampling_params.n", "1 to 4"),
    ("n_over_the_limit", "a", {"n": 5}, "sampling_params.n", "1 to 4 (max_n), got 5"),
    ("logprobs", "a", {"logprobs": 21}, "sampling_params.logprobs", "0 to 20"),
    ("request_id", "a", {"request_id": "r" * 129}, "request_id", "at most 128"),
]


@pytest.mark.parametrize("unary", [True, False], ids=["unary", "stream"])
async def test_bad_field_is_named_with_its_limit(start_server: StartServer, unary: bool) -> None:
    running = await start_server(backend=MockBackend(max_context=32), max_n=4)
    for name, prompt, options, field, limit in ROWS:
        full = {"max_new_tokens": 1} | options
        client = running.client
        call = client.generate(prompt, **full) if unary else anext_of(client, prompt, full)
        with pytest.raises(InvalidRequestError) as caught:
            await call
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT, name
        assert [v.field for v in caught.value.violations] == [field], name
        assert limit in caught.value.violations[0].description, name
        assert field in caught.value.message, name


async def anext_of(client: AsyncClient, prompt: Any, options: dict[str, Any]) -> TokenChunk:
    return await anext(client.generate_stream(prompt, **options))


async def test_all_bad_fields_are_named_at_once(start_server: StartServer) -> None:
    running = await start_server()
    with pytest.raises(InvalidRequestError) as caught:
        await running.client.generate("a", temperature=-1.0, top_p=2.0, max_new_tokens=0)
    assert {v.field.rpartition(".")[2] for v in caught.value.violations} == {
        "temperature",
        "top_p",
        "max_new_tokens",
    }


async def test_a_thousand_violations_still_fit_the_trailers(start_server: StartServer) -> None:
    running = await start_server()
    with pytest.raises(InvalidRequestError) as caught:
        await running.client.generate("a", logit_bias=dict.fromkeys(range(1000, 2000), 1e30))
    assert 1 <= len(caught.value.violations) <= 16


async def test_ids_to_detokenize_are_checked(start_server: StartServer) -> None:
    running = await start_server()
    with pytest.raises(InvalidRequestError) as caught:
        await running.client.detokenize([0, 1, 257])
    assert caught.value.violations[0].field == "ids[2]"
    assert "vocabulary of 257, got 257" in caught.value.violations[0].description


def length_delimited(number: int, payload: bytes) -> bytes:
    """A field of the wire format, shorter than 128 bytes."""
    return bytes(((number << 3) | 2, len(payload))) + payload


BAD_UTF8 = [
    ("Generate", length_delimited(1, b"ab\xff"), "text"),
    ("GenerateStream", length_delimited(1, b"ab\xff"), "text"),
    ("Generate", length_delimited(1, b"a") + length_delimited(3, b"\xc3"), "request_id"),
    (
        "Generate",
        length_delimited(1, b"a")
        + length_delimited(4, length_delimited(14, b"ok") + length_delimited(14, b"\xe2\x82")),
        "sampling_params.stop[1]",
    ),
    ("Tokenize", length_delimited(1, b"\xff"), "text"),
]


@pytest.mark.parametrize(("method", "data", "field"), BAD_UTF8)
async def test_invalid_utf8_is_an_invalid_argument_that_names_the_field(
    start_server: StartServer, method: str, data: bytes, field: str
) -> None:
    running = await start_server()
    error = await call_with_bytes(running.target, method, data)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [(v.field, v.description) for v in error.violations] == [(field, "must be valid UTF-8")]


async def test_truncated_message_is_an_invalid_argument(start_server: StartServer) -> None:
    running = await start_server()
    whole = pb.GenerateRequest(text="hello").SerializeToString()
    error = await call_with_bytes(running.target, "Generate", whole[:-2])
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "gptjet.v1.GenerateRequest" in error.message


async def call_with_bytes(target: str, method: str, data: bytes) -> GptjetError:
    from gptjet.service.client_channel import from_rpc_error

    async with grpc.aio.insecure_channel(target) as opened:
        channel: Any = opened  # without serializers it carries bytes, which its types do not say
        path = f"/gptjet.v1.TextGeneration/{method}"
        try:
            if method == "GenerateStream":
                await channel.unary_stream(path)(data).read()
            else:
                await channel.unary_unary(path)(data)
        except grpc.RpcError as error:
            return from_rpc_error(error)
    raise AssertionError("the call succeeded")


async def test_unknown_fields_are_ignored(start_server: StartServer) -> None:
    running = await start_server()
    request = pb.GenerateRequest(text="abc", sampling_params=pb.SamplingParams(max_new_tokens=2))
    unknown = bytes((0xC0, 0x3E, 0x01))  # field 1000, a varint
    async with grpc.aio.insecure_channel(running.target) as opened:
        channel: Any = opened
        answer = await channel.unary_unary("/gptjet.v1.TextGeneration/Generate")(
            request.SerializeToString() + unknown
        )
    assert pb.GenerateResponse.FromString(answer).sequences[0].text == "de"


async def test_message_over_the_limit_is_refused_with_both_sizes(start_server: StartServer) -> None:
    running = await start_server(max_message_bytes=65536)
    with pytest.raises(
        ResourceExhaustedError,
        match=r"has \d+ bytes; at most 65536 are taken \(max_message_bytes\)",
    ) as caught:
        await running.client.tokenize("x" * 70_000)
    assert not isinstance(caught.value, QueueFullError)
    # Far over it, gRPC does not even take it in.
    with pytest.raises(ResourceExhaustedError, match="larger than max"):
        await running.client.tokenize("x" * 2_000_000)


async def test_full_queue_says_when_to_come_back(start_server: StartServer) -> None:
    backend = MockBackend(max_sequences=1, decode_ms=25)
    running = await start_server(backend=backend, max_queue_size=1)
    first = running.client.generate_stream("a", max_new_tokens=400)
    await anext(first)  # it runs
    second = asyncio.create_task(running.client.generate("a", max_new_tokens=1))
    await running.until(lambda: running.server.engine.num_waiting == 1)
    with pytest.raises(QueueFullError, match="1 requests are waiting") as caught:
        await running.client.generate("a", max_new_tokens=1)
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_s == 1.0
    first.cancel()
    assert (await second).text == "b"  # the one that waited was not harmed


async def test_loading_server_answers_health_and_get_model_and_refuses_the_rest(
    start_server: StartServer,
) -> None:
    running = await start_server(attach=False, max_n=3)
    client = running.client
    assert await client.health() == "not_serving"
    assert await client.health("") == "not_serving"
    model = await client.get_model()
    assert (model.name, model.backend, model.max_n, model.max_context) == ("toy", "mock", 3, 0)
    calls = (client.generate("a"), client.tokenize("a"), client.detokenize([1]))
    for call in calls:
        with pytest.raises(UnavailableError, match="the model is loading") as caught:
            await call
        assert caught.value.retry_after_s == 2.0
    with pytest.raises(UnavailableError, match="the model is loading"):
        await anext(client.generate_stream("a"))
