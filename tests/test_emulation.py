"""The emulator of the SIMT model is itself right: collectives, fragments, limits, and what its modules offer."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from support.emulated import REPOSITORY, Library, from_bf16, library, to_bf16

MODULES = Path(os.environ.get("CNNFAST_EMULATION_DIR", REPOSITORY / "build" / "emulation"))


@pytest.fixture(scope="session")
def plain() -> Library:
    return library(check=False)


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
    assert "too much dynamic shared memory" in message
    # without a bound a kernel may never have more than at first
    assert plain.probe("growing_shared", out=out, size=90) is None
    message = plain.probe("growing_shared", out=out, size=101)
    assert message is not None
    assert "more dynamic shared memory than the kernel asked for" in message


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
