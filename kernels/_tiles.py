"""Tiles of matrix products: the configurations, and which of them a problem gets where nobody has tuned.

Everything here is a pure function of sizes, so that a choice can be tested, and compiled, without a card. The lists are
predicted from the instruction sets; ``untuned`` has those that config() takes, ``candidates`` also those that are there
for tuning, both without what the model in _cards.py finds no room or no registers for.

The lists are short, since each tile is a compilation of each kind of call: a tile stands in them if the model finds it the
best of some layer of a network by more than a few per cent; one that differs from another by its stages alone, only if that
changes how many blocks lie beside each other. All are compiled for all kinds of call (tests/test_triton_static.py), and
what spilled has more warps, or fewer elements.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ._cards import CARDS, LIMITS, MOST_REGISTERS, known, registers, resident
from ._common import INTERPRETED, ceil_div, next_power_of_2, product_options


@dataclass(frozen=True)
class Config:
    """A tile: BLOCK_M × BLOCK_N results, BLOCK_K of the reduction at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8  # tiles of pixels that share a weight panel before the next panel
    persistent: int = 0  # 1: tensor descriptors and as many programs as multiprocessors, see _conv2d_descriptor.py

    @property
    def name(self) -> str:
        """Of its compilations."""
        return f"{self.block_m}x{self.block_n}x{self.block_k}-{self.num_warps}x{self.num_stages}"

    def options(self, arch: int) -> dict[str, int]:
        """The compiler's, for sm_<arch>."""
        return product_options(arch, self.block_m, self.block_n, self.num_warps, self.num_stages)

    def shared_bytes(self, itemsize: int) -> int:
        """What the pipeline holds at most."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages


# What a block may use, and the number of blocks that fill the card: sm_80 (A100) and sm_90 (H100).
SHARED_BYTES = {arch: limits.shared_block for arch, limits in LIMITS.items()}
MULTIPROCESSORS = {80: CARDS["A100"].multiprocessors, 90: CARDS["H100"].multiprocessors}

# Largest first: config() takes the first that wastes no channels and fills the card.
HALF_CONFIGS: dict[int, tuple[Config, ...]] = {
    80: (
        Config(128, 128, 64, 8, 3),
        Config(128, 64, 32, 4, 4),
        Config(64, 64, 64, 4, 2),
        Config(64, 32, 64, 4, 3),
        Config(64, 16, 64, 4, 4),
    ),
    90: (
        Config(128, 256, 64, 8, 3),
        Config(128, 128, 64, 8, 4),
        Config(128, 64, 64, 4, 4),
        Config(64, 64, 64, 4, 4),
        Config(128, 32, 64, 4, 4),
        Config(64, 32, 64, 4, 4),
        Config(64, 16, 64, 4, 4),
    ),
}
TF32_CONFIGS: tuple[Config, ...] = (
    Config(128, 128, 32, 8, 3),
    Config(128, 64, 32, 4, 3),
    Config(64, 64, 32, 4, 4),
    Config(64, 32, 32, 4, 4),
    Config(64, 16, 32, 4, 4),
)
# fp32 of three tf32 terms holds both halves of each operand in registers; sm_90 reads one operand from shared memory.
SPLIT_CONFIGS: dict[int, tuple[Config, ...]] = {
    80: (Config(128, 128, 16, 8, 3), Config(64, 64, 16, 4, 3), Config(64, 32, 32, 4, 3), Config(64, 16, 32, 4, 4)),
    90: (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 3), Config(64, 32, 32, 4, 4), Config(64, 16, 32, 4, 4)),
}
# Full fp32 runs on the FMA pipes: small tiles, since operands come through registers.
IEEE_CONFIGS: tuple[Config, ...] = (
    Config(64, 64, 16, 8, 4),
    Config(64, 32, 16, 8, 3),
    Config(64, 16, 16, 4, 3),
)
# Where operands are loaded element by element (odd sizes or strides, flattened reductions), each element costs an
# address and a mask in registers: smaller tiles over more threads, or they spill.
CAREFUL_CONFIGS: tuple[Config, ...] = (
    Config(64, 64, 32, 8, 3),
    Config(64, 32, 32, 8, 2),
    Config(64, 16, 32, 4, 3),
)
CAREFUL_SPLIT_CONFIGS: tuple[Config, ...] = (
    Config(64, 64, 16, 8, 3),
    Config(64, 32, 16, 4, 3),
    Config(128, 16, 16, 4, 2),
)
CAREFUL_IEEE_CONFIGS: tuple[Config, ...] = (
    Config(64, 64, 16, 8, 3),
    Config(64, 32, 16, 8, 3),
    Config(64, 16, 16, 4, 3),
)
# Tiles that only tuning and the model take: each the best of some layers, by prediction.
TUNED_HALF_CONFIGS: dict[int, tuple[Config, ...]] = {
    80: (Config(128, 256, 64, 8, 3), Config(128, 128, 32, 4, 4)),
    90: (Config(128, 128, 64, 8, 3), Config(256, 64, 64, 8, 3)),
}
TUNED_TF32_CONFIGS: dict[int, tuple[Config, ...]] = {
    80: (),
    90: (Config(256, 64, 32, 8, 3), Config(128, 64, 32, 4, 4)),
}
# Of 16-bit products that tensor descriptors feed, on sm_90 and sm_100. Few: each is compiled for each box of places. Their depth
# isn't cut, since no mask has to fit it.
PERSISTENT_CONFIGS: tuple[Config, ...] = (
    Config(256, 128, 64, 8, 3, persistent=1),
    Config(128, 128, 64, 8, 4, persistent=1),
    Config(256, 64, 64, 8, 4, persistent=1),
    Config(64, 128, 64, 4, 5, persistent=1),  # maps of seven in small batches: 1.3 times the others' speed on an H200
)
# The interpreter pays by the program and by the operation: few, and tiles that small problems still cut.
INTERPRETER_CONFIGS: tuple[Config, ...] = (Config(64, 64, 64, 4, 1), Config(64, 16, 64, 4, 1))

# How tl.dot multiplies fp32, by precision mode: "fp32" by three tf32 products of each operand's two halves.
INPUT_PRECISION = {"ieee": "ieee", "fp32": "tf32x3", "high": "tf32"}


# By the bytes of an element, the widest tile whose accumulators leave registers for a residual.
RESIDUAL_BLOCK_N = {2: 128, 4: 64}


def untuned(
    precision: str, itemsize: int, vectors: bool, arch: int, residual: bool = False, normed: bool = False
) -> tuple[Config, ...]:
    """What config() selects from."""
    how = INPUT_PRECISION[precision]
    if itemsize == 4 and how == "ieee":
        found = IEEE_CONFIGS if vectors else CAREFUL_IEEE_CONFIGS
    elif itemsize == 4 and how == "tf32x3":
        found = SPLIT_CONFIGS[table_arch(arch)] if vectors else CAREFUL_SPLIT_CONFIGS
    elif not vectors:
        # the widest tile spills where accumulators lie in tensor memory
        found = CAREFUL_CONFIGS[1:] if known(arch) == 100 else CAREFUL_CONFIGS
    else:
        found = HALF_CONFIGS[table_arch(arch)] if itemsize == 2 else TF32_CONFIGS
    return _fitting(found, precision, itemsize, vectors, arch, residual, normed)


def candidates(
    precision: str, itemsize: int, vectors: bool, arch: int, residual: bool = False, normed: bool = False
) -> tuple[Config, ...]:
    """All that a launcher may be given: untuned() first, then what only tuning takes."""
    found: tuple[Config, ...] = ()
    if vectors and itemsize == 2:
        found = TUNED_HALF_CONFIGS[table_arch(arch)]
    elif vectors and INPUT_PRECISION[precision] == "tf32":
        found = TUNED_TF32_CONFIGS[table_arch(arch)]
    fitting = _fitting(found, precision, itemsize, vectors, arch, residual, normed)
    return (*untuned(precision, itemsize, vectors, arch, residual, normed), *fitting)


def _fitting(
    found: tuple[Config, ...], precision: str, itemsize: int, vectors: bool, arch: int, residual: bool, normed: bool
) -> tuple[Config, ...]:
    """Those that fit."""
    if known(arch) == 100 and vectors and (itemsize == 2 or INPUT_PRECISION[precision] != "ieee"):
        found = tuple(_beside_tensor_memory(c) for c in found if _takes_sums(c, itemsize, residual))
    return tuple(c for c in found if _fits(c, precision, itemsize, arch, residual, normed))


def _takes_sums(c: Config, itemsize: int, residual: bool) -> bool:
    """A thread takes a row of sums from tensor memory, and as many elements of the epilogue's operands: or it spills."""
    return c.block_n <= 128 and (itemsize == 2 or not residual or c.block_m <= 128)


