"""The emulator of the SIMT model finds the bugs that it is there to find, and is itself right.

The kernels with planted bugs are compiled here, not by `make emulation`: no test can mistake them for real ones.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
EMULATION = REPOSITORY / "csrc" / "emulation"
SOURCES = REPOSITORY / "tests" / "emulation"
MODULES = Path(os.environ.get("CNNFAST_EMULATION_DIR", REPOSITORY / "build" / "emulation"))
ORDERS = ("ascending", "descending", "random")


@dataclasses.dataclass(frozen=True)
class Mode:
    order: str
    lazy_async: bool
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.order}-{'lazy' if self.lazy_async else 'eager'}"


MODES = tuple(Mode(order, lazy) for order in ORDERS for lazy in (False, True))


# ---------------------------------------------------------------------------------------------------------- building


def cuda_include() -> list[str] | None:
    """Folders with cuda_fp16.h and what it includes."""
    compiler = shutil.which("nvcc")
    candidates = [os.environ.get("CNNFAST_CUDA_INCLUDE"), "/usr/local/cuda/include"]
    candidates += [os.path.join(os.environ[v], "include") for v in ("CUDA_HOME", "CUDA_PATH") if v in os.environ]
    if compiler:
        candidates.append(os.path.join(os.path.dirname(os.path.realpath(compiler)), "..", "include"))
    candidates += [str(p) for p in Path(sysconfig.get_path("purelib")).glob("nvidia/cu[0-9]*/include")]
    for folder in filter(None, candidates):
        nv = [f for f in (folder, os.path.join(folder, "cccl")) if os.path.exists(os.path.join(f, "nv", "target"))]
        if nv and all(os.path.exists(os.path.join(folder, f)) for f in ("cuda_bf16.h", "crt/host_defines.h")):
            return [folder, *nv]
    return None


def build(check: bool) -> Path:
    """The library of planted and probing kernels, cached by the hash of everything that goes into it."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    include = cuda_include()
    if not compiler or not include:
        pytest.skip("needs g++ and the CUDA headers (cuda_fp16.h)")
    runtime = sorted(p for p in EMULATION.glob("*.cpp") if p.name != "bindings.cpp")
    kernels = sorted(SOURCES.glob("*.cu"))
    headers = sorted([*EMULATION.glob("*.h"), *SOURCES.glob("*.h"), *(REPOSITORY / "csrc/cuda/primitives").glob("*.h")])
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ftls-model=initial-exec"]
    flags += ["-Wno-builtin-declaration-mismatch", *(x for folder in include for x in ("-isystem", folder))]
    digest = hashlib.sha256(repr((compiler, flags, check)).encode())
    for path in [*runtime, *kernels, *headers]:
        digest.update(path.read_bytes())
    folder = REPOSITORY / "build" / "emulation-tests" / digest.hexdigest()[:16]
    library = folder / "planted.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for source in [*runtime, *kernels]:
        target = folder / f"{source.name}.{os.getpid()}.o"
        extra = ["-DCNNFAST_EMULATION_CHECK"] if check else []
        if source in kernels and check:
            extra.append("-fsanitize=thread")
        subprocess.run([compiler, *flags, *extra, "-x", "c++", "-c", source, "-o", target], check=True)
        objects.append(target)
    unfinished = folder / f"planted.{os.getpid()}.so"
    subprocess.run([compiler, "-shared", *objects, "-o", unfinished], check=True)
    for target in objects:
        target.unlink()
    unfinished.replace(library)
    return library


class Library:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name in ("run_planted", "run_probe", "bug_names"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self.bugs: list[str] = self._library.bug_names().decode().split()
        self._kept: list[np.ndarray] = []

    def configure(self, mode: Mode) -> None:
        self._library.configure(ORDERS.index(mode.order), mode.seed, int(mode.lazy_async))

    def register(self, *arrays: tuple[np.ndarray, bool]) -> None:
        self._library.clear_ranges()
        self._kept = [array for array, _ in arrays]
        for array, writable in arrays:
            self._library.register_range(pointer(array), ctypes.c_uint64(array.nbytes), int(writable))

    def planted(self, kernel: str, bug: str, a: np.ndarray, b: np.ndarray, out: np.ndarray, *sizes: int) -> str | None:
        padded = [*sizes, 0, 0, 0, 0][:4]
        number = self.bugs.index(bug)
        return text(self._library.run_planted(kernel.encode(), number, pointer(a), pointer(b), pointer(out), *padded))

    def probe(
        self,
        name: str,
        a: np.ndarray | None = None,
        b: np.ndarray | None = None,
        out: np.ndarray | None = None,
        size: int = 0,
    ) -> str | None:
        self._library.clear_ranges()
        self.configure(MODES[0])
        return text(self._library.run_probe(name.encode(), pointer(a), pointer(b), pointer(out), size))


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data if array is not None else None)


