"""What every Triton kernel file shares: the interpreter's flag, exact bf16 conversions, and offline compilation.

Offline compilation needs no GPU: ``variants()`` of ``_<stem>_variants.py`` lists all that the launchers of a file can
select, ``compile_variant`` turns one into PTX and machine code with the compiler that Triton's wheel ships.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl

# Read once: @triton.jit decides at decoration whether a kernel is interpreted.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


class Conv2dProblem(Protocol):
    """The fields of csrc/common/params.h, and the precision mode. Strides count elements."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    G: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dilation_h: int
    dilation_w: int
    x_n: int
    x_c: int
    x_h: int
    x_w: int
    w_k: int
    w_c: int
    w_r: int
    w_s: int
    y_n: int
    y_c: int
    y_h: int
    y_w: int
    act: int
    r_n: int
    r_h: int
    r_w: int
    precision: str


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


# Channels a program where memory bounds. What a pixel's channels in a block have to fill is sectors of 32 bytes: 16 channels
# of 16 bits are one, 64 are a line of 128 bytes. Blocks between these read no fewer sectors, and every one has to be compiled
# for every kind of call. The narrowest is for images, whose neighbouring pixels share a sector.
CHANNELS = (4, 16, 64)
VECTORS = 16  # channels that have vectors: fewer are not divisible by 16, which the compiler asks for


def block_channels(channels: int) -> int:
    """The widest block that isn't wider than the channels rounded up to a power of two, else the narrowest.

    So 32 channels are two blocks of 16, not half of one of 64: as many sectors, no idle threads.
    """
    return max((block for block in CHANNELS if block <= next_power_of_2(channels)), default=CHANNELS[0])


def needs_int64(*extents: tuple[int, int]) -> bool:
    """Whether an offset passes 2^31: each extent is (count, stride); a tensor's largest offset is their sum.

    The margin leaves room for what tails and padding add before the mask hides it.
    """
    return sum(count * abs(stride) for count, stride in extents) >= 2**31 - 2**24


def x_int64(p: Conv2dProblem) -> bool:
    """Whether x's offsets need 64 bits."""
    # Rows and columns beyond the map are addressed before the mask hides them.
    reach_h = p.H + p.R * p.dilation_h + p.pad_h
    reach_w = p.W + p.S * p.dilation_w + p.pad_w
    return needs_int64((p.N, p.x_n), (reach_h, p.x_h), (reach_w, p.x_w), (p.C, 1))


def y_int64(p: Conv2dProblem) -> bool:
    """Whether y's do."""
    reach_h = p.P + p.R * p.dilation_h + p.pad_h
    reach_w = p.Q + p.S * p.dilation_w + p.pad_w
    return needs_int64((p.N, p.y_n), (reach_h, p.y_h), (reach_w, p.y_w), (p.K, 1))


