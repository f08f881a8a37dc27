"""The server's life: listen, load, serve, drain, exit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gptjet.proto.v1 import text_generation_pb2_grpc as pb_grpc
from gptjet.service.config import ServerConfig
from gptjet.service.engine.async_engine import AsyncEngine
from gptjet.service.engine.backend import Backend
from gptjet.service.engine.tokenizer import Tokenizer
from gptjet.service.governance.governance import Governance
from gptjet.service.log import get_logger
from gptjet.service.observability.setup import Observability, set_up
from gptjet.service.rpc import health, listen, sockets
from gptjet.service.rpc.access.control import AccessControl, Outcome, Reloaded
from gptjet.service.rpc.access.errors import AccessError
from gptjet.service.rpc.access.interceptor import RefusalLog
from gptjet.service.rpc.admin_server import AdminServer
from gptjet.service.rpc.governed import open_governance
from gptjet.service.rpc.interceptors import RequestInterceptor, RequestRecord
from gptjet.service.rpc.listen import ListenError
from gptjet.service.rpc.servicer import (
    METHOD_NAMES,
    SERVICE_NAME,
    TextGenerationServicer,
    server_version,
)
from gptjet.service.rpc.text import TextCodec

logger = get_logger(__name__)


# After the grace period: to send what is finished, and for the step that is running to end.
_FLUSH_S = 1.0
_STEP_S = 30.0
_POLL_S, _QUIET_POLLS = 0.02, 3
# Times max_concurrent_rpcs: with that many of our service, as many others are let in.
_RPCS_OF_ANY_KIND = 2


class Server:
    """A gRPC server of one model, without signals and exit codes: `start`, `attach`, `drain`.

    `failed` is set when its engine has failed for good. Belongs to the event loop it is made in.
    """

    def __init__(self, config: ServerConfig, observability: Observability | None = None) -> None:
        """`observability`: None for what the settings say; raises ObservabilityError for it."""
        self.config = config
        self.port = 0
        self.engine: AsyncEngine | None = None
        self.governance: Governance | None = None
        self._codec: TextCodec | None = None
        self._health = health.HealthServicer(("", SERVICE_NAME))
        self.observability = observability or set_up(
            config,
            version=server_version(),
            methods=METHOD_NAMES,
            is_serving=lambda: self._health.is_serving,
        )
        self._rpcs = RequestInterceptor(
            SERVICE_NAME,
            self.observability,
            max_rpcs=config.max_concurrent_rpcs,
            max_message_bytes=config.max_message_bytes,
        )
        self._servicer = TextGenerationServicer(config, self._rpcs.watch)
        self.failed = asyncio.Event()
        self._watching_engine: asyncio.Task[None] | None = None
        self._grpc: grpc.aio.Server | None = None
        self._access: AccessControl | None = None
        self._refusals = RefusalLog()
        self._admin = AdminServer(config, self)
        self._port_file: os.stat_result | None = None
        self._started_s = time.monotonic()
        self._draining = False
        # Set when it has been told to stop other than by a signal; whoever runs it waits for this.
        self.stop_asked = asyncio.Event()
        self._grace_s = config.grace_s

    async def start(self) -> None:
        """Listen. Health says NOT_SERVING and requests get UNAVAILABLE until `attach`.

        With reuse_port, `attach` listens instead: another server on the port serves until then, and
        half of its callers would come here. Raises ListenError, ObservabilityError or
        GovernanceError with one line if that cannot be.
        """
        try:
            self._access = AccessControl(self.config, self._note_refused)
        except AccessError as error:
            raise ListenError(str(error)) from error
        self.governance = open_governance(self.config)
        if self.governance is not None:
            self._servicer.govern(self.governance)
            self.observability.govern(self.governance)
        self._serve_metrics()
        if self.config.reuse_port:
            listen.check_address(self.config.host, self.config.port, "--port", reuse_port=True)
        else:
            await self._listen()
        self._access.start()
        await self._admin.start()

    async def _listen(self) -> None:
        assert self._access is not None, "`start` made it"
        server = grpc.aio.server(
            interceptors=[self._rpcs, *self._access.for_callers(SERVICE_NAME)],
            options=listen.channel_options(self.config),
            # The interceptor counts those of our service whose request is there, and names the
            # setting. This bounds the rest, too: probes, reflection, and headers without a request.
            maximum_concurrent_rpcs=_RPCS_OF_ANY_KIND * self.config.max_concurrent_rpcs,
        )
        pb_grpc.add_TextGenerationServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self.config.reflection:
            reflection.enable_server_reflection(
                (SERVICE_NAME, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
            )
        self.port = listen.bind(server, self.config, self._access.credentials())
        self._grpc = server
        await server.start()
        if self.config.port_file is not None:
            self._port_file = listen.write_port_file(self.config.port_file, self.port)
        logger.info(
            "listening",
            address=listen.address(self.config.host, self.port),
            tls=self.config.tls_cert is not None,
        )

    def _serve_metrics(self) -> None:
        config = self.config
        if config.metrics_port is None:
            return
        scheme = self.observability.listen(config)
        address = listen.address(config.metrics_host, self.observability.metrics_port)
        logger.info("metrics", url=f"{scheme}://{address}/metrics")

    def _note_refused(self, record: RequestRecord) -> None:
        self._refusals(record)
        self._rpcs.watch.count_refused(record)

    async def attach(self, backend: Backend, tokenizer: Tokenizer) -> None:
        """Warm a loaded model up and serve it.

        Raises what `Backend.warm_up` raises, and with reuse_port what `start` raises.
        """
        engine = AsyncEngine(
            backend,
            tokenizer,
            self.config.engine,
            step_observer=self.observability.metrics,
            request_observers=self.observability.request_observers,
        )
        # Walks the whole vocabulary.
        codec = await asyncio.to_thread(
            TextCodec, tokenizer, backend.spec.max_context, self.config.max_queue_size
        )
        await engine.start()
        self.engine, self._codec = engine, codec
        self.observability.attach(engine, self.config.model)
        self._servicer.attach(engine, codec)
        self._watching_engine = asyncio.create_task(self._watch(engine))
        self._health.set_status(health.SERVING)
        if self.config.reuse_port:
            await self._listen()

    async def _watch(self, engine: AsyncEngine) -> None:
        await engine.failed.wait()
        self._health.set_status(health.NOT_SERVING)
        self._servicer.refuse(engine.failure or "")
        self.failed.set()

    async def drain(self, grace_s: float | None = None) -> bool:
        """Refuse new requests, let running ones finish within `grace_s`, then stop.

        With reuse_port nothing is refused while another server may take it: see `_hand_over`.
        Returns False if a step of the backend did not end, or the backend did not close, so that
        its thread is still alive. Raises what a part of the server raises, once all have stopped.
        """
        grace_s = self._grace_s if grace_s is None else grace_s
        self._draining = True
        # What is left to do is done whatever raises before it; the last in the list is the first.
        async with contextlib.AsyncExitStack() as left:
            left.callback(self._remove_port_file)
            left.push_async_callback(self._close_governance)
            left.callback(self._stop_watching_engine)
            left.push_async_callback(self._stop_access)
            left.push_async_callback(self._admin.stop)
            left.push_async_callback(self.observability.close)
            left.push_async_callback(self._stop_grpc)
            left.callback(self._health.end_watches)
            left.callback(self._close_codec)
            is_shared = self.config.reuse_port and self._grpc is not None
            if is_shared and grace_s and not self.failed.is_set():
                grace_s = await self._hand_over(grace_s)
            self._health.set_status(health.NOT_SERVING)
            self._servicer.refuse("the server is draining: it takes no new requests")
            if self.engine is None:
                return True
            return await self._drain_engine(self.engine, grace_s)

    def _close_codec(self) -> None:
        if self._codec is not None:
            self._codec.close()

    async def _stop_grpc(self) -> None:
        if self._grpc is not None:
            await self._close_connections()
            await self._grpc.stop(_FLUSH_S)

    async def _stop_access(self) -> None:
        if self._access is not None:
            await self._access.stop()

    def _stop_watching_engine(self) -> None:
        if self._watching_engine is not None:
            self._watching_engine.cancel()

    async def _close_governance(self) -> None:
        if self.governance is not None:
            await asyncio.to_thread(self.governance.close)

    def _remove_port_file(self) -> None:
        if self._port_file is not None and self.config.port_file is not None:
            listen.remove_port_file(self.config.port_file, self._port_file)

    # --- what its administrator sees and does ---

    @property
    def access(self) -> AccessControl:
        """Certificates and tokens; there from `start` on."""
        assert self._access is not None
        return self._access

    @property
    def admin_port(self) -> int:
        """Where gptjet.v1.Admin listens; 0: on no port."""
        return self._admin.port

    @property
    def state(self) -> str:
        """ "loading", "serving", "draining", or "failed": its engine has, for good.

        Also while it drains for that: what its administrator has to know is that it failed.
        """
        if self.engine is not None and self.engine.failure is not None:
            return "failed"
        if self._draining or self.stop_asked.is_set():
            return "draining"
        return "loading" if self.engine is None else "serving"

    @property
    def running(self) -> int:
        """Requests that hold a KV cache."""
        return 0 if self.engine is None else self.engine.num_running

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return 0 if self.engine is None else self.engine.num_waiting

    async def reload(self) -> list[Reloaded]:
        """Read certificates, tokens and the policy again; what became of each.

        Nothing before `start`, which reads them.
        """
        if self._access is None:
            return []
        results = await self.access.reload()
        if self.governance is not None:
            read = await asyncio.to_thread(self.governance.reload)
            if not read.ok:
                results.append(Reloaded("policy", Outcome.REFUSED, read.message))
            else:
                outcome = Outcome.RELOADED if read.changed else Outcome.UNCHANGED
                results.append(Reloaded("policy", outcome))
        return results

    def ask_to_stop(self, grace_s: float | None) -> float:
        """Have whoever runs this server drain it; the grace period that holds, in seconds.

        Asking again changes nothing, nor does asking a server that drains.
        """
        if not (self._draining or self.stop_asked.is_set()):
            self._grace_s = self.config.grace_s if grace_s is None else grace_s
            self.stop_asked.set()
        return self._grace_s

    def about(self) -> dict[str, Any]:
        """What it is, for a person."""
        return {
            "server_version": server_version(),
            "uptime_s": round(time.monotonic() - self._started_s, 3),
            "model": self.config.model,
            "backend": "" if self.engine is None else self.engine.spec.name,
            "address": listen.address(self.config.host, self.port),
        }

    async def _hand_over(self, grace_s: float) -> float:
        """Leave the port to the other servers on it; returns what is left of the grace period.

        New connections go to the others from now on. Callers on the old ones are served until
        each connection has reached its age and been told so (GOAWAY): then their next call connects
        anew. gRPC's own `stop` would cancel the calls that cross its GOAWAY.
        """
        started = time.monotonic()
        end = started + grace_s
        aged = min(end, started + 1.2 * listen.connection_age_s(self.config) + _FLUSH_S)
        num_listeners = sockets.close_listeners(self.port)
        logger.info("handing over", listeners=num_listeners, grace_s=grace_s)
        while num_listeners and time.monotonic() < end:
            if time.monotonic() > aged:
                self._health.end_watches()  # they hold connections that nothing else is on
            if not sockets.num_connections(self.port):
                break
            await asyncio.sleep(_POLL_S)
        left = sockets.num_connections(self.port)
        logger.info("handed over", all_finished=not left, connections_left=left)
        return max(0.0, end - time.monotonic())

    async def _close_connections(self) -> None:
        """Take no connection, wait until what has just ended is sent, and close every connection.

        A call that comes then sees its connection end, UNAVAILABLE, and may be tried again
        elsewhere; gRPC's own `stop` would say CANCELLED, also to one on a connection that was made
        between here and that `stop`.
        """
        if self.config.reuse_port:
            sockets.close_listeners(self.port)
        else:
            sockets.refuse_connections(self.port)
        end, num_quiet = time.monotonic() + _FLUSH_S, 0
        while num_quiet < _QUIET_POLLS and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
            num_quiet = 0 if sockets.num_unsent_bytes(self.port) else num_quiet + 1
        sockets.close_connections(self.port)
        # gRPC itself has to see them end before it may be stopped.
        end = time.monotonic() + _FLUSH_S
        while sockets.num_connections(self.port) and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
            sockets.close_connections(self.port)

    async def _drain_engine(self, engine: AsyncEngine, grace_s: float) -> bool:
        started = time.monotonic()
        logger.info(
            "draining", running=engine.num_running, waiting=engine.num_waiting, grace_s=grace_s
        )
        try:
            async with asyncio.timeout(grace_s + _STEP_S):
                finished = await engine.drain(grace_s)
        except TimeoutError:
            logger.error("a step of the backend does not end", waited_s=grace_s + _STEP_S)
            return False
        # What the engine has finished, slow readers may still be reading.
        left_s = max(grace_s - (time.monotonic() - started), _FLUSH_S)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._rpcs.idle.wait(), left_s)
        try:
            async with asyncio.timeout(_STEP_S):
                await engine.stop()
        except TimeoutError:
            logger.error("the backend does not close", waited_s=_STEP_S)
            return False
        logger.info("drained", all_finished=finished and engine.failure is None)
        return True