def text(message: bytes | None) -> str | None:
    return message.decode() if message is not None else None


@pytest.fixture(scope="session")
def plain() -> Library:
    return Library(build(check=False))


@pytest.fixture(scope="session")
def checked() -> Library:
    return Library(build(check=True))


# -------------------------------------------------------------------------------------------------------- the kernels


def to_bf16(a: np.ndarray) -> np.ndarray:
    """Rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Kernel:
    """A planted kernel's operands and its right result; the output lies between guard bands of NaN."""

    def __init__(self, name: str) -> None:
        rng = np.random.default_rng(0)
        self.name = name
        self.sizes: tuple[int, ...]
        if name == "direct":
            h, w, c, k = self.sizes = 13, 11, 6, 3
            self.a = rng.standard_normal((h, w, c)).astype(np.float32)
            self.b = rng.standard_normal((k, 3, 3, c)).astype(np.float32)
            padded = np.pad(self.a.astype(np.float64), ((1, 1), (1, 1), (0, 0)))
            self.expected = sum(padded[r : r + h, s : s + w] @ self.b[:, r, s].T for r in range(3) for s in range(3))
        elif name == "reduce":
            self.sizes = 5, 1000
            self.a = rng.standard_normal(self.sizes).astype(np.float32)
            self.b = np.zeros(1, np.float32)
            self.expected = 2 * self.a.astype(np.float64).sum(1)
        else:
            m, n, depth = self.sizes = 100, 72, 224
            self.a, self.b = to_bf16(rng.standard_normal((m, depth))), to_bf16(rng.standard_normal((n, depth)))
            self.expected = from_bf16(self.a).astype(np.float64) @ from_bf16(self.b).astype(np.float64).T

    def run(self, library: Library, bug: str, mode: Mode) -> str | None:
        """None if the result is right, else what is wrong."""
        guard = 256
        buffer = np.full(self.expected.size + 2 * guard, np.nan, np.float32)
        out = buffer[guard:-guard]
        library.configure(mode)
        library.register((self.a, False), (self.b, False), (out, True))
        error = library.planted(self.name, bug, self.a, self.b, out, *self.sizes)
        if error is not None:
            return error
        if not np.isnan(buffer[:guard]).all() or not np.isnan(buffer[-guard:]).all():
            return "wrote outside of its output"
        off = np.abs(out.reshape(self.expected.shape) - self.expected).max()
        return None if off <= 1e-5 * np.abs(self.expected).max() else f"wrong result, off by {off}"


