"""Random valid and invalid calls of batch_norm, add_act and conv_bn_act: torch's verdict, shape, strides; float64's values."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import oracle, process
from support.verdict import outcome

from cnnfast.functional import add_act, batch_norm, conv_bn_act

pytestmark = pytest.mark.skipif(
    process.EMULATED or process.INTERPRETED, reason="needs no kernel: the plain process runs it"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda z: z, "relu": torch.relu, "relu6": F.relu6, "leaky_relu": F.leaky_relu,
}  # fmt: skip


def _tensor(chance: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Of that shape, dense in either format, a slice, or expanded."""
    how = chance.random()
    if how < 0.15:
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    if how < 0.25 and len(shape) > 1:
        return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
    x = torch.randn(shape).to(dtype)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 and how < 0.65 else x


def _vector(chance: random.Random, n: int, dtype: torch.dtype, positive: bool = False) -> torch.Tensor | None:
    """A vector of n, in one call of twelve of n + 1, in one of three none."""
    if chance.random() < 0.33:
        return None
    v = torch.randn(n + (chance.random() < 0.08))
    return (v.abs() + 0.1 if positive else v).to(dtype)


def _wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        a.detach().double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )  # fmt: skip


def _leaves(args: tuple[Any, ...], which: tuple[int, ...]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The arguments, those of ``which`` recording gradients, running statistics as copies."""
    found = [a.detach().clone() if isinstance(a, torch.Tensor) and i not in which else a for i, a in enumerate(args)]
    leaves = []
    for i in which:
        if isinstance(found[i], torch.Tensor):
            found[i] = found[i].detach().requires_grad_()
            leaves.append(found[i])
    return tuple(found), leaves


def _close(
    what: str, ours: torch.Tensor, torchs: torch.Tensor, ref: torch.Tensor, roundings: float, least: float = 1e-3,
    beyond: float = 0.0,
) -> None:  # fmt: skip
    """Within 3 times torch's error against float64, so many roundings of the largest value, ``least`` at least, and
    ``beyond`` that."""
    assert (ours.shape, ours.dtype) == (torchs.shape, torchs.dtype), what
    if not ours.numel():
        return
    finite = ref.isfinite()
    oracle.check_nonfinite(what, ours, torchs, ref)
    error, own = ((t.double() - ref)[finite].abs().amax() if bool(finite.any()) else 0 for t in (ours, torchs))
    scale = float(ref[finite].abs().amax()) if bool(finite.any()) else 0.0
    if ours.dtype == torch.float64:
        roundings *= 16  # the reference has as many of its own, and a small variance multiplies them
    bound = 3 * float(own) + roundings * oracle.ROUND_OFF[ours.dtype] * max(scale, least) + beyond
    assert float(error) <= bound, f"{what}: error {float(error):.3g} > {bound:.3g}"


def _condition(x: Any, training: bool, eps: float = 1e-5) -> float:
    """What a rounding of x, or of its mean, is multiplied with in training: |x| over the standard deviation."""
    if not training or not isinstance(x, torch.Tensor) or x.dim() < 2 or x.numel() <= x.shape[1]:
        return 1.0
    wide, dims = x.double(), [d for d in range(x.dim()) if d != 1]
    return max(1.0, float((wide.abs().amax(dims) / (wide.var(dims, correction=0) + eps).sqrt()).amax()))


def _compare(
    what: str, ours: Callable[..., Any], torchs: Callable[..., Any], args: tuple[Any, ...], which: tuple[int, ...],
    roundings: float, documented: bool = False, beyond: float = 0.0,
) -> bool:  # fmt: skip
    """Whether both accepted: then values and gradients (of the arguments ``which``) are float64's, and, where torch has
    the operation (``documented``), strides are torch's. ``roundings`` and ``beyond``: of :func:`_close`."""
    x = args[0]
    (a, a_leaves), (b, b_leaves) = _leaves(args, which), _leaves(args, which)
    y, z = outcome(ours, a, {}), outcome(torchs, b, {})
    if isinstance(z, Exception):
        assert isinstance(y, (ValueError, TypeError, RuntimeError, NotImplementedError)), f"{what}: torch rejects: {z}"
        return False
    if isinstance(y, ValueError) and not documented and not z.numel():
        return False  # torch's sequence looks at no vector where there is nothing to normalise; ours does
    assert not isinstance(y, Exception), f"{what}: torch gives {tuple(z.shape)}, ours {y!r}"
    documented = documented and min(y.shape) > 1  # else several strides describe one layout
    assert not documented or y.stride() == z.stride(), f"{what}: strides {y.stride()}, torch {z.stride()}"
    c, c_leaves = _leaves(_wide(args), which)
    ref = torchs(*c)
    _close(what, y.detach(), z.detach(), ref.detach(), roundings, beyond=beyond)
    for index, (one, other, wide) in enumerate(zip(a, b, c, strict=True)):
        if isinstance(one, torch.Tensor) and not one.requires_grad:  # what training wrote into the running statistics
            # a mean of values that cancel has roundings of these, not of what is left
            summed = x[x.isfinite()].abs() if ours is batch_norm and index == 1 else x.new_zeros(0)
            least = max(1e-3, float(summed.amax()) if summed.numel() else 0.0)
            _close(f"{what}: statistics", one, other, wide, roundings, least)
    if a_leaves and y.numel() and y.requires_grad:
        g = torch.randn(y.shape).to(y.dtype)
        gradients = [
            torch.autograd.grad(out, leaves, g.to(out.dtype), allow_unused=True)
            for out, leaves in ((y, a_leaves), (z, b_leaves), (ref, c_leaves))
        ]
        for index, (one, other, wide) in enumerate(zip(*gradients, strict=True)):
            assert (one is None) == (other is None)
            if one is not None:
                assert not documented or one.stride() == other.stride(), f"{what}: gradient {index}, strides"
                # sums of products that cancel: roundings of what they are made of, not of what is left
                _close(f"{what}: gradient {index}", one, other, wide, 16 * roundings + y.numel() ** 0.5, 0.1)
    return True


def _torch_conv(x: Any, w: Any, b: Any, *conv: Any) -> torch.Tensor:
    """torch's convolution in float64, rounded: in fp32 and below 2.14 crashes on dilated filters that see only padding."""
    wide = F.conv2d(x.double().contiguous(), w.double(), None if b is None else b.double(), *conv)
    return wide.to(x.dtype)


def _convolution_error(args: tuple[Any, ...], conv: tuple[Any, ...], training: bool, eps: float = 1e-5) -> float:
    """What rounding a convolution's sums of n products, and the sum itself, can do to what batch norm makes of it.

    A sum z is off by (n u' + u) |x| * |w|, u' being the round-off of accumulators, and 3 times that by algorithms of mode
    "fp32". Batch norm multiplies that by |w| / sd; in training the mean and sd of its channel are off as much, the latter
    times (z - mean) / sd.
    """
    x, w, b, mean, var, gamma = _wide(args[:6])
    n = w[0].numel() + (b is not None)
    magnitude = F.conv2d(x.abs(), w.abs(), None if b is None else b.abs(), *conv)
    if not magnitude.numel():
        return 0.0
    u = oracle.ROUND_OFF[args[0].dtype]
    error = 3 * (n * min(u, oracle.ROUND_OFF[torch.float32]) + u) * magnitude.amax((0, 2, 3))
    far = 0.0 * error
    if training:
        z = F.conv2d(x, w, b, *conv)
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
        far = 1 + ((z - mean[:, None, None]).abs() / (var[:, None, None] + eps).sqrt()).amax((0, 2, 3))
    error = error * (1 + far) / (var + eps).sqrt()
    return float((error if gamma is None else error * gamma.abs()).amax())


def test_fuzz_batch_norm() -> None:
    chance = random.Random(process.SEED)
    torch.manual_seed(process.SEED)
    accepted = 0
    for call in range(process.FUZZ_CALLS):
        C, dims = chance.choice([1, 2, 3, 8, 17, 33]), chance.choice([2, 3, 4, 4, 4, 5])
        shape = (chance.choice([0, 1, 2, 3]), C, *(chance.randint(1, 6) for _ in range(dims - 2)))
        dtype = chance.choice(DTYPES)
        narrow = dtype in (torch.bfloat16, torch.float16)
        vectors = torch.float32 if narrow and chance.random() < 0.6 else dtype
        x = _tensor(chance, shape, dtype)
        args = (
            x, _vector(chance, C, vectors), _vector(chance, C, vectors, positive=True), _vector(chance, C, vectors),
            _vector(chance, C, vectors), chance.random() < 0.5, chance.choice([0.1, 0.0, 1.0]),
            chance.choice([1e-5, 1e-3]),
        )  # fmt: skip
        what = f"call {call}: {shape} {dtype} {[None if a is None else getattr(a, 'shape', a) for a in args[1:]]}"
        roundings = 8 * _condition(x, args[5], args[7])
        accepted += _compare(what, batch_norm, F.batch_norm, args, (0, 3, 4), roundings, documented=True)
    assert accepted > process.FUZZ_CALLS // 5


def test_fuzz_add_act() -> None:
    chance = random.Random(process.SEED)
    torch.manual_seed(process.SEED)
    accepted = 0
    for call in range(process.FUZZ_CALLS):
        shape = tuple(chance.choice([0, 1, 2, 3, 5, 16, 33]) for _ in range(chance.choice([1, 2, 3, 4, 4, 4])))
        other = tuple(n if chance.random() < 0.93 else chance.choice([1, n, n + 1]) for n in shape)
        dtype = chance.choice(DTYPES)
        a = _tensor(chance, shape, dtype)
        b = _tensor(chance, other, dtype if chance.random() < 0.9 else chance.choice(DTYPES))
        name = chance.choice([*ACTS])
        what = f"call {call}: {shape} {a.stride()} {a.dtype}, {other} {b.stride()} {b.dtype}, {name}"
        accepted += _compare(
            what, lambda a, b, name=name: add_act(a, b, name), lambda a, b, name=name: ACTS[name](a + b), (a, b), (0, 1), 2
        )  # fmt: skip
    assert accepted > process.FUZZ_CALLS // 4
    with pytest.raises(ValueError, match="activation"):
        add_act(torch.ones(2), torch.ones(2), "sine")


def test_fuzz_conv_bn_act() -> None:
    chance = random.Random(process.SEED)
    torch.manual_seed(process.SEED)
    accepted = 0
    for call in range(process.FUZZ_CALLS):
        dtype = chance.choice(DTYPES)
        groups = chance.choice([1, 1, 1, 2, 4])
        C, K = groups * chance.choice([1, 3, 8]), groups * chance.choice([1, 2, 5, 16])
        R, S = chance.randint(1, 3), chance.randint(1, 3)
        H, W = chance.randint(1, 8), chance.randint(1, 8)
        stride, padding = chance.randint(1, 3), chance.choice([0, 1, (2, 0), "same", "valid"])
        dilation = chance.choice([1, 1, 2])
        x = _tensor(chance, (chance.choice([0, 1, 2]), C, H, W), dtype)
        w = (torch.randn(K, C // groups + (chance.random() < 0.05), R, S) / 3).to(dtype)
        vectors = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        mean, var = torch.randn(K).to(vectors), (torch.rand(K) + 0.2).to(vectors)
        training = chance.random() < 0.2
        bias = None if chance.random() < 0.5 else torch.randn(K).to(dtype)
        gamma, beta = _vector(chance, K, vectors), _vector(chance, K, vectors)
        name = chance.choice([*ACTS])
        probe = outcome(_torch_conv, (x, w, None, stride, padding, dilation, groups), {})
        residual = None
        if isinstance(probe, torch.Tensor) and chance.random() < 0.4:
            residual = torch.randn_like(probe)
        conv: tuple[Any, ...] = (stride, padding, dilation, groups)

        def ours(x: Any, w: Any, b: Any, m: Any, v: Any, gamma: Any, beta: Any, r: Any) -> torch.Tensor:
            return conv_bn_act(x, w, b, m, v, gamma, beta, r, name, *conv, training=training)  # noqa: B023

        def torchs(x: Any, w: Any, b: Any, m: Any, v: Any, gamma: Any, beta: Any, r: Any) -> torch.Tensor:
            z = F.batch_norm(_torch_conv(x, w, b, *conv), m, v, gamma, beta, training)  # noqa: B023
            return ACTS[name](z if r is None else z + r)  # noqa: B023

        what = f"call {call}: {tuple(x.shape)} {x.stride()} {dtype} * {tuple(w.shape)}, {conv}, {name}, training {training}"
        args = (x, w, bias, mean, var, gamma, beta, residual)
        valid = isinstance(outcome(torchs, (*args[:3], mean.clone(), var.clone(), *args[5:]), {}), torch.Tensor)
        beyond = _convolution_error(args, conv, training) if valid else 0.0
        accepted += _compare(what, ours, torchs, args, (), 8, beyond=beyond)
    assert accepted > process.FUZZ_CALLS // 4
