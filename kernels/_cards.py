"""NVIDIA cards as the choice of a tile sees them: what a block may use, how many fit beside each other, what they take.

    resident(tile)   = min over shared memory, registers, warps, blocks of (what a multiprocessor has / what a block takes)
    seconds(product) = waves of resident blocks, each step of one bound by tensor cores, shared memory, L2 or latency

All of it is arithmetic on sizes: a list of tiles is pruned and ordered without a card, and before anything compiles.
Predicted, not measured, but for what is said otherwise. The formulas of shared memory and registers are held against what
the compiler makes of every tile (tests/test_triton_static.py).

Sources: CUDA C++ Programming Guide, "Compute Capabilities" (limits); the architectures' white papers and the cards' data
sheets (rates without sparsity, sums in fp32).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

KIB = 1024
REGISTERS = 65536  # of a multiprocessor, on all of them
MOST_REGISTERS = 255  # of a thread
CONVERSION = 8 * KIB  # in which sums change their layout, where the pipeline is smaller
TENSOR_MEMORY_COLUMNS = 512  # of sm_100, 128 lanes of fp32


class Tile(Protocol):
    """What _tiles.Config has."""

    @property
    def block_m(self) -> int: ...
    @property
    def block_n(self) -> int: ...
    @property
    def block_k(self) -> int: ...
    @property
    def num_warps(self) -> int: ...
    @property
    def num_stages(self) -> int: ...
    @property
    def persistent(self) -> int: ...


@dataclass(frozen=True)
class Limits:
    """Of an architecture: bytes of shared memory of a block and a multiprocessor, warps and blocks of the latter."""

    shared_block: int
    shared_all: int
    warps: int
    blocks: int
    # a multiprocessor's 2 x multiply-adds a clock: 16-bit floats and tf32 on tensor cores, fp32 on its own pipes
    half: int
    tf32: int
    fp32: int
    clock: float  # a second, boosted
    bandwidth: float  # bytes a second, of a typical card


LIMITS: Mapping[int, Limits] = {
    80: Limits(163 * KIB, 164 * KIB, 64, 32, 2048, 1024, 128, 1.41e9, 1.56e12),
    86: Limits(99 * KIB, 100 * KIB, 48, 16, 512, 256, 256, 1.70e9, 0.77e12),
    87: Limits(163 * KIB, 164 * KIB, 48, 16, 1024, 512, 256, 1.30e9, 0.20e12),
    89: Limits(99 * KIB, 100 * KIB, 48, 24, 512, 256, 256, 2.50e9, 0.90e12),
    90: Limits(227 * KIB, 228 * KIB, 64, 32, 4096, 2048, 256, 1.76e9, 3.35e12),
    100: Limits(227 * KIB, 228 * KIB, 64, 32, 8192, 4096, 256, 1.85e9, 8.00e12),
    120: Limits(99 * KIB, 100 * KIB, 48, 24, 512, 256, 256, 2.40e9, 1.70e12),
}


def known(arch: int) -> int:
    """The architecture whose limits a card gets: the newest that is no newer, so sm_103 is a sm_100, sm_121 a sm_120."""
    return max((a for a in LIMITS if a <= arch), default=min(LIMITS))


@dataclass(frozen=True)
class Card:
    """A card: its compute capability (80 for sm_80) and its multiprocessors; rates where they aren't its architecture's."""

    arch: int
    multiprocessors: int
    clock: float = 0.0
    bandwidth: float = 0.0
    half: int = 0

    @property
    def limits(self) -> Limits:
        """Its architecture's."""
        return LIMITS[known(self.arch)]

    @property
    def hertz(self) -> float:
        """Clocks a second."""
        return self.clock or self.limits.clock

    @property
    def bytes_a_second(self) -> float:
        """The memory's."""
        return self.bandwidth or self.limits.bandwidth

    def rate(self, how: str) -> float:
        """2 x multiply-adds a clock of a multiprocessor; how: "half", or how tl.dot multiplies fp32."""
        half = self.half or self.limits.half
        return {"half": half, "tf32": half / 2, "tf32x3": half / 6, "ieee": self.limits.fp32}[how]