# Which kernel, and what the check variant says of it (None: only the result shows it).
PLANTED = {
    "no_barrier_before_use": ("direct", "race|uninitialised"),
    "no_barrier_before_restaging": ("direct", "race"),
    "halo_off_by_one": ("direct", "out of bounds"),
    "no_tail_mask": ("direct", "out of bounds"),
    "halo_not_staged": ("direct", "uninitialised"),
    "channel_tail_read": ("direct", "out of bounds"),
    "two_owners": ("direct", "race in global memory"),
    "no_barrier_before_reduction": ("reduce", "race|uninitialised"),
    "half_warp_reduced": ("reduce", None),
    "no_syncwarp": ("reduce", "race|uninitialised"),
    "wait_too_little": ("gemm", "not waited for|race"),
    "no_barrier_after_wait": ("gemm", "race|uninitialised"),
    "refill_before_barrier": ("gemm", "race"),
    "stale_stage": ("gemm", "not waited for|race"),
    "fragments_swapped": ("gemm", None),
    "swizzle_forgotten": ("gemm", None),
    "row_tail_read": ("gemm", "out of bounds"),
}


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kernel", ["direct", "reduce", "gemm"])
def test_right_kernels_are_right_in_every_mode(plain: Library, kernel: str, mode: Mode) -> None:
    for seed in range(4 if mode.order == "random" else 1):
        assert Kernel(kernel).run(plain, "none", dataclasses.replace(mode, seed=seed)) is None


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("kernel", ["direct", "reduce", "gemm"])
def test_check_is_silent_about_right_kernels(checked: Library, kernel: str, mode: Mode) -> None:
    assert Kernel(kernel).run(checked, "none", mode) is None


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_found(plain: Library, checked: Library, bug: str) -> None:
    kernel, complaint = PLANTED[bug]
    verdicts = {str(mode): Kernel(kernel).run(plain, bug, mode) for mode in MODES}
    check = Kernel(kernel).run(checked, bug, MODES[0])
    print({**verdicts, "check": check})
    assert check is not None or any(verdicts.values())
    if complaint is None:
        assert any(verdicts.values())
    else:
        assert check is not None
        assert any(part in check for part in complaint.split("|"))
        assert f"{kernel}<" in check
        assert "block (" in check
        assert "thread (" in check


def test_every_planted_bug_is_tested(plain: Library) -> None:
    assert {"none", *PLANTED} == set(plain.bugs)


def test_only_the_order_shows_some_bugs(plain: Library) -> None:
    """No single mode finds all: that is why tests run several."""
    found = {mode: {bug for bug, (k, _) in PLANTED.items() if Kernel(k).run(plain, bug, mode)} for mode in MODES}
    assert all(bugs != set().union(*found.values()) for bugs in found.values())


# ------------------------------------------------------------------------------------------------------ the emulator


def fragment(lane: int, element: int, matrix: str) -> tuple[int, int]:
    """(row, column) of an element of a lane's fragment: the PTX ISA's formulas for mma.m16n8k16, word for word."""
    group_id, thread_id_in_group = lane >> 2, lane % 4
    if matrix == "a":
        row = group_id if 0 <= element < 2 or 4 <= element < 6 else group_id + 8
        return row, thread_id_in_group * 2 + (element & 1) + (0 if element < 4 else 8)
    if matrix == "b":
        return thread_id_in_group * 2 + (element & 1) + (0 if element < 2 else 8), group_id
    return (group_id if element < 2 else group_id + 8), thread_id_in_group * 2 + (element & 1)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_mma_fragments(plain: Library, kind: str) -> None:
    rng = np.random.default_rng(1)
    to_bits = to_bf16 if kind == "bf16" else lambda v: v.astype(np.float16).view(np.uint16)
    to_float = from_bf16 if kind == "bf16" else lambda v: v.view(np.float16).astype(np.float32)
    a, b = to_bits(rng.standard_normal((16, 16))), to_bits(rng.standard_normal((16, 8)))
    c = rng.standard_normal((16, 8)).astype(np.float32)
    registers_a, registers_b = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
    registers_d = np.zeros((32, 4), np.float32)
    for lane in range(32):
        registers_a[lane] = [a[fragment(lane, i, "a")] for i in range(8)]
        registers_b[lane] = [b[fragment(lane, i, "b")] for i in range(4)]
        registers_d[lane] = [c[fragment(lane, i, "c")] for i in range(4)]
    assert plain.probe(f"mma_{kind}", registers_a, registers_b, registers_d) is None
    d = np.full((16, 8), np.nan)
    for lane in range(32):
        for i in range(4):
            d[fragment(lane, i, "c")] = registers_d[lane, i]
    np.testing.assert_allclose(d, c + to_float(a).astype(np.float64) @ to_float(b), rtol=1e-5, atol=1e-5)


def fragment_tf32(lane: int, element: int, matrix: str) -> tuple[int, int]:
    """The same of mma.m16n8k8 with tf32."""
    group_id, thread_id_in_group = lane >> 2, lane % 4
    if matrix == "a":
        return group_id if element in (0, 2) else group_id + 8, thread_id_in_group + (0 if element < 2 else 4)
    return thread_id_in_group + (0 if element == 0 else 4), group_id


