"""`gptjet score` against a live server of the mock backend: after "abc" comes d, then e, f…

Each further id is e times less likely: of " d" and its neighbours no more need be known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from typer.testing import Result

from gptjet.service.backends.mock import MockBackend
from gptjet.service.commands.terminal import ExitCode

Invoke = Callable[..., Awaitable[Result]]

BEST = math.log(1 - 1 / math.e)


async def test_table_has_the_most_probable_first_and_the_time_is_on_stderr(
    start_server: Any, invoke: Invoke
) -> None:
    # Weights e**-1 for "e" and 1 for "d": 1 / (1 + 1/e) = 0.7311.
    running = await start_server()
    result = await invoke(
        *("score", "abc", "--candidate", "e", "-c", "d", "--server", running.target)
    )
    assert result.exit_code == ExitCode.OK, result.stderr
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["probability", "logprob", "tokens", "candidate"],
        ["0.7311", "-0.4587", "1", '"d"'],
        ["0.2689", "-1.4587", "1", '"e"'],
    ]
    assert result.stderr.endswith(" ms · 3 prompt tokens · 2 candidate tokens\n")


async def test_calibration_has_a_column(start_server: Any, invoke: Invoke) -> None:
    # After "d" (the calibration), e is the best and d 256 further round.
    running = await start_server()
    result = await invoke(
        *("score", "abc", "-c", "d", "-c", "e", "--calibration", "d"),
        *("--server", running.target),
    )
    head, first, second = [line.split() for line in result.stdout.splitlines()]
    assert head == ["probability", "logprob", "calibration", "tokens", "candidate"]
    assert first == ["1.0000", "-0.4587", "-256.4587", "1", '"d"']
    assert second == ["0.0000", "-1.4587", "-0.4587", "1", '"e"']


async def test_json_has_the_scores_of_server_and_in_process_alike(
    start_server: Any, invoke: Invoke
) -> None:
    running = await start_server()
    arguments = ("score", "abc", "-c", " x", "-c", "de", "--calibration", "z", "--json")
    there = await invoke(*arguments, "--request-id", "r1", "--server", running.target)
    here = await invoke(*arguments, "--request-id", "r1", "--in-process", "--backend", "mock")
    assert not there.stderr
    fields, here_fields = json.loads(there.stdout), json.loads(here.stdout)
    assert fields["timings"].pop("e2e_ms") > 0
    del fields["timings"], here_fields["timings"]
    assert fields["request_id"] == "r1"
    assert (fields["best"], fields["best_index"]) == ("de", 1)
    assert fields["usage"] == {"prompt_tokens": 3, "candidate_tokens": 4}
    score = fields["scores"][1]
    assert (score["index"], score["text"]) == (1, "de")
    assert score["logprob"] == pytest.approx(2 * BEST, abs=1e-5)
    assert [t["token_id"] for t in score["tokens"]] == [ord("d"), ord("e")]
    assert score["calibration_logprob"] == pytest.approx(2 * BEST - 3, abs=1e-5)  # after z: a
    # The wire holds a token's logprob in float32, as the backend made it: nothing is lost.
    assert here_fields == fields


async def test_prompt_comes_from_stdin_without_its_last_newline(
    start_server: Any, invoke: Invoke
) -> None:
    running = await start_server()
    result = await invoke(
        *("score", "-", "-c", "d", "--json", "--server", running.target), stdin=b"abc\n"
    )
    fields = json.loads(result.stdout)
    assert fields["usage"]["prompt_tokens"] == 3
    assert fields["scores"][0]["logprob"] == pytest.approx(BEST, abs=1e-5)


@pytest.mark.parametrize("where", ["server", "here"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", "-c", "d"), "the prompt: must hold at least one token, got none"),
        (("abc", "-c", "d", "-c", ""), "--candidate: must hold at least one token, got none"),
        (("abc", *["-c", "d"] * 65), "--candidate: must be 1 to 64, got 65"),
        (("abc", "-c", "d", "--calibration", ""), "--calibration: must hold at least one token"),
    ],
)
async def test_what_cannot_be_served_is_a_usage_error_with_the_limit(
    start_server: Any, invoke: Invoke, where: str, arguments: tuple[str, ...], message: str
) -> None:
    if where == "server":
        place = ("--server", (await start_server()).target)
    else:
        place = ("--in-process", "--backend", "mock")  # type: ignore[assignment]
    result = await invoke("score", *arguments, *place)
    assert result.exit_code == ExitCode.USAGE
    assert message in result.stderr
    assert not result.stdout


async def test_missing_candidates_bad_utf8_and_stray_model_flags_are_usage_errors(
    invoke: Invoke,
) -> None:
    missing = await invoke("score", "abc")
    assert missing.exit_code == ExitCode.USAGE
    assert "--candidate" in missing.stderr
    bad = await invoke("score", "abc", "-c", "\udcff")
    assert (bad.exit_code, "not valid UTF-8" in bad.stderr) == (ExitCode.USAGE, True)
    bad = await invoke("score", "-", "-c", "d", stdin=b"\xff")
    assert (bad.exit_code, "prompt is not valid UTF-8" in bad.stderr) == (ExitCode.USAGE, True)
    stray = await invoke("score", "abc", "-c", "d", "--backend", "mock")
    assert (stray.exit_code, "--backend needs --in-process" in stray.stderr) == (
        ExitCode.USAGE,
        True,
    )


async def test_timeout_ends_with_its_own_code_and_stops_the_server(
    start_server: Any, invoke: Invoke
) -> None:
    backend = MockBackend(decode_ms=20)
    running = await start_server(backend=backend)
    result = await invoke(
        *("score", "abc", *["-c", "d"] * 64, "--timeout", "0.2", "--server", running.target)
    )
    assert result.exit_code == ExitCode.TIMEOUT
    assert "timed out after 0.2 s" in result.stderr
    await running.until(lambda: not backend.cached)


async def test_nobody_there_is_said_so(invoke: Invoke) -> None:
    result = await invoke("score", "abc", "-c", "d", "--server", "127.0.0.1:1")
    assert result.exit_code == ExitCode.UNREACHABLE
    assert "no server answers at 127.0.0.1:1" in result.stderr


async def test_text_that_would_command_a_terminal_is_quoted(
    start_server: Any, invoke: Invoke
) -> None:
    running = await start_server()
    result = await invoke("score", "abc", "-c", "\x1b[2J", "--server", running.target)
    assert "\x1b" not in result.stdout
    assert r'"\u001b[2J"' in result.stdout
