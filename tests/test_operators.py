"""What every operator owes torch: opcheck, meta functions, FLOPs, no way to ATen, subclasses, settings, safety."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import conv2d
from support import process
from support.functions import FUNCTIONS, Function
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import cnnfast
from cnnfast import dispatch, functional, settings
from cnnfast.backends import cpu

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
needs_cpu_kernels = pytest.mark.skipif(cpu.MODULE is None, reason=f"no CPU kernels here: {cpu.ABSENT}")
each = pytest.mark.parametrize("f", FUNCTIONS, ids=str)
MODULES = cases.MODULES
CL = torch.channels_last

_CONV = ((1, 1), (1, 1, 1, 1), (1, 1), 1, "fp32", "auto", False)


def _samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, raw as its schema takes them."""
    x, w, b, g = torch.randn(2, 4, 5, 6), torch.randn(6, 4, 3, 3), torch.randn(6), torch.randn(2, 6, 5, 6)
    xs, ws = [2, 4, 5, 6], [6, 4, 3, 3]
    last = [t.to(memory_format=CL) for t in (x, w, g)]
    conv = [tuple(list(v) if isinstance(v, tuple) else v for v in _CONV)]
    grouped = ([2, 1], [1, 1, 0, 2], [1, 2], 2, "fp32", "auto", False)
    average = ([3, 3], [2, 2], [1, 1], False, True, None, "auto", False)
    to = ([3, 2], "auto", False)
    gp, ga = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 2)
    k, ka = torch.randint(9, gp.shape, dtype=torch.uint8), torch.randint(6, ga.shape, dtype=torch.uint8)
    pool = ([3, 3], [2, 2], [1, 1], [1, 1], False, "auto", False)
    xg, wg = torch.randn(2, 4, 7, 8), torch.randn(6, 2, 3, 2)
    gg = torch.ops.cnnfast.conv2d(xg, wg, None, *grouped)
    fused = (*conv[0][:4], "relu", *conv[0][4:])
    norm, bn = [torch.rand(4) + 0.5 for _ in range(4)], ("relu", True, 1e-5, "auto", False)
    around = (*conv[0][:4], "relu", 1e-5, 1e-5, *conv[0][4:])
    scale, shift = torch.rand(6) + 0.5, torch.randn(6)
    return {
        "conv2d": [(x, w, b, *conv[0]), (last[0], last[1], None, *conv[0]), (xg, wg, b, *grouped)],
        "conv2d_dgrad": [
            (w, g, xs, False, *conv[0]), (last[1], last[2], xs, True, *conv[0]), (wg, gg, [2, 4, 7, 8], False, *grouped)
        ],
        "conv2d_wgrad": [
            (x, g, ws, False, *conv[0]), (last[0], last[2], ws, True, *conv[0]), (xg, gg, [6, 2, 3, 2], True, *grouped)
        ],
        "add_act": [(x, x + 1, "relu", "auto", False), (last[0], x, "none", "auto", False)],
        "add_act_dgrad": [(x, x + 1, "relu", "auto", False), (last[0], x, "relu6", "auto", False)],
        "batch_norm_stats": [(x, 1e-5, "auto", False), (last[0], 1e-5, "auto", False)],
        "batch_norm": [
            (x, *norm, None, *bn), (last[0], *norm, x + 1, *bn), (x, None, None, None, None, None, *bn[:1], False, *bn[2:]),
        ],
        **{
            f"batch_norm_{direction}": [(x, *norm, None, x + 1, *bn), (last[0], *norm, x + 1, x, *bn)]
            for direction in ("wgrad", "backward", "backward_residual")
        },
        "batch_norm_dgrad": [(x, *norm, None, x + 1, *bn[:1], False, *bn[2:])],
        "conv_bn_act": [
            (x, w, b, scale, shift, g, *fused), (last[0], last[1], None, scale, shift, None, *fused),
            (x, w, None, None, None, last[2], *fused),
        ],
        "bn_act_conv": [
            (x, w, b, *norm, *around), (last[0], last[1], None, *[None] * 4, *around),
        ],
        "bn_act_conv_wgrad": [(x, g, *norm, ws, False, *around), (last[0], last[2], *norm, ws, True, *around)],
        "bn_act_conv_dgrad": [(x, w, g, *norm, *around), (last[0], last[1], last[2], *norm, *around)],
        "max_pool2d": [(x, *pool), (last[0], *pool)],
        "max_pool2d_indices": [(x, *pool), (last[0], *pool)],
        "max_pool2d_recorded": [(x, *pool), (last[0], *pool)],
        "max_pool2d_dgrad": [
            (x, gp, None, *pool), (last[0], gp, None, *pool), (x, gp, k, *pool), (last[0], gp, k.to(memory_format=CL), *pool),
        ],
        "max_pool2d_jvp": [(x, torch.randn_like(x), *pool), (last[0], torch.randn_like(last[0]), *pool)],
        "avg_pool2d": [(x, *average), (last[0], *average)],
        "avg_pool2d_dgrad": [(gp, xs, False, *average), (gp.to(memory_format=CL), xs, True, *average)],
        "adaptive_avg_pool2d": [(x, *to), (last[0], *to)],
        "adaptive_avg_pool2d_dgrad": [(ga, xs, False, *to), (ga.to(memory_format=CL), xs, True, *to)],
        "adaptive_max_pool2d": [(x, *to), (last[0], *to)],
        "adaptive_max_pool2d_indices": [(x, *to), (last[0], *to)],
        "adaptive_max_pool2d_recorded": [(x, *to), (last[0], *to)],
        "adaptive_max_pool2d_dgrad": [
            (x, ga, None, *to), (last[0], ga, None, *to), (x, ga, ka, *to), (last[0], ga, ka.to(memory_format=CL), *to),
        ],
        "adaptive_max_pool2d_jvp": [(x, torch.randn_like(x), *to), (last[0], torch.randn_like(last[0]), *to)],
        "conv2d_bgrad": [(g, "fp32", "auto", False), (last[2], "fp32", "auto", False)],
    }  # fmt: skip


