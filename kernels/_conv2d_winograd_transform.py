"""The transforms of Winograd's F(M x M, 3 x 3): M = 4 or 2 outputs from P = M + 2 inputs along each axis.

    Y = A' [ (G g G') . (B' d B) ] A      d: P x P inputs, g: 3 x 3 taps, Y: M x M outputs, . element by element
    dg = G' [ (A dY A') . (B' d B) ] G    its derivative by g

F(2,3): points 0, 1, -1. F(4,3): points 0, a, -a, b, -b with a = sqrt(1/2) and b = sqrt(2) instead of 0, 1, -1, 2, -2: an
error of about 1.8 times the direct sum's instead of 5 times. The matrices, and how they follow from the points, are in
csrc/cpu/conv2d_winograd_transform.h.

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016); Barabasz et al., Error Analysis and Improving the
Accuracy of Winograd Convolution for Deep Neural Networks (2020).
"""

from __future__ import annotations

import triton
import triton.language as tl

A, B = tl.constexpr(0.70710678118654752440), tl.constexpr(1.41421356237309504880)


@triton.jit
def _inputs(d, M: tl.constexpr):
    """B' d."""
    if M == 4:
        even_a = d[4] - 2.0 * d[2]
        odd_a = (d[3] - 2.0 * d[1]) * A
        even_b = d[4] - 0.5 * d[2]
        odd_b = (d[3] - 0.5 * d[1]) * B
        first = d[0] + d[4] - 2.5 * d[2]
        last = d[1] + d[5] - 2.5 * d[3]
        return (first, even_a + odd_a, even_a - odd_a, even_b + odd_b, even_b - odd_b, last)
    else:
        return (d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1])


@triton.jit
def _filters(g, M: tl.constexpr):
    """G g."""
    if M == 4:
        even_a = (g[0] + g[0] + g[2]) * (-1.0 / 3.0)
        odd_a = g[1] * (-2.0 / 3.0 * A)
        even_b = (g[0] + g[2] + g[2]) * (1.0 / 6.0)
        odd_b = g[1] * (1.0 / 6.0 * B)
        return (g[0], even_a + odd_a, even_a - odd_a, even_b + odd_b, even_b - odd_b, g[2])
    else:
        even = 0.5 * (g[0] + g[2])
        odd = 0.5 * g[1]
        return (g[0], even + odd, even - odd, g[2])


@triton.jit
def _outputs(m, M: tl.constexpr):
    """A' m."""
    sum_a = m[1] + m[2]
    difference_a = m[1] - m[2]
    if M == 4:
        sum_b = m[3] + m[4]
        difference_b = m[3] - m[4]
        return (
            m[0] + sum_a + sum_b,
            difference_a * A + difference_b * B,
            0.5 * sum_a + 2.0 * sum_b,
            difference_a * (0.5 * A) + (difference_b * (2.0 * B) + m[5]),
        )
    else:
        return (m[0] + sum_a, difference_a + m[3])


@triton.jit
def _gradients(d, M: tl.constexpr):
    """A d."""
    if M == 4:
        even_a = d[0] + 0.5 * d[2]
        odd_a = (d[1] + 0.5 * d[3]) * A
        even_b = d[0] + 2.0 * d[2]
        odd_b = (d[1] + 2.0 * d[3]) * B
        return (d[0], even_a + odd_a, even_a - odd_a, even_b + odd_b, even_b - odd_b, d[3])
    else:
        return (d[0], d[0] + d[1], d[0] - d[1], d[1])


@triton.jit
def _taps(m, M: tl.constexpr):
    """G' m."""
    sum_a = m[1] + m[2]
    difference_a = m[1] - m[2]
    if M == 4:
        sum_b = m[3] + m[4]
        difference_b = m[3] - m[4]
        return (
            m[0] + (sum_b * (1.0 / 6.0) - sum_a * (2.0 / 3.0)),
            difference_b * (1.0 / 6.0 * B) - difference_a * (2.0 / 3.0 * A),
            m[5] + (sum_b - sum_a) * (1.0 / 3.0),
        )
    else:
        return (m[0] + 0.5 * sum_a, 0.5 * difference_a, m[3] + 0.5 * sum_a)


@triton.jit
def _one(values, WHAT: tl.constexpr, M: tl.constexpr):
    if WHAT == "inputs":
        return _inputs(values, M)
    elif WHAT == "filters":
        return _filters(values, M)
    elif WHAT == "outputs":
        return _outputs(values, M)
    elif WHAT == "gradients":
        return _gradients(values, M)
    else:
        return _taps(values, M)


@triton.jit
def transform(values, WHAT: tl.constexpr, M: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr):
    """Along both axes: AFTER x AFTER tensors of BEFORE x BEFORE, each a tuple, row by row."""
    columns = ()
    for j in tl.static_range(BEFORE):
        column = ()
        for i in tl.static_range(BEFORE):
            column += (values[i * BEFORE + j],)
        columns += (_one(column, WHAT, M),)
    results = ()
    for a in tl.static_range(AFTER):
        row = ()
        for j in tl.static_range(BEFORE):
            row += (columns[j][a],)
        results += _one(row, WHAT, M)
    return results
