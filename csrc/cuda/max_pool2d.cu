// 2-D max pooling: every kernel size, stride, padding and dilation, in f32, f64, bf16 and f16.
//
//   fprop    y[n,c,p,q] = max_{r,s} x[n, h, w, c]      h = p*stride - pad + r*dilation, w likewise, inside the image
//   indices  the same, and i[n,c,p,q] = h*W + w of the maximum
//   jvp      y[n,c,p,q] = t[n, h, w, c] at the maximum
//   dgrad    t[n,c,h,w] = sum of y[n,p,q,c] over the windows that have their maximum at h, w
//
// The first of equal elements is the maximum; with NaNs the last NaN is. A window without elements gives -inf (and, as
// in torch, its first tap that isn't above or left of the image as index), 0 in jvp, and nothing to dgrad.
//
// Mapping, layout of fprop, indices and jvp: max_pool2d.h. In dgrad a thread takes one or two channels and a tile of up
// to 32 pixels of t. It finds the maximum of each window that reaches into its tile and adds the gradient to the
// pixel's sum in shared memory: every sum has one owner, who adds in the order of p, q, so that there are no atomics
// and no barriers, and the result doesn't depend on the tiling. Layout: NHWC, any pixel strides; where sizes, strides
// or addresses don't allow vectors a thread takes one channel. Accumulator of dgrad f32 (f64 for f64), one rounding at
// the end; the other directions copy elements bit by bit. Memory offsets are 64-bit, coordinates within an image
// 32-bit.
#include "max_pool2d.h"

namespace cnnfast::cuda {
namespace {

constexpr int kTileThreads = 128;  // of dgrad; its sums take 256 bytes of shared memory a thread, 32 KB a block
constexpr int kTileRows = 4;
constexpr int kTileColumns = 8;
constexpr int kTilePixels = kTileRows * kTileColumns;
constexpr int64_t kItemsWanted = 1 << 16;  // with fewer tiles are made smaller

template <class T>
constexpr int kTileChannels = sizeof(T) == 8 ? 1 : 2;

// How dgrad cuts t into tiles: where the stride allows at a multiple of it, which windows then straddle least.
struct Tiling {
  int height, width;
  int64_t rows, columns;  // of tiles

  Tiling(const MaxPool2dParams& p, int64_t images_and_packs) {
    height = fit(kTileRows, p.stride_h);
    width = fit(kTileColumns, p.stride_w);
    count(p);
    while (rows * columns * images_and_packs < kItemsWanted && height * width > 4) {
      if (height >= width)
        height = fit(height / 2, p.stride_h);
      else
        width = fit(width / 2, p.stride_w);
      count(p);
    }
  }

