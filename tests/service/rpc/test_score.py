"""Score over a real gRPC server, on the mock and on a small huggingface checkpoint."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.service.backends.factory import load_backend
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import (
    DeadlineExceededError,
    HealthStatus,
    InternalError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from gptjet.service.engine.backend import ScoreJob
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.rpc.servicer import SERVICE_NAME

StartServer = Callable[..., Awaitable[Any]]

BEST = math.log(1 - 1 / math.e)
METHOD = f"/{SERVICE_NAME}/Score"


async def test_scores_come_back_as_worked_out_by_hand(start_server: StartServer) -> None:
    # After "ab": c is the best, d one less; "cd" is the best twice.
    running = await start_server()
    result = await running.client.score("ab", ["c", [100], "cd"], request_id="mine")
    assert result.request_id == "mine"
    assert [s.logprob for s in result.scores] == pytest.approx([BEST, BEST - 1, 2 * BEST], abs=1e-5)
    assert [[t.token_id for t in s.tokens] for s in result.scores] == [[99], [100], [99, 100]]
    assert [t.logprob for t in result.scores[2].tokens] == pytest.approx([BEST, BEST], abs=1e-5)
    assert sum(s.probability for s in result.scores) == pytest.approx(1)
    assert result.scores[0].probability / result.scores[1].probability == pytest.approx(math.e)
    assert [s.calibration_logprob for s in result.scores] == [None, None, None]
    assert (result.prompt_tokens, result.candidate_tokens, result.best) == (2, 4, 0)
    assert result.timings.e2e_ms > 0


@pytest.mark.parametrize("calibration", ["b", [98]])
async def test_calibration_prompt_is_scored_and_subtracted(
    start_server: StartServer, calibration: Any
) -> None:
    # After "a": b the best, c one less. After "b": c the best, b 256 further round.
    running = await start_server()
    result = await running.client.score([97], ["b", "c"], calibration_prompt=calibration)
    assert [s.calibration_logprob for s in result.scores] == pytest.approx(
        [BEST - 256, BEST], abs=1e-4
    )
    assert result.scores[0].probability == pytest.approx(1)
    uncalibrated = await running.client.score([97], ["b", "c"])
    assert uncalibrated.scores[0].probability == pytest.approx(math.e / (math.e + 1))


# The mock has a context of 32 here, 257 ids, and one token a byte.
ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("empty_prompt", {"prompt": ""}, "prompt", "at least one token"),
    ("no_prompt_ids", {"prompt": []}, "prompt", "at least one token"),
    ("prompt_is_the_context", {"prompt": "x" * 32}, "prompt", "context of 32"),
    ("prompt_over_the_context", {"prompt": "x" * 33}, "prompt", "context of 32"),
    ("prompt_ids_over_the_context", {"prompt": [1] * 33}, "prompt", "context of 32"),
    ("prompt_id", {"prompt": [257]}, "token_ids.ids[0]", "vocabulary of 257, got 257"),
    ("no_candidates", {"candidates": []}, "candidates", "1 to 64, got 0"),
    ("many_candidates", {"candidates": ["x"] * 65}, "candidates", "1 to 64, got 65"),
    ("empty_text", {"candidates": ["x", ""]}, "candidates[1]", "at least one token"),
    ("empty_ids", {"candidates": ["x", []]}, "candidates[1]", "at least one token"),
    (
        "candidate_id",
        {"candidates": ["x", "x", [1, 300]]},
        "candidates[2].token_ids.ids[1]",
        "vocabulary of 257, got 300",
    ),
    (
        "candidate_text_over_the_context",
        {"candidates": ["x", "x", "x" * 33]},
        "candidates[2].text",
        "at most 32 bytes of text",
    ),
    (
        "candidate_ids_over_the_context",
        {"candidates": [[1] * 33]},
        "candidates[0]",
        "context of 32",
    ),
    (
        "prompt_and_candidate_over_the_context",
        {"prompt": "x" * 30, "candidates": ["x", "xxx"]},
        "candidates[1]",
        "prompt (30) + candidate (3) must be at most the context of 32",
    ),
    ("empty_calibration", {"calibration_prompt": ""}, "calibration_prompt", "at least one token"),
    (
        "long_calibration_text",
        {"calibration_prompt": "x" * 33},
        "calibration_text",
        "at most 32 bytes",
    ),
    (
        "calibration_id",
        {"calibration_prompt": [999]},
        "calibration_token_ids.ids[0]",
        "vocabulary of 257",
    ),
    ("request_id", {"request_id": "r" * 129}, "request_id", "at most 128"),
]


async def test_bad_field_is_named_with_its_limit(start_server: StartServer) -> None:
    running = await start_server(backend=MockBackend(max_context=32))
    for name, changes, field, limit in ROWS:
        values: dict[str, Any] = {"prompt": "a", "candidates": ["b"]} | changes
        with pytest.raises(InvalidRequestError) as caught:
            await running.client.score(values.pop("prompt"), values.pop("candidates"), **values)
        assert caught.value.code is grpc.StatusCode.INVALID_ARGUMENT, name
        assert [v.field for v in caught.value.violations] == [field], name
        assert limit in caught.value.violations[0].description, name


async def test_kv_cache_that_can_never_hold_it_is_named(start_server: StartServer) -> None:
    running = await start_server(backend=MockBackend(num_kv_blocks=1))
    with pytest.raises(InvalidRequestError, match="never fit its 16"):
        await running.client.score("x" * 15, ["ab"])


async def test_bytes_that_are_no_text_name_the_candidate(start_server: StartServer) -> None:
    running = await start_server()
    good = pb.Candidate(text="good").SerializeToString()
    bad = b"\x0a\x02\xff\xfe"
    message = b"".join(
        [b"\x0a\x01a", b"\x22" + bytes([len(good)]) + good, b"\x22" + bytes([len(bad)]) + bad]
    )
    async with grpc.aio.insecure_channel(running.target) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD)(message)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "candidates[1].text: must be valid UTF-8" in (caught.value.details() or "")


async def test_candidate_that_is_neither_text_nor_ids_is_named(start_server: StartServer) -> None:
    running = await start_server()
    async with grpc.aio.insecure_channel(running.target) as channel:
        message = pb.ScoreRequest(text="a", candidates=[pb.Candidate()]).SerializeToString()
        with pytest.raises(grpc.aio.AioRpcError, match=r"candidates\[0\]: must hold at least one"):
            await channel.unary_unary(METHOD)(message)


async def test_one_log_line_says_what_was_scored(start_server: StartServer) -> None:
    running = await start_server(log_prompts=True)
    await running.client.score("abc", ["d", "ef"], request_id="r-7")
    line = await running.request_line(method="Score")
    assert (line["code"], line["request_id"], line["prompt"]) == ("OK", "r-7", "abc")
    assert (line["prompt_tokens"], line["candidates"], line["candidate_tokens"]) == (3, 2, 3)
    assert {"queue_ms", "prefill_ms", "decode_ms", "e2e_ms", "peer"} <= line.keys()
    assert "finish_reason" not in line
    assert "ttft_ms" not in line


async def test_prompt_stays_out_of_the_log_unless_asked_for(start_server: StartServer) -> None:
    running = await start_server()
    await running.client.score("secret", ["word"])
    line = await running.request_line(method="Score")
    assert "secret" not in str(line)
    assert "word" not in str(line)


async def test_caller_that_leaves_stops_the_score(start_server: StartServer) -> None:
    backend = MockBackend(decode_ms=100)
    running = await start_server(backend=backend)
    scoring = asyncio.create_task(running.client.score("ab", ["c"] * 64))
    await running.until(lambda: bool(backend.cached))
    scoring.cancel()
    await running.until(lambda: not backend.cached)
    line = await running.request_line(method="Score")
    assert (line["code"], line["finish_reason"]) == ("CANCELLED", "cancelled")
    assert line["candidates"] == 64
    manager = running.server.engine.engine.scheduler.block_manager
    await running.until(lambda: manager.num_free_blocks == manager.num_blocks)


async def test_deadline_stops_the_score(start_server: StartServer) -> None:
    backend = MockBackend(decode_ms=100)
    running = await start_server(backend=backend)
    await running.client.health()  # there is a connection
    with pytest.raises(DeadlineExceededError):
        await running.client.score("ab", ["c"] * 64, timeout_s=0.8)
    line = await running.request_line(method="Score")
    assert (line["code"], line["finish_reason"]) == ("DEADLINE_EXCEEDED", "deadline")
    await running.until(lambda: not backend.cached)


class BrokenBackend(MockBackend):
    """Fails in the second piece of every job whose prompt begins with an exclamation mark."""

    def score(self, job: ScoreJob) -> Generator[None, None, tuple[torch.Tensor, ...]]:
        pieces = super().score(job)
        if job.prompt_token_ids[0] != ord("!"):
            return (yield from pieces)
        yield
        raise ZeroDivisionError("the kernel broke")


async def test_failed_score_is_internal_with_an_id_and_others_are_answered(
    start_server: StartServer,
) -> None:
    running = await start_server(backend=BrokenBackend())
    broken, good = await asyncio.gather(
        running.client.score("!", ["c"]),
        running.client.score("ab", ["c", "d"]),
        return_exceptions=True,
    )
    assert isinstance(broken, InternalError)
    assert "error id" in broken.message
    assert "kernel" not in broken.message
    assert good.best == 0
    line = await running.request_line(code="INTERNAL")
    assert line["finish_reason"] == "error"


async def test_full_queue_refuses_with_a_retry_time(start_server: StartServer) -> None:
    running = await start_server(backend=MockBackend(decode_ms=100), max_queue_size=1)
    first = asyncio.create_task(running.client.score("ab", ["c"] * 64))
    await running.until(lambda: bool(running.backend.cached))
    second = asyncio.create_task(running.client.score("ab", ["c"]))
    await running.until(lambda: running.server.engine.num_waiting == 1)
    with pytest.raises(QueueFullError) as caught:
        await running.client.score("ab", ["c"])
    assert caught.value.retry_after_s == 1.0
    first.cancel()
    assert (await second).best == 0


async def test_score_is_unavailable_while_the_model_loads(start_server: StartServer) -> None:
    running = await start_server(attach=False)
    with pytest.raises(UnavailableError, match="loading"):
        await running.client.score("ab", ["c"])


async def test_draining_server_answers_the_scores_it_has_and_takes_no_more(
    start_server: StartServer,
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=100))
    scoring = asyncio.create_task(running.client.score("ab", ["c"] * 20))
    await running.until(lambda: bool(running.backend.cached))
    draining = asyncio.create_task(running.server.drain(20.0))
    with pytest.raises(UnavailableError, match="draining"):
        await running.client.score("ab", ["c"])
    assert len((await scoring).scores) == 20
    assert await draining


async def test_score_cut_off_by_the_end_of_the_grace_is_unavailable(
    start_server: StartServer,
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=50))
    scoring = asyncio.create_task(running.client.score("ab", ["c"] * 64))
    await running.until(lambda: bool(running.backend.cached))
    await running.server.drain(0.1)
    with pytest.raises(UnavailableError, match="stopped before"):
        await scoring


class SlowTokenizer(ByteTokenizer):
    """Long texts wait until `go_on`."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def encode(self, text: str) -> list[int]:
        if len(text) > 1500:
            assert self.go_on.wait(20)
        return super().encode(text)


