// The transforms of Winograd's F(M, R) along an axis: M outputs of R taps from P = M + R - 1 inputs.
//
//   Y = A' [ (G g G') . (B' d B) ] A      d: inputs, g: taps, Y: outputs of a tile, . element by element
//
// In one dimension this is Toom and Cook's way to multiply polynomials, transposed: the taps' polynomial is evaluated
// in P - 1 points and at infinity (G), and the inputs are weighed so that the products' sum with powers of the points
// (A') is the convolution. For finite points p_i, with n(x) the product of all (x - p_j):
//
//   row i of B'   the coefficients of n(x) / (x - p_i), which is one polynomial of degree P - 2 for each point
//   row i of G    (1, p_i, p_i^2, ...) / N_i, N_i the product of p_i - p_j over j != i
//   row j of A'   (p_i^j); infinity adds n(x) itself to B', (0, ..., 0, 1) to G, and a 1 to the last row of A'
//
// F(2,3): points 0, 1, -1 (the first row's sign moved from G to B'). F(4,3): points 0, a, -a, b, -b with a =
// sqrt(1/2) and b = sqrt(2) instead of 0, 1, -1, 2, -2: an error of about 1.8 times the direct sum's instead of 5
// times, because the entries of A' and B' grow less. From a^2 = 1/2, b^2 = 2, ab = 1:
//
//         1   0  -5/2   0   1  0           1       0     0            1  1  1    1    1   0
//         0 -2a   -2    a   1  0         -2/3   -2a/3  -1/3           0  a -a    b   -b   0
//   B' =  0  2a   -2   -a   1  0   G =   -2/3    2a/3  -1/3    A' =   0 1/2 1/2  2    2   0
//         0 -b/2 -1/2   b   1  0          1/6     b/6   1/3           0 a/2 -a/2 2b -2b   1
//         0  b/2 -1/2  -b   1  0          1/6    -b/6   1/3
//         0   1    0  -5/2  0  1           0       0     1
//
// B' depends on the points alone: F(3,4) and F(2,5) have those of F(4,3), and G and A' of one column more or one row
// less. F(1,1) leaves an axis as it is.
//
// Stride 2 has two sums an axis: of three taps the outer two meet every other input, which is F(3,2) with points 0, 1,
// -1, and the middle one those between, which is a product an output: 7 points for 3 outputs instead of 9 products.
//
// wgrad is the derivative by g: the same matrices transposed,
//
//   dg = G' [ (A dY A') . (B' d B) ] G
//
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016); Barabasz et al., Error Analysis and
// Improving the Accuracy of Winograd Convolution for Deep Neural Networks (2020).
#pragma once
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {

constexpr int kTapsAcross = 3;
template <int M, int R = kTapsAcross>
constexpr int kPoints = M + R - 1;

template <class T>
constexpr T kA = static_cast<T>(0.70710678118654752440L);
template <class T>
constexpr T kB = static_cast<T>(1.41421356237309504880L);

// t = B' d
template <class T, int M, int R = kTapsAcross>
CNNFAST_INLINE void transform_input(const Vec<T>* d, Vec<T>* t) {
  static_assert(kPoints<M, R> == 6 || kPoints<M, R> == 4 || kPoints<M, R> == 1);
  if constexpr (kPoints<M, R> == 6) {
    t[0] = d[0] + d[4] - T(2.5) * d[2];
    const Vec<T> even_a = d[4] - T(2) * d[2], odd_a = d[3] - T(2) * d[1];
    t[1] = even_a + kA<T> * odd_a;
    t[2] = even_a - kA<T> * odd_a;
    const Vec<T> even_b = d[4] - T(0.5) * d[2], odd_b = d[3] - T(0.5) * d[1];
    t[3] = even_b + kB<T> * odd_b;
    t[4] = even_b - kB<T> * odd_b;
    t[5] = d[1] + d[5] - T(2.5) * d[3];
  } else if constexpr (kPoints<M, R> == 4) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  } else {
    t[0] = d[0];
  }
}

// t = G g
template <class T, int M, int R = kTapsAcross>
CNNFAST_INLINE void transform_weights(const Vec<T>* g, Vec<T>* t) {
  t[0] = g[0];
  if constexpr (kPoints<M, R> == 6) {
    Vec<T> even_a = g[0] + T(0.5) * g[2], odd_a = g[1], even_b = g[0] + T(2) * g[2], odd_b = g[1];
    if constexpr (R > 3) odd_a += T(0.5) * g[3], odd_b += T(2) * g[3];
    if constexpr (R > 4) even_a += T(0.25) * g[4], even_b += T(4) * g[4];
    even_a *= T(-2.0L / 3), odd_a *= T(-2.0L / 3) * kA<T>;
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    even_b *= T(1.0L / 6), odd_b *= T(1.0L / 6) * kB<T>;
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[R - 1];
  } else if constexpr (kPoints<M, R> == 4) {
    const Vec<T> even = T(0.5) * (g[0] + g[2]), odd = T(0.5) * g[1];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = g[2];
  }
}

