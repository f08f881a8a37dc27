"""The process's own sockets on one port, which gRPC keeps to itself.

gRPC's only way to stop listening is to stop, and a stopped server cancels the calls that have
arrived and are not begun, so a hand-over of the port must close the listening socket behind its
back. Linux only: elsewhere nothing is found.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

_DESCRIPTORS = Path("/proc/self/fd")


def close_listeners(port: int) -> int:
    """Stop listening on a port; connections stay. Returns how many sockets listened.

    The kernel gives new connections to the other processes on the port from then on. gRPC logs one
    line, that it cannot accept any more.
    """
    num_closed = 0
    for own in _sockets_on(port):
        if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            own.shutdown(socket.SHUT_RDWR)
            num_closed += 1
    return num_closed


def num_connections(port: int) -> int:
    """Connections that callers of a port have open."""
    return sum(_is_connected(own) for own in _sockets_on(port))


def _is_connected(own: socket.socket) -> bool:
    try:
        own.getpeername()
    except OSError:
        return False
    return True


def _sockets_on(port: int) -> Iterator[socket.socket]:
    """Each socket bound to the port, as a duplicate that is closed after its turn."""
    try:
        descriptors = [int(entry.name) for entry in _DESCRIPTORS.iterdir() if _is_socket(entry)]
    except OSError:
        return
    for descriptor in descriptors:
        try:
            duplicate = os.dup(descriptor)
        except OSError:  # closed meanwhile
            continue
        try:
            own = socket.socket(fileno=duplicate)
        except OSError:  # its number is another file's by now
            os.close(duplicate)
            continue
        with own:
            is_tcp = own.family in (socket.AF_INET, socket.AF_INET6)
            if is_tcp and own.getsockname()[1] == port:
                yield own


def _is_socket(entry: Path) -> bool:
    try:
        return str(entry.readlink()).startswith("socket:")
    except OSError:
        return False