async def test_long_texts_are_tokenized_outside_the_event_loop(start_server: StartServer) -> None:
    tokenizer = SlowTokenizer()
    running = await start_server(backend=MockBackend(max_context=4000), tokenizer=tokenizer)
    # Neither is long by itself: together they are.
    scoring = asyncio.create_task(running.client.score("x" * 1600, ["y" * 1600]))
    assert await running.client.health() is HealthStatus.SERVING
    assert (await running.client.generate("abc", max_new_tokens=2)).text == "de"
    assert not scoring.done()
    tokenizer.go_on.set()
    assert (await scoring).candidate_tokens == 1600


async def test_reflection_describes_score(start_server: StartServer) -> None:
    running = await start_server()
    async with grpc.aio.insecure_channel(running.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE_NAME)
        async for answer in stub.ServerReflectionInfo(iter([request])):
            files = answer.file_descriptor_response.file_descriptor_proto
            assert any(b"ScoreRequest" in file for file in files)
            break


async def test_64_streams_run_while_scores_are_answered(start_server: StartServer) -> None:
    running = await start_server(
        backend=MockBackend(max_sequences=80, decode_ms=0.5), max_sequences=80
    )
    letters = [chr(ord("a") + index % 26) for index in range(64)]
    many = running.new_client(retry=None, timeout_s=60)

    async def stream(letter: str) -> str:
        async with many.generate_stream(letter, max_new_tokens=40) as tokens:
            return "".join([token.text async for token in tokens])

    async with asyncio.TaskGroup() as group:
        streams = [group.create_task(stream(letter)) for letter in letters]
        scores = [
            group.create_task(running.client.score(letter, [letter, "bc"])) for letter in letters
        ]
    for letter, task in zip(letters, streams, strict=True):
        first = ord(letter) - ord("a")
        assert task.result() == "".join(chr(ord("a") + (first + k) % 26) for k in range(1, 41))
    for letter, answer in zip(letters, scores, strict=True):
        own, bc = (score.logprob for score in answer.result().scores)
        after = ord(letter) + 1 if letter < "z" else ord("a")
        assert own == pytest.approx(BEST - (ord(letter) - after) % 257, abs=1e-4)
        assert bc == pytest.approx(2 * BEST - (ord("b") - after) % 257, abs=1e-4)


