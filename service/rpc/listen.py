"""The listening side: port, TLS, channel options, and one clear line where they cannot be had."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from gptjet.service.config import ServerConfig

if TYPE_CHECKING:
    import grpc

_LONGEST_HAND_OVER_S = 10.0
_OVERSIZE_BYTES = 1024 * 1024
# gRPC's own word for it: the largest 32-bit number.
_NEVER_MS = 2**31 - 1


class ListenError(Exception):
    """The server cannot listen as it was told; the message is one line for a person."""


def channel_options(config: ServerConfig) -> list[tuple[str, int]]:
    """gRPC's own settings."""
    return [
        # On by default: a second server on the same port would start and take half the requests.
        ("grpc.so_reuseport", int(config.reuse_port)),
        # The interceptor refuses what is too large by the setting's name; what is far too large
        # is not taken in for that.
        ("grpc.max_receive_message_length", config.max_message_bytes + _OVERSIZE_BYTES),
        # Answers are as long as the request asked for, which is bounded already.
        ("grpc.max_send_message_length", -1),
        ("grpc.keepalive_time_ms", round(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        # Of a ping that the caller's system has taken and its process does not answer; a minute
        # otherwise, whatever keepalive_timeout_ms says.
        ("grpc.http2.ping_timeout_ms", round(config.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Keep pinging through a long queue or prompt, when nothing else is sent.
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.server_handshake_timeout_ms", round(config.handshake_timeout_s * 1000)),
        ("grpc.max_connection_idle_ms", _ms_or_never(config.max_connection_idle_s)),
        ("grpc.max_connection_age_ms", _ms_or_never(connection_age_s(config))),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            round(config.min_ping_interval_s * 1000),
        ),
    ]


def connection_age_s(config: ServerConfig) -> float:
    """When a connection's caller is asked to connect anew; infinite where that is never.

    A server that may hand its port over asks so often that it can be left within the grace period.
    gRPC spreads the moments by a tenth either way.
    """
    if config.max_connection_age_s is not None:
        return config.max_connection_age_s
    if not config.reuse_port:
        return math.inf
    return max(1.0, min(_LONGEST_HAND_OVER_S, config.grace_s / 2))


def _ms_or_never(seconds: float | None) -> int:
    return _NEVER_MS if seconds is None else round(min(seconds * 1000, _NEVER_MS))


def address(host: str, port: int) -> str:
    """`host:port`, with brackets where the host is an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bind(
    server: grpc.aio.Server, config: ServerConfig, credentials: grpc.ServerCredentials | None
) -> int:
    """Bind the server's port, with TLS if there are credentials, and return its number.

    Raises ListenError.
    """
    return bind_to(
        server, config.host, config.port, credentials, "--port", reuse_port=config.reuse_port
    )


def bind_to(
    server: grpc.aio.Server,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None,
    flag: str,
    *,
    reuse_port: bool = False,
) -> int:
    """Bind any port; `flag` is what chooses another. Raises ListenError."""
    target = address(host, port)
    check_address(host, port, flag, reuse_port=reuse_port)
    try:
        if credentials is None:
            bound = server.add_insecure_port(target)
        else:
            bound = server.add_secure_port(target, credentials)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {target}: {error}") from error
    if bound == 0:
        raise ListenError(f"cannot listen on {target}")
    return bound


def check_address(host: str, port: int, flag: str, *, reuse_port: bool = False) -> None:
    """Try the address with a plain socket first, which says why it fails; gRPC does not.

    Raises ListenError.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}: {error.strerror or error}") from error
    errors = []
    for family, kind, protocol, _, socket_address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind(socket_address)
        except OSError as error:
            errors.append(error)
    taken = [error for error in errors if error.errno == errno.EADDRINUSE]
    if taken:
        raise ListenError(f"port {port} on {host} is in use; choose another with {flag}")
    if len(errors) == len(found):
        reason = errors[0].strerror or errors[0]
        raise ListenError(f"cannot listen on {address(host, port)}: {reason}")


def write_port_file(path: Path, port: int) -> None:
    """Write the bound port, whole or not at all, for a script to read. Raises ListenError."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(f"{port}\n", encoding="ascii")
        unfinished.replace(path)
    except OSError as error:
        raise ListenError(f"{path}: {error.strerror or error}") from error


def remove_port_file(path: Path) -> None:
    """Take the port file away, so that nobody calls a server that has gone."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
