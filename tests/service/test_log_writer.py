"""A log handler that never blocks and never raises, whatever its file does."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from gptjet.service.log_writer import BackgroundHandler

PATIENCE_S = 20.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:  # the test has closed it
            continue


def log(handler: BackgroundHandler, message: str) -> None:
    handler.emit(logging.LogRecord("gptjet", logging.INFO, "", 0, message, None, None))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_lines_come_whole_and_in_order_from_many_threads(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = BackgroundHandler(writer)

    def write(name: int) -> None:
        for number in range(100):
            log(handler, f"{name} {number}")

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handler.close()
    os.close(writer)
    lines = os.fdopen(reader).read().splitlines()
    assert sorted(lines) == sorted(f"{name} {number}" for name in range(4) for number in range(100))
    for name in range(4):
        mine = [int(line.split()[1]) for line in lines if line.startswith(f"{name} ")]
        assert mine == list(range(100))
    assert handler.dropped == 0


def test_what_is_over_the_bound_is_dropped_counted_and_said(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = BackgroundHandler(writer, max_waiting_bytes=1000)
    log(handler, "x" * 200_000)  # over the bound by itself
    assert handler.dropped == 1
    # The pipe takes 64 KiB, and one line more is being written; then 1000 bytes wait.
    for _ in range(2000):
        log(handler, "y" * 99)
    assert handler.dropped > 1000
    text = bytearray()
    draining = threading.Thread(target=lambda: text.extend(os.fdopen(reader, "rb").read()))
    draining.start()
    until(lambda: not handler._lines)
    log(handler, "after")
    handler.close()
    os.close(writer)
    draining.join()
    lines = text.decode().splitlines()
    assert lines[-1] == "after"
    assert set(lines) == {
        "y" * 99,
        "after",
        "log lines were dropped: they could not be written, or not fast enough",
    }
    assert handler.dropped == 2001 - lines.count("y" * 99)


def test_a_full_disk_costs_lines_and_no_more_once_there_is_room(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = pipe
    room = [3]  # bytes that are left; None: the disk has been emptied
    write = os.write

    def write_to_full(fd: int, data: bytes) -> int:
        if fd != writer or room[0] is None:
            return write(fd, data)
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(fd, bytes(data)[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(os, "write", write_to_full)
    handler = BackgroundHandler(writer)
    log(handler, "first")
    log(handler, "second")
    until(lambda: handler.dropped == 2)
    room[0] = None  # type: ignore[call-overload]
    log(handler, "third")
    handler.close()
    os.close(writer)
    assert os.fdopen(reader).read().splitlines() == [
        "fir",  # what there was room for; the next line begins on a line of its own
        "log lines were dropped: they could not be written, or not fast enough",
        "third",
    ]


def test_a_reader_that_has_gone_costs_lines_only(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.close(reader)
    handler = BackgroundHandler(writer)
    for _ in range(3):
        log(handler, "nobody")
    until(lambda: handler.dropped == 3)
    handler.close()


def test_flush_waits_no_longer_than_a_bound_for_a_reader_that_does_not_read(
    pipe: tuple[int, int],
) -> None:
    _, writer = pipe
    handler = BackgroundHandler(writer)
    log(handler, "x" * 1_000_000)
    started = time.monotonic()
    handler.flush()
    assert time.monotonic() - started < PATIENCE_S


def test_a_pipe_that_does_not_block_is_written_whole(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    handler = BackgroundHandler(writer)
    log(handler, "x" * 300_000)
    text = bytearray()
    while len(text) < 300_001:
        text += os.read(reader, 65536)
    assert text == b"x" * 300_000 + b"\n"
    assert handler.dropped == 0
    handler.close()


def test_what_cannot_be_rendered_is_counted_and_raises_nothing(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    handler = BackgroundHandler(writer)

    class Unprintable:
        def __str__(self) -> str:
            raise RuntimeError("no")

    handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "%s", (Unprintable(),), None))
    log(handler, "half a \ud800 pair")
    handler.close()
    assert os.read(reader, 1000).decode().splitlines()[-1] == "half a \\ud800 pair"
    assert handler.dropped == 1