def _beside_tensor_memory(c: Config) -> Config:
    """Half of the row a thread where it is long."""
    return replace(c, num_warps=8) if c.block_m * c.block_n >= 128 * 64 else c


def _fits(c: Config, precision: str, itemsize: int, arch: int, residual: bool, normed: bool) -> bool:
    if residual:
        spare = MOST_REGISTERS - registers(c, itemsize, arch)
        if c.block_n > RESIDUAL_BLOCK_N[itemsize] or spare < c.block_m * c.block_n // (64 * c.num_warps):
            return False
    return resident(c, itemsize, arch, "half" if itemsize == 2 else INPUT_PRECISION[precision], normed) > 0


def persistent(arch: int) -> tuple[Config, ...]:
    """The tiles of a product that tensor descriptors feed."""
    return PERSISTENT_CONFIGS if known(arch) in (90, 100) else ()


def table_arch(arch: int) -> int:
    """The architecture whose tiles a card gets: sm_90's where tensor cores read shared memory, else sm_80's."""
    return 90 if known(arch) in (90, 100) else 80


def config(
    m: int, n: int, depth: int, precision: str, itemsize: int, vectors: bool, arch: int = 80, residual: bool = False,
    normed: bool = False,
) -> Config:  # fmt: skip
    """The tile for m × n results; depth: the stretch of the reduction that a block may not cross, 0 if there is none.

    vectors: whether operands are loaded 16 bytes at a time; normed: whether one is normalised before it is multiplied.
    Pure, so that it can be tested without a card.
    """
    if INTERPRETED:
        return INTERPRETER_CONFIGS[0] if n > 16 else INTERPRETER_CONFIGS[1]
    fitting = untuned(precision, itemsize, vectors, arch, residual, normed)
    tile = _fit_tile(m, n, fitting, MULTIPROCESSORS[table_arch(arch)])
    return fit_depth(tile, depth, itemsize, normed)