 private:
  static int fit(int size, int64_t stride) { return static_cast<int>(stride < size ? size / stride * stride : size); }
  void count(const MaxPool2dParams& p) {
    rows = ceil_div(p.H, height);
    columns = ceil_div(p.W, width);
  }
};

// An item is a tile of one image and `width` channels, the channels fastest.
template <class T, int width>
__global__ void __launch_bounds__(kTileThreads, 6)
    dgrad(const Pooling<MaxPool2dParams, DilatedAxis> p, const Tiling tiling, const int64_t items,
          const T* __restrict__ x, const T* __restrict__ y, T* __restrict__ t) {
  using Acc = Accumulator<T>;
  CNNFAST_SHARED(Acc, sums, [kTilePixels][width][kTileThreads]);
  const int self = threadIdx.x;

  for (int64_t item = int64_t{blockIdx.x} * kTileThreads + self; item < items;
       item += int64_t{gridDim.x} * kTileThreads) {
    const Quotient tile(item, p.C / width), line(tile.quotient, tiling.columns), image(line.quotient, tiling.rows);
    const int64_t pack = tile.rest, c = pack * width, n = image.quotient;
    const int h0 = static_cast<int>(image.rest) * tiling.height;
    const int w0 = static_cast<int>(line.rest) * tiling.width;
    const int height = p.H - h0 < tiling.height ? static_cast<int>(p.H) - h0 : tiling.height;
    const int columns_inside = p.W - w0 < tiling.width ? static_cast<int>(p.W) - w0 : tiling.width;

    for (int pixel = 0; pixel < height * columns_inside; ++pixel)
#pragma unroll
      for (int e = 0; e < width; ++e) sums[pixel][e][self] = 0;

    // The pixel's place among the sums, or -1.
    auto label_of = [=](unsigned h, unsigned w) {
      const unsigned i = h - h0, j = w - w0;  // huge above and left of the tile
      const bool inside = i < static_cast<unsigned>(height) && j < static_cast<unsigned>(columns_inside);
      return inside ? static_cast<int>(i) * columns_inside + static_cast<int>(j) : -1;
    };
    const Span down = p.rows.windows(h0, h0 + height), across = p.columns.windows(w0, w0 + columns_inside);
    for (unsigned row = down.begin; row < down.end; ++row) {
      const Span rows = p.rows.elements(row);
      for (unsigned q = across.begin; q < across.end; ++q) {
        const Span columns = p.columns.elements(q);
        if (rows.empty() || columns.empty()) continue;
        const auto gradient = load<T, width>(y + n * p.y_n + row * p.y_h + q * p.y_w + c);
        Maximum<T, width> maximum;
        maximum.search(p, x + n * p.x_n + c, rows, columns, label_of);
#pragma unroll
        for (int e = 0; e < width; ++e)
          if (maximum.label[e] >= 0) sums[maximum.label[e]][e][self] += Numeric<T>::widen(gradient.v[e]);
      }
    }

    T* to = t + n * p.t_n + h0 * p.t_h + w0 * p.t_w;
    for (int i = 0, pixel = 0; i < height; ++i)
      for (int j = 0; j < columns_inside; ++j, ++pixel) {
        Pack<T, width> result;
#pragma unroll
        for (int e = 0; e < width; ++e) result.v[e] = Numeric<T>::narrow(sums[pixel][e][self]);
        pack_of<T, width>(to + i * p.t_h + j * p.t_w, pack) = result;
      }
  }
}

template <class T, int width>
const char* launch_dgrad_of(const Pooling<MaxPool2dParams, DilatedAxis>& p, const Launch& run) {
  const int64_t packs = p.C / width;
  if (p.N * p.H * p.W * packs == 0) return nullptr;
  const Tiling tiling(p, p.N * packs);
  const int64_t items = p.N * tiling.rows * tiling.columns * packs;
  return launch<dgrad<T, width>>(grid_for(ceil_div(items, kTileThreads)), dim3(kTileThreads, 1, 1), 0, run.stream, p,
                                 tiling, items, static_cast<const T*>(run.operands[0]),
                                 static_cast<const T*>(run.operands[1]), static_cast<T*>(run.operands[3]));
}

Pooling<MaxPool2dParams, DilatedAxis> pooling(const void* params) {
  const auto& p = *static_cast<const MaxPool2dParams*>(params);
  return {p, DilatedAxis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h),
          DilatedAxis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w)};
}

template <class T, Direction direction>
const char* launch_direct(const void* params, const Launch& run) {
  return launch_pool<T, direction>(pooling(params), run);
}

template <class T>
const char* launch_dgrad(const void* params, const Launch& run) {
  const auto p = pooling(params);
  constexpr int width = kTileChannels<T>;
  return all_take_packs<T>(p, run, width) ? launch_dgrad_of<T, width>(p, run) : launch_dgrad_of<T, 1>(p, run);
}

}  // namespace

CNNFAST_KERNEL("max_pool2d.fprop.f32", MaxPool2dParams, (launch_direct<float, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.f64", MaxPool2dParams, (launch_direct<double, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.bf16", MaxPool2dParams, (launch_direct<__nv_bfloat16, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.fprop.f16", MaxPool2dParams, (launch_direct<__half, Direction::fprop>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f32", MaxPool2dParams, (launch_direct<float, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f64", MaxPool2dParams, (launch_direct<double, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.bf16", MaxPool2dParams, (launch_direct<__nv_bfloat16, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.indices.f16", MaxPool2dParams, (launch_direct<__half, Direction::indices>), nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f32", MaxPool2dParams, launch_dgrad<float>, nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f64", MaxPool2dParams, launch_dgrad<double>, nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.bf16", MaxPool2dParams, launch_dgrad<__nv_bfloat16>, nullptr)
CNNFAST_KERNEL("max_pool2d.dgrad.f16", MaxPool2dParams, launch_dgrad<__half>, nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f32", MaxPool2dParams, (launch_direct<float, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f64", MaxPool2dParams, (launch_direct<double, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.bf16", MaxPool2dParams, (launch_direct<__nv_bfloat16, Direction::jvp>), nullptr)
CNNFAST_KERNEL("max_pool2d.jvp.f16", MaxPool2dParams, (launch_direct<__half, Direction::jvp>), nullptr)

}  // namespace cnnfast::cuda
