"""When the page's model server is started again, and when that is given up."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from gptjet.service.apps.sentiment.web import model_server
from gptjet.service.apps.sentiment.web.model_server import ModelServer, ModelServerError


class Process:
    """Ends with this code at once; None: never."""

    pid = 1

    def __init__(self, returncode: int | None) -> None:
        self.returncode = returncode

    async def wait(self) -> int:
        if self.returncode is None:
            await asyncio.Event().wait()
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        self.returncode = 0

    def kill(self) -> None:
        raise AssertionError("it has ended")


class ScriptedServer(ModelServer):
    """Each start is the next of the script: (exit code, whether it listens before), or an error."""

    def __init__(self, script: list[tuple[int | None, bool] | OSError]) -> None:
        self.script = script
        self.notes: list[str] = []
        self.settled = asyncio.Event()
        super().__init__((), on_note=self.notes.append, on_failed=self.settled.set)

    async def _start(self) -> int:
        step = self.script.pop(0)
        if isinstance(step, OSError):
            raise step
        code, listens = step
        process: Any = Process(code)
        self._process = process
        if not listens:
            assert code is not None
            raise ModelServerError("ended", code)
        if code is None:
            self.settled.set()
        return 50051


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_server, "_FIRST_PAUSE_S", 0.0)


async def test_a_port_that_was_taken_and_a_fork_that_failed_are_tried_again() -> None:
    no_memory = OSError(errno.ENOMEM, "Cannot allocate memory")
    server = ScriptedServer([(-9, True), (2, False), no_memory, (2, False), (None, True)])
    async with server, asyncio.timeout(60):
        await server.settled.wait()
        assert server.error is None
    assert server.script == []
    assert "the model server cannot be started: Cannot allocate memory" in server.notes
    assert sum("ended with exit code 2; starting it again" in note for note in server.notes) == 3


async def test_a_model_that_cannot_be_loaded_after_a_restart_is_given_up() -> None:
    server = ScriptedServer([(-9, True), (2, True)])
    async with server, asyncio.timeout(60):
        await server.settled.wait()
    assert server.error is not None
    assert server.error.exit_code == 2
