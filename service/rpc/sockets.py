"""The process's own sockets on one port, which gRPC keeps to itself.

gRPC's only way to stop listening is to stop, and then it ends the calls that have arrived and are
not begun with CANCELLED, which nobody retries. So its sockets are closed behind its back. Linux
only: elsewhere nothing is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

_DESCRIPTORS = Path("/proc/self/fd")

# Not in Python's socket module. Linux, asm-generic/socket.h.
_SO_ATTACH_FILTER = 26
# One instruction of a classic socket filter: return 0, "keep no byte of this packet".
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)


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


def refuse_connections(port: int) -> None:
    """Let nobody connect to a port any more; connections stay, and gRPC notices nothing.

    The kernel drops what would connect, which tries again within a second and is refused when
    this process has stopped listening. For a port that no other process takes over: its share of
    the new connections is dropped too.
    """
    instruction = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
    program = struct.pack("HP", 1, ctypes.addressof(instruction))
    for own in _sockets_on(port):
        if own.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            with contextlib.suppress(OSError):  # a sandbox without socket filters
                own.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def num_connections(port: int) -> int:
    """Connections that callers of a port have open."""
    return sum(_is_connected(own) for own in _sockets_on(port))


def num_unsent_bytes(port: int) -> int:
    """Bytes that the callers' machines have not taken yet.

    What gRPC itself still holds is not counted, but it holds nothing while the kernel has room.
    """
    num_bytes = 0
    for own in _sockets_on(port):
        if _is_connected(own):
            answer = fcntl.ioctl(own, termios.TIOCOUTQ, b"\0" * 4)
            num_bytes += int.from_bytes(answer, sys.byteorder)
    return num_bytes


def close_connections(port: int) -> None:
    """Close every connection; a call that comes just now ends with UNAVAILABLE at its caller."""
    for own in _sockets_on(port):
        if _is_connected(own):
            with contextlib.suppress(OSError):  # its peer was first
                own.shutdown(socket.SHUT_RDWR)


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
