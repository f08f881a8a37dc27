"""A policy over the wire. The mock continues "abc" with "defgh…", so what may leave is known."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from gptjet.proto.v1 import admin_pb2, admin_pb2_grpc
from gptjet.proto.v1 import text_generation_pb2 as pb
from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.backends.mock import MockBackend
from gptjet.service.client import FinishReason, PolicyBlockedError, UnavailableError
from gptjet.service.config import ServerConfig
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.governance.audit import AuditLog, read_log
from gptjet.service.governance.governance import Governance, GovernanceError
from gptjet.service.governance.review import ReviewQueue
from gptjet.service.rpc.server import Server

StartServer = Callable[..., Awaitable[Any]]
StartGoverned = Callable[..., Awaitable[Any]]

RULES = """
version = 1
[[rules]]
name = "no-fgh"
on = ["output"]
action = "block"
phrases = ["fgh"]
[[rules]]
name = "no-secret"
on = ["input"]
action = "block"
phrases = ["top secret"]
[[rules]]
name = "name"
action = "redact"
phrases = ["pq", "John Doe"]
replacement = "<n>"
[[rules]]
name = "watch"
action = "flag"
phrases = ["uv"]
"""
# The last of these alone.
WATCHING = "version = 1\n[[rules]]" + RULES.split("[[rules]]")[-1]


@pytest.fixture
def start_governed(start_server: StartServer, tmp_path: Path) -> StartGoverned:
    """`await start_governed(rules, **settings)`: a server with that policy; `.folder` is its."""

    async def start(rules: str = RULES, **settings: Any) -> Any:
        policy = tmp_path / "policy.toml"
        policy.write_text(rules, encoding="utf-8")
        settings.setdefault("governance_dir", tmp_path / "governance")
        running = await start_server(governance_policy=policy, **settings)
        running.folder = settings["governance_dir"]
        running.policy = policy
        return running

    return start


def decisions(running: Any) -> list[dict[str, Any]]:
    return [r for r in read_log(running.folder / "audit.jsonl") if r["event"] == "decision"]


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
