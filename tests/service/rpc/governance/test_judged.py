"""A policy over the wire. The mock continues "abc" with "defgh…", so what may leave is known."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import FinishReason, PolicyBlockedError
from gptjet.service.engine.tokenizer import ByteTokenizer

from .conftest import RULES, StartGoverned, decisions


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            info = error_details_pb2.ErrorInfo()
            (detail,) = status_pb2.Status.FromString(value).details
            assert detail.Unpack(info)
            return info
    raise AssertionError("no details")


async def call(running: Any, method: str, request: Any) -> Any:
    async with grpc.aio.insecure_channel(running.target) as channel:
        return await getattr(pb_grpc.TextGenerationStub(channel), method)(request)


async def test_a_blocked_phrase_split_over_tokens_never_leaves(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    stream = running.client.generate_stream("abc", max_new_tokens=20, logprobs=0)
    chunks: list[Any] = []

    async def read() -> None:
        async for chunk in stream:
            chunks.append(chunk)

    with pytest.raises(PolicyBlockedError) as error:
        await read()
    assert "".join(chunk.text for chunk in chunks) == "de"
    assert bytes(i for chunk in chunks for i in chunk.token_ids) == b"de"
    assert all(len(chunk.logprobs) == len(chunk.token_ids) for chunk in chunks)
    assert error.value.code is grpc.StatusCode.PERMISSION_DENIED
    assert "no-fgh" in error.value.message
    assert "fgh'" not in error.value.message.replace("no-fgh'", "")
    line = await running.request_line(code="PERMISSION_DENIED")
    assert line["finish_reason"] == FinishReason.ERROR.value
    await running.until(lambda: running.server.engine.num_running == 0)
    assert running.backend.cached == {}
    (record,) = decisions(running)
    assert record["rule"] == "no-fgh"
    assert (record["action"], record["direction"], record["field"]) == (
        "block",
        "output",
        "sequences[0]",
    )
    assert record["spans"] == [[2, 5]]
    assert record["request_id"] == line["request_id"]


async def test_a_blocked_output_says_its_rule_in_an_error_info(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(running, "Generate", pb.GenerateRequest(text="abc"))
    info = error_info(error.value)
    assert (info.reason, info.domain) == ("POLICY_BLOCKED", "gptjet")
    assert dict(info.metadata) == {
        "rule": "no-fgh",
        "direction": "output",
        "field": "sequences[0]",
    }


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("Generate", pb.GenerateRequest(text="a TOP  Secret"), "prompt"),
        (
            "Generate",
            pb.GenerateRequest(token_ids=pb.TokenIds(ids=b"top secret")),
            "prompt",
        ),
        (
            "Generate",
            pb.GenerateRequest(
                text="k", sampling_params=pb.SamplingParams(stop=["x", "top secret"])
            ),
            "sampling_params.stop[1]",
        ),
        ("Generate", pb.GenerateRequest(text="k", request_id="top secret 1"), "request_id"),
        ("Score", pb.ScoreRequest(text="top secret", candidates=[{"text": "x"}]), "prompt"),
        (
            "Score",
            pb.ScoreRequest(text="a", candidates=[{"text": "x"}, {"text": " top secret"}]),
            "candidates[1]",
        ),
        # Half in the prompt, half in the candidate.
        ("Score", pb.ScoreRequest(text="top ", candidates=[{"text": "secret"}]), "candidates[0]"),
        (
            "Score",
            pb.ScoreRequest(text="a", candidates=[{"text": "x"}], calibration_text="top secret"),
            "calibration_prompt",
        ),
        (
            "Score",
            pb.ScoreRequest(text="a", candidates=[{"text": "x"}], request_id="TOP SECRET"),
            "request_id",
        ),
        ("Tokenize", pb.TokenizeRequest(text="top secret"), "text"),
        ("Detokenize", pb.DetokenizeRequest(ids=b"top secret"), "ids"),
    ],
)
async def test_every_text_of_every_request_is_judged(
    start_governed: StartGoverned, method: str, request_: Any, field: str
) -> None:
    running = await start_governed()
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(running, method, request_)
    assert error.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert dict(error_info(error.value).metadata) == {
        "rule": "no-secret",
        "direction": "input",
        "field": field,
    }
    (record,) = decisions(running)
    assert (record["method"], record["field"], record["rule"]) == (method, field, "no-secret")
    assert running.backend.cached == {}
    assert running.server.engine.num_waiting == running.server.engine.num_running == 0


async def test_every_rpc_of_the_contract_is_judged_or_has_no_text() -> None:
    """A new method must be thought of here."""
    methods = {m.name for m in pb.DESCRIPTOR.services_by_name["TextGeneration"].methods}
    judged = {"Generate", "GenerateStream", "Score", "Tokenize", "Detokenize"}
    assert methods - judged == {"GetModel"}


async def test_redacted_output_leaves_no_id_no_log_probability_and_no_alternative(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    options: dict[str, Any] = {"max_new_tokens": 7, "logprobs": 3}
    answer = await running.client.generate("lm", **options)
    assert answer.text == "no<n>rst"
    (sequence,) = answer.sequences
    assert bytes(sequence.token_ids) == b"norst"
    assert [item.token_id for item in sequence.logprobs] == list(b"norst")
    text, ids = "", []
    stream = running.client.generate_stream("lm", **options)
    async for chunk in stream:
        text += chunk.text
        ids += chunk.token_ids
    assert (text, bytes(ids)) == (answer.text, b"norst")
    assert stream.summary is not None
    # The count is of the tokens that were computed.
    assert stream.summary.completion_tokens == 7


async def test_alternatives_that_say_a_blocked_text_by_themselves_are_left_out(
    start_governed: StartGoverned,
) -> None:
    rules = RULES.replace('"fgh"', '"z"')
    running = await start_governed(rules)
    answer = await running.client.generate("w", max_new_tokens=2, logprobs=3)
    # After "w" come x, y, z and {: the likeliest three, less the one that is blocked.
    assert [[chr(i) for i, _ in item.top] for item in answer.sequences[0].logprobs] == [
        ["x", "y"],
        ["y", "{"],
    ]


async def test_a_redacted_prompt_never_reaches_the_model_and_its_echo_is_the_redacted_one(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    answer = await running.client.generate(
        "I am john  doe a", max_new_tokens=1, echo=True, logprobs=0
    )
    assert answer.text == "I am <n> ab"
    assert bytes(answer.sequences[0].token_ids) == b"I am <n> ab"
    assert answer.summary.prompt_tokens == len("I am <n> a")
    as_ids = await running.client.generate(list(b"John Doe a"), max_new_tokens=1, echo=True)
    assert as_ids.text == "<n> ab"
    score = await running.client.score("John Doe", ["a", "pq"])
    assert [len(s.tokens) for s in score.scores] == [1, 3]


async def test_what_begins_in_the_prompt_is_found_in_the_output(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    for echo in (False, True):
        with pytest.raises(PolicyBlockedError):
            await running.client.generate("xf", max_new_tokens=4, echo=echo)
    answer = await running.client.generate("op", max_new_tokens=2, echo=True)
    assert answer.text == "o<n>r"
    assert bytes(answer.sequences[0].token_ids) == b"or"
    answer = await running.client.generate("op", max_new_tokens=2)
    assert answer.text == "<n>r"


async def test_a_stop_string_hides_nothing_that_its_ids_would_say(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    with pytest.raises(PolicyBlockedError):
        await running.client.generate("abc", max_new_tokens=9, stop="gh")
    rules = RULES.replace('action = "redact"', 'on = ["output"]\naction = "redact"')
    running.policy.write_text(rules)
    assert running.server.governance.reload().ok
    answer = await running.client.generate("lm", max_new_tokens=9, stop="pq")
    assert answer.text == "no"
    assert bytes(answer.sequences[0].token_ids) == b"no"
    assert answer.summary.finish_reason is FinishReason.STOP_STRING
    assert answer.summary.sequences[0].stop_match is None


async def test_one_blocked_sequence_of_several_ends_the_request(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    with pytest.raises(PolicyBlockedError):
        await running.client.generate("abc", max_new_tokens=9, n=3)
    await running.until(lambda: running.server.engine.num_running == 0)


async def test_many_streams_at_once_are_each_judged(start_governed: StartGoverned) -> None:
    running = await start_governed()

    async def one(index: int) -> str:
        prompt = "lm" if index % 2 else "abc"
        try:
            return str((await running.client.generate(prompt, max_new_tokens=8)).text)
        except PolicyBlockedError:
            return "blocked"

    answers = await asyncio.gather(*(one(index) for index in range(40)))
    assert answers == ["blocked", "no<n>rstu"] * 20
    records = decisions(running)
    assert len(records) == 40
    assert json.dumps(records).count('"block"') == 20


async def test_tokenize_and_detokenize_show_the_redacted_text(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    tokens = await running.client.tokenize("a John Doe")
    assert bytes(tokens.ids) == b"a <n>"
    assert "".join(tokens.pieces) == "a <n>"
    assert await running.client.detokenize(ByteTokenizer().encode("pq r")) == "<n> r"
    with pytest.raises(PolicyBlockedError):
        await running.client.detokenize(list(b"fgh"))


async def test_an_id_of_the_servers_own_is_not_judged_and_a_callers_is(
    start_governed: StartGoverned,
) -> None:
    # every id that the server makes has such a digit
    rules = "version = 1\n[[rules]]\nname = 'digits'\naction = 'redact'\n"
    running = await start_governed(
        rules + "regexes = ['[0-9]']\nwindow = 4\nreplacement = '-'\non = ['input']\n"
    )
    params = pb.SamplingParams(max_new_tokens=2)
    for _ in range(5):
        request = pb.GenerateRequest(text="xyz", sampling_params=params)
        assert (await call(running, "Generate", request)).summary.usage.prompt_tokens == 3
    score = pb.ScoreRequest(text="xyz", candidates=[pb.Candidate(text="z")])
    assert len((await call(running, "Score", score)).scores) == 1
    request.request_id = "0000"
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(running, "Generate", request)
    assert error_info(error.value).metadata["field"] == "request_id"


async def test_a_line_of_the_log_has_one_id_and_not_the_whole_of_an_endless_one(
    start_governed: StartGoverned,
) -> None:
    running = await start_governed()
    with pytest.raises(grpc.aio.AioRpcError):
        await call(running, "Generate", pb.GenerateRequest(text="a", request_id="i" * 100_000))
    line = await running.request_line(code="INVALID_ARGUMENT")
    assert len(line["request_id"]) <= 128


async def test_a_blocked_output_leaves_the_prefix_cache_as_it_is(
    start_governed: StartGoverned,
) -> None:
    backend = MockBackend(paged=True, max_prefill_tokens=64)
    running = await start_governed(backend=backend)
    params = pb.SamplingParams(max_new_tokens=9)
    request = pb.GenerateRequest(text="x" * 64 + "abc", sampling_params=params)
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError):
            await call(running, "Generate", request)
    await running.until(lambda: running.server.engine.num_running == 0)
    manager = running.server.engine.engine.scheduler.block_manager
    assert manager.num_cached_blocks >= 4