SAMPLES = _samples()
OPERATORS = sorted(
    {
        name.removeprefix("cnnfast::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("cnnfast::")
    }
)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    """torch's check of schema, meta function, autograd registration, functionalisation, with and without gradients."""
    assert name in SAMPLES, "an operator without a sample: add it above"
    operator = getattr(torch.ops.cnnfast, name).default
    for sample in SAMPLES[name]:
        torch.library.opcheck(operator, sample)
        floats = [
            a.detach().clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in sample
        ]
        torch.library.opcheck(operator, tuple(floats))


# ---- meta and fake tensors -------------------------------------------------------------------------------------------


def _directions(module: Any, case: Any) -> list[str]:
    """What may be called: taps are numbered, and read, only where a kernel has that, and ATen hasn't."""
    return [
        d
        for d in module.DIRECTIONS
        if d not in ("taps", "scatter")
        or dispatch.serves(module.problem(case, d, torch.float32, "fp32"), settings.AUTO)
    ]


@pytest.mark.parametrize(
    ("module", "case"), [pytest.param(m, c, id=f"{m.OP}-{c}") for m in MODULES for c in m.CASES]
)  # fmt: skip
def test_meta_agrees_with_the_kernel(module: Any, case: Any) -> None:
    """Shape, strides and dtype of every direction's meta function are those of the real call."""
    if "without elements" in case.why:
        pytest.skip("its adapter looks at values")
    for direction in _directions(module, case):
        tensors = {r: g.tensor for r, g in module.inputs(case, direction, torch.float32).items()}
        reals = module.call(case, direction, tensors, "fp32", "auto", False)
        with FakeTensorMode() as mode:
            fakes = {r: mode.from_tensor(t) for r, t in tensors.items()}
            metas = module.call(case, direction, fakes, "fp32", "auto", False)
        many = isinstance(reals, tuple)
        for real, fake in zip(reals if many else (reals,), metas if many else (metas,), strict=True):
            assert (real.shape, real.dtype) == (fake.shape, fake.dtype), direction
            assert real.stride() == fake.stride(), (
                f"{direction}: the kernel gives {real.stride()}, the meta function {fake.stride()}"
            )


@each
def test_fake_tensors(f: Function) -> None:
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t) for t in f.tensors(torch.float32)]
        for t in tensors:
            t.requires_grad_()
        out = f.ours(*tensors)
        gradients = torch.autograd.grad(out.sum(), tensors)
    assert out.shape == f.torchs(*f.tensors(torch.float32)).shape
    assert [g.shape for g in gradients] == [t.shape for t in tensors]


@each
def test_meta_tensors_have_gradients(f: Function) -> None:
    tensors = [t.to("meta").requires_grad_() for t in f.tensors(torch.float32)]
    out = f.ours(*tensors)
    assert out.device.type == "meta"
    assert [g.shape for g in torch.autograd.grad(out.sum(), tensors)] == [t.shape for t in tensors]


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


