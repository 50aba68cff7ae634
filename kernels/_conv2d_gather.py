"""Device code of conv2d_implicit_gemm's fprop and dgrad, which both gather; the launchers' file says what it computes."""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate, activate_gradient
from ._batch_norm import _factors, _normalised
from ._common import narrow, widen
from ._conv2d_norm import batch_normed, gradient_sums, tile_statistics
from ._gemm import NOWHERE, accumulate, on_map, tile_order, wide


@triton.jit
def _phase_taps(phase, taps, stride, pad, dilation, gcd, inverse):
    """The taps of one axis that reach the output pixels phase, phase + stride, …: first + j * every, j < count.

    ``(phase + pad - r * dilation) % stride == 0`` is a linear congruence: it has solutions iff gcd(stride, dilation)
    divides phase + pad, and then one in each ``stride / gcd`` taps. Also returns the source pixel of the first.
    """
    shift = phase + pad
    every = stride // gcd
    first = (shift // gcd) % every * inverse % every
    count = tl.where(shift % gcd == 0, tl.maximum(0, (taps - first + every - 1) // every), 0)
    return first, every, count, (shift - first * dilation) // stride


@triton.jit
def _product(
    acc, src, weight, base, src_i, src_j, in_m, in_n, lane, w_lane, w_channel, own, only, group_channel, mean, invstd, gamma, beta,
    count_r, count_s, c_src, src_h, src_w, step_h, step_w, src_row, src_col, w_src, w_r, w_s,
    LINEAR: tl.constexpr, EVEN_K: tl.constexpr, NORM_SOURCE: tl.constexpr, NORM_ACT: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + the sum over taps and channels; own and only, where they are given, mask weights and source channels."""
    # One loop over taps and channels, so that loads are in flight across the change of the tap.
    blocks = tl.cdiv(c_src, BLOCK_K)
    c0 = 0
    r = 0
    s = 0
    for _ in range(0, count_r * count_s * blocks):
        if LINEAR:
            valid = in_m
            offset = c0
        else:
            i = src_i + r * step_h
            j = src_j + s * step_w
            valid = on_map(i, src_h) & on_map(j, src_w)
            offset = r * step_h * src_row + s * step_w * src_col + c0
        a_ptrs = src + offset + (base[:, None] + lane[None, :])
        b_ptrs = weight + (r * w_r + s * w_s + c0 * w_src) + (w_lane[:, None] + w_channel[None, :])
        if EVEN_K:
            a = tl.load(a_ptrs, mask=valid[:, None], other=0.0)
            b = tl.load(b_ptrs, mask=in_n[None, :], other=0.0)
        elif own is not None:
            in_k = lane < c_src
            if only is not None:
                in_k &= only
            a = tl.load(a_ptrs, mask=valid[:, None] & in_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=in_k[:, None] & in_n[None, :] & own, other=0.0)
        else:
            in_k = c0 + lane < c_src
            a = tl.load(a_ptrs, mask=valid[:, None] & in_k[None, :], other=0.0)
            b = tl.load(b_ptrs, mask=in_k[:, None] & in_n[None, :], other=0.0)
        if NORM_SOURCE:
            c = c0 + lane
            a = batch_normed(
                a, valid[:, None] & (c < c_src)[None, :], group_channel + c, c < c_src, mean, invstd, gamma, beta,
                NORM_ACT, BY_HAND,
            )  # fmt: skip
        acc = accumulate(a, b, acc, INPUT_PRECISION, BY_HAND)
        c0 += BLOCK_K
        tap_done = c0 >= c_src
        c0 = tl.where(tap_done, 0, c0)
        s = tl.where(tap_done, s + 1, s)
        row_done = s >= count_s
        r = tl.where(row_done, r + 1, r)
        s = tl.where(row_done, 0, s)
    return acc


@triton.jit(do_not_specialize=["batch", "out_h", "out_w", "src_h", "src_w", "taps_r", "taps_s", "pad_h", "pad_w"])
def _gather_gemm(
    src, weight, bias, scale, shift, residual, mean, invstd, gamma, beta, sums, out,
    batch, out_h, out_w, src_h, src_w, c_src, c_out, groups, taps_r, taps_s,
    stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, gcd_h, gcd_w, inverse_h, inverse_w,
    each_src, each_out, wrap_src, wrap_out,
    src_n, src_row, src_col, w_group, w_src, w_out, w_r, w_s, out_n, out_row, out_col, res_n, res_row, res_col,
    ACT: tl.constexpr, TRANSPOSED: tl.constexpr, LINEAR: tl.constexpr, PACKED: tl.constexpr, EVEN_K: tl.constexpr,
    DIAGONAL: tl.constexpr, NORM_ACT: tl.constexpr, NORM_SOURCE: tl.constexpr, NORM_RESULT: tl.constexpr,
    HAS_BIAS: tl.constexpr, INT64: tl.constexpr, INPUT_PRECISION: tl.constexpr, BY_HAND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Phases and groups vary fastest: neighbours read and write interleaved parts of the same cache lines.
    pid = tl.program_id(0)
    group = pid % groups
    pid = pid // groups
    if TRANSPOSED:
        num_phases = stride_h * stride_w
        phase = pid % num_phases
        pid = pid // num_phases
        phase_h = phase // stride_w
        phase_w = phase % stride_w
        out_step_h = stride_h
        out_step_w = stride_w
        first_r, every_r, count_r, off_h = _phase_taps(phase_h, taps_r, stride_h, pad_h, dilation_h, gcd_h, inverse_h)
        first_s, every_s, count_s, off_w = _phase_taps(phase_w, taps_s, stride_w, pad_w, dilation_w, gcd_w, inverse_w)
        mul_h = 1
        mul_w = 1
        step_h = -(every_r * dilation_h // stride_h)
        step_w = -(every_s * dilation_w // stride_w)
        rows = (out_h - phase_h + stride_h - 1) // stride_h
        cols = (out_w - phase_w + stride_w - 1) // stride_w
        num_m = tl.cdiv(batch * tl.cdiv(out_h, stride_h) * tl.cdiv(out_w, stride_w), BLOCK_M)
        weight += first_r * w_r + first_s * w_s
        w_r *= every_r
        w_s *= every_s
    else:
        num_phases = 1
        phase = 0
        phase_h = 0
        phase_w = 0
        out_step_h = 1
        out_step_w = 1
        count_r = taps_r
        count_s = taps_s
        mul_h = stride_h
        mul_w = stride_w
        off_h = -pad_h
        off_w = -pad_w
        step_h = dilation_h
        step_w = dilation_w
        rows = out_h
        cols = out_w
        num_m = tl.cdiv(batch * out_h * out_w, BLOCK_M)
    tile_m, tile_n = tile_order(pid, num_m, tl.cdiv(c_out, BLOCK_N), GROUP_M)

    src_n, src_row, src_col = wide(INT64, src_n, src_row, src_col)
    out_n, out_row, out_col = wide(INT64, out_n, out_row, out_col)
    res_n, res_row, res_col = wide(INT64, res_n, res_row, res_col)
    w_group, w_src, w_out = wide(INT64, w_group, w_src, w_out)
    w_r, w_s, _ = wide(INT64, w_r, w_s, 0)

    pixel = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    channel = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    in_m = pixel < batch * rows * cols
    in_n = channel < c_out
    if LINEAR:
        base = pixel * src_col
    else:
        # A phase can be empty (stride beyond the map): it divides by one then, under an all-false mask.
        image = pixel // tl.maximum(rows * cols, 1)
        rest = pixel - image * (rows * cols)
        row = rest // tl.maximum(cols, 1)
        col = rest - row * cols
        src_i = tl.where(in_m, row * mul_h + off_h, NOWHERE)  # off the map for every tap
        src_j = col * mul_w + off_w
        base = image * src_n + (row * mul_h + off_h) * src_row + src_j * src_col
    src += group * c_src
    weight += group * w_group
    w_channel = channel * w_out

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if PACKED:
        depth = count_r * count_s * c_src
        for k0 in range(0, depth, BLOCK_K):
            k = k0 + lane
            tap = k // c_src
            c = k - tap * c_src
            r = tap // tl.maximum(count_s, 1)
            s = tap - r * count_s
            in_k = k < depth
            i = src_i[:, None] + (r * step_h)[None, :]
            j = src_j[:, None] + (s * step_w)[None, :]
            valid = on_map(i, src_h) & on_map(j, src_w) & in_k[None, :]
            offset = r * step_h * src_row + s * step_w * src_col + c
            a = tl.load(src + (base[:, None] + offset[None, :]), mask=valid, other=0.0)
            w_offset = r * w_r + s * w_s + c * w_src
            b = tl.load(
                weight + (w_offset[:, None] + w_channel[None, :]), mask=in_k[:, None] & in_n[None, :], other=0.0
            )
            acc = accumulate(a, b, acc, INPUT_PRECISION, BY_HAND)
    else:
        own = None
        w_lane = lane * w_src
        if DIAGONAL:
            # Several groups in a tile: the weights are its diagonal blocks, zeros beside them.
            own = (lane // each_src)[:, None] == (channel // each_out)[None, :]
            w_lane = lane % wrap_src * w_src
            w_channel = channel % wrap_out * w_out
        i = 0
        j = 0
        if not LINEAR:
            i = src_i
            j = src_j
        acc = _product(
            acc, src, weight, base, i, j, in_m, in_n, lane, w_lane, w_channel, own, None, group * c_src,
            mean, invstd, gamma, beta,
            count_r, count_s, c_src, src_h, src_w, step_h, step_w, src_row, src_col, w_src, w_r, w_s,
            LINEAR, EVEN_K, NORM_SOURCE, NORM_ACT, INPUT_PRECISION, BY_HAND, BLOCK_K,
        )  # fmt: skip
        if DIAGONAL:  # noqa: SIM102
            # A zero times what isn't finite would reach the other groups: these are rare, and computed one by one.
            if tl.sum(tl.sum((acc - acc != 0.0).to(tl.int32), axis=1), axis=0) > 0:
                for g in range(0, c_src // each_src):
                    one = _product(
                        tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
                        src, weight, base, i, j, in_m, in_n, lane, w_lane, w_channel, own, lane // each_src == g,
                        group * c_src, mean, invstd, gamma, beta,
                        count_r, count_s, c_src, src_h, src_w, step_h, step_w, src_row, src_col, w_src, w_r, w_s,
                        LINEAR, EVEN_K, NORM_SOURCE, NORM_ACT, INPUT_PRECISION, BY_HAND, BLOCK_K,
                    )  # fmt: skip
                    acc = tl.where((channel // each_out == g)[None, :], one, acc)

    if HAS_BIAS:
        b = tl.load(bias + group * c_out + channel, mask=in_n, other=0.0)
        acc += widen(b, BY_HAND).to(tl.float32)[None, :]
    if scale is not None:
        acc *= tl.load(scale + group * c_out + channel, mask=in_n, other=0.0)[None, :]
    if shift is not None:
        acc += tl.load(shift + group * c_out + channel, mask=in_n, other=0.0)[None, :]
    inside = in_m[:, None] & in_n[None, :]
    if residual is not None:
        if LINEAR:
            at = pixel * res_col
        else:
            at = image * res_n + (row * out_step_h + phase_h) * res_row + (col * out_step_w + phase_w) * res_col
        r_ptrs = residual + group * c_out + (at[:, None] + channel[None, :])
        other = widen(tl.load(r_ptrs, mask=inside, other=0.0), BY_HAND).to(tl.float32)
        if NORM_RESULT:
            norm = _factors(gamma, beta, mean, invstd, group * c_out + channel, in_n, 0, True)
            other -= norm[0]
            acc = activate_gradient(acc, _normalised(other, norm[2], norm[3]), NORM_ACT)
        else:
            acc += other
    acc = activate(acc, ACT)
    if LINEAR:
        target = pixel * out_col
    else:
        target = image * out_n + (row * out_step_h + phase_h) * out_row + (col * out_step_w + phase_w) * out_col
    result = narrow(acc, out.dtype.element_ty, BY_HAND)
    tl.store(out + group * c_out + (target[:, None] + channel[None, :]), result, mask=inside)
    if sums is not None:
        # Of what was stored: its reader finds the very mean and sums that the values in memory have.
        stored = widen(result, BY_HAND).to(tl.float32)
        at = sums + group * c_out + channel
        if NORM_RESULT:
            tile = phase * num_m + tile_m
            gradient_sums(stored, other * norm[1], inside, at, tile, num_m * num_phases, groups * c_out, in_n)
        else:
            tile_statistics(stored, in_m, at, tile_m, num_m, groups * c_out, in_n)
