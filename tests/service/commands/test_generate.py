"""`gptjet generate` against a live server of the mock backend: after "abc" comes "defgh…"."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from typer.testing import Result

from gptjet.service.backends.mock import MockBackend
from gptjet.service.commands.terminal import ExitCode
from gptjet.service.engine.tokenizer import ByteTokenizer

Invoke = Callable[..., Awaitable[Result]]
Start = Callable[..., Awaitable[asyncio.subprocess.Process]]

ALPHABET = "defghijklmnopqrstuvwxyz"


# --- output ---


async def test_text_goes_to_stdout_and_the_summary_to_stderr(
    start_server: Any, invoke: Invoke
) -> None:
    running = await start_server()
    result = await invoke("generate", "abc", "--max-new-tokens", "5", "--server", running.target)
    assert result.exit_code == ExitCode.OK
    assert result.stdout == "defgh\n"
    assert result.stderr.startswith("TTFT ")
    assert result.stderr.endswith(" tokens/s · 5 tokens · length\n")


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-new-tokens", "40"],
        ["--temperature", "1.3", "--seed", "11", "--max-new-tokens", "40"],
        ["--n", "3", "--temperature", "1", "--seed", "5"],
        ["--echo", "--stop", "hij"],
    ],
)
async def test_streamed_unary_json_and_in_process_give_the_same_text(
    start_server: Any, invoke: Invoke, flags: list[str]
) -> None:
    running = await start_server()
    server = ("--server", running.target)
    streamed = await invoke("generate", "abc", *flags, *server)
    unary = await invoke("generate", "abc", *flags, *server, "--no-stream")
    here = await invoke("generate", "abc", *flags, "--in-process", "--backend", "mock")
    assert streamed.exit_code == unary.exit_code == here.exit_code == ExitCode.OK
    assert streamed.stdout == unary.stdout == here.stdout

    as_json = json.loads((await invoke("generate", "abc", *flags, *server, "--json")).stdout)
    here_json = json.loads(
        (
            await invoke("generate", "abc", *flags, "--json", "--in-process", "--backend", "mock")
        ).stdout
    )
    assert as_json["sequences"] == here_json["sequences"]
    texts = [sequence["text"] for sequence in as_json["sequences"]]
    if len(texts) == 1:
        assert streamed.stdout == texts[0] + "\n"
    else:
        assert all(f"[{index}] {text}" in streamed.stdout for index, text in enumerate(texts))

    lines = (await invoke("generate", "abc", *flags, *server, "--json", "--stream")).stdout
    *chunks, end = [json.loads(line) for line in lines.splitlines()]
    assert end["event"] == "summary"
    for index, text in enumerate(texts):
        assert "".join(c["text"] for c in chunks if c["index"] == index) == text


async def test_json_has_the_text_the_ids_and_how_it_went(start_server: Any, invoke: Invoke) -> None:
    running = await start_server()
    result = await invoke(
        *("generate", "The X", "--json", "--seed", "3", "--request-id", "r1", "--logprobs", "1"),
        *("--server", running.target),
    )
    fields = json.loads(result.stdout)
    assert not result.stderr
    assert fields["text"] == "YZ"
    assert fields["token_ids"] == [ord("Y"), ord("Z"), 256]
    assert fields["finish_reason"] == "stop_token"
    assert fields["usage"] == {"prompt_tokens": 5, "completion_tokens": 3}
    assert set(fields["timings"]) == {"queue_ms", "prefill_ms", "decode_ms", "ttft_ms", "e2e_ms"}
    assert (fields["seed"], fields["request_id"]) == (3, "r1")
    (sequence,) = fields["sequences"]
    assert sequence["stop_match"] == 256
    # The mock: probability of the likeliest is 1 - 1/e.
    assert sequence["logprobs"][0]["logprob"] == pytest.approx(-0.4586751, abs=1e-6)


async def test_tokens_are_printed_while_the_rest_is_still_being_made(
    start_server: Any, start_cli: Start
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=50))
    process = await start_cli(
        "generate", "abc", "--max-new-tokens", "23", "--server", running.target
    )
    assert process.stdout
    assert await asyncio.wait_for(process.stdout.readexactly(3), 20) == b"def"
    assert running.server.engine.num_running == 1
    rest, _ = await asyncio.wait_for(process.communicate(), 20)
    assert rest.decode() == ALPHABET[3:] + "\n"
    assert process.returncode == ExitCode.OK


# --- prompts ---


@pytest.mark.parametrize(
    ("stdin", "seen"),
    [
        (b"abc\n", b"abc"),
        (b"abc\r\n", b"abc"),
        (b"abc", b"abc"),
        (b"a\n\n", b"a\n"),
        ("zażółć\n".encode(), "zażółć".encode()),
    ],
)
async def test_a_prompt_comes_from_stdin_without_its_last_newline(
    start_server: Any, invoke: Invoke, stdin: bytes, seen: bytes
) -> None:
    running = await start_server()
    arguments = ("generate", "-", "--echo", "--max-new-tokens", "1", "--json")
    result = await invoke(*arguments, "--server", running.target, stdin=stdin)
    assert bytes(json.loads(result.stdout)["token_ids"][:-1]) == seen


async def test_a_prompt_that_is_not_utf8_is_refused(invoke: Invoke) -> None:
    for arguments in (["-"], ["a\udcffb"]):
        result = await invoke("generate", *arguments, stdin=b"a\xffb")
        assert result.exit_code == ExitCode.USAGE
        assert "the prompt is not valid UTF-8" in result.stderr


async def test_a_prompt_can_be_token_ids(start_server: Any, invoke: Invoke) -> None:
    running = await start_server()
    flags = ("--max-new-tokens", "3", "--server", running.target)
    assert (await invoke("generate", "--token-ids", "97, 98,99", *flags)).stdout == "def\n"
    bad = await invoke("generate", "--token-ids", "97,x", *flags)
    assert bad.exit_code == ExitCode.USAGE
    assert "--token-ids" in bad.stderr


async def test_no_prompt_at_all_says_how_to_give_one(invoke: Invoke) -> None:
    result = await invoke("generate")
    assert result.exit_code == ExitCode.USAGE
    assert "give the prompt as text, or - for stdin" in result.stderr


# --- servers that do not answer ---


async def test_without_a_server_it_says_so_and_how_to_start_one(invoke: Invoke) -> None:
    result = await invoke("generate", "abc", "--server", "127.0.0.1:1")
    assert result.exit_code == ExitCode.UNREACHABLE
    lines = result.stderr.splitlines()
    assert lines[0] == "gptjet: error: no server answers at 127.0.0.1:1"
    assert lines[1] == "  start one: gptjet serve --port 1"
    assert "--in-process" in lines[2]
    assert not result.stdout


@pytest.mark.parametrize("mode", [[], ["--no-stream"], ["--json", "--stream"]])
async def test_a_server_that_is_still_loading_refuses_with_code_4(
    start_server: Any, invoke: Invoke, mode: list[str]
) -> None:
    running = await start_server(attach=False)
    result = await invoke("generate", "abc", "--server", running.target, *mode)
    assert result.exit_code == ExitCode.REFUSED
    assert result.stderr == f"gptjet: error: {running.target} refused: the model is loading\n"


async def test_a_full_queue_refuses_with_code_4(start_server: Any, invoke: Invoke) -> None:
    running = await start_server(
        backend=MockBackend(max_sequences=1, decode_ms=50), max_queue_size=1
    )
    first = running.client.generate_stream("abc", max_new_tokens=400)
    await anext(first)
    second = running.client.generate_stream("abc")
    await running.until(lambda: running.server.engine.num_waiting == 1)
    result = await invoke("generate", "abc", "--server", running.target)
    assert result.exit_code == ExitCode.REFUSED
    assert "refused: the queue is full: 1 requests are waiting" in result.stderr
    first.cancel()
    second.cancel()


@pytest.mark.parametrize("mode", [[], ["--no-stream"]])
async def test_a_timeout_ends_with_code_5_and_frees_the_request(
    start_server: Any, invoke: Invoke, mode: list[str]
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=50))
    flags = ("--max-new-tokens", "400", "--timeout", "0.4")
    result = await invoke("generate", "abc", *flags, "--server", running.target, *mode)
    assert result.exit_code == ExitCode.TIMEOUT
    assert result.stderr.endswith("timed out after 0.4 s (--timeout)\n")
    await running.until(lambda: running.server.engine.num_running == 0)


async def test_a_timeout_holds_in_process_too(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = MockBackend.decode

    def slow_decode(self: MockBackend, batch: Any) -> Any:
        time.sleep(0.02)
        return decode(self, batch)

    monkeypatch.setattr(MockBackend, "decode", slow_decode)
    flags = ("--max-new-tokens", "400", "--timeout", "2")
    result = await invoke("generate", "abc", *flags, "--in-process", "--backend", "mock")
    assert result.exit_code == ExitCode.TIMEOUT
    assert result.stdout.startswith("def")
    assert result.stderr == "gptjet: error: timed out after 2 s (--timeout)\n"


async def test_a_server_that_goes_away_in_the_middle_is_a_failure_after_what_came(
    start_server: Any, start_cli: Start
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=50))
    process = await start_cli(
        "generate", "abc", "--max-new-tokens", "400", "--server", running.target
    )
    assert process.stdout
    await asyncio.wait_for(process.stdout.readexactly(1), 20)
    await running.server.drain(0.0)
    text, error = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == ExitCode.FAILURE
    assert text.endswith(b"\n")
    assert b"the server went away" in error


# --- leaving early ---


@pytest.mark.parametrize("mode", [[], ["--no-stream"], ["--json"]])
async def test_ctrl_c_cancels_the_request_and_ends_with_code_130(
    start_server: Any, start_cli: Start, mode: list[str]
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=50))
    process = await start_cli(
        "generate", "abc", "--max-new-tokens", "500", "--server", running.target, *mode
    )
    await running.until(lambda: running.server.engine.num_running == 1)
    if not mode:
        assert process.stdout
        await asyncio.wait_for(process.stdout.readexactly(1), 20)
    process.send_signal(signal.SIGINT)
    text, error = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == ExitCode.INTERRUPTED
    assert b"Traceback" not in error
    assert error.strip() == b"interrupted"
    assert text == b"" or text.endswith(b"\n")
    # 500 steps of 50 ms would take 25 s: it is the cancellation that ends it.
    await running.until(lambda: running.server.engine.num_running == 0)
    line = await running.request_line(code="CANCELLED")
    assert line["output_tokens"] < 400


async def test_a_reader_that_has_enough_cancels_the_request(
    start_server: Any, start_cli: Start
) -> None:
    running = await start_server(backend=MockBackend(decode_ms=20))
    process = await start_cli(
        "generate", "abc", "--max-new-tokens", "500", "--server", running.target
    )
    assert process.stdout
    assert process.stderr
    await asyncio.wait_for(process.stdout.readexactly(3), 20)
    process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
    error = await asyncio.wait_for(process.stderr.read(), 20)
    assert await process.wait() == ExitCode.FAILURE
    assert b"Traceback" not in error
    await running.request_line(code="CANCELLED")
    assert running.server.engine.num_running == 0


# --- TLS, and a model of one's own ---


async def test_a_tls_server_is_reached_with_its_root_and_not_without(
    start_server: Any, invoke: Invoke, make_certificate: Any
) -> None:
    made, other = make_certificate("gpu-box"), make_certificate("gpu-box")
    running = await start_server(tls_cert=made.cert, tls_key=made.key)
    arguments = ("generate", "abc", "--max-new-tokens", "3", "--server", running.target)
    named = ("--tls-server-name", "gpu-box")
    good = await invoke(*arguments, *named, "--tls-ca", str(made.cert))
    assert good.stdout == "def\n", good.stderr
    for flags in ([], ["--tls"], [*named, "--tls-ca", str(other.cert)]):
        bad = await invoke(*arguments, *flags)
        assert bad.exit_code == ExitCode.UNREACHABLE
        assert not bad.stdout


async def test_in_process_a_model_that_cannot_be_loaded_is_one_line_and_code_2(
    invoke: Invoke,
) -> None:
    result = await invoke("generate", "abc", "--in-process", "--backend", "nope")
    assert result.exit_code == ExitCode.USAGE
    assert result.stderr.count("\n") == 1
    assert "unknown backend 'nope'" in result.stderr


async def test_in_process_an_empty_prompt_stays_empty_where_the_model_has_a_start_token(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: [256, *text.encode()])
    result = await invoke("generate", "", "--in-process", "--backend", "mock")
    assert result.exit_code == ExitCode.USAGE
    assert "the prompt: must hold at least one token" in result.stderr


async def test_in_process_takes_the_servers_environment_settings(invoke: Invoke) -> None:
    result = await invoke(
        *("generate", "abc", "--in-process", "--max-new-tokens", "3"),
        env={"GPTJET_BACKEND": "mock", "GPTJET_SERVER": "127.0.0.1:1"},
    )
    assert result.stdout == "def\n", result.stderr


async def test_a_model_in_process_answers_as_it_does_from_a_server(
    start_server: Any, invoke: Invoke, make_gptj_checkpoint: Callable[..., Any]
) -> None:
    from gptjet.service.backends.factory import load_backend

    folder = str(make_gptj_checkpoint())
    loaded = load_backend("huggingface", folder, progress=False)
    running = await start_server(backend=loaded.backend, tokenizer=loaded.tokenizer)
    flags = ("--max-new-tokens", "20", "--temperature", "0.9", "--seed", "4", "--json")
    asked = await invoke("generate", "abc", *flags, "--server", running.target)
    here = await invoke("generate", "abc", *flags, "--in-process", "--model", folder)
    assert here.exit_code == ExitCode.OK, here.stderr
    assert json.loads(here.stdout)["token_ids"] == json.loads(asked.stdout)["token_ids"]
