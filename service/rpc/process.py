"""The server's process: bring a model up, obey signals, drain, and the exit code."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from gptjet.service.config import ServerConfig
from gptjet.service.engine.backend import Backend
from gptjet.service.engine.errors import BackendLoadError
from gptjet.service.engine.tokenizer import Tokenizer
from gptjet.service.governance.governance import GovernanceError
from gptjet.service.log import configure_logging, flush_log, get_logger
from gptjet.service.observability.errors import ObservabilityError
from gptjet.service.rpc.listen import ListenError
from gptjet.service.rpc.server import Server

logger = get_logger(__name__)

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_ENGINE = 0, 1, 2, 6

_THREAD_PREFIX = "gptjet-"

# Such a task has one message to send on a connection that has gone: milliseconds.
_LAST_TASKS_S = 1.0


class LoadedModel(Protocol):
    """What a loader gives; `gptjet.service.backends.factory` has one of these."""

    @property
    def backend(self) -> Backend:
        """The model."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        ...


# Given from outside, so that this room knows no backend. It may block and raise BackendLoadError.
Loader = Callable[[ServerConfig], LoadedModel]


async def serve(config: ServerConfig, *, loader: Loader) -> int:
    """Run a server until SIGTERM or SIGINT and return the process's exit code.

    0: drained. 1: a bug. 2: the model, the port or a file does not allow it; one line was logged.
    6: the engine has failed for good, by a step that hangs or a thread that died; callers were
    told, and health said NOT_SERVING for failure_grace_s.
    A second signal ends the process at once. Needs the main thread, for the signals.
    """
    configure_logging(config.log_level, config.log_format, background=True)
    try:
        server = Server(config)
    except ObservabilityError as error:
        return _give_up(str(error))
    stop = server.stop_asked
    _stop_on_signals(stop)
    _reload_on_hangup(server)
    try:
        await server.start()
    except (ListenError, ObservabilityError, GovernanceError) as error:
        await _drain(server, 0.0)
        return _give_up(str(error))
    bringing_up = asyncio.create_task(_bring_up(server, loader))
    stopping = asyncio.create_task(stop.wait())
    failing = asyncio.create_task(server.failed.wait())
    await asyncio.wait({bringing_up, stopping}, return_when=asyncio.FIRST_COMPLETED)
    code = EXIT_OK
    if bringing_up.done():
        code = bringing_up.result()
        if code == EXIT_OK:
            await asyncio.wait({stopping, failing}, return_when=asyncio.FIRST_COMPLETED)
    if server.failed.is_set():
        await asyncio.wait({stopping}, timeout=config.failure_grace_s)
    bringing_up.cancel()
    stopping.cancel()
    failing.cancel()
    await asyncio.gather(bringing_up, stopping, failing, return_exceptions=True)
    if not await _drain(server):
        code = EXIT_FAILURE
    if server.failed.is_set():
        code = EXIT_ENGINE
    await _let_tasks_end()
    logger.info("stopped", exit_code=code)
    flush_log()
    return code


def run(config: ServerConfig, *, loader: Loader) -> int:
    """`serve` for a process of its own: returns the exit code, or exits with it.

    It exits by itself where a thread is still inside the backend, loading or in a step that does
    not end: the interpreter cannot be shut down under it without crashing.
    """
    code = asyncio.run(serve(config, loader=loader))
    if any(
        thread.daemon and thread.name.startswith(_THREAD_PREFIX) for thread in threading.enumerate()
    ):
        _exit_now(code)
    return code


async def _drain(server: Server, grace_s: float | None = None) -> bool:
    """`Server.drain`, but what it raises is logged, as False: its process ends all the same."""
    try:
        return await server.drain(grace_s)
    except Exception as error:
        # All its parts have been told to stop; an error that came on the way is a context of this.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.error("draining failed", reason=reason, exc_info=error)
        return False


async def _let_tasks_end() -> None:
    """Wait for what gRPC has left to do for calls that came as it stopped.

    Its `stop` does not wait for the coroutine that is still refusing such a call; `asyncio.run`
    would cancel it, which gRPC reports as an error with a traceback.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=_LAST_TASKS_S)


async def _bring_up(server: Server, loader: Loader) -> int:
    """Load and warm up; the exit code if that fails, else EXIT_OK with the server serving."""
    config = server.config
    started = time.monotonic()
    logger.info("loading", model=config.model, backend=config.backend)
    try:
        loaded = await _in_daemon_thread(lambda: loader(config), _THREAD_PREFIX + "loader")
        await server.attach(loaded.backend, loaded.tokenizer)
    except (BackendLoadError, ListenError) as error:
        return _give_up(str(error))
    except Exception as error:
        logger.error("loading failed", exc_info=error)
        return EXIT_FAILURE
    spec = loaded.backend.spec
    logger.info(
        "serving",
        model=config.model,
        backend=spec.name,
        device=spec.device,
        dtype=spec.dtype,
        max_context=spec.max_context,
        load_s=round(time.monotonic() - started, 2),
    )
    return EXIT_OK


async def _in_daemon_thread(function: Callable[[], Any], name: str) -> Any:
    """Run a function in a thread that, unlike a pool's, does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run_function() -> None:
        result, error = None, None
        try:
            result = function()
        except BaseException as raised:  # noqa: BLE001 - raised again where it is awaited
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run_function, name=name, daemon=True).start()
    return await future


def _stop_on_signals(stop: asyncio.Event) -> None:
    signalled = False

    def on_signal(number: int) -> None:
        nonlocal signalled
        # `stop` may be set already by an administrator, whose supervisor's SIGTERM comes after.
        if signalled:
            _exit_now(128 + number)
        signalled = True
        logger.info("signal received", signal=signal.Signals(number).name)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)


def _reload_on_hangup(server: Server) -> None:
    """SIGHUP reads again what may change: certificates, tokens, the policy.

    Where none is given it does what it does to any process.
    """
    config = server.config
    if not (config.governance_policy or config.tokens_file or config.tls_cert):
        return
    loop = asyncio.get_running_loop()
    reloading: set[asyncio.Task[Any]] = set()

    def on_hangup() -> None:
        task = loop.create_task(server.reload())
        reloading.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(reloading.discard)

    loop.add_signal_handler(signal.SIGHUP, on_hangup)


def _exit_now(code: int) -> None:
    flush_log()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or its disk is full
            stream.flush()
    os._exit(code)


def _give_up(reason: str) -> int:
    """One line for a person, whatever a message looks like."""
    logger.error("cannot serve: " + " ".join(reason.split()))
    flush_log()
    return EXIT_USAGE
