"""Where the log goes can fill up, close or stop reading: no request may notice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROMPT = "x" * 400
# Enough lines of this length to fill a pipe, of 64 KiB on Linux, twice.
REQUESTS = 300


def ask(client: Any, requests: int) -> None:
    for number in range(requests):
        answer = client.generate(PROMPT, max_new_tokens=1, request_id=f"r{number}")
        assert answer.text == "y"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_fails_no_request(start_process: Callable[..., Any]) -> None:
    with Path("/dev/full").open("wb") as full:
        server = start_process(full)
    with server.connect() as client:
        ask(client, 20)
    assert server.stop() == 0


def test_a_closed_pipe_fails_no_request(start_process: Callable[..., Any]) -> None:
    reader, writer = os.pipe()
    server = start_process(writer)
    os.close(writer)
    with server.connect() as client:
        os.close(reader)
        ask(client, 20)
    assert server.stop() == 0


def test_a_reader_that_stops_reading_holds_no_request_up(start_process: Callable[..., Any]) -> None:
    reader, writer = os.pipe()
    try:
        server = start_process(writer, GPTJET_LOG_PROMPTS="true")
        os.close(writer)
        with server.connect() as client:
            ask(client, REQUESTS)
        assert server.stop() == 0
    finally:
        os.close(reader)


def test_a_reader_that_is_slow_gets_every_line(start_process: Callable[..., Any]) -> None:
    reader, writer = os.pipe()
    server = start_process(writer, GPTJET_LOG_PROMPTS="true")
    os.close(writer)
    with server.connect() as client:
        ask(client, REQUESTS)
        with os.fdopen(reader, encoding="utf-8") as log:
            ids = []
            while len(ids) < REQUESTS:
                line = json.loads(log.readline())
                if line["event"] == "request":
                    ids.append(line["request_id"])
            assert ids == [f"r{number}" for number in range(REQUESTS)]
            assert server.stop() == 0
            last = json.loads(log.read().splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("stopped", 0)