def _fit_tile(m: int, n: int, configs: tuple[Config, ...], programs: int) -> Config:
    width = max(16, next_power_of_2(n))
    narrow_enough = [c for c in configs if c.block_n <= width]
    for candidate in narrow_enough:
        if ceil_div(m, candidate.block_m) * ceil_div(n, candidate.block_n) >= programs:
            return candidate
    # Nothing fills the card: the smallest tile that is no narrower than half the channels keeps most programs busy.
    return next((c for c in reversed(narrow_enough) if c.block_n >= min(32, width)), narrow_enough[-1])


def fit_depth(tile: Config, depth: int, itemsize: int, normed: bool = False) -> Config:
    """The deepest block that pads the channels at most 30 % more than the shallowest does."""
    least = shallowest(itemsize, normed)
    padded = ceil_div(depth, least) * least
    block_k = tile.block_k
    while block_k > least and ceil_div(depth, block_k) * block_k > 1.3 * padded:
        block_k //= 2
    return replace(tile, block_k=block_k)


def shallowest(itemsize: int, normed: bool) -> int:
    """BLOCK_K at least: 64 bytes of a row, two sectors of memory and two steps of the tensor cores.

    A block that is normalised first is worth its vectors and its way back to shared memory from 32 channels on.
    """
    return 32 if normed else 64 // itemsize


def cuts(tile: Config, itemsize: int, normed: bool = False) -> tuple[Config, ...]:
    """All that fit_depth() makes of a tile."""
    depths = (tile.block_k >> i for i in range(tile.block_k.bit_length()))
    least = min(tile.block_k, shallowest(itemsize, normed))
    return tuple(replace(tile, block_k=depth) for depth in depths if depth >= least)