async def test_huggingface_checkpoint_scores_as_transformers_while_it_generates(
    start_server: StartServer, make_gptj_checkpoint: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = make_gptj_checkpoint(n_positions=128)
    loaded = load_backend("huggingface", str(folder))
    running = await start_server(backend=loaded.backend, tokenizer=loaded.tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def expected(prompt: str, candidate: str) -> float:
        whole, first = [*f"{prompt}{candidate}".encode()], len(prompt.encode())
        with torch.inference_mode():
            rows = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        return sum(float(rows[i - 1, whole[i]]) for i in range(first, len(whole)))

    candidates = [" positive", " negative", "x"]
    alone = await running.client.generate("The room", max_new_tokens=40)
    generating = asyncio.create_task(running.client.generate("The room", max_new_tokens=40))
    for prompt in ("The food was wonderful:", "T"):
        result = await running.client.score(prompt, candidates, calibration_prompt="N/A:")
        for score, candidate in zip(result.scores, candidates, strict=True):
            assert score.logprob == pytest.approx(expected(prompt, candidate), abs=1e-4)
            assert score.calibration_logprob == pytest.approx(expected("N/A:", candidate), abs=1e-4)
            assert score.logprob == pytest.approx(sum(t.logprob for t in score.tokens), abs=1e-4)
        weights = [math.exp(s.logprob - (s.calibration_logprob or 0)) for s in result.scores]
        assert [s.probability for s in result.scores] == pytest.approx(
            [weight / sum(weights) for weight in weights], rel=1e-6
        )
    assert (await generating).token_ids == alone.token_ids