def test_mma_tf32_fragments(plain: Library) -> None:
    rng = np.random.default_rng(1)
    a, b, c = (rng.standard_normal(s).astype(np.float32) for s in ((16, 8), (8, 8), (16, 8)))
    registers_a, registers_b, registers_d = (np.zeros((32, n), np.float32) for n in (4, 2, 4))
    for lane in range(32):
        registers_a[lane] = [a[fragment_tf32(lane, i, "a")] for i in range(4)]
        registers_b[lane] = [b[fragment_tf32(lane, i, "b")] for i in range(2)]
        registers_d[lane] = [c[fragment(lane, i, "c")] for i in range(4)]
    assert plain.probe("mma_tf32", registers_a, registers_b, registers_d) is None
    d = np.full((16, 8), np.nan)
    for lane in range(32):
        for i in range(4):
            d[fragment(lane, i, "c")] = registers_d[lane, i]
    rounded_a, rounded_b = (  # to 10 bits of mantissa, ties away from zero
        ((v.view(np.uint32) + 0x1000) & ~np.uint32(0x1FFF)).view(np.float32).astype(np.float64) for v in (a, b)
    )
    np.testing.assert_allclose(d, c + rounded_a @ rounded_b, rtol=1e-5, atol=1e-5)
    assert np.abs(d - (c + a.astype(np.float64) @ b)).max() > 1e-5, "nothing was rounded"


def test_f16_subnormals_and_infinities(plain: Library) -> None:
    a, b, d = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16), np.zeros((32, 4), np.float32)
    a[0, 0], a[4, 0] = 0x0001, 0xFC00  # 2^-24 in row 0, -inf in row 1
    b[0, 0] = 0x3C00  # 1 in column 0
    assert plain.probe("mma_f16", a, b, d) is None
    assert d[0, 0] == 2.0**-24
    assert d[4, 0] == -np.inf


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(plain: Library, transposed: bool) -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((32, 4, 2), np.uint16)
    assert plain.probe("ldmatrix_transposed" if transposed else "ldmatrix", matrices, None, out) is None
    for lane in range(32):
        for m in range(4):  # PTX ISA: lane l receives elements 2*(l % 4) and the next of row l / 4
            source = matrices[m].T if transposed else matrices[m]
            assert list(out[lane, m]) == list(source[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])


@pytest.mark.parametrize("width", [32, 16, 8, 2])
@pytest.mark.parametrize("argument", [0, 1, 3, 5, 9, 17])
def test_shuffles_with_width(plain: Library, width: int, argument: int) -> None:
    out = np.zeros((4, 32), np.int32)
    assert plain.probe("shuffles", np.array([argument], np.int32), None, out, width) is None
    for lane in range(32):
        first = lane // width * width
        sync = first + argument % width
        up = lane - argument if lane - argument >= first else lane
        down = lane + argument if lane + argument < first + width else lane
        # An exclusive or may read an earlier segment, not a later one.
        xor = lane ^ argument if (lane ^ argument) < first + width else lane
        assert list(out[:, lane] - 100) == [sync, up, down, xor]


def test_ballots_with_disjoint_masks(plain: Library) -> None:
    out = np.zeros(64, np.uint32)
    assert plain.probe("ballots", out=out) is None
    assert set(out.reshape(2, 32)[:, :8].flat) == {0b1001001}
    assert set(out.reshape(2, 32)[:, 8:].flat) == {0xFFE00000}


def test_exited_threads_do_not_hold_a_barrier(plain: Library) -> None:
    out = np.zeros(1, np.int32)
    assert plain.probe("early_exit", out=out) is None
    assert out[0] == 7


def test_dynamic_shared_memory(plain: Library) -> None:
    out = np.zeros(1, np.int32)
    assert plain.probe("dynamic_shared", out=out, size=20000) is None
    assert out[0] == 19999
    message = plain.probe("dynamic_shared", out=out, size=60000)
    assert message is not None
    assert "dynamic shared memory" in message


