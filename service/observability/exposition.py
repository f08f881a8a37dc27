"""The HTTP port that Prometheus scrapes: one path, few connections, nothing that can hang."""

from __future__ import annotations

import errno
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from gptjet.service.observability.errors import ObservabilityError
from gptjet.service.observability.tls import MetricsTls, MetricsTlsFiles

logger = logging.getLogger(__name__)

PATH = "/metrics"
# A scrape is one connection every few seconds, or two where Prometheus is doubled.
_MAX_CONNECTIONS = 8
_CLIENT_TIMEOUT_S = 10.0

_App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class MetricsServer:
    """Serves a registry from a thread of its own, from construction until `close`."""

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        tls: MetricsTlsFiles | None = None,
    ) -> None:
        """Port 0 chooses one. Raises ObservabilityError where it cannot listen."""
        secure = None if tls is None else MetricsTls(tls)
        try:
            family, *_, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as error:
            raise ObservabilityError(
                f"cannot serve metrics on {host}: {error.strerror or error}; see --metrics-host"
            ) from error
        try:
            self._http = _Server(family, address, _only_metrics(make_wsgi_app(registry)), secure)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = f"port {port} on {host} is in use; choose another with --metrics-port"
            else:
                reason = f"{host}, port {port}: {error.strerror or error}"
            raise ObservabilityError(f"cannot serve metrics: {reason}") from error
        self.port: int = self._http.server_address[1]
        self._thread = threading.Thread(
            target=self._http.serve_forever, name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Safe to call again."""
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """A scrape is no event."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(
        self, family: socket.AddressFamily, address: Any, app: _App, tls: MetricsTls | None
    ) -> None:
        self.address_family = family
        self._tls = tls
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        super().__init__(address, _Handler)
        self.set_app(app)

    def server_bind(self) -> None:
        """Bind, without the library's look-up of the host's full name: it can take a minute."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, unless there are too many."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands in the connection's own thread: a client that does not holds up nobody."""
        if self._tls is None:
            super().finish_request(request, client_address)
            return
        request.settimeout(_CLIENT_TIMEOUT_S)
        # `request` is an empty shell from here on, which its caller closes.
        with self._tls.context().wrap_socket(request, server_side=True) as secure:
            super().finish_request(secure, client_address)

    def handle_error(self, _request: Any, client_address: Any) -> None:
        """A client that goes away or says nothing is its own business."""
        logger.debug("metrics: connection from %s failed", client_address, exc_info=True)


def _only_metrics(app: _App) -> _App:
    def serve(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH:
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"the metrics are at {PATH}\n".encode()]
        try:
            return app(environ, start_response)
        except Exception:
            logger.exception("the metrics cannot be collected")
            start_response("500 Internal Server Error", [("Content-Type", "text/plain")])
            return [b"the metrics cannot be collected; the server's log has the reason\n"]

    return serve
