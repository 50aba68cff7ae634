"""Every registered kernel on every case: accuracy, bitwise determinism, NaN and infinities, guard bands.

A new operation adds its table to OPERATIONS; a new kernel is found by its registration. Expensive combinations (dtype,
precision, instruction set, scheduling) rotate with a hash of the case; CNNFAST_TEST_FULL=1 runs the whole product.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import cases
import pytest
import torch
from cases import conv2d
from support import oracle, process
from support.memory import Guarded, bits, guarded_allocations, registered

from cnnfast import dispatch, settings
from cnnfast.dispatch import TORCH_DTYPES, Implementation

OPERATIONS: dict[str, ModuleType] = {module.OP: module for module in cases.MODULES}
PRECISIONS = ("fp32", "ieee", "high")
# Of the combinations (variant, dtype, precision) of a kernel, so many a case and direction: what a budget allows.
SHARE = 1 if process.INTERPRETED or process.CHECKED else 4 if process.EMULATED else 2
# On the emulated GPU cases of more FLOPs than these have half as many; beyond the second a quarter, and where accesses are checked
# every other such case is left to make test-all, once each kernel had its turn.
EMULATED_FLOPS, EMULATED_LARGE = 5e6, 1.5e7
# What a minute buys in Triton's interpreter: cases made for kernels of the CPU are left to make test-all there.
INTERPRETED_FLOPS, INTERPRETED_BYTES = 3e6, 1.5e5
# Winograd's products are fewer, and F(4x4) serves none that is small.
ALLOWANCE = {"conv2d_winograd_f4x4": 16, "conv2d_winograd_f2x2": 2}
# The same of a pooling, taps a window: max pooling's gradient searches every window that it touches, tap by tap.
INTERPRETED_TAPS = 20


def _problem(op: str, direction: str, case: Any, combination: tuple[Implementation, str, str]) -> dispatch.Problem:
    implementation, dtype, precision = combination
    device = process.device(implementation)
    return OPERATIONS[op].problem(case, direction, TORCH_DTYPES[dtype], precision, device)


def _combinations(op: str, direction: str, case: Any) -> Iterator[tuple[Implementation, str, str]]:
    """What to run of a case: in the full product everything that fits, else a rotating part."""
    stems: dict[tuple[str, str], list[Implementation]] = {}
    for implementation in dispatch.implementations(op):
        if implementation.direction == direction and not process.not_here(implementation):
            stems.setdefault((implementation.backend, implementation.stem), []).append(implementation)
    for stem, variants in stems.items():
        fitting = [
            (i, dtype, precision)
            for i, dtype in itertools.product(variants, sorted(TORCH_DTYPES))
            for precision in (PRECISIONS if dtype == "f32" else ("fp32",))
            if not dispatch.reasons_against(i, _problem(op, direction, case, (i, dtype, precision)))
        ]
        if process.INTERPRETED and not process.FULL and fitting:
            if stem[1] == "conv2d_winograd_f2x2" and process.stable_hash(case, direction, stem) % 4:
                continue  # most of the table's filters are 3x3
            p = _problem(op, direction, case, fitting[0])
            if p.flops and dict(p.sizes)["G"] > 1 and process.stable_hash(case, direction, "groups") % 2:
                continue  # a program or more each
            window = p.R * p.S if not p.flops and "R" in dict(p.sizes) else 0
            taps = window and p.N * p.C * p.P * p.Q * window
            if (
                max(p.flops, 8 * taps) > INTERPRETED_FLOPS * ALLOWANCE.get(stem[1], 1)
                or (not p.flops and p.bytes > INTERPRETED_BYTES)
                or window > INTERPRETED_TAPS
            ):
                continue
        share = SHARE
        if process.EMULATED and fitting:
            flops = _problem(op, direction, case, fitting[0]).flops
            share = max(1, share // ((1 + (flops > EMULATED_FLOPS)) * (1 + (flops > EMULATED_LARGE))))
            if process.CHECKED and flops > EMULATED_LARGE and not process.FULL:
                taken = all((op, direction, f[0].name) in TAKEN for f in fitting)
                if taken and process.stable_hash(case, direction, stem, "large") % 2:
                    continue
        if process.FULL or len(fitting) <= share:
            yield from fitting
            continue
        # one step through the list for each case: neighbours in the table differ, and all combinations get their turn
        start = process.stable_hash(case, direction, stem)
        chosen = [fitting[(start + j * (len(fitting) // share)) % len(fitting)] for j in range(share)]
        # and a variant that no case has run so far takes its turn first: few cases fit some of them
        waiting = [f for f in fitting if (op, direction, f[0].name) not in TAKEN]
        if waiting and not any(f in waiting for f in chosen):
            chosen[0] = waiting[0]
        TAKEN.update((op, direction, f[0].name) for f in chosen)
        yield from chosen


def _parameters() -> list[Any]:
    found = []
    for op, adapter in OPERATIONS.items():
        for case, direction in itertools.product(adapter.CASES, adapter.DIRECTIONS):
            for implementation, dtype, precision in _combinations(op, direction, case):
                mode = "" if precision == "fp32" else f"-{precision}"
                id = f"{op}-{implementation.name}-{direction}-{dtype}{mode}-{case}"
                found.append(
                    pytest.param(
                        op,
                        implementation,
                        direction,
                        dtype,
                        precision,
                        case,
                        id=id,
                        marks=process.marks(implementation),
                    )
                )
    return found


TAKEN: set[tuple[str, str, str]] = set()
PARAMETERS = _parameters()
RAN: set[tuple[str, str, str]] = set()
EXECUTED: list[str] = []
UNWRITTEN = {torch.int64: -1, torch.uint8: 255}  # what no element of a result is


@functools.lru_cache(maxsize=64)
def _expected(op: str, case: Any, direction: str, dtype: str) -> tuple[Any, Any, Any]:
    """float64, torch in the dtype, and the sums of absolute products. On the CPU, whatever is tested."""
    adapter = OPERATIONS[op]
    t = {role: g.tensor for role, g in adapter.inputs(case, direction, TORCH_DTYPES[dtype]).items()}
    wide = {role: tensor.double() if tensor.is_floating_point() else tensor for role, tensor in t.items()}
    return (
        adapter.reference(case, direction, wide),
        adapter.reference(case, direction, t),
        adapter.magnitude(case, direction, wide),
    )


def _results(value: Any) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _run(
    op: str,
    implementation: Implementation,
    direction: str,
    precision: str,
    case: Any,
    given: Mapping[str, Guarded],
    what: str,
) -> tuple[torch.Tensor, ...]:
    """One call that nothing but this kernel serves, all memory around its operands guarded."""
    adapter = OPERATIONS[op]
    adapter.OPERATORS[direction]._runs.clear()  # a bound kernel keeps the allocator that it was bound with
    with settings.backend(implementation.name), settings.strict(), guarded_allocations() as allocations:
        backend, _, strict = settings.state()
        out = adapter.call(case, direction, {r: g.tensor for r, g in given.items()}, precision, backend, strict)
    adapter.OPERATORS[direction]._runs.clear()
    allocations.check(what)
    for role, guarded in given.items():
        guarded.check(f"{what}: {role}")
    return _results(out)


@pytest.mark.parametrize(("op", "implementation", "direction", "dtype", "precision", "case"), PARAMETERS)
def test_kernel(
    op: str, implementation: Implementation, direction: str, dtype: str, precision: str, case: Any, request: Any
) -> None:
    adapter = OPERATIONS[op]
    RAN.add((op, implementation.name, direction))
    EXECUTED.append(request.node.nodeid)
    device = process.device(implementation)
    what = f"{implementation.name} {direction} {dtype} {precision}, {case} ({case.why})"
    given = adapter.inputs(case, direction, TORCH_DTYPES[dtype], device)

    first = process.schedule(case, direction, "first")
    out = _run(op, implementation, direction, precision, case, given, f"{what} {first}")
    refs, owns, magnitudes = (_results(v) for v in _expected(op, case, direction, dtype))
    m, _ = implementation.error_bound
    depth = adapter.depth(case, direction)
    for o, ref, own, magnitude in zip(out, refs, owns, magnitudes, strict=True):
        if o.is_floating_point():
            oracle.check(f"{what} {first}", o, ref, own, magnitude, m, precision, depth)
        else:
            assert torch.equal(o.cpu(), own), f"{what}: differs from torch"

    second = process.schedule(case, direction, "second")
    again = _run(op, implementation, direction, precision, case, given, f"{what} {second}")
    for a, b in zip(out, again, strict=True):
        same = bits(a) == bits(b)
        assert bool(same.all()), f"{what}: {int((~same).sum())} elements differ between two runs ({first}; {second})"


def _some(what: str, turn: int) -> list[Any]:
    """One case in four of each kernel, in the interpreter one in six, in full runs all."""
    share = 6 if process.INTERPRETED else 4
    return [p for p in PARAMETERS if process.FULL or process.stable_hash(p.id, what) % share == turn]


@pytest.mark.parametrize(("op", "implementation", "direction", "dtype", "precision", "case"), _some("nonfinite", 0))
def test_nonfinite(
    op: str, implementation: Implementation, direction: str, dtype: str, precision: str, case: Any
) -> None:
    """NaN and infinities come out where torch's do."""
    adapter = OPERATIONS[op]
    device = process.device(implementation)
    generator = torch.Generator().manual_seed(process.stable_hash(case, direction))
    for role in adapter.nonfinite(case, direction):
        given = adapter.inputs(case, direction, TORCH_DTYPES[dtype], device, seed=1)
        tensor = given[role].tensor
        if tensor.numel() == 0:
            continue
        # an infinite scale shows the sign of a sum near zero, which less exact sums (Winograd's) may have the other way
        exact = role != "scale" or implementation.error_bound == Implementation.error_bound
        for value in (float("nan"), float("inf"), float("-inf")) if exact else (float("nan"),):
            index = tuple(int(torch.randint(n, (), generator=generator)) for n in tensor.shape)
            tensor[index] = value
        given = {r: Guarded(g.tensor, g.buffer, g.buffer.clone()) for r, g in given.items()}
        what = (
            f"{implementation.name} {direction} {dtype} {precision}, {case} ({case.why}), NaN and infinities in {role}"
        )
        out = _run(op, implementation, direction, precision, case, given, what)
        cpu = {r: g.tensor.cpu() for r, g in given.items()}
        wide = {r: t.double() if t.is_floating_point() else t for r, t in cpu.items()}
        for o, a, b in zip(
            out,
            _results(adapter.reference(case, direction, wide)),
            _results(adapter.reference(case, direction, cpu)),
            strict=True,
        ):
            if o.is_floating_point():
                oracle.check_nonfinite(what, o, a, b, signs=2e-3 if role == "scale" else 0.0)


