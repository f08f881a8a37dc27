"""What a multiprocessor of each capability holds, and so how much of a kernel fits on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one multiprocessor; shared memory in bytes.

    reserved_shared  that the system takes of it for each block
    """

    warps: int
    blocks: int
    shared_per_multiprocessor: int
    shared_per_block: int
    reserved_shared: int


# CUDA C++ Programming Guide, "Compute Capabilities", tables of technical specifications and of
# memory (resident warps and blocks, shared memory per multiprocessor and, opted in, per block).
LIMITS: Mapping[int, Limits] = {
    70: Limits(64, 32, 96 * KIB, 96 * KIB, 0),
    75: Limits(32, 16, 64 * KIB, 64 * KIB, 0),
    80: Limits(64, 32, 164 * KIB, 163 * KIB, KIB),
    86: Limits(48, 16, 100 * KIB, 99 * KIB, KIB),
    90: Limits(64, 32, 228 * KIB, 227 * KIB, KIB),
}

# The same guide: 64 K registers a multiprocessor, and 255 a thread, for all of them. The units that
# registers and shared memory are given out in are those of CUDA's occupancy calculator
# (cuda_occupancy.h): 256 registers of a warp, warps in fours (one to each scheduler), 128 bytes
# from sm_80 on and 256 before.
_REGISTERS = 65536
_REGISTER_UNIT = 256
_SCHEDULERS = 4


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Blocks and warps resident on a multiprocessor at once; `limit` is what forbids one more."""

    blocks: int
    warps: int
    share: float
    limit: str


def occupancy(capability: int, num_warps: int, registers: int, shared: int) -> Occupancy:
    """How many programs of `num_warps` fit, as CUDA's occupancy calculator counts.

    registers of a thread; shared memory of a program, in bytes.
    """
    limits = LIMITS[capability]
    per_warp = _round_up(registers * 32, _REGISTER_UNIT)
    warps_by_registers = _REGISTERS // per_warp // _SCHEDULERS * _SCHEDULERS if per_warp else 64
    unit = 128 if capability >= 80 else 256
    per_block = _round_up(shared + limits.reserved_shared, unit)
    by = {
        "warps": limits.warps // num_warps,
        "blocks": limits.blocks,
        "registers": warps_by_registers // num_warps,
    }
    if per_block:
        by["shared memory"] = limits.shared_per_multiprocessor // per_block
    limit = min(by, key=lambda name: by[name])
    blocks = by[limit]
    return Occupancy(blocks, blocks * num_warps, blocks * num_warps / limits.warps, limit)


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
