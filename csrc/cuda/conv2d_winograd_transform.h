// The transforms of Winograd's F(M x M, 3 x 3): M = 4 or 2 outputs from P = M + 2 inputs along each axis.
//
//   Y  = A' [ (G g G') . (B' d B) ] A      d: P x P inputs, g: 3 x 3 taps, Y: M x M outputs, . element by element
//   dg = G' [ (A dY A') . (B' d B) ] G      the derivative by g: F(3 x 3, M x M), the same matrices transposed
//
// F(2,3): points 0, 1, -1. F(4,3): points 0, a, -a, b, -b with a = sqrt(1/2) and b = sqrt(2) instead of 0, 1, -1, 2,
// -2: an error of about 1.8 times the direct sum's instead of 5 times. The matrices, and how they follow from the
// points, are in csrc/cpu/conv2d_winograd_transform.h.
//
// Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2016); Barabasz et al., Error Analysis and
// Improving the Accuracy of Winograd Convolution for Deep Neural Networks (2020).
#pragma once
#include "primitives/cuda.h"

namespace cnnfast::cuda::winograd {

template <int M>
constexpr int kPoints = M + 2;
constexpr int kTapsAcross = 3;

constexpr float kA = 0.70710678118654752440f;
constexpr float kB = 1.41421356237309504880f;

// t = B' d
template <int M>
__device__ __forceinline__ void transform_input(const float (&d)[kPoints<M>], float (&t)[kPoints<M>]) {
  if constexpr (M == 4) {
    t[0] = d[0] + d[4] - 2.5f * d[2];
    const float even_a = d[4] - 2.0f * d[2], odd_a = d[3] - 2.0f * d[1];
    t[1] = even_a + kA * odd_a;
    t[2] = even_a - kA * odd_a;
    const float even_b = d[4] - 0.5f * d[2], odd_b = d[3] - 0.5f * d[1];
    t[3] = even_b + kB * odd_b;
    t[4] = even_b - kB * odd_b;
    t[5] = d[1] + d[5] - 2.5f * d[3];
  } else {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[3] - d[1];
  }
}

// t = G g
template <int M>
__device__ __forceinline__ void transform_weights(const float (&g)[kTapsAcross], float (&t)[kPoints<M>]) {
  if constexpr (M == 4) {
    t[0] = g[0];
    const float even_a = (-1.0f / 3.0f) * (g[0] + g[0] + g[2]), odd_a = (-2.0f / 3.0f * kA) * g[1];
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    const float even_b = (1.0f / 6.0f) * (g[0] + g[2] + g[2]), odd_b = (1.0f / 6.0f * kB) * g[1];
    t[3] = even_b + odd_b;
    t[4] = even_b - odd_b;
    t[5] = g[2];
  } else {
    const float even = 0.5f * (g[0] + g[2]), odd = 0.5f * g[1];
    t[0] = g[0];
    t[1] = even + odd;
    t[2] = even - odd;
    t[3] = g[2];
  }
}

// y = A' m
template <int M>
__device__ __forceinline__ void transform_output(const float (&m)[kPoints<M>], float (&y)[M]) {
  const float sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  if constexpr (M == 4) {
    const float sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = kA * difference_a + kB * difference_b;
    y[2] = 0.5f * sum_a + 2.0f * sum_b;
    y[3] = (0.5f * kA) * difference_a + ((2.0f * kB) * difference_b + m[5]);
  } else {
    y[0] = m[0] + sum_a;
    y[1] = difference_a + m[3];
  }
}

// t = A d
template <int M>
__device__ __forceinline__ void transform_gradient(const float (&d)[M], float (&t)[kPoints<M>]) {
  t[0] = d[0];
  if constexpr (M == 4) {
    const float even_a = d[0] + 0.5f * d[2], odd_a = kA * (d[1] + 0.5f * d[3]);
    t[1] = even_a + odd_a;
    t[2] = even_a - odd_a;
    const float even_b = d[0] + 2.0f * d[2], odd_b = kB * (d[1] + 2.0f * d[3]);
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
template <int M>
__device__ __forceinline__ void transform_taps(const float (&m)[kPoints<M>], float (&g)[kTapsAcross]) {
  const float sum_a = m[1] + m[2], difference_a = m[1] - m[2];
  if constexpr (M == 4) {
    const float sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    g[0] = m[0] + (1.0f / 6.0f * sum_b - 2.0f / 3.0f * sum_a);
    g[1] = (1.0f / 6.0f * kB) * difference_b - (2.0f / 3.0f * kA) * difference_a;
    g[2] = m[5] + 1.0f / 3.0f * (sum_b - sum_a);
  } else {
    g[0] = m[0] + 0.5f * sum_a;
    g[1] = 0.5f * difference_a;
    g[2] = m[3] + 0.5f * sum_a;
  }
}

}  // namespace cnnfast::cuda::winograd
