"""How many blocks of a kernel a multiprocessor holds at once: a pure function of what the kernel needs and the card has."""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
REGISTERS = 65536  # of a multiprocessor, in four parts of as many warps
REGISTER_UNIT, WARP_UNIT, SHARED_UNIT = 256, 4, 128
SHARED_RESERVED = 1024  # bytes of each block that the system takes


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has (CUDA C++ Programming Guide, technical specifications by compute capability)."""

    threads: int
    blocks: int
    shared: int  # bytes
    shared_of_a_block: int  # bytes, at most


LIMITS = {
    80: Limits(2048, 32, 164 * 1024, 163 * 1024),
    86: Limits(1536, 16, 100 * 1024, 99 * 1024),
    89: Limits(1536, 24, 100 * 1024, 99 * 1024),
    90: Limits(2048, 32, 228 * 1024, 227 * 1024),
    100: Limits(2048, 32, 228 * 1024, 227 * 1024),
    120: Limits(1536, 24, 100 * 1024, 99 * 1024),
}


def blocks_at_once(capability: int, threads: int, registers: int, shared: int) -> int:
    """Blocks of so many threads, registers a thread and bytes of shared memory; 0 where not even one fits."""
    limits = LIMITS[capability]
    warps = -(-threads // WARP)
    if shared > limits.shared_of_a_block or threads > 1024:
        return 0
    of_a_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    warps_by_registers = REGISTERS // of_a_warp // WARP_UNIT * WARP_UNIT
    of_a_block = -(-(shared + SHARED_RESERVED) // SHARED_UNIT) * SHARED_UNIT
    return min(
        limits.blocks, limits.threads // (warps * WARP), warps_by_registers // warps, limits.shared // of_a_block
    )