@each
def test_flops_are_torchs(f: Function) -> None:
    """Forward and backward, as torch's counter has them; the counter must not change what runs, either."""
    counts, results = [], []
    for function in (f.ours, f.torchs):
        tensors = f.tensors(torch.float32, grad=True)
        with FlopCounterMode(display=False) as forward:
            out = function(*tensors)
        with FlopCounterMode(display=False) as backward:
            gradients = torch.autograd.grad(out.sum(), tensors)
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
        results.append((out, *gradients))
    if "grouped" in f.name or "depthwise" in f.name:  # torch forgets the groups of the weight gradient
        assert counts[0] == (counts[1][0], 2 * counts[1][0])
    else:
        assert counts[0] == counts[1]
    torch.testing.assert_close(*results)


# ---- ATen never serves behind our back -------------------------------------------------------------------------------


class NoConvolution(TorchDispatchMode):
    """Fails where torch's own kernels do the work."""

    FORBIDDEN = ("convolution", "conv", "mkldnn", "max_pool", "avg_pool", "mm", "bmm", "addmm", "batch_norm")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "cnnfast":
            name = str(func).split(".")[1]
            assert not any(word in name for word in self.FORBIDDEN), f"{func} does the work"
        return func(*args, **(kwargs or {}))


@needs_cpu_kernels
@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.OP)
def test_strict_never_reaches_aten(module: Any) -> None:
    """Every case, every direction and dtype, under strict(): a kernel of ours serves, and torch sees no convolution."""
    with cnnfast.strict(), settings.observe() as events, NoConvolution():
        for case in module.CASES:
            dtypes = list(dispatch.DTYPES)
            if not process.FULL:
                dtypes = [dtypes[process.stable_hash(case) % len(dtypes)]]
            for direction in _directions(module, case):
                for dtype in dtypes:
                    t = {r: g.tensor for r, g in module.inputs(case, direction, dtype).items()}
                    module.call(case, direction, t, "fp32", "auto", True)
    calls = [e for e in events if isinstance(e, dispatch.Event)]  # beside them: what other operators compose
    served = {e.selection.implementation.backend for e in calls}
    assert served == {"cpu"}, served
    assert len(calls) >= sum(len(_directions(module, case)) for case in module.CASES)


@needs_cpu_kernels
@each
def test_strict_backward_never_reaches_aten(f: Function) -> None:
    tensors = f.tensors(torch.float32, grad=True)
    with cnnfast.strict(), NoConvolution():
        out = f.ours(*tensors)
        first = torch.autograd.grad(out.sin().sum(), tensors, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), tensors)


def test_strict_without_a_kernel_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in ("cpu", "cuda", "triton"):
        monkeypatch.setitem(
            dispatch._backends, backend, dispatch.Backend(backend, lambda p, b=backend: [f"{b} is away"], [])
        )
    x, w = torch.randn(1, 3, 5, 9), torch.randn(2, 3, 3, 3)
    with cnnfast.strict(), pytest.raises(NotImplementedError) as raised:
        functional.conv2d(x, w)
    for words in ("conv2d fprop f32 on cpu", "W=9", "cpu is away", "aten: strict() is set"):
        assert words in str(raised.value)
    torch.testing.assert_close(functional.conv2d(x, w), torch.conv2d(x, w))  # without strict ATen serves


