"""Generation over the wire. The mock continues "abc" with "defgh…", so answers are known."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import (
    DeadlineExceededError,
    FinishReason,
    InternalError,
    UnavailableError,
)
from gptjet.service.engine.backend import ScheduledBatch
from gptjet.service.engine.tokenizer import ByteTokenizer

StartServer = Callable[..., Awaitable[Any]]

FOR_EVER = 50_000


def slow_backend(**options: Any) -> MockBackend:
    """FOR_EVER tokens take minutes: what ends sooner was ended by something."""
    return MockBackend(max_context=2 * FOR_EVER, decode_ms=5, **options)


async def test_unary_answer_is_the_mocks_continuation(start_server: StartServer) -> None:
    running = await start_server()
    answer = await running.client.generate("abc", max_new_tokens=4, request_id="r-1", seed=9)
    assert answer.text == "defg"
    assert answer.token_ids == tuple(b"defg")
    summary = answer.summary
    assert (summary.request_id, summary.seed) == ("r-1", 9)
    assert (summary.prompt_tokens, summary.completion_tokens) == (3, 4)
    assert summary.finish_reason is FinishReason.LENGTH
    assert summary.timings.e2e_ms >= summary.timings.ttft_ms > 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.5, "seed": 4, "n": 3},
        {"stop": ["hij", "ff"], "max_new_tokens": 40},
        {"echo": True, "logprobs": 2},
    ],
    ids=["greedy", "sampled", "n", "stop", "echo"],
)
async def test_stream_concatenated_equals_the_unary_answer(
    start_server: StartServer, options: dict[str, Any]
) -> None:
    running = await start_server()
    full = {"max_new_tokens": 24} | options
    unary = await running.client.generate("é abc", **full)
    texts: dict[int, str] = {}
    ids: dict[int, tuple[int, ...]] = {}
    logprobs: dict[int, tuple[Any, ...]] = {}
    stream = running.client.generate_stream("é abc", **full)
    async for chunk in stream:
        texts[chunk.index] = texts.get(chunk.index, "") + chunk.text
        ids[chunk.index] = ids.get(chunk.index, ()) + chunk.token_ids
        logprobs[chunk.index] = logprobs.get(chunk.index, ()) + chunk.logprobs
    assert sorted(texts) == list(range(full.get("n", 1)))
    for sequence in unary.sequences:
        assert texts[sequence.index].encode() == sequence.text.encode()
        assert ids[sequence.index] == sequence.token_ids
        assert logprobs[sequence.index] == sequence.logprobs
    assert stream.text == unary.text
    assert stream.summary is not None
    assert stream.summary.sequences == unary.summary.sequences
    assert stream.summary.completion_tokens == unary.summary.completion_tokens


async def test_token_ids_are_a_prompt_like_their_text(start_server: StartServer) -> None:
    running = await start_server()
    answer = await running.client.generate(list(b"xyz"), max_new_tokens=2)
    assert answer.text == "ab"


async def test_n_sequences_each_have_a_summary(start_server: StartServer) -> None:
    running = await start_server()
    answer = await running.client.generate("abc", max_new_tokens=2, n=3)
    assert [s.text for s in answer.sequences] == ["de"] * 3
    assert [s.index for s in answer.summary.sequences] == [0, 1, 2]
    assert answer.summary.completion_tokens == 6


async def test_stop_reasons_say_what_matched(start_server: StartServer) -> None:
    running = await start_server()
    by_string = await running.client.generate("abc", max_new_tokens=9, stop="fg")
    assert by_string.text == "de"
    assert by_string.summary.sequences[0].stop_match == "fg"
    by_id = await running.client.generate("abc", max_new_tokens=9, stop_token_ids=[ord("f")])
    assert by_id.text == "de"
    assert by_id.summary.sequences[0].stop_match == ord("f")
    assert by_id.summary.finish_reason is FinishReason.STOP_TOKEN
    # The mock ends the text after "Z".
    by_end = await running.client.generate("X", max_new_tokens=9)
    assert by_end.text == "YZ"
    assert by_end.summary.sequences[0].stop_match == 256


async def test_echo_repeats_the_prompt_and_marks_it(start_server: StartServer) -> None:
    running = await start_server()
    stream = running.client.generate_stream("abc", max_new_tokens=2, echo=True, logprobs=1)
    chunks = [chunk async for chunk in stream]
    assert [c.is_prompt for c in chunks] == [True, *[False] * (len(chunks) - 1)]
    assert (chunks[0].text, "".join(c.text for c in chunks[1:])) == ("abc", "de")
    assert chunks[0].logprobs[0].logprob is None  # nothing comes before the first token
    # The successor has probability 1 - 1/e: see logits_after.
    assert chunks[0].logprobs[1].logprob == pytest.approx(math.log(1 - math.exp(-1)), abs=1e-6)
    assert chunks[1].logprobs[0].top[0][0] == ord("d")
    assert stream.summary is not None
    assert stream.summary.completion_tokens == 2


async def test_no_logprobs_unless_asked(start_server: StartServer) -> None:
    running = await start_server()
    assert (await running.client.generate("a", max_new_tokens=1)).sequences[0].logprobs == ()
    zero = await running.client.generate("a", max_new_tokens=1, logprobs=0)
    assert [item.top for item in zero.sequences[0].logprobs] == [()]


async def test_absent_params_have_the_defaults_of_the_contract(start_server: StartServer) -> None:
    running = await start_server()
    async with grpc.aio.insecure_channel(running.target) as channel:
        call = channel.unary_unary(
            "/gptjet.v1.TextGeneration/Generate",
            pb.GenerateRequest.SerializeToString,
            pb.GenerateResponse.FromString,
        )
        answer = await call(pb.GenerateRequest(text="a"))
    assert answer.summary.usage.completion_tokens == 64


async def test_tokenize_and_detokenize(start_server: StartServer) -> None:
    running = await start_server()
    tokens = await running.client.tokenize("hé")
    assert tokens.ids == (0x68, 0xC3, 0xA9)
    assert tokens.pieces == ("h", "\ufffd", "\ufffd")
    assert await running.client.detokenize(tokens.ids) == "hé"


async def test_get_model_gives_the_limits_in_force(start_server: StartServer) -> None:
    running = await start_server(max_queue_size=7, max_n=3, max_sequences=5)
    model = await running.client.get_model()
    assert (model.name, model.architecture, model.device) == ("toy", "mock", "cpu")
    assert (model.vocab_size, model.max_context, model.eos_token_id) == (257, 512, 256)
    assert (model.max_queue_size, model.max_n, model.max_sequences) == (7, 3, 5)
    assert model.parity.status == "not_run"


async def test_deadline_ends_the_rpc_and_frees_the_sequence(start_server: StartServer) -> None:
    backend = slow_backend()
    running = await start_server(backend=backend)
    await running.client.health()  # there is a connection
    stream = running.client.generate_stream("a", max_new_tokens=FOR_EVER, timeout_s=0.8)
    with pytest.raises(DeadlineExceededError):
        async for _ in stream:
            pass
    await running.until(lambda: not backend.cached and running.server.engine.num_running == 0)
    line = await running.request_line(method="GenerateStream")
    assert (line["code"], line["finish_reason"]) == ("DEADLINE_EXCEEDED", "deadline")


async def test_engine_knows_the_callers_deadline(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it can act between two steps, even if the cancellation never arrives."""
    running = await start_server()
    seen = submitted_requests(running, monkeypatch)
    await running.client.generate("a", timeout_s=15.0)
    await running.client.generate("a", timeout_s=math.inf)
    assert 0 < seen[0].deadline_ns - seen[0].arrival_ns <= 15.1e9
    assert seen[1].deadline_ns is None


