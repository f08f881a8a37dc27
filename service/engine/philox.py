"""Philox4x32-10, a counter-based random generator: the same key and counter, the same number.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). It has no
state to advance, so a sequence's randomness does not depend on what else is running, and a
sequence can be resumed at any position.

Layout, which a sampler on the GPU shares (`tl.philox(seed, c0, c1, c2, c3)` with 32-bit counters):

    key      (seed low word, seed high word)
    counter  (position low word, position high word, sequence index, stream)

position is the number of tokens the sequence has generated so far, sequence index tells the n
continuations of one request apart, and stream 0 is the token draw; other uses take other streams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from numpy.typing import NDArray

TOKEN_STREAM = 0

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9  # golden ratio
_WEYL_1 = 0xBB67AE85  # sqrt(3) - 1

# Below this many rows ten rounds of Python integers are faster than ten rounds of numpy calls.
_SCALAR_ROWS = 24

Words = tuple[int, int, int, int]
WordArrays = tuple[
    "NDArray[np.uint64]", "NDArray[np.uint64]", "NDArray[np.uint64]", "NDArray[np.uint64]"
]


def philox4x32(key: int, counter: Words) -> Words:
    """One block of four 32-bit words for a 64-bit `key` and four 32-bit `counter` words."""
    k0, k1 = key & _MASK, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0 = (product_1 >> 32) ^ c1 ^ k0
        c1 = product_1 & _MASK
        c2 = (product_0 >> 32) ^ c3 ^ k1
        c3 = product_0 & _MASK
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def philox4x32_array(keys: NDArray[np.uint64], counters: WordArrays) -> WordArrays:
    """`philox4x32` over arrays: keys [N] of 64 bits, four counter words [N] below 2**32."""
    mask, shift = np.uint64(_MASK), np.uint64(32)
    multiplier_0, multiplier_1 = np.uint64(_MULTIPLIER_0), np.uint64(_MULTIPLIER_1)
    k0, k1 = keys & mask, keys >> shift
    c0, c1, c2, c3 = counters
    for _ in range(_ROUNDS):
        product_0 = multiplier_0 * c0  # 32 x 32 bits: fits in 64
        product_1 = multiplier_1 * c2
        c0 = (product_1 >> shift) ^ c1 ^ k0
        c1 = product_1 & mask
        c2 = (product_0 >> shift) ^ c3 ^ k1
        c3 = product_0 & mask
        k0 = (k0 + np.uint64(_WEYL_0)) & mask
        k1 = (k1 + np.uint64(_WEYL_1)) & mask
    return c0, c1, c2, c3


def uniforms(
    seeds: Seq[int], indices: Seq[int], positions: Seq[int], *, stream: int = TOKEN_STREAM
) -> list[float]:
    """One number in [0, 1) for each (seed, sequence index, position), a multiple of 2**-53.

    Its bits are the top 27 of word 0 and the top 26 of word 1. Row i depends on entry i alone.
    """
    if len(seeds) < _SCALAR_ROWS:
        return [
            _scalar_uniform(seed, index, position, stream)
            for seed, index, position in zip(seeds, indices, positions, strict=True)
        ]
    where = np.asarray(positions, dtype=np.uint64)
    counters = (
        where & np.uint64(_MASK),
        where >> np.uint64(32),
        np.asarray(indices, dtype=np.uint64),
        np.full(len(seeds), stream, dtype=np.uint64),
    )
    high, low, _, _ = philox4x32_array(np.asarray(seeds, dtype=np.uint64), counters)
    mantissa = (high >> np.uint64(5)) << np.uint64(26) | (low >> np.uint64(6))
    values: list[float] = (mantissa.astype(np.float64) * 2.0**-53).tolist()
    return values


def _scalar_uniform(seed: int, index: int, position: int, stream: int) -> float:
    high, low, _, _ = philox4x32(seed, (position & _MASK, position >> 32, index, stream))
    return ((high >> 5) << 26 | low >> 6) * 2.0**-53
