"""The listening side: port, TLS, channel options, and one clear line where they cannot be had."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import socket
import ssl
from pathlib import Path

import grpc

from gptjet.service.config import ServerConfig

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


def bind(server: grpc.aio.Server, config: ServerConfig) -> int:
    """Bind the server's port, with TLS if it is set up, and return its number.

    Raises ListenError.
    """
    target = address(config.host, config.port)
    check_address(config)
    credentials = _credentials(config)
    try:
        if credentials is None:
            port = server.add_insecure_port(target)
        else:
            port = server.add_secure_port(target, credentials)
    except RuntimeError as error:
        raise ListenError(f"cannot listen on {target}: {error}") from error
    if port == 0:
        raise ListenError(f"cannot listen on {target}")
    return port


def check_address(config: ServerConfig) -> None:
    """Try the address with a plain socket first, which says why it fails; gRPC does not.

    Raises ListenError.
    """
    host, port = config.host, config.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ListenError(f"cannot listen on {host}: {error.strerror or error}") from error
    errors = []
    for family, kind, protocol, _, socket_address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if config.reuse_port:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                probe.bind(socket_address)
        except OSError as error:
            errors.append(error)
    taken = [error for error in errors if error.errno == errno.EADDRINUSE]
    if taken:
        raise ListenError(f"port {port} on {host} is in use; choose another with --port")
    if len(errors) == len(found):
        reason = errors[0].strerror or errors[0]
        raise ListenError(f"cannot listen on {address(host, port)}: {reason}")


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    certificate, key = _read(config.tls_cert), _read(config.tls_key)
    client_ca = None if config.tls_client_ca is None else _read(config.tls_client_ca)
    _check_certificate(config)
    return grpc.ssl_server_credentials(
        [(key, certificate)],
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )


def _check_certificate(config: ServerConfig) -> None:
    """Have Python's ssl read the files, which says what is wrong; gRPC fails each handshake."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    assert config.tls_cert is not None
    try:
        # A password callback, so that an encrypted key is an error and not a prompt.
        context.load_cert_chain(config.tls_cert, config.tls_key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        raise ListenError(
            f"{config.tls_cert} and {config.tls_key} are not a certificate and its key: {error}"
        ) from error
    if config.tls_client_ca is not None:
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            raise ListenError(f"{config.tls_client_ca} holds no PEM roots: {error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ListenError(f"{path}: {error.strerror or error}") from error


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
