"""What `gptjet generate` prints, and that it cannot harm a terminal."""

from __future__ import annotations

import json
import sys

import pytest

from gptjet.service import client
from gptjet.service.commands.output import (
    JsonPrinter,
    TextPrinter,
    summary_line,
    tokens_per_second,
)
from gptjet.service.commands.terminal import printable


def summary(**changes: object) -> client.GenerationSummary:
    fields = {
        "request_id": "r",
        "finish_reason": client.FinishReason.LENGTH,
        "prompt_tokens": 3,
        "completion_tokens": 11,
        "timings": client.Timings(
            queue_ms=1, prefill_ms=2, decode_ms=500, ttft_ms=12.34, e2e_ms=600
        ),
        "sequences": (
            client.SequenceSummary(
                index=0, finish_reason=client.FinishReason.LENGTH, completion_tokens=11
            ),
        ),
        "seed": 7,
    }
    return client.GenerationSummary(**(fields | changes))  # type: ignore[arg-type]


def chunk(text: str, index: int = 0) -> client.TokenChunk:
    return client.TokenChunk(index=index, text=text, token_ids=(1,))


def test_the_summary_line_counts_decoding_without_the_first_token() -> None:
    # 10 tokens after the first in 0.5 s
    assert tokens_per_second(summary()) == pytest.approx(20.0)
    assert summary_line(summary()) == "TTFT 12.3 ms · 20.0 tokens/s · 11 tokens · length"


def test_one_token_has_no_speed() -> None:
    assert tokens_per_second(summary(completion_tokens=1)) is None
    assert summary_line(summary(completion_tokens=1)) == "TTFT 12.3 ms · 1 token · length"


def test_the_summary_line_says_what_the_cache_and_the_guesses_brought() -> None:
    guesses = client.Speculation(drafted_tokens=20, accepted_tokens=17, decode_steps=3)
    line = summary_line(summary(cached_prompt_tokens=512, speculation=guesses))
    assert line.endswith("length · 512 prompt tokens cached · 17 of 20 guesses right")
    one = client.Speculation(drafted_tokens=1, accepted_tokens=0, decode_steps=10)
    line = summary_line(summary(cached_prompt_tokens=1, speculation=one))
    assert line.endswith("length · 1 prompt token cached · 0 of 1 guess right")


def test_on_a_terminal_model_text_cannot_command_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\x1b[2J\x07\r\x9b1m\x7f\u202eb\n\tä 👩\u200d👧\u00a0"
    assert printable(text) == text  # pytest's stdout is no terminal
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert printable(text) == ("a\\x1b[2J\\x07\\r\\x9b1m\\x7f\\u202eb\n\tä 👩\u200d👧\u00a0")


def test_several_sequences_are_printed_one_below_the_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = TextPrinter(2, show_seed=True)
    for text, index in (("a", 0), ("x", 1), ("b\n", 0), ("y", 1)):
        printer.chunk(chunk(text, index))
    printer.end(summary())
    captured = capsys.readouterr()
    assert captured.out == "[0] ab\n[1] xy\n"
    assert captured.err.rstrip().endswith("length · seed 7")


def test_an_interrupted_line_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    printer = TextPrinter(1, show_seed=False)
    printer.chunk(chunk("half a"))
    printer.interrupt()
    assert capsys.readouterr().out == "half a\n"


def test_a_probability_of_zero_is_valid_json(capsys: pytest.CaptureFixture[str]) -> None:
    printer = JsonPrinter()
    logprob = client.TokenLogprob(1, float("-inf"), ((2, float("-inf")), (3, -0.5)))
    printer.chunk(client.TokenChunk(index=0, text="a", token_ids=(1,), logprobs=(logprob,)))
    printer.end(summary())

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    printed = json.loads(capsys.readouterr().out, parse_constant=refuse)
    top = printed["sequences"][0]["logprobs"][0]["top"]
    assert top == [{"token_id": 2, "logprob": None}, {"token_id": 3, "logprob": -0.5}]
