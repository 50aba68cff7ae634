// What the kernels of a network's first convolution share: the patch of x that a block stages, 4 channels a pixel,
// those that there aren't of zeros (conv2d_stem.cu).
#pragma once
#include "conv2d_grouped.h"

namespace cnnfast::cuda::grouped {

constexpr int kPixel = 4;  // elements in shared memory
constexpr int kPatchBytes = 28 * 1024;

// Stages a tile's patch, a pixel a thread at a time; zeros for the padding and the channels that there aren't.
template <class T>
__device__ __forceinline__ void stage_pixels(const Conv2dParams& p, const Tiling& t, const TilePlace& at,
                                             const T* __restrict__ x, T* patch) {
  struct alignas(kPixel * sizeof(T)) Pixel {
    T v[kPixel];
  };
  const int h0 = at.row * static_cast<int>(p.stride_h) - static_cast<int>(p.pad_h);
  const int w0 = at.column * static_cast<int>(p.stride_w) - static_cast<int>(p.pad_w);
  const T* image = x + at.n * p.x_n;
  int row = static_cast<int>(threadIdx.x) / t.patch_columns, column = static_cast<int>(threadIdx.x) % t.patch_columns;
  for (int i = threadIdx.x; i < t.patch_rows * t.patch_columns; i += kThreads) {
    const int h = h0 + row, w = w0 + column;
    const bool inside = h >= 0 && h < p.H && w >= 0 && w < p.W;
    Pixel pixel;
#pragma unroll
    for (int c = 0; c < kPixel; ++c)
      pixel.v[c] = inside && c < p.C ? image[h * p.x_h + w * p.x_w + c * p.x_c] : Numeric<T>::narrow(0.0f);
    reinterpret_cast<Pixel*>(patch)[i] = pixel;
    column += kThreads;
    while (column >= t.patch_columns) column -= t.patch_columns, ++row;
  }
}

}  // namespace cnnfast::cuda::grouped