def conv2d_int64(p: Conv2dProblem) -> bool:
    """Whether any operand's do."""
    weights = needs_int64((p.K, p.w_k), (p.C // p.G, p.w_c), (p.R, p.w_r), (p.S, p.w_s))
    return x_int64(p) or y_int64(p) or weights


def pixel_stride(sizes: tuple[int, int, int], strides: tuple[int, int, int]) -> int | None:
    """The distance between neighbouring pixels (n, h, w), or None where it isn't the same for all."""
    distance, expected = None, 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size == 1:
            continue
        if distance is None:
            distance = expected = stride
        if stride != expected:
            return None
        expected *= size
    return distance or 0


def by_hand(dtype: torch.dtype) -> bool:
    """Whether kernels on this dtype convert it by hand: see below."""
    return INTERPRETED and dtype != torch.float32


def capability(tensor: torch.Tensor) -> int:
    """The compute capability, 80 for sm_80; the interpreter poses as sm_80."""
    if not tensor.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


class Recorded(NamedTuple):
    """One launch as it was made: the compiled kernel, its grid, and every argument in the kernel's order."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[Any]


class _Recording(threading.local):
    launches: list[Recorded] | None = None


_recording = _Recording()


@contextlib.contextmanager
def record() -> Iterator[list[Recorded]]:
    """Collects the launches that this thread makes within the context.

    ``kernel[grid](...)`` binds, specialises and looks up 40 arguments in Python: 80 us on an H100 machine, three times
    what a small convolution takes. A recorded launch is repeated without that (``compiled[grid](*arguments)``).
    """
    before, _recording.launches = _recording.launches, []
    try:
        yield _recording.launches
    finally:
        _recording.launches = before


def launch(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Launches a kernel over so many programs; every launcher goes through here."""
    compiled = kernel[(programs,)](*arguments, **meta)
    if _recording.launches is not None:
        rest = (meta[name] for name in kernel.arg_names[len(arguments) :])
        _recording.launches.append(Recorded(compiled, (programs, 1, 1), [*arguments, *rest]))


def product_options(arch: int, block_m: int, block_n: int, num_warps: int, num_stages: int) -> dict[str, int]:
    """How a product of BLOCK_M x BLOCK_N sums is compiled for sm_<arch>.

    On sm_100 and its kin the compiler would rather spill a few registers than have fewer blocks beside each other, unless
    it is told how many a thread may have. Where a thread has 64 sums there is no such choice, and telling it makes it
    spend them all on loads ahead.
    """
    limit = {"maxnreg": 255} if arch // 10 == 10 and block_m * block_n < 64 * 32 * num_warps else {}
    return {"num_warps": num_warps, "num_stages": num_stages, **limit}


# The interpreter holds bf16 as bare 16-bit patterns: its arithmetic on them is integer arithmetic, and its rounding
# loses the carry into the exponent. BY_HAND does both conversions on the bits; the compiler's own are exact.


@triton.jit
def widen(value, BY_HAND: tl.constexpr):
    """To fp32; without BY_HAND the value stays as it is, for the tensor cores."""
    if BY_HAND:
        if value.dtype == tl.bfloat16:
            return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            return value.to(tl.float32)
    else:
        return value


@triton.jit
def narrow(value, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """From fp32 to dtype, to nearest even."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def pixel_offset(pixel, height, width, stride_n, stride_h, stride_w, DENSE: tl.constexpr):
    """Where a pixel lies, by its number; DENSE: pixels lie stride_w apart, see pixel_stride."""
    if DENSE:
        return pixel * stride_w
    else:
        image = pixel // (height * width)
        inside = pixel - image * (height * width)
        row = inside // width
        return image * stride_n + row * stride_h + (inside - row * width) * stride_w


@dataclass(frozen=True)
class Variant:
    """One compilation of one kernel: all that Triton's just-in-time compiler would derive from a call."""

    name: str
    fn: Any
    signature: Mapping[str, str]  # argument → Triton type, or "constexpr"
    constexprs: Mapping[str, Any]
    aligned: tuple[str, ...]  # arguments known to be divisible by 16
    num_warps: int
    num_stages: int
    capability: int  # 80, 90 or 100
    tensor_cores: bool  # HMMA is expected, on sm_90 HGMMA, on sm_100 UTCHMMA
    asynchronous: bool  # LDGSTS (cp.async) or UTMALDG (TMA) is expected

    @property
    def options(self) -> dict[str, int]:
        """The compiler's, as the launchers give them."""
        blocks = self.constexprs
        if "BLOCK_K" in blocks:
            m, n = blocks["BLOCK_M"], blocks["BLOCK_N"]
            return product_options(self.capability, m, n, self.num_warps, self.num_stages)
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def compile_variant(variant: Variant) -> Any:
    """Compiles for the variant's architecture; the result's ``asm`` holds ptx and cubin.

    Not in an interpreting process: there the kernels are no longer Triton's own functions.
    """
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", variant.capability, 32)
    return triton.compile(_source(variant), target=target, options=variant.options)


def _source(variant: Variant) -> Any:
    from triton.compiler import ASTSource

    names = list(variant.fn.arg_names)
    return ASTSource(
        fn=variant.fn,
        signature={name: variant.signature[name] for name in names},
        constexprs=dict(variant.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned},
    )


def lower_variant(variant: Variant) -> str:
    """Triton's IR of a variant as its source says it, helpers inlined and nothing optimised; a tenth of compiling it.

    Equal text is equal code: it has no line numbers.
    """
    from triton._C.libtriton import ir, passes
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", variant.capability, 32)
    backend = make_backend(target)
    options = backend.parse_options(variant.options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = _source(variant).make_ir(
        target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
    )
    manager = ir.pass_manager(context)
    passes.common.add_inliner(manager)
    passes.common.add_symbol_dce(manager)
    manager.run(module, "inline")
    return module.str_nodebug()