@pytest.mark.parametrize(("op", "implementation", "direction", "dtype", "precision", "case"), _some("bound", 1))
def test_result_in_a_slice(
    op: str, implementation: Implementation, direction: str, dtype: str, precision: str, case: Any
) -> None:
    """Bound directly, a kernel writes an activation into a slice of a larger tensor, and nothing beside it."""
    adapter = OPERATIONS[op]
    sig = dispatch.signature(op)
    device, torch_dtype = process.device(implementation), TORCH_DTYPES[dtype]
    what = f"{implementation.name} {direction} {dtype} {precision}, {case} ({case.why}), bound directly"
    given = {r: g.tensor for r, g in adapter.inputs(case, direction, torch_dtype, device).items()}
    refs, owns, magnitudes = (_results(v) for v in _expected(op, case, direction, dtype))
    operands: list[Any] = []
    results: list[tuple[torch.Tensor, torch.Tensor]] = []  # (result, what it is a slice of)
    for role in sig.roles:
        layout = implementation.layouts.get(role.name)
        if role.name in sig.outputs[direction]:
            shape = case.shapes[role.name]
            free = role.is_activation and layout != "nhwc"
            first, beside = (
                (16, 24) if free else (0, 0)
            )  # channels before and around: the next pixel is as well aligned
            wide = dispatch.ACCUMULATORS.get(torch_dtype, torch.float32)
            dtypes = {"i64": torch.int64, "u8": torch.uint8, "acc": wide, None: torch_dtype}
            base = torch.full(
                (shape[0], shape[1] + beside, *shape[2:]) if beside else shape,
                UNWRITTEN.get(dtypes[role.dtype], float("nan")),
                dtype=dtypes[role.dtype],
                device=device,
            )
            if layout == "nhwc" or (role.is_activation and layout != "any"):
                base = base.to(memory_format=torch.channels_last)
            operands.append(base[:, first : first + shape[1]] if free else base)
            results.append((operands[-1], base))
        else:
            t = given.get(role.name)
            if t is not None and not dispatch.readable(role, t.shape, t.stride(), layout):
                t = t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.contiguous_format)
            if t is not None and t.data_ptr() % implementation.alignment:
                t = t.clone()
            operands.append(t)
    if not any(r.numel() for r, _ in results):
        return
    problem = adapter.problem(case, direction, torch_dtype, precision, device)
    strides = {role.name: t.stride() for role, t in zip(sig.roles, operands, strict=True) if t is not None}
    process.schedule(case, direction, "bound")
    kernel = implementation.bind(problem, dispatch.parameters(problem, strides))
    ranges = [(t, role.name in sig.outputs[direction]) for role, t in zip(sig.roles, operands, strict=True)]
    with registered(ranges), guarded_allocations(ranges=True) as allocations:
        kernel(operands)
    allocations.check(what)
    for (out, base), ref, own, magnitude in zip(results, refs, owns, magnitudes, strict=True):
        if "without elements" in case.why:
            continue  # whose value is a test of its own
        if not out.is_floating_point():
            assert torch.equal(out.cpu(), own), f"{what}: differs from torch"
            written = int((base != UNWRITTEN[base.dtype]).sum())
            assert written == out.numel(), f"{what}: {written - out.numel()} elements beside the result were written"
            continue
        m, _ = implementation.error_bound
        oracle.check(what, out, ref, own, magnitude, m, precision, adapter.depth(case, direction))
        written = int((~base.isnan()).sum())
        assert written == out.numel(), f"{what}: {written - out.numel()} elements beside the result were written"


