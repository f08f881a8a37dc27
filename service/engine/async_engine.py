"""The engine in a thread of its own, and asyncio outside it."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from typing import TYPE_CHECKING

from gptjet.service.engine.endings import refusal, refused_score
from gptjet.service.engine.engine import Engine
from gptjet.service.engine.errors import EngineUnavailableError, QueueFullError
from gptjet.service.engine.observer import RequestWatch
from gptjet.service.engine.request import FinishReason, Request, RequestOutput
from gptjet.service.engine.score_call import ScoreCall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from gptjet.service.engine.backend import Backend, BackendSpec
    from gptjet.service.engine.config import EngineConfig
    from gptjet.service.engine.observer import RequestObserver, StepObserver
    from gptjet.service.engine.score import ScoreOutcome, ScoreRequest
    from gptjet.service.engine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_QUEUE_FULL_RETRY_S = 1.0


class RequestStream:
    """The outputs of one request, as they come. Iterate it once; `aclose` or `cancel` to leave.

    It belongs to the event loop that submitted the request.
    """

    def __init__(self, request: Request, on_cancel: Callable[[RequestStream, FinishReason], None]):
        self.request = request
        self._on_cancel = on_cancel
        self._outputs: deque[RequestOutput] = deque()
        self._arrived = asyncio.Event()
        self._ended = False
        self._closed = False

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._outputs:
            if self._ended or self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._outputs.popleft()

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Stop the request within one step; the stream still delivers its summary."""
        if not self._ended:
            self._on_cancel(self, reason)

    async def aclose(self) -> None:
        """Leave: cancel if unfinished, and drop what has not been read; the iteration ends."""
        self.cancel()
        self._closed = True
        self._outputs.clear()
        self._arrived.set()

    def deliver(self, output: RequestOutput) -> None:
        """For the engine: append an output, and end the stream with the one that has a summary."""
        if not self._closed:  # else what comes late would follow a gap
            self._outputs.append(output)
        self._ended = self._ended or output.summary is not None
        self._arrived.set()


