"""The engine in a thread of its own, and asyncio outside it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import uuid
from typing import TYPE_CHECKING

from gptjet.service.engine.admission import Admission, tokens_of, tokens_of_score
from gptjet.service.engine.callers import Callers
from gptjet.service.engine.endings import ended, log_failure, refusal, refused_score
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import (
    EngineError,
    EngineStepError,
    EngineUnavailableError,
    QueueTimeError,
)
from gptjet.service.engine.observer import RequestWatch
from gptjet.service.engine.request import FinishReason, Request, RequestOutput
from gptjet.service.engine.request_stream import RequestStream
from gptjet.service.engine.score import ScoreOutcome
from gptjet.service.engine.score_call import ScoreCall
from gptjet.service.engine.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from gptjet.service.engine.backend import Backend, BackendSpec
    from gptjet.service.engine.config import EngineConfig
    from gptjet.service.engine.faults import Outputs
    from gptjet.service.engine.observer import RequestObserver, StepObserver
    from gptjet.service.engine.score import ScoreRequest
    from gptjet.service.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_QUEUE_TIME_RETRY_S = 1.0


class _TooManyFailedStepsError(Exception):
    """As many steps in a row have failed as a device that works would never let fail."""


class AsyncEngine:
    """Runs an Engine in one thread and hands its outputs to the event loop that started it.

    Every method is for that event loop's thread. The queue is bounded, see Admission, counted from
    `submit` to a request's first step or its end.

    The engine has failed for good when its thread has ended by itself, when a step does not end
    within `config.step_timeout_s`, or when `config.max_failed_steps` in a row raise. Then every
    caller is told, `failed` is set, `failure` says why, and nothing new is taken.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        step_observer: StepObserver | None = None,
        request_observers: tuple[RequestObserver, ...] = (),
    ) -> None:
        self._engine = Engine(backend, tokenizer, config, step_observer)
        self._watch = RequestWatch(request_observers)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._admission: Admission[RequestStream | ScoreCall]
        self._admission = Admission(self._engine.config, self._give_up)
        self._watchdog = Watchdog(self._engine.config.step_timeout_s, self._on_hung)
        self._ended = asyncio.Event()  # the thread has
        self.failed = asyncio.Event()
        self.failure: str | None = None
        self._callers = Callers()
        self._refusal: str | None = "the engine has not been started"

    @property
    def spec(self) -> BackendSpec:
        """What the backend can do."""
        return self._engine.spec

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    @property
    def config(self) -> EngineConfig:
        """The engine's limits."""
        return self._engine.config

    @property
    def num_waiting(self) -> int:
        """Requests submitted of which nothing has run yet."""
        return self._admission.num_waiting

    @property
    def num_running(self) -> int:
        """Requests of which at least one step has run."""
        return self._admission.num_running

    @property
    def engine(self) -> Engine:
        """The engine itself; its state belongs to the engine thread while that runs."""
        return self._engine

    async def start(self) -> None:
        """Warm the backend up in the engine thread and take requests from then on.

        Raises what `warm_up` raises.
        """
        if self._thread is not None:
            raise RuntimeError("an AsyncEngine starts once")
        self._loop = asyncio.get_running_loop()
        warmed_up: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(warmed_up,), name="gptjet-engine", daemon=True
        )
        self._thread.start()
        await warmed_up
        self._watchdog.start()
        self._refusal = None

    def submit(self, request: Request) -> RequestStream:
        """Queue a request and return the stream of its outputs.

        Raises EngineUnavailableError before `start` and from `drain` on, InvalidRequestError if
        the request can never be served, QueueFullError and TokensInFlightError at those bounds. Its
        stream ends with QueueTimeError if it waits too long.
        """
        self._refuse_if_unavailable()
        self._engine.validate(request)
        num_tokens = tokens_of(request)
        self._admission.check(num_tokens)
        stream = RequestStream(request, self._cancel)
        self._enqueue(stream, num_tokens, lambda: self._add(stream))
        return stream

    def submit_score(self, request: ScoreRequest) -> ScoreCall:
        """Queue a score request, in the same queue; raises what `submit` raises."""
        self._refuse_if_unavailable()
        self._engine.scorer.validate(request)
        num_tokens = tokens_of_score(request)
        self._admission.check(num_tokens)
        call = ScoreCall(request, self._cancel_score)
        self._enqueue(call, num_tokens, lambda: self._add_score(call))
        return call

    async def drain(self, grace_s: float) -> bool:
        """Take nothing new and wait up to `grace_s` for what is queued and running.

        Returns True if all of it finished; else the rest is cancelled and False is returned once
        it has left the engine.
        """
        self._refusal = self.failure or "the server is draining: it takes no new requests"
        idle = self._admission.idle
        if idle.is_set():
            return True
        try:
            await asyncio.wait_for(idle.wait(), grace_s)
        except TimeoutError:
            for submitted in self._admission.all:
                submitted.cancel()
            await idle.wait()
            return False
        return True

    async def stop(self) -> None:
        """Cancel what is left, end the thread and close the backend. Safe to call again.

        The thread of an engine that has failed is left alone: it may never end.
        """
        await self.drain(0.0)
        self._refusal = self.failure or "the engine has stopped"
        self._watchdog.stop()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            if self.failure is None:
                # No thread of asyncio's waits: one who gives up would wait for that at the end.
                await self._ended.wait()
                thread.join()

    # --- event loop side ---

    def _refuse_if_unavailable(self) -> None:
        if self._refusal is not None:
            raise EngineUnavailableError(self._refusal)

    def _enqueue(
        self, submitted: RequestStream | ScoreCall, num_tokens: int, command: Callable[[], None]
    ) -> None:
        self._admission.add(submitted, num_tokens)
        self._inbox.put(command)

    def _give_up(self, submitted: RequestStream | ScoreCall) -> None:
        self._inbox.put(lambda: self._give_up_in_thread(submitted))

    def _cancel_score(self, call: ScoreCall, reason: FinishReason) -> None:
        self._inbox.put(lambda: self._cancel_score_in_thread(call, reason))

    def _end_score(self, call: ScoreCall, outcome: ScoreOutcome) -> None:
        if self.failure is not None:  # it has been told, and counted, by `_fail`
            return
        self._watch.score_ended(call.request, outcome)
        call.deliver(outcome)
        self._admission.end(call)

    def _cancel(self, stream: RequestStream, reason: FinishReason) -> None:
        self._inbox.put(lambda: self._cancel_in_thread(stream, reason))

    def _deliver(self, outputs: list[tuple[RequestStream, RequestOutput]]) -> None:
        if self.failure is not None:  # a step that hung has ended after all: see `_end_score`
            return
        for stream, output in outputs:
            self._admission.start(stream)
            if output.summary is not None:
                self._watch.request_ended(stream.request, output.summary)
            stream.deliver(output)
            if output.summary is not None:
                self._admission.end(stream)

    def _fail(self, error_id: str, reason: str) -> None:
        """The engine has failed for good: nobody may be left waiting for it."""
        if self.failure is not None:
            return
        self.failure = self._refusal = f"{reason} (error id {error_id})"
        for submitted in self._admission.all:
            error: EngineError = EngineStepError(error_id, reason)
            if self._admission.is_waiting(submitted):  # so it may be tried elsewhere
                error = EngineUnavailableError(self.failure)
            if isinstance(submitted, RequestStream):
                output = ended(submitted.request, error)
                if output.summary is not None:
                    self._watch.request_ended(submitted.request, output.summary)
                submitted.deliver(output)
            else:
                outcome = ScoreOutcome(finish_reason=FinishReason.ERROR, error=error)
                self._watch.score_ended(submitted.request, outcome)
                submitted.deliver(outcome)
            self._admission.end(submitted)
        self.failed.set()

    # --- engine thread side ---

    def _run(self, warmed_up: asyncio.Future[None]) -> None:
        loop = self._loop
        assert loop is not None
        try:
            self._work(loop, warmed_up)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(self._ended.set)

    def _work(self, loop: asyncio.AbstractEventLoop, warmed_up: asyncio.Future[None]) -> None:

        def tell(error: Exception | None) -> None:
            if warmed_up.done():  # `start` was cancelled
                return
            if error is None:
                warmed_up.set_result(None)
            else:
                warmed_up.set_exception(error)

        try:
            self._engine.backend.warm_up()
        except Exception as error:  # noqa: BLE001 - handed to `start`, which raises it
            self._engine.backend.close()
            loop.call_soon_threadsafe(tell, error)
            return
        loop.call_soon_threadsafe(tell, None)
        try:
            while self._take_commands():
                self._watchdog.begin()
                self._publish(self._step())
                self._watchdog.end()
                self._check_health()
        except BaseException as error:  # noqa: BLE001 - whatever ends this thread, SystemExit too
            self._on_dead(error)
        self._engine.backend.close()

    def _on_dead(self, error: BaseException) -> None:
        self._watchdog.stop()
        error_id = uuid.uuid4().hex[:12]
        logger.critical("the engine has failed, error id %s", error_id, exc_info=error)
        reason = "the engine's thread has ended"
        if isinstance(error, _TooManyFailedStepsError):
            reason = str(error)
        self._tell_loop(self._fail, error_id, reason)

    def _on_hung(self, stack: str) -> None:
        """For the watchdog's thread."""
        error_id = uuid.uuid4().hex[:12]
        reason = f"a step did not end in {self.config.step_timeout_s:g} s (step_timeout_s)"
        logger.critical("the engine hangs, error id %s: %s; it is at\n%s", error_id, reason, stack)
        self._tell_loop(self._fail, error_id, reason)

    def _take_commands(self) -> bool:
        """Run what the event loop asked for, blocking while there is no work; False: stop."""
        try:
            while True:
                command = self._inbox.get(block=not self._engine.has_work)
                if command is None:
                    return False
                command()
        except queue.Empty:
            return True

    def _step(self) -> Outputs:
        try:
            return self._engine.step()
        except Exception as error:  # noqa: BLE001
            # Not a backend's error, those are caught inside: a bug of ours. Nobody may be left
            # waiting for it, so everything in flight is failed by name.
            outputs = self._engine.fail(None, error)
            return outputs + self._lost(outputs, error)

    def _lost(self, outputs: Outputs, error: Exception) -> Outputs:
        """The ends of requests that ended in a step whose outputs are lost to its error.

        outputs  those of the requests that the engine still knew, and has failed
        """
        lost = self._callers.not_told(outputs)
        if not lost:
            return []
        told = log_failure(error, [request.request_id for _, request in lost])
        return [(key, ended(request, told)) for key, request in lost]

    def _check_health(self) -> None:
        failed = self._engine.guard.num_failed_steps
        if failed >= self.config.max_failed_steps:
            raise _TooManyFailedStepsError(
                f"{failed} steps in a row have failed (max_failed_steps)"
            )

    def _publish(self, outputs: Outputs) -> None:
        if outputs:
            self._send(self._callers.address(outputs))

    def _send(self, addressed: list[tuple[RequestStream, RequestOutput]]) -> None:
        assert self._loop is not None
        try:
            # One wake-up of the loop a step, however many streams it serves.
            self._loop.call_soon_threadsafe(self._deliver, addressed)
        except RuntimeError:
            logger.warning("the event loop has closed: %d outputs dropped", len(addressed))

    def _add(self, stream: RequestStream) -> None:
        try:
            key = self._engine.add_unchecked(stream.request)
        except Exception as error:  # noqa: BLE001 - logged by refusal, and told to the caller
            self._send([(stream, refusal(stream.request, error))])
            return
        self._callers.add(key, stream)

    def _add_score(self, call: ScoreCall) -> None:
        def end(outcome: ScoreOutcome) -> None:
            self._callers.end(call)
            self._tell_loop(self._end_score, call, outcome)

        try:
            key = self._engine.add_score_unchecked(
                call.request, lambda: self._tell_loop(self._admission.start, call), end
            )
        except Exception as error:  # noqa: BLE001 - logged by refused_score, told to the caller
            end(refused_score(call.request, error))
            return
        self._callers.add(key, call)

    def _cancel_score_in_thread(self, call: ScoreCall, reason: FinishReason) -> None:
        key = self._callers.key_of(call)
        if key is not None:
            self._engine.cancel(key, reason)

    def _tell_loop(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            logger.warning("the event loop has closed: a caller is not told how its request ends")

    def _cancel_in_thread(self, stream: RequestStream, reason: FinishReason) -> None:
        key = self._callers.key_of(stream)
        if key is not None:
            self._publish(self._engine.cancel(key, reason))

    def _give_up_in_thread(self, submitted: RequestStream | ScoreCall) -> None:
        key = self._callers.key_of(submitted)
        # It may have begun meanwhile.
        if key is not None and self._engine.is_waiting(key):
            error = QueueTimeError(self.config.max_queue_time_s, _QUEUE_TIME_RETRY_S)
            self._publish(self._engine.cancel(key, FinishReason.ERROR, error))