// y = A' m
template <class T, int M, int R = kTapsAcross>
CNNFAST_INLINE void transform_output(const Vec<T>* m, Vec<T>* y) {
  if constexpr (kPoints<M, R> == 1) {
    y[0] = m[0];
  } else {
    const Vec<T> sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    if constexpr (kPoints<M, R> == 6) {
      const Vec<T> sum_b = m[3] + m[4], difference_b = m[3] - m[4];
      y[0] = m[0] + sum_a + sum_b;
      y[1] = kA<T> * difference_a + kB<T> * difference_b;
      if constexpr (M > 2) y[2] = T(0.5) * sum_a + T(2) * sum_b;
      if constexpr (M > 3)
        y[3] = (T(0.5) * kA<T>)*difference_a + ((T(2) * kB<T>)*difference_b + m[5]);
      else
        y[M - 1] += m[5];
    } else {
      y[0] = m[0] + sum_a;
      y[1] = difference_a + m[3];
    }
  }
}

// Stride 2: t of 7 inputs, of 3 taps (5), and 3 outputs. F(3,2)'s points come first.
template <class T>
CNNFAST_INLINE void transform_strided_input(const Vec<T>* d, Vec<T>* t) {
  t[0] = d[0] - d[4];
  t[1] = d[2] + d[4];
  t[2] = d[4] - d[2];
  t[3] = d[6] - d[2];
  t[4] = d[1];
  t[5] = d[3];
  t[6] = d[5];
}
template <class T>
CNNFAST_INLINE void transform_strided_weights(const Vec<T>* g, Vec<T>* t) {
  t[0] = g[0];
  t[1] = T(0.5) * (g[0] + g[2]);
  t[2] = T(0.5) * (g[0] - g[2]);
  t[3] = g[2];
  t[4] = g[1];  // and of the points after it
}
template <class T>
CNNFAST_INLINE void transform_strided_output(const Vec<T>* m, Vec<T>* y) {
  const Vec<T> sum = m[1] + m[2];
  y[0] = m[0] + sum + m[4];
  y[1] = m[1] - m[2] + m[5];
  y[2] = m[3] + sum + m[6];
}

// t = A d
template <class T, int M>
CNNFAST_INLINE void transform_gradient(const Vec<T>* d, Vec<T>* t) {
  t[0] = d[0];
  if constexpr (M == 4) {
    const Vec<T> even_a = d[0] + T(0.5) * d[2], odd_a = kA<T> * (d[1] + T(0.5) * d[3]);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    const Vec<T> even_b = d[0] + T(2) * d[2], odd_b = kB<T> * (d[1] + T(2) * d[3]);
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = d[3];
  } else {
    t[1] = d[0] + d[1];
    t[2] = d[0] - d[1];
    t[3] = d[1];
  }
}

// g = G' m
template <class T, int M>
CNNFAST_INLINE void transform_taps(const Vec<T>* m, Vec<T>* g) {
  const Vec<T> sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  if constexpr (M == 4) {
    const Vec<T> sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    g[0] = m[0] + (T(1.0L / 6) * sum_b - T(2.0L / 3) * sum_a);
    g[1] = (T(1.0L / 6) * kB<T>)*difference_b - (T(2.0L / 3) * kA<T>)*difference_a;
    g[2] = m[5] + T(1.0L / 3) * (sum_b - sum_a);
  } else {
    g[0] = m[0] + T(0.5) * sum_a;
    g[1] = T(0.5) * difference_a;
    g[2] = m[3] + T(0.5) * sum_a;
  }
}

// Along both axes: out(a, b) of OutH x OutW from in(i, j) of InH x InW; `along_h` makes OutH vectors of InH, `along_w`
// OutW of InW.
template <class T, int InH, int InW, int OutH, int OutW, class Load, class AlongH, class AlongW, class Store>
CNNFAST_INLINE void transform_axes(const Load& in, const AlongH& along_h, const AlongW& along_w, const Store& out) {
  Vec<T> rows[OutH][InW];
#pragma GCC unroll 7
  for (int j = 0; j < InW; ++j) {
    Vec<T> column[InH], t[OutH];
#pragma GCC unroll 7
    for (int i = 0; i < InH; ++i) column[i] = in(i, j);
    along_h(column, t);
#pragma GCC unroll 7
    for (int a = 0; a < OutH; ++a) rows[a][j] = t[a];
  }
#pragma GCC unroll 7
  for (int a = 0; a < OutH; ++a) {
    Vec<T> t[OutW];
    along_w(rows[a], t);
#pragma GCC unroll 7
    for (int b = 0; b < OutW; ++b) out(a, b, t[b]);
  }
}

// The same way along both.
template <class T, int In, int Out, class Load, class Transform, class Store>
CNNFAST_INLINE void transform_both(const Load& in, const Transform& transform, const Store& out) {
  transform_axes<T, In, In, Out, Out>(in, transform, transform, out);
}

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
