"""The emulator finds the bugs that it is there to find: each is planted in a small kernel, and found in a test of its own."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from support.emulated import MODES, Library, Mode, from_bf16, library, to_bf16


@pytest.fixture(scope="session")
def plain() -> Library:
    return library(check=False)


@pytest.fixture(scope="session")
def checked() -> Library:
    return library(check=True)


class Kernel:
    """A planted kernel's operands and its right result; the output lies between guard bands of NaN."""

    def __init__(self, name: str) -> None:
        rng = np.random.default_rng(0)
        self.name = name
        self.sizes: tuple[int, ...]
        self.b = np.zeros(1, np.float32)
        if name == "direct":
            h, w, c, k = self.sizes = 13, 11, 6, 3
            self.a = rng.standard_normal((h, w, c)).astype(np.float32)
            self.b = rng.standard_normal((k, 3, 3, c)).astype(np.float32)
            padded = np.pad(self.a.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
            self.expected = sum(padded[r : r + h, s : s + w] @ self.b[:, r, s].T for r in range(3) for s in range(3))
        elif name == "gemm":
            m, n, depth = self.sizes = 100, 72, 224
            self.a, self.b = to_bf16(rng.standard_normal((m, depth))), to_bf16(rng.standard_normal((n, depth)))
            self.expected = from_bf16(self.a).astype(np.float64) @ from_bf16(self.b).astype(np.float64).T
        elif name == "reduce":
            self.sizes = 5, 100
            self.a = rng.standard_normal(self.sizes).astype(np.float32)
            self.expected = 2 * self.a.astype(np.float64).sum(1)
        elif name == "histogram":
            self.sizes = (250,)
            self.a = rng.integers(0, 16, self.sizes).astype(np.int32)
            parts = [self.a[i : i + 100] for i in range(0, 250, 100)]
            self.expected = np.array([np.bincount(part, minlength=16) for part in parts], np.float64)
        elif name == "blur":
            self.sizes = (388,)
            self.a = rng.standard_normal(self.sizes).astype(np.float32)
            self.expected = np.convolve(self.a.astype(np.float64), np.ones(3), "same")
        elif name == "rows":
            self.sizes = first, width, count = 2000003, 1100, 3
            assert first * width >= 2**31
            self.a = rng.standard_normal((count, width)).astype(np.float32)
            self.expected = self.a.astype(np.float64)
        elif name == "transpose":
            self.sizes = 45, 71
            self.a = rng.standard_normal(self.sizes).astype(np.float32)
            self.expected = self.a.T.astype(np.float64)
        else:
            assert name == "compact"
            self.sizes = (100,)
            self.a = rng.standard_normal(self.sizes).astype(np.float32)
            rows = [self.a[i : i + 32] for i in range(0, 100, 32)]
            self.expected = np.array([np.pad(r[r > 0], (0, 32 - int((r > 0).sum()))) for r in rows], np.float64)

    def run(self, library: Library, bug: str, mode: Mode) -> str | None:
        """None if the result is right, else what is wrong."""
        guard = 256
        buffer = np.full(self.expected.size + 2 * guard + 16, np.nan, np.float32)
        buffer = buffer[-(buffer.ctypes.data // 4) % 4 :][: self.expected.size + 2 * guard]  # 16 bytes aligned
        out = buffer[guard:-guard]
        if bug == "aliased_output":
            out[:] = self.a
        library.configure(mode)
        library.register((self.a, False), (self.b, False), (out, True))
        error = library.planted(self.name, bug, self.a, self.b, out, *self.sizes)
        if error is not None:
            return error
        if not np.isnan(buffer[:guard]).all() or not np.isnan(buffer[-guard:]).all():
            return "wrote outside of its output"
        difference = np.abs(out.reshape(self.expected.shape) - self.expected)
        off = float(difference.max())
        return None if off <= 1e-5 * np.abs(self.expected).max() else f"wrong result, off by {off}"


KERNELS = ("direct", "gemm", "reduce", "histogram", "blur", "rows", "transpose", "compact")

# What the check variant says of a bug. None: it says nothing, only the result shows the bug.
PLANTED = {
    "no_barrier_before_use": "race|uninitialised shared",
    "no_barrier_before_restaging": "race",
    "surplus_barrier": "__syncthreads divergence",
    "halo_off_by_one": "out of bounds",
    "column_mask_of_rows": "out of bounds",
    "tap_too_far": "an index outside of its array",
    "no_tail_mask": "out of bounds",
    "halo_not_staged": "uninitialised shared",
    "channel_tail_read": "out of bounds",
    "two_owners": "race in global memory",
    "wait_too_little": "not waited for|race",
    "never_waited": "not waited for|race",
    "never_committed": "not waited for|race",
    "commit_forgotten_at_end": "not waited for|race",
    "copies_left": "ends with asynchronous copies",
    "misaligned_copy": "not aligned to 16 bytes",
    "no_barrier_after_wait": "race|uninitialised shared",
    "refill_before_barrier": "race",
    "two_stages": "not waited for|race",
    "stale_stage": "not waited for|race",
    "wrong_row": None,
    "transposed": None,
    "registers_swapped": None,
    "fragments_swapped": None,
    "depth_swapped": None,
    "swizzle_forgotten": None,
    "partial_mma": "deadlock|in one warp|has exited",
    "result_row": None,
    "row_tail_read": "out of bounds",
    "column_tail_written": "race in global memory|out of bounds",
    "no_barrier_before_reduction": "race|uninitialised shared",
    "half_warp_reduced": None,
    "no_syncwarp": "race|uninitialised shared",
    "shuffle_width": None,
    "shuffle_mask": "not in the mask|not in its own mask",
    "partial_shuffle": "deadlock",
    "early_return": "deadlock|has exited",
    "one_partial": "race",
    "one_partial_more": "uninitialised shared",
    "buffer_reused": "race",
    "accumulates_in_shared": "race",
    "accumulates_in_global": "race in global memory|uninitialised global",
    "bins_not_cleared": "uninitialised shared",
    "aliased_output": "race in global memory|uninitialised global",
    "misaligned_vector": "not aligned as its type is",
    "vector_tail": "out of bounds",
    "grid_too_small": None,
    "grid_stride": "race in global memory",
    "reads_its_result": "race in global memory|uninitialised global",
    "offset_overflow": "overflows",
    "shift_too_far": "overflows|a shift too far",
    "dynamic_too_small": "out of bounds",
    "too_much_shared": "bytes of shared memory",
    "wrong_pitch": "race",
    "divergent_barrier": "__syncthreads divergence",
    "no_barrier_between_tiles": "race",
    "vote_under_condition": "has exited|deadlock",
    "vote_of_tail": None,
    "vote_includes_self": "race in global memory|out of bounds",
}
# Not run in the plain variant: the processor stops the process, as a GPU would stop the kernel.
FAULTS = ("misaligned_vector",)
# Found where an access is made: the report ends with a line of source. Else it names the line of the instruction.
ACCESSES = ("race", "out of bounds", "uninitialised", "not waited for", "not aligned as", "overflows", "an index")


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_right_kernels_are_right_in_every_mode(plain: Library, kernel: str, mode: Mode) -> None:
    for seed in range(4 if mode.order == "random" else 1):
        assert Kernel(kernel).run(plain, "none", dataclasses.replace(mode, seed=seed)) is None


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_check_is_silent_about_right_kernels(checked: Library, kernel: str, mode: Mode) -> None:
    assert Kernel(kernel).run(checked, "none", mode) is None


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found(plain: Library, checked: Library, bug: str) -> None:
    kernel, complaint = plain.bugs[bug], PLANTED[bug]
    modes = () if bug in FAULTS else MODES
    verdicts = {str(mode): Kernel(kernel).run(plain, bug, mode) for mode in modes}
    check = Kernel(kernel).run(checked, bug, MODES[0])
    print({**verdicts, "check": check})
    assert check is not None or any(verdicts.values())
    if complaint is None:
        assert any(verdicts.values())
        return
    assert check is not None
    assert any(part in check for part in complaint.split("|"))
    assert f"test::{kernel}, block (" in check
    assert "thread (" in check
    if "ends with" not in check and "bytes of shared memory" not in check:
        assert "line " in check or ".cu:" in check
    if any(part in check for part in ACCESSES) and "line " not in check:
        assert "planted" in check
        assert ".cu:" in check


def test_every_planted_bug_is_tested(plain: Library) -> None:
    assert ["none", *PLANTED] == list(plain.bugs)
    assert set(plain.bugs.values()) == {"-", *KERNELS}


def test_only_the_order_shows_some_bugs(plain: Library) -> None:
    """No single mode finds all: that is why tests run several."""
    bugs = [bug for bug in PLANTED if bug not in FAULTS]
    found = {mode: {bug for bug in bugs if Kernel(plain.bugs[bug]).run(plain, bug, mode)} for mode in MODES}
    assert all(bugs != set().union(*found.values()) for bugs in found.values())