# By a part of the name that the driver gives. Data sheets: A100 SXM 80 GB, H100 SXM, L4, GeForce RTX 4090.
CARDS: Mapping[str, Card] = {
    "A100": Card(80, 108, 1.41e9, 2.04e12),
    "H100": Card(90, 132, 1.76e9, 3.35e12),
    "L4": Card(89, 58, 2.04e9, 0.30e12, half=1024),
    "RTX 4090": Card(89, 128, 2.52e9, 1.01e12),
}
TYPICAL_MULTIPROCESSORS = {80: 108, 86: 82, 87: 16, 89: 128, 90: 132, 100: 148, 120: 170}


@functools.cache
def card(name: str, arch: int, multiprocessors: int = 0) -> Card:
    """The card of a name, if it is one of CARDS and no part of one (MIG), else one of its architecture's rates."""
    words = name.replace("-", " ").split()
    for key, found in CARDS.items():
        matches = all(word in words for word in key.split()) and found.arch == arch
        if matches and multiprocessors in (0, found.multiprocessors):
            return found
    return Card(arch, multiprocessors or TYPICAL_MULTIPROCESSORS[known(arch)])


# ---------------------------------------------------------------------------------------------------------------------
# What a block takes


def asynchronous_products(arch: int) -> bool:
    """Whether tensor cores read shared memory themselves (wgmma, tcgen05): operands then need no registers."""
    return 90 <= arch < 120


def shared_bytes(
    tile: Tile, itemsize: int, arch: int, how: str = "half", normed: bool = False, stored: int | None = None
) -> int:
    """Of the pipeline, or of the result on its way to memory, which takes its place; ``normed``: of one that normalises its
    first operand, which goes back to shared memory for the products, eight elements between its rows, with its vectors beside it.
    ``stored``: bytes of a result's element where they aren't an operand's: Winograd's products leave in fp32.

    A stage less than num_stages where products read registers: the operands of the step at hand have left shared memory,
    but for those that are split into terms.
    """
    stage = (tile.block_m + tile.block_n) * tile.block_k * itemsize
    if tile.persistent:  # whose result has a place of its own
        return stage * tile.num_stages + tile.block_m * tile.block_n * itemsize + KIB
    kept = asynchronous_products(arch) or how == "tf32x3"
    stages = tile.num_stages if kept else max(1, tile.num_stages - 1)
    if normed:
        return shared_bytes(tile, itemsize, arch, how) + tile.block_m * (tile.block_k + 8) * itemsize + 2 * KIB
    held = stage * stages
    if how == "tf32x3" and asynchronous_products(arch):
        held += tile.block_n * tile.block_k * itemsize  # the split operand
    results = tile.block_m * tile.block_n
    held = max(held, results * (stored or itemsize), min(results * 4, CONVERSION))
    return held + (KIB if asynchronous_products(arch) else 0)


def _vectors(rows: int, tile: Tile, itemsize: int) -> float:
    """Loads of 16 bytes that a thread has in flight for one step of an operand: each has an address and a mask."""
    return rows * tile.block_k * itemsize / 16 / (32 * tile.num_warps)


def registers(tile: Tile, itemsize: int, arch: int) -> int:
    """Of a thread, as it needs them at least: sums, addresses of the gathered operand and of the weights, and the rest.

    Fitted to ptxas: where it says more than 255, one kernel or another spilled.
    """
    sums = tile.block_m * tile.block_n // (32 * tile.num_warps)
    addresses = 6 * _vectors(tile.block_m, tile, itemsize) + 3 * _vectors(tile.block_n, tile, itemsize)
    return int(sums + addresses) + 64 + (24 if itemsize == 4 else 0)