@needs_cpu_kernels
def test_pinned_kernel_serves_what_it_has_and_its_backend_the_rest() -> None:
    """A pinned kernel holds in backward, too; directions that have no such kernel aren't an error."""
    for implementation in dispatch.implementations("conv2d"):
        if process.not_here(implementation) or implementation.direction != "fprop":
            continue
        sizes = [
            (8, 6, 2, (3, 3), 1),
            (8, 6, 4, (3, 3), 1),
            *((64, 35, 1, taps, 1) for taps in ((3, 3), (5, 5), (1, 3), (1, 7))),
            (64, 35, 1, (3, 3), 2),
        ]
        for channels, size, groups, taps, stride in sizes:  # one of them fits any kernel
            dtype = torch.float32 if "f32" in implementation.dtypes else dispatch.TORCH_DTYPES[implementation.dtypes[0]]
            shapes = ((1, channels, size, size), (channels, channels // groups, *taps), (channels,))
            x, w, b = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
            case = conv2d.Case("", 1, channels, size, size, channels, *taps, (stride, stride), groups=groups)
            if not dispatch.reasons_against(implementation, conv2d.problem(case, "fprop", dtype, "fp32")):
                break
        with cnnfast.backend(implementation.name), settings.observe() as events:
            functional.conv2d(x, w, b, stride, groups=groups).sum().backward()
        first = events[0].selection.implementation
        assert first.name == implementation.name
        assert {e.selection.implementation.backend for e in events} == {implementation.backend}


# ---- settings --------------------------------------------------------------------------------------------------------


def test_settings_are_saved_for_backward() -> None:
    """Backward runs under the settings of the forward call, wherever it is called."""
    x, w = torch.randn(1, 3, 5, 5, requires_grad=True), torch.randn(2, 3, 3, 3, requires_grad=True)
    with cnnfast.backend("aten"):
        out = functional.conv2d(x, w)
    with settings.observe() as events:
        out.sum().backward()
    assert events
    assert {e.selection.implementation.backend for e in events} == {"aten"}


def test_settings_reject_nonsense_and_are_restored() -> None:
    for bad in ("gpu", "", "ATEN", 3):
        with pytest.raises(ValueError, match="backend"):
            cnnfast.backend(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision"):
        cnnfast.precision("tf32")
    before = settings.state()
    inside = []

    def fails() -> None:
        with cnnfast.backend("aten"), cnnfast.precision("ieee"), cnnfast.strict():
            inside.append(settings.state())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert inside == [("aten", "ieee", True)]
    assert settings.state() == before


# ---- subclasses and modes --------------------------------------------------------------------------------------------


class Loud(torch.Tensor):
    """A subclass that counts the functions it passes through."""

    seen: list[Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Loud.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("position", [0, 1, 2])
def test_torch_function(position: int) -> None:
    """__torch_function__ has its say for each operand, sees our function itself, and gets the subclass back."""
    Loud.seen = []
    tensors: list[Any] = [torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)]
    expected = torch.conv2d(*tensors, padding=1)
    tensors[position] = tensors[position].as_subclass(Loud)
    out = functional.conv2d(*tensors, padding=1)
    assert type(out) is Loud
    assert functional.conv2d in Loud.seen
    torch.testing.assert_close(out.as_subclass(torch.Tensor), expected)


def test_torch_function_mode() -> None:
    """What FX-like tracers do: a mode that records functional.conv2d by name."""
    seen = []

    class Recorder(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Recorder():
        functional.conv2d(torch.randn(1, 3, 5, 5), torch.randn(4, 3, 3, 3))
    assert functional.conv2d in seen


class Wrapped(torch.Tensor):
    """A wrapper subclass as quantisation and distributed tensors are: everything through __torch_dispatch__."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(v: Any) -> Any:
            return v.inner if isinstance(v, cls) else v

        out = func(*torch.utils._pytree.tree_map(unwrap, args), **torch.utils._pytree.tree_map(unwrap, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda v: cls(v) if isinstance(v, torch.Tensor) else v, out)


def test_wrapper_subclass() -> None:
    """No kernel may touch the memory of a subclass that has none."""
    x, w, b = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    out = functional.conv2d(Wrapped(x), Wrapped(w), b, padding=1)
    assert type(out) is Wrapped
    torch.testing.assert_close(out.inner, torch.conv2d(x, w, b, padding=1))


def test_lazy_views_are_resolved() -> None:
    """Negative views and zero tensors have other values than their memory, or no memory."""
    x, w, b = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    zero = torch._efficientzerotensor((2, 3, 5, 5))
    complex_weight = torch.randn(4, 3, 3, 3, dtype=torch.cfloat)
    for a, c, d in ((torch._neg_view(x), w, b), (x, torch._neg_view(w), b), (x, w, torch._neg_view(b)), (zero, w, b),
                    (x, complex_weight.conj().imag, b)):  # fmt: skip
        torch.testing.assert_close(functional.conv2d(a, c, d), torch.conv2d(a, c, d))


def test_inference_mode_and_no_grad() -> None:
    x, w = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    with torch.inference_mode():
        out = functional.conv2d(x, w)
        assert out.is_inference()
    with torch.no_grad():
        assert not functional.conv2d(x, w).requires_grad
    assert functional.conv2d(x, w).requires_grad
    torch.testing.assert_close(out.clone(), torch.conv2d(x, w))


def test_default_dtype_and_device_contexts() -> None:
    """Ambient defaults of torch don't leak into our results."""
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    expected = torch.conv2d(x, w)
    torch.set_default_dtype(torch.float64)
    try:
        assert functional.conv2d(x, w, padding=0).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        out = functional.conv2d(x, w, padding=(0, 0), stride=(1, 1))
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("seen", [True, False], ids=["call seen before", "call not seen before"])
def test_device_context_in_backward(seen: bool) -> None:
    x, w, b = (
        torch.randn(2, 3, 5 + seen, 5, requires_grad=True),
        torch.randn(4, 3, 3, 3, requires_grad=True),
        torch.randn(4),
    )
    expected = torch.autograd.grad(torch.conv2d(x, w, b).sum(), (x, w))
    if seen:
        functional.conv2d(x, w, b).sum().backward()
    with torch.device("meta"):
        gradients = torch.autograd.grad(functional.conv2d(x, w, b).sum(), (x, w))
    torch.testing.assert_close(gradients, expected)


def test_deterministic_algorithms() -> None:
    """use_deterministic_algorithms(True) rejects nothing of ours and changes nothing: all of it is deterministic."""
    x, w, b = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 3, 3), torch.randn(16)
    before = functional.conv2d(x, w, b)
    torch.use_deterministic_algorithms(True)
    try:
        a, c, d = (t.clone().requires_grad_() for t in (x, w, b))
        out = functional.conv2d(a, c, d)
        out.sum().backward()
        assert torch.equal(out, before)
    finally:
        torch.use_deterministic_algorithms(False)


def test_profiler_sees_the_operator() -> None:
    x, w = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    functional.conv2d(x, w)
    with torch.profiler.profile() as profile:
        functional.conv2d(x, w)
    assert any(e.key == "cnnfast::conv2d" for e in profile.key_averages())


def test_gradient_operators_check_their_arguments() -> None:
    """Called directly, they may not read beyond their operands either."""
    w, g, x = torch.randn(6, 4, 3, 3), torch.randn(2, 6, 5, 6), torch.randn(2, 4, 5, 6)
    ops = torch.ops.cnnfast
    bad: list[Callable[[], Any]] = [
        lambda: ops.conv2d_dgrad(w, g, [2, 4, 9, 6], False, *_CONV),
        lambda: ops.conv2d_dgrad(w, g[:, :5], [2, 4, 5, 6], False, *_CONV),
        lambda: ops.conv2d_dgrad(w, g, [2, 3, 5, 6], False, *_CONV),
        lambda: ops.conv2d_dgrad(w, g.double(), [2, 4, 5, 6], False, *_CONV),
        lambda: ops.conv2d_dgrad(w, g, [2, 4, 5], False, *_CONV),
        lambda: ops.conv2d_dgrad(w, g, [2, 4, 5, 6], False, (0, 1), *_CONV[1:]),
        lambda: ops.conv2d_wgrad(x, g, [6, 4, 5, 3], False, *_CONV),
        lambda: ops.conv2d_wgrad(x, g[:1], [6, 4, 3, 3], False, *_CONV),
        lambda: ops.conv2d_wgrad(x[0], g, [6, 4, 3, 3], False, *_CONV),
        lambda: ops.conv2d_wgrad(x, g, [6, 4, 3, 3], False, *_CONV[:3], 0, *_CONV[4:]),
        lambda: ops.conv2d_wgrad(x, g, [6, 4, 3, 3], False, *_CONV[:3], 4, *_CONV[4:]),
        lambda: ops.conv2d_bgrad(g[0], "fp32", "auto", False),
        lambda: ops.conv2d(x[0], w, None, *_CONV),
        lambda: ops.conv2d(x, w, torch.randn(7), *_CONV),
        lambda: ops.conv2d(x, w[:, :3], None, *_CONV),
    ]
    for number, call in enumerate(bad):
        try:
            call()
        except (ValueError, TypeError, RuntimeError, IndexError):
            continue
        pytest.fail(f"call {number} was accepted")


@needs_cpu_kernels
def test_autocast_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Casts are functional's: under it operators go to their kernels as without, and weights are cast once a call."""
    x, w = (torch.randn(s).to(memory_format=CL) for s in ((2, 4, 5, 6), (6, 4, 3, 3)))
    weight = w.clone().requires_grad_()
    expected = functional.conv2d(x.bfloat16(), w.bfloat16(), None, 1, 1)
    monkeypatch.setattr(cnnfast.ops.conv2d, "op", None)  # what the dispatcher would call
    casts: list[torch.dtype] = []
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: (casts.append(t.dtype), to(t, *a, **k))[1])
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            y = functional.conv2d(x, w, None, 1, 1)
        assert casts == [torch.float32] * 2
        functional.conv2d(x, weight, None, 1, 1).float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