@pytest.mark.parametrize(
    ("probe", "expected"),
    [
        ("divergent_barrier", "__syncthreads divergence: line"),
        ("missing_thread", "deadlock"),
        ("exited_lane", "lane 5 of the mask has exited"),
        ("not_in_mask", "the calling lane is not in its own mask"),
        ("shuffle_from_outside", "reads lane 20, which is not in the mask"),
        ("collectives_differ", "in one warp"),
        ("too_much_shared", "bytes of shared memory"),
        ("misaligned_copy", "not aligned"),
        ("copy_into_global", "not in this block's shared memory"),
        ("big_block", "invalid block (1025,1,1)"),
        ("big_grid", "invalid grid (1,65536,1)"),
        ("empty_grid", "invalid grid (0,1,1)"),
    ],
)
def test_errors_name_kernel_and_reason(plain: Library, probe: str, expected: str) -> None:
    message = plain.probe(probe, out=np.zeros(64, np.float32))
    assert message is not None
    assert expected in message
    kernel = "nothing" if probe in ("big_block", "big_grid", "empty_grid") else probe
    assert message.startswith((f"{kernel}:", f"{kernel},", f"test::{kernel}"))
    assert plain.probe("early_exit", out=np.zeros(1, np.int32)) is None  # the next launch is unharmed


# -------------------------------------------------------------------------------------------------------- the modules


def emulated(name: str):  # type: ignore[no-untyped-def]
    """The module that `make emulation` built."""
    files = sorted(MODULES.glob(f"{name}.*so"))
    if not files:
        pytest.skip(f"{MODULES} has no {name}: run `make emulation`")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, files[0])
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def test_both_modules_have_the_same_table() -> None:
    plain, checked = emulated("_emulated"), emulated("_emulated_check")
    assert sorted(plain.kernels()) == sorted(checked.kernels()) != []
    assert plain.device() == {"emulated": "yes", "checked": "no"}
    assert checked.device() == {"emulated": "yes", "checked": "yes"}


def test_configuration_and_statistics() -> None:
    module = emulated("_emulated")
    module.configure(order="random", seed=3, lazy_async=True)
    with pytest.raises(ValueError, match="ascending, descending or random"):
        module.configure(order="sideways")
    module.configure()
    assert {"blocks", "barriers", "mma", "ldmatrix_wavefronts"} <= set(module.statistics())


def test_check_module_reports_accesses_outside_of_the_registered_ranges() -> None:
    """A copy of 2x3 pixels by a 1x1 convolution with one channel; the input's range is then made one pixel short."""
    module = emulated("_emulated_check")
    ones = ("N", "C", "K", "R", "S", "G", "stride_h", "stride_w", "dilation_h", "dilation_w")
    strides = {"x_n": 6, "x_h": 3, "x_w": 1, "y_n": 6, "y_h": 3, "y_w": 1, "w_k": 1, "w_c": 1, "w_r": 1, "w_s": 1}
    values = {**dict.fromkeys(ones, 1), "H": 2, "W": 3, "P": 2, "Q": 3, **strides}
    size, fields = module.structs()["Conv2dParams"]
    params = np.zeros(size // 8, np.int64)
    for name, offset in fields:
        params[offset // 8] = values.get(name, 0)
    number = [name for name, _ in module.kernels()].index("conv2d_direct.fprop.f32")
    call = module.Call(number, params.tobytes())
    x, w, y = np.arange(6, dtype=np.float32), np.ones(1, np.float32), np.zeros(6, np.float32)

    def run(x_bytes: int, y_writable: bool = True) -> None:
        module.configure()
        module.clear_ranges()
        module.register_range(x.ctypes.data, x_bytes, False)
        module.register_range(w.ctypes.data, w.nbytes, False)
        module.register_range(y.ctypes.data, y.nbytes, y_writable)
        try:
            call(x.ctypes.data, w.ctypes.data, 0, y.ctypes.data, 0, 0, 1)
        finally:
            module.clear_ranges()

    run(x.nbytes)
    np.testing.assert_array_equal(y, x)
    with pytest.raises(RuntimeError, match=r"correlate<float.*block \(0,0,0\), thread \(.*out of bounds: reading"):
        run(x.nbytes - 4)
    with pytest.raises(RuntimeError, match="read-only memory, writing 4 bytes at range 2"):
        run(x.nbytes, y_writable=False)