@pytest.mark.skipif(not process.CHECKED, reason="only the emulated GPU's check variant sees single accesses")
@process.mark_of_this_process
def test_check_variant_sees_foreign_memory() -> None:
    """Where an operand isn't registered, its first read is an error: the bytes of the others are really watched."""
    adapter, case = conv2d, conv2d.CASES[3]
    own = [i for i in dispatch.implementations("conv2d") if not process.not_here(i)]
    kernel = next(i for i in own if i.stem == "conv2d_direct" and i.direction == "fprop")
    t = {r: g.tensor for r, g in adapter.inputs(case, "fprop", torch.float32).items()}
    y = torch.empty(case.shapes["y"]).to(memory_format=torch.channels_last)
    operands = [t["x"].contiguous(memory_format=torch.channels_last), t["w"], t["b"], y]
    problem = adapter.problem(case, "fprop", torch.float32, "fp32")
    bound = kernel.bind(
        problem, dispatch.parameters(problem, {r: o.stride() for r, o in zip("xwby", operands, strict=True)})
    )
    with registered([(o, o is y) for o in operands]):
        bound(operands)
    for missing in range(4):
        with registered([(o, o is y) for i, o in enumerate(operands) if i != missing]), pytest.raises(RuntimeError):
            bound(operands)
    with registered([(o, False) for o in operands]), pytest.raises(RuntimeError):
        bound(operands)