class AsyncEngine:
    """Runs an Engine in one thread and hands its outputs to the event loop that started it.

    Every method is for that event loop's thread. The queue is bounded: at most
    `config.max_queue_size` requests wait, counted from `submit` to their first step or their end.
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
        self._streams: set[RequestStream | ScoreCall] = set()
        self._not_started: set[RequestStream | ScoreCall] = set()
        # These three belong to the engine thread.
        self._score_key_of: dict[ScoreCall, int] = {}
        self._stream_of: dict[int, RequestStream] = {}
        self._key_of: dict[RequestStream, int] = {}
        self._refusal: str | None = "the engine has not been started"
        self._idle = asyncio.Event()
        self._idle.set()

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
        return len(self._not_started)

    @property
    def num_running(self) -> int:
        """Requests of which at least one step has run."""
        return len(self._streams) - len(self._not_started)

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
        self._refusal = None

    def submit(self, request: Request) -> RequestStream:
        """Queue a request and return the stream of its outputs.

        Raises EngineUnavailableError before `start` and from `drain` on, InvalidRequestError if
        the request can never be served, QueueFullError at the queue's bound.
        """
        self._refuse_if_unavailable()
        self._engine.validate(request)
        self._refuse_if_full()
        stream = RequestStream(request, self._cancel)
        self._enqueue(stream, lambda: self._add(stream))
        return stream

    def submit_score(self, request: ScoreRequest) -> ScoreCall:
        """Queue a score request, in the same queue; raises what `submit` raises."""
        self._refuse_if_unavailable()
        self._engine.scorer.validate(request)
        self._refuse_if_full()
        call = ScoreCall(request, self._cancel_score)
        self._enqueue(call, lambda: self._add_score(call))
        return call

    async def drain(self, grace_s: float) -> bool:
        """Take nothing new and wait up to `grace_s` for what is queued and running.

        Returns True if all of it finished; else the rest is cancelled and False is returned once
        it has left the engine.
        """
        self._refusal = "the server is draining: it takes no new requests"
        if self._idle.is_set():
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            for stream in list(self._streams):
                stream.cancel()
            await self._idle.wait()
            return False
        return True

    async def stop(self) -> None:
        """Cancel what is left, end the thread and close the backend. Safe to call again."""
        await self.drain(0.0)
        self._refusal = "the engine has stopped"
        thread, self._thread = self._thread, None
        if thread is not None:
            self._inbox.put(None)
            await asyncio.to_thread(thread.join)

    # --- event loop side ---

    def _refuse_if_unavailable(self) -> None:
        if self._refusal is not None:
            raise EngineUnavailableError(self._refusal)

    def _refuse_if_full(self) -> None:
        if len(self._not_started) >= self.config.max_queue_size:
            raise QueueFullError(self.config.max_queue_size, _QUEUE_FULL_RETRY_S)

    def _enqueue(self, submitted: RequestStream | ScoreCall, command: Callable[[], None]) -> None:
        self._streams.add(submitted)
        self._not_started.add(submitted)
        self._idle.clear()
        self._inbox.put(command)

    def _cancel_score(self, call: ScoreCall, reason: FinishReason) -> None:
        self._inbox.put(lambda: self._cancel_score_in_thread(call, reason))

    def _end_score(self, call: ScoreCall, outcome: ScoreOutcome) -> None:
        self._not_started.discard(call)
        self._streams.discard(call)
        self._watch.score_ended(call.request, outcome)
        call.deliver(outcome)
        if not self._streams:
            self._idle.set()

    def _cancel(self, stream: RequestStream, reason: FinishReason) -> None:
        self._inbox.put(lambda: self._cancel_in_thread(stream, reason))

    def _deliver(self, outputs: list[tuple[RequestStream, RequestOutput]]) -> None:
        for stream, output in outputs:
            self._not_started.discard(stream)
            if output.summary is not None:
                self._streams.discard(stream)
                self._watch.request_ended(stream.request, output.summary)
            stream.deliver(output)
        if not self._streams:
            self._idle.set()

    # --- engine thread side ---

    def _run(self, warmed_up: asyncio.Future[None]) -> None:
        loop = self._loop
        assert loop is not None

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
        while self._take_commands():
            self._publish(self._step())
        self._engine.backend.close()

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

    def _step(self) -> list[tuple[int, RequestOutput]]:
        try:
            return self._engine.step()
        except Exception as error:  # noqa: BLE001
            # Not a backend's error, those are caught inside: a bug of ours. Nobody may be left
            # waiting for it, so everything in flight is failed by name.
            return self._engine.fail(None, error)

    def _publish(self, outputs: list[tuple[int, RequestOutput]]) -> None:
        if not outputs:
            return
        addressed = []
        for key, output in outputs:
            stream = self._stream_of[key]
            addressed.append((stream, output))
            if output.summary is not None:
                del self._stream_of[key], self._key_of[stream]
        self._send(addressed)

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
        self._stream_of[key] = stream
        self._key_of[stream] = key

    def _add_score(self, call: ScoreCall) -> None:
        def end(outcome: ScoreOutcome) -> None:
            self._score_key_of.pop(call, None)
            self._tell_loop(self._end_score, call, outcome)

        try:
            key = self._engine.add_score_unchecked(
                call.request, lambda: self._tell_loop(self._not_started.discard, call), end
            )
        except Exception as error:  # noqa: BLE001 - logged by refused_score, told to the caller
            end(refused_score(call.request, error))
            return
        self._score_key_of[call] = key

    def _cancel_score_in_thread(self, call: ScoreCall, reason: FinishReason) -> None:
        key = self._score_key_of.get(call)
        if key is not None:
            self._engine.cancel(key, reason)

    def _tell_loop(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            logger.warning("the event loop has closed: the end of a score request is dropped")

    def _cancel_in_thread(self, stream: RequestStream, reason: FinishReason) -> None:
        key = self._key_of.get(stream)
        if key is not None:
            self._publish(self._engine.cancel(key, reason))
