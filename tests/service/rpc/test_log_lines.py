"""One line a request, and never the caller's text unless the operator asked for it."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import structlog

from gptjet.service.client import AsyncClient, GptjetError
from gptjet.service.config import ServerConfig
from gptjet.service.engine.tokenizer import ByteTokenizer
from gptjet.service.log import configure_logging, get_logger
from gptjet.service.rpc.server import Server

StartServer = Callable[..., Awaitable[Any]]
SECRET = "my secret prompt"


@pytest.fixture
def own_logging() -> Iterator[None]:
    """Let a test configure logging, and put it back."""
    root, ours = logging.getLogger(), logging.getLogger("gptjet")
    before = (root.handlers, root.level, ours.level)
    yield
    structlog.reset_defaults()
    root.handlers, root.level, ours.level = before


async def test_request_line_has_the_counts_and_timings(start_server: StartServer) -> None:
    running = await start_server()
    await running.client.generate("abc", max_new_tokens=5, n=2, echo=True, request_id="mine")
    line = await running.request_line(method="Generate")
    expected = {
        "event": "request",
        "log_level": "info",
        "request_id": "mine",
        "code": "OK",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "output_tokens": 10,
    }
    assert expected.items() <= line.items()
    for name in ("queue_ms", "prefill_ms", "ttft_ms", "decode_ms", "e2e_ms", "tokens_per_s"):
        assert line[name] >= 0
    assert line["tokens_per_s"] == pytest.approx(8 / line["decode_ms"] * 1e3, rel=1e-2)
    assert line["peer"].startswith("ipv4:127.0.0.1:")


async def test_refused_request_has_a_line_with_its_code(start_server: StartServer) -> None:
    running = await start_server()
    with pytest.raises(GptjetError):
        await running.client.generate("abc", top_p=2.0)
    line = await running.request_line(method="Generate")
    assert line["code"] == "INVALID_ARGUMENT"
    assert "top_p" in line["error"]
    assert len([entry for entry in running.logs if entry["event"] == "request"]) == 1


async def test_probes_are_not_logged_at_info(start_server: StartServer) -> None:
    running = await start_server()
    await running.client.health()
    line = await running.request_line(method="grpc.health.v1.Health/Check")
    assert line["log_level"] == "debug"


async def test_prompt_is_logged_only_when_asked(start_server: StartServer) -> None:
    quiet = await start_server()
    await quiet.client.generate(SECRET, max_new_tokens=1)
    await quiet.request_line(method="Generate")
    assert SECRET not in str(quiet.logs)
    loud = await start_server(log_prompts=True)
    await loud.client.generate(SECRET, max_new_tokens=1)
    await loud.request_line(prompt=SECRET)


class BrokenTokenizer(ByteTokenizer):
    """Has the prompt among its local variables when it fails."""

    def encode(self, text: str) -> list[int]:
        raise RuntimeError("no tokens today")


@pytest.mark.parametrize("log_format", ["console", "json"])
async def test_traceback_does_not_show_the_prompt(
    own_logging: None, capfd: pytest.CaptureFixture[str], log_format: Any
) -> None:
    configure_logging("info", log_format)
    server = Server(ServerConfig(port=0))
    await server.start()
    from gptjet.service.backends.mock import MockBackend

    await server.attach(MockBackend(), BrokenTokenizer())
    async with AsyncClient(f"127.0.0.1:{server.port}", retry=None) as client:
        with pytest.raises(GptjetError):
            await client.generate(SECRET)
    await server.drain(0.0)
    written = capfd.readouterr().err
    assert "no tokens today" in written
    assert "Traceback" in written
    assert SECRET not in written


def test_json_lines_are_json_also_for_libraries(
    own_logging: None, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("info", "json")
    get_logger("gptjet.test").info("ours", request_id="a\nb")
    logging.getLogger("gptjet.service.engine").error("an engine's %s", "line")
    logging.getLogger("somebody.else").info("chatter")
    logging.getLogger("somebody.else").warning("theirs")
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["event"], line["level"]) for line in lines] == [
        ("ours", "info"),
        ("an engine's line", "error"),
        ("theirs", "warning"),
    ]
    assert lines[0]["request_id"] == "a\nb"


def test_request_id_cannot_forge_a_line(
    own_logging: None, capfd: pytest.CaptureFixture[str]
) -> None:
    configure_logging("info", "console")
    get_logger("gptjet.test").info("request", request_id="é\nforged \x1b[31m")
    written = capfd.readouterr().err
    assert len(written.splitlines()) == 1
    assert repr("é\nforged \x1b[31m") in written


def test_level_filters(own_logging: None, capfd: pytest.CaptureFixture[str]) -> None:
    configure_logging("warning", "console")
    get_logger("gptjet.test").info("quiet")
    get_logger("gptjet.test").warning("loud")
    written = capfd.readouterr().err
    assert "loud" in written
    assert "quiet" not in written


TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE_ID}-00f067aa0ba902b7-01"


async def test_a_request_has_an_id_on_its_line_also_where_it_is_refused(
    start_server: StartServer,
) -> None:
    running = await start_server()
    with pytest.raises(GptjetError):
        await running.client.generate("abc", top_p=2.0)
    with pytest.raises(GptjetError):
        await running.client.generate("abc", top_p=2.0, request_id="theirs")
    await running.client.tokenize("abc")
    assert (await running.request_line(request_id="theirs"))["code"] == "INVALID_ARGUMENT"
    drawn = [
        (await running.request_line(method="Tokenize"))["request_id"],
        (await running.request_line(method="Generate"))["request_id"],
    ]
    assert [len(request_id) for request_id in drawn] == [32, 32]
    assert drawn[0] != drawn[1]


async def test_an_id_that_is_too_long_is_refused_and_cut_in_the_log(
    start_server: StartServer,
) -> None:
    running = await start_server()
    with pytest.raises(GptjetError, match="request_id"):
        await running.client.generate("abc", request_id="x" * 100_000)
    line = await running.request_line(method="Generate")
    assert line["request_id"] == "x" * 128


@pytest.mark.parametrize(
    ("traceparent", "expected"),
    [
        (TRACEPARENT, TRACE_ID),
        (f"cc-{TRACE_ID}-00f067aa0ba902b7-01-what-comes-later", TRACE_ID),
        (f"ff-{TRACE_ID}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
        (f"00-{TRACE_ID.upper()}-00f067aa0ba902b7-01", None),
        ("anything", None),
    ],
)
async def test_the_callers_trace_id_is_on_the_line_without_any_tracing(
    start_server: StartServer, traceparent: str, expected: str | None
) -> None:
    running = await start_server()
    client = running.new_client(metadata=[("traceparent", traceparent)], retry=None)
    await client.generate("abc", max_new_tokens=1)
    line = await running.request_line(method="Generate")
    assert line.get("trace_id") == expected


async def test_every_line_of_a_request_has_its_ids(
    own_logging: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """The servicer's own, a library's, and those of the engine's thread."""

    class Talking(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            logging.getLogger("somebody.else").warning("tokenizing")
            get_logger("gptjet.test").info("ours")
            return super().encode(text)

    from gptjet.service.backends.mock import MockBackend

    class Broken(MockBackend):
        def decode(self, batch: Any) -> Any:
            raise RuntimeError("the device is gone")

    configure_logging("info", "json")
    server = Server(ServerConfig(port=0))
    await server.start()
    await server.attach(Broken(), Talking())
    async with AsyncClient(
        f"127.0.0.1:{server.port}", retry=None, metadata=[("traceparent", TRACEPARENT)]
    ) as client:
        for request_id in ("one", "two"):
            with pytest.raises(GptjetError):
                await client.generate("abc", request_id=request_id, max_new_tokens=4)
        with pytest.raises(GptjetError):
            await client.score("abc", [""], request_id="three")
    await server.drain(0.0)
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    of_one = [line for line in lines if line.get("request_id") == "one"]
    assert [line["event"] for line in of_one] == ["tokenizing", "ours", "request"]
    assert {line["trace_id"] for line in of_one} == {TRACE_ID}
    failed = [line for line in lines if line["event"].startswith("engine step failed")]
    assert [line["request_ids"] for line in failed] == [["one"], ["two"]]
    # The id that the caller was told.
    assert failed[0]["error_id"] in of_one[-1]["error"]
    # Nothing is left on lines of no request.
    assert "request_id" not in lines[-1]