def resident(tile: Tile, itemsize: int, arch: int, how: str = "half", normed: bool = False) -> int:
    """Blocks beside each other on a multiprocessor; 0 where not one fits. ``normed``: as shared_bytes() has it."""
    limits = LIMITS[known(arch)]
    shared = shared_bytes(tile, itemsize, arch, how, normed)
    needed = registers(tile, itemsize, arch)
    if shared > limits.shared_block or needed > MOST_REGISTERS:
        return 0
    held = needed - (40 if asynchronous_products(arch) else 0)  # fragments of operands, which wgmma hasn't
    allocated = -(-held // 8) * 8 * 32 * tile.num_warps
    return min(
        limits.shared_all // (shared + KIB), REGISTERS // allocated, limits.warps // tile.num_warps, limits.blocks
    )


# ---------------------------------------------------------------------------------------------------------------------
# What a product takes

LATENCY = 900.0  # clocks from a load's issue to its data, under load
L2_BYTES = 64.0  # a clock and multiprocessor
SHARED_READ = 128.0  # bytes a clock and multiprocessor
EFFICIENCY = 0.85  # of the tensor cores' rate, that the best kernels reach
START = 1500.0  # clocks of a block before its loop and after it


@dataclass(frozen=True)
class Product:
    """A batch of matrix products of one size, as an implicit GEMM makes them of a convolution."""

    m: int
    n: int
    depth: int  # of the reduction without its taps: no block crosses it
    taps: int = 1
    batches: int = 1  # groups, phases, chunks of a split reduction
    itemsize: int = 2
    how: str = "half"  # "half", or how tl.dot multiplies fp32
    bytes: int = 0  # of the operands and the result, once each
    normed: bool = False  # whether the first operand is normalised between loading and multiplying


def _fragment_bytes(tile: Tile, itemsize: int, arch: int) -> float:
    """What tensor cores read from shared memory in a step: each warp (or four of them) all that its part needs."""
    parts = tile.num_warps // 4 if asynchronous_products(arch) else tile.num_warps
    rows, cols = tile.block_m, tile.block_n
    least = 64 if asynchronous_products(arch) else 16
    for _ in range(max(0, parts.bit_length() - 1)):
        if (rows >= cols and rows > least) or cols <= 16:
            rows //= 2
        else:
            cols //= 2
    return parts * (rows + cols) * tile.block_k * itemsize


def seconds(product: Product, tile: Tile, card: Card) -> float:
    """Predicted time of a product in this tile; infinite where the tile doesn't fit the card."""
    beside = resident(tile, product.itemsize, card.arch, product.how, product.normed)
    if beside == 0:
        return float("inf")
    steps = product.taps * -(-product.depth // tile.block_k)
    programs = product.batches * -(-product.m // tile.block_m) * -(-product.n // tile.block_n)
    multiply = 2.0 * tile.block_m * tile.block_n * tile.block_k / (EFFICIENCY * card.rate(product.how))
    fetch = (tile.block_m + tile.block_n) * tile.block_k * product.itemsize / L2_BYTES
    read = _fragment_bytes(tile, product.itemsize, card.arch) / SHARED_READ
    wait = LATENCY / max(1, tile.num_stages - 1)

    def block(together: int) -> float:
        """Clocks of so many blocks side by side."""
        step = max(together * max(multiply, fetch, read), wait)
        write = together * tile.block_m * tile.block_n * product.itemsize / L2_BYTES
        return (0.0 if tile.persistent else START + LATENCY) + steps * step + write

    waves, rest = divmod(programs, card.multiprocessors * beside)
    clocks = START + LATENCY if tile.persistent else 0.0
    clocks += waves * block(beside) + (block(-(-rest // card.multiprocessors)) if rest else 0.0)
    return max(clocks / card.hertz, product.bytes / card.bytes_a_second)
