"""A GPTJet server of the page's own: `gptjet serve` as a child, started again if it ends.

It ends with the page, even one that is killed: the kernel sends it SIGTERM
(prctl(PR_SET_PDEATHSIG), Linux).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

_LISTEN_TIMEOUT_S = 300.0  # imports on a cold and busy machine; the model loads after that
_STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# Of `gptjet serve`: a flag or the model is not usable, and will not be the next time.
_NOT_USABLE = 2
# A module's name, not an import: it is for starting.
_DIE_WITH_PARENT = "gptjet.service.die_with_parent"


class ModelServerError(Exception):
    """The model server cannot be started; what it wrote to stderr says why."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ModelServer:
    """`async with ModelServer(flags) as server: ... server.target`.

    flags      of `gptjet serve`; the port is chosen here, on the loopback interface
    on_note    is told in a line when the server has ended and is started again
    on_failed  is called when it has ended and starting it again would not help; `error` says why
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        on_note: Callable[[str], None],
        on_failed: Callable[[], None],
    ) -> None:
        self._flags = tuple(flags)
        self._on_note = on_note
        self._on_failed = on_failed
        self.error: ModelServerError | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def target(self) -> str:
        """host:port for a client; the same after a restart."""
        return f"127.0.0.1:{self._port}"

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._process.pid if self._process else None

    async def __aenter__(self) -> Self:
        """Return once it listens; its model loads after that. Raises ModelServerError."""
        try:
            self._port = await self._start()
        except BaseException:
            await self._stop()
            raise
        self._keeper = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        await self._stop()

    async def _start(self) -> int:
        """Start the process; the port it listens on."""
        with tempfile.TemporaryDirectory(prefix="gptjet-page-") as folder:
            file = Path(folder, "port")
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", _DIE_WITH_PARENT, str(os.getpid())),
                *(sys.executable, "-m", "gptjet.service.cli", "serve", *self._flags),
                *("--host", "127.0.0.1", "--port", str(self._port), "--port-file", str(file)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                # Settings in the environment are for servers that people start themselves; those
                # of the model are among the flags.
                env={k: v for k, v in os.environ.items() if not k.startswith("GPTJET_")},
                # Ctrl-C goes to a terminal's whole process group: only the page is to hear it.
                start_new_session=True,
            )
            try:
                async with asyncio.timeout(_LISTEN_TIMEOUT_S):
                    while not file.exists():
                        if self._process.returncode is not None:
                            raise _ended(self._process.returncode)
                        await asyncio.sleep(_POLL_S)
            except TimeoutError:
                raise ModelServerError(
                    f"the model server does not listen after {_LISTEN_TIMEOUT_S:.0f} s", 1
                ) from None
            return int(file.read_text(encoding="ascii"))

    async def _keep(self) -> None:
        """Start it again whenever it ends, after pauses that grow while it keeps ending."""
        pause_s = _FIRST_PAUSE_S
        loop = asyncio.get_running_loop()
        listened = True
        while True:
            assert self._process is not None
            started_s = loop.time()
            code = await self._process.wait()
            # Before it listens, it cannot be the flags, which were good the first time: somebody
            # else has taken its port meanwhile, and may give it back.
            if code == _NOT_USABLE and listened:
                self.error = _ended(code)
                self._on_failed()
                return
            if loop.time() - started_s > _LONGEST_PAUSE_S:
                pause_s = _FIRST_PAUSE_S
            self._on_note(
                f"the model server ended with exit code {code}; starting it again in {pause_s:g} s"
            )
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            # Where it ends before it listens, the next round waits for that process, ended already.
            listened = False
            try:
                await self._start()
                listened = True
            except ModelServerError:
                pass
            except OSError as error:
                self._on_note(f"the model server cannot be started: {error.strerror or error}")

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _ended(code: int) -> ModelServerError:
    return ModelServerError(f"the model server ended with exit code {code}", code)
