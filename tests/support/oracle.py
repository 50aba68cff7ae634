"""The accuracy contract: out may be as far from float64 as torch is, times m, plus one rounding of the output.

    ‖out - ref‖ <= m ‖torch - ref‖ + u ‖ |x| * |w| ‖      for the maximum and the root mean square of each tensor

``ref`` is torch in float64 on inputs already rounded to the dtype, ``torch`` the same call in that dtype, u the unit
round-off of the output, m what the implementation claims (:attr:`Implementation.error_bound`). In mode "ieee", which
allows any order of plain fp32 additions, and in float64, where torch is its own reference, the random walk of that many
roundings, sqrt(depth) u ‖ |x| * |w| ‖, is added to torch's error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ROUND_OFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32_ROUND_OFF = 2.0**-10  # truncated, as tensor cores read plain fp32
NORMS: dict[str, Callable[[torch.Tensor], float]] = {
    "max": lambda t: float(t.abs().max()),
    "rms": lambda t: float(t.square().mean().sqrt()),
}


def check(
    what: str,
    out: torch.Tensor,
    ref: torch.Tensor,
    torch_out: torch.Tensor,
    magnitude: torch.Tensor,
    m: float = 3.0,
    precision: str = "fp32",
    depth: int = 1,
) -> None:
    """Fails naming the worst element, both values and both sides of the bound.

    Args:
        what: The call and why it is tested.
        out: What is tested.
        ref: The same in float64.
        torch_out: torch's own result in the dtype.
        magnitude: The sum of the absolute products, in float64.
        m: The factor on torch's own error.
        precision: The mode; in "high" operands may be rounded to tf32.
        depth: The length of the sums.
    """
    assert out.shape == ref.shape, f"{what}: shape {tuple(out.shape)}, torch gives {tuple(ref.shape)}"
    assert out.dtype == torch_out.dtype, f"{what}: dtype {out.dtype}, torch gives {torch_out.dtype}"
    if out.numel() == 0:
        return
    ref, magnitude = ref.cpu(), magnitude.cpu()
    error, own = (out.cpu().double() - ref).abs(), (torch_out.cpu().double() - ref).abs()
    u = ROUND_OFF[out.dtype]
    rounding = u + (2 * TF32_ROUND_OFF if precision == "high" and out.dtype == torch.float32 else 0.0)
    if out.dtype == torch.float64 or precision == "ieee":
        own = own + depth**0.5 * u * magnitude
    worst = int(torch.nan_to_num(error, nan=float("inf")).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    element = (
        f"worst at {where}: got {float(out[where]):.9g}, float64 {float(ref[where]):.9g}, "
        f"torch {float(torch_out[where]):.9g}"
    )
    for name, norm in NORMS.items():
        bound = m * norm(own) + rounding * norm(magnitude)
        got = norm(error)
        assert got <= bound, (
            f"{what}: {name} error {got:.3g} > {bound:.3g} = {m} * {norm(own):.3g} + rounding; {element}"
        )


def check_sums(
    what: str, out: torch.Tensor, ref: torch.Tensor, magnitude: torch.Tensor, terms: torch.Tensor, m: float = 3.0
) -> None:
    """Fails where a tensor of sums of products is farther from float64 than rounding explains, whatever torch gives.

    A sum of n products rounds each product and each addition: |out - ref| <= n u sum |x| |w| in any order, by maximum and
    to the first order. m, at most 3, is what the algorithms of mode "fp32" may take beyond it (``error_bound``).

    Args:
        what: The call.
        out: What is tested.
        ref: The same in float64.
        magnitude: The sums of the absolute products, in float64.
        terms: How many products each sum has.
        m: The factor on the bound.
    """
    if out.numel() == 0:
        return
    error = float((out.double() - ref).abs().nan_to_num(nan=float("inf")).max())
    bound = m * (float(terms.max()) + 1) * ROUND_OFF[out.dtype] * float(magnitude.max())
    assert error <= bound, (
        f"{what}: error {error:.3g} > {bound:.3g} = {m} * ({float(terms.max()):g} + 1) u max |x| * |w|"
    )


def check_nonfinite(what: str, out: torch.Tensor, *accepted: torch.Tensor, signs: float = 0.0) -> None:
    """Fails where out isn't NaN, inf, -inf or finite as one of the accepted results is.

    ``signs``: this share of the elements may be inf, -inf or finite where another of these is expected: times an infinite
    scale, the sign of a sum that rounding leaves of 0 decides.
    """
    kinds = [_kind(t) for t in accepted]
    got = _kind(out)
    wrong = torch.stack([got != k for k in kinds]).all(0)
    nan = torch.stack([wrong & ((got == 3) | (k == 3)) for k in kinds]).any(0)
    if bool(nan.any()) or int(wrong.sum()) > signs * wrong.numel():
        where = tuple(int(i) for i in wrong.nonzero()[0])
        torchs = ", ".join(f"{float(t[where]):.9g}" for t in accepted)
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {out.numel()} elements are NaN, infinite or finite where torch's aren't; "
            f"first at {where}: got {float(out[where]):.9g}, torch {torchs}"
        )


def _kind(t: torch.Tensor) -> torch.Tensor:
    t = t.cpu()
    return t.isnan() * 3 + t.isposinf() * 1 + t.isneginf() * 2
