"""The read bandwidth of memory, as the threads of the CPU kernels get it."""

from __future__ import annotations

import ctypes

from gptjet.kernels.cpu import library as native


def measure_read(
    num_threads: int, num_bytes: int, *, repeats: int = 5, rounds: int = 1
) -> list[float]:
    """Bytes a second of each repeat, which reads `num_bytes` `rounds` times over; after a warm-up.

    Memory in large pages where the system has them, read in vectors and ahead, and shared out as
    the kernels share their weights. Raises NativeUnavailableError, MemoryError, and ValueError for
    less than one thread, byte, repeat or round.
    """
    if min(num_threads, num_bytes, repeats, rounds) < 1:
        raise ValueError("num_threads, num_bytes, repeats and rounds must be at least 1")
    seconds = (ctypes.c_double * repeats)()
    library = native.native_library()
    if library.measure_read(num_threads, num_bytes, rounds, repeats, seconds):
        raise MemoryError(f"no memory of {num_bytes} bytes, or no threads")
    return [num_bytes / each for each in seconds]