@process.mark_of_this_process
def test_every_kernel_ran() -> None:
    """Every registered implementation and direction ran a case here, or the reason is printed."""
    registered = [i for i in dispatch.implementations() if i.backend != "aten"]
    assert {i.op for i in registered} <= set(OPERATIONS), "an operation with kernels has no table of cases"
    elsewhere: dict[str, list[str]] = {}
    missing = []
    for i in registered:
        reason = process.not_here(i)
        if reason:
            elsewhere.setdefault(f"{i.backend}: {reason}", []).append(f"{i.name} {i.direction}")
        elif (i.op, i.name, i.direction) not in {(p.values[0], p.values[1].name, p.values[2]) for p in PARAMETERS}:
            missing.append(f"{i.op}: {i.name} {i.direction}")
    for backend, kernels in dispatch.backends().items():
        if not any(i.backend == backend for i in registered):
            print(f"{backend}: no kernels: {kernels.status()}")
    for reason, names in elsewhere.items():
        print(f"not run here: {len(names)} of {reason}")
    assert not missing, f"no case of the tables runs: {', '.join(missing)}"
    if len(EXECUTED) < len(PARAMETERS):
        pytest.skip(f"{len(EXECUTED)} of {len(PARAMETERS)} tests of kernels were selected")
    expected = {(i.op, i.name, i.direction) for i in registered if not process.not_here(i)}
    assert expected == RAN, f"didn't run: {sorted(expected - RAN)}"