def submitted_requests(running: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    submit = running.server.engine.submit

    def spy(request: Any) -> Any:
        seen.append(request)
        return submit(request)

    monkeypatch.setattr(running.server.engine, "submit", spy)
    return seen


async def test_every_deadline_is_logged_as_one_however_the_caller_left(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's cancellation and the server's own clock race; both must read the same."""
    running = await start_server(backend=slow_backend())
    client = running.client
    await client.health()  # there is a connection
    seen = submitted_requests(running, monkeypatch)
    calls = [
        client.generate("a", max_new_tokens=FOR_EVER, timeout_s=0.5 + i / 97) for i in range(20)
    ]
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, DeadlineExceededError)
    await running.until(lambda: len(request_lines(running)) >= len(seen) > 0)
    ends = {(line["code"], line["finish_reason"]) for line in request_lines(running)}
    assert ends == {("DEADLINE_EXCEEDED", "deadline")}


def request_lines(running: Any) -> list[Any]:
    return [
        line for line in running.logs if line["event"] == "request" and line["method"] == "Generate"
    ]


async def test_deadline_in_the_queue_is_kept_too(start_server: StartServer) -> None:
    backend = slow_backend(max_sequences=1)
    running = await start_server(backend=backend)
    first = running.client.generate_stream("a", max_new_tokens=FOR_EVER)
    await anext(first)
    with pytest.raises(DeadlineExceededError):
        await running.client.generate("b", timeout_s=0.1)
    await running.until(lambda: running.server.engine.num_waiting == 0)
    assert len(backend.cached) == 1
    first.cancel()


@pytest.mark.parametrize("unary", [True, False], ids=["unary", "stream"])
async def test_caller_that_goes_away_frees_its_sequences(
    start_server: StartServer, unary: bool
) -> None:
    backend = slow_backend()
    running = await start_server(backend=backend)
    if unary:
        task = asyncio.create_task(running.client.generate("a", max_new_tokens=FOR_EVER, n=2))
        await running.until(lambda: running.server.engine.num_running == 1)
        task.cancel()
    else:
        async with running.client.generate_stream("a", max_new_tokens=FOR_EVER, n=2) as stream:
            async for _ in stream:
                break
    await running.until(lambda: not backend.cached and running.server.engine.num_running == 0)
    line = await running.request_line(code="CANCELLED")
    assert line["finish_reason"] == "cancelled"


class FailingBackend(MockBackend):
    """Fails in the step that decodes the letter 'q'."""

    def decode(self, batch: ScheduledBatch) -> Any:
        if any(sequence.last_token_id == ord("q") for sequence in batch.sequences):
            raise RuntimeError("a detail of the device")
        return super().decode(batch)


async def test_failed_step_is_internal_with_the_id_in_the_log(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    running = await start_server(backend=FailingBackend())
    stream = running.client.generate_stream("n", max_new_tokens=9)
    with pytest.raises(InternalError, match="error id") as caught:
        async for _ in stream:
            pass
    assert stream.text == "opq"
    error_id = caught.value.message.partition("error id ")[2][:12]
    assert error_id in caplog.text
    assert "a detail of the device" not in caught.value.message
    line = await running.request_line(code="INTERNAL")
    assert line["finish_reason"] == "error"
    assert (
        await running.client.generate("abc", max_new_tokens=2)
    ).text == "de"  # others are served


class BrokenTokenizer(ByteTokenizer):
    """A tokenizer with a bug."""

    def encode(self, text: str) -> list[int]:
        raise KeyError(text)


async def test_bug_is_internal_with_an_id_and_no_more(start_server: StartServer) -> None:
    running = await start_server(tokenizer=BrokenTokenizer())
    with pytest.raises(InternalError) as caught:
        await running.client.generate("the prompt")
    assert "the prompt" not in caught.value.message
    (logged,) = [line for line in running.logs if line["event"] == "internal error"]
    assert logged["error_id"] in caught.value.message
    assert isinstance(logged["exc_info"], KeyError)


class HeldBackend(MockBackend):
    """No decode step ends until `go_on`."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def decode(self, batch: ScheduledBatch) -> Any:
        assert self.go_on.wait(20)
        return super().decode(batch)


async def test_drain_finishes_what_runs_and_refuses_what_comes(start_server: StartServer) -> None:
    backend = HeldBackend()
    running = await start_server(backend=backend)
    stream = running.client.generate_stream("a", max_new_tokens=60)
    await anext(stream)
    draining = asyncio.create_task(running.server.drain(20.0))
    await running.until(lambda: any(line["event"] == "draining" for line in running.logs))
    assert await running.client.health() == "not_serving"
    for call in (running.client.generate("a"), running.client.tokenize("a")):
        with pytest.raises(UnavailableError, match="draining") as caught:
            await call
        assert caught.value.retry_after_s == 1.0
    backend.go_on.set()
    assert sum([len(chunk.token_ids) async for chunk in stream]) == 59
    assert stream.summary is not None
    assert await draining


async def test_requests_over_the_grace_period_are_told_that_the_server_stops(
    start_server: StartServer,
) -> None:
    backend = slow_backend()
    running = await start_server(backend=backend)
    stream = running.client.generate_stream("a", max_new_tokens=FOR_EVER)
    await anext(stream)
    draining = asyncio.create_task(running.server.drain(0.05))
    with pytest.raises(UnavailableError, match="stopped before the request was finished"):
        async for _ in stream:
            pass
    assert await draining
    assert not backend.cached
