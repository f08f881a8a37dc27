"""The process's own sockets: who may still connect, and what is open."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from gptjet.service.rpc import sockets

_LOOPBACK = "127.0.0.1"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server((_LOOPBACK, 0)) as listening:
        yield listening


def test_a_refused_port_takes_no_connection_and_keeps_those_it_has(
    listener: socket.socket,
) -> None:
    port = listener.getsockname()[1]
    with socket.create_connection((_LOOPBACK, port), timeout=5) as caller:
        accepted, _ = listener.accept()
        with accepted:
            sockets.refuse_connections(port)
            with pytest.raises(TimeoutError):
                socket.create_connection((_LOOPBACK, port), timeout=0.2)
            caller.sendall(b"still here")
            assert accepted.recv(16) == b"still here"
            assert sockets.num_connections(port) == 1


def test_a_closed_listener_refuses_at_once(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert sockets.close_listeners(port) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((_LOOPBACK, port), timeout=5)


def test_a_closed_connection_ends_at_its_peer(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    with socket.create_connection((_LOOPBACK, port), timeout=5) as caller:
        accepted, _ = listener.accept()
        with accepted:
            sockets.close_connections(port)
            assert caller.recv(16) == b""


def test_other_ports_are_left_alone(listener: socket.socket) -> None:
    with socket.create_server((_LOOPBACK, 0)) as other:
        sockets.refuse_connections(other.getsockname()[1])
        socket.create_connection(listener.getsockname(), timeout=5).close()
