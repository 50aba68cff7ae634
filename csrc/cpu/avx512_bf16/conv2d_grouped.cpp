// Grouped convolution with 2, 4 or 8 input and as many output channels a group on pairs of bf16 (vdpbf16ps), fprop and
// dgrad.
//
//   y[n,k,p,q] = b[k] + sum_{r,s, pairs of k's group} dot(x[n,c:c+2,h,w], w[k,c:c+2,r,s])
//                h = p*stride_h - pad_h + r*dilation_h, w = q*stride_w - pad_w + s*dilation_w
//
// A vector holds the sums of 16 output channels, whole groups; their 16 input channels are 8 pairs. One permutation
// gives every lane pair q of its group, and one dot product multiplies it with weights packed in that order, so that
// every lane is useful:
//
//   acc[pixel] += dot(spread<q>(x[pixel moved by tap]), w[tap][q])      up to 14 pixels of one row x 1 vector a tile
//
// (16 and more channels a group fill the tiles of the implicit GEMM.) dgrad is fprop of the gradient, one stride-1
// convolution for each residue class (conv2d_view.h). A thread owns vectors of channels times rows of the output. For 4
// vectors at a time it packs the weights inside the call and copies the rows of x that a block of output rows needs, a
// vector's beside each other [row][column][16], with the zeros of the padding. Sums are in float, rounded once to bf16;
// vdpbf16ps takes denormals for 0. Padding contributes nothing: a call that meets an Inf or a NaN among its weights is
// done again by the direct kernel.
#include "../../common/kernel_table.h"
#include "../primitives/parallel.h"
#include "../primitives/scratch.h"
#include "direct.h"
#include "dot_pack.h"
#include "dot_results.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t VL = kLanes<float>;           // channels of a vector
constexpr int64_t kVecs = 4;                    // vectors at a time
constexpr int64_t kStripBytes = 20 << 10;       // copied rows of one vector
constexpr int64_t kImageBytes = 1 << 20;        // of g, while the classes of dgrad pass by
constexpr int64_t kMacsWorthThreads = 1 << 17;  // below, one thread
constexpr const char* kNoMemory = "out of memory";

// Lane l gets pair q of its group of `pairs` among the 8 of half a vector.
template <int pairs, int q>
CNNFAST_INLINE BitsVec spread(BitsVec x) {
  constexpr int kOut = 2 * pairs;
  BitsVec index{};
#pragma GCC unroll 16
  for (int l = 0; l < VL; ++l) index[l] = l / kOut * pairs + q;
  return __builtin_shuffle(x, index);
}

template <int pairs, int q = 0>
CNNFAST_INLINE void multiply(Vec<float>& acc, BitsVec x, const BitsVec* weights) {
  if constexpr (q < pairs) {
    acc = dot_pairs(acc, spread<pairs, q>(x), weights[q]);
    multiply<pairs, q + 1>(acc, x, weights);
  }
}

// args.run: taps of a filter row; args.taps: the offsets of the rows; next[0].step: bytes from column to column.
template <int pairs, int MR>
void grouped_tile(const DotTileArgs& args) {
  Vec<float> acc[MR][1];
  const Vec<float> bias = load(args.bias);
#pragma GCC unroll 14
  for (int i = 0; i < MR; ++i) acc[i][0] = bias;
  const BFloat16* w = args.b;
  for (int64_t r = 0; r < args.ntaps; ++r) {
    const char* x = args.a + args.taps[r];
    for (int64_t s = 0; s < args.run; ++s, x += args.next[0].step, w += pairs * kHalves) {
      BitsVec weights[pairs];
#pragma GCC unroll 4
      for (int q = 0; q < pairs; ++q) weights[q] = load_halves(w + q * kHalves);
#pragma GCC unroll 14
      for (int i = 0; i < MR; ++i)
        multiply<pairs>(acc[i][0], load_low_halves(reinterpret_cast<const BFloat16*>(x + i * args.a_row)), weights);
    }
  }
  dot_finish<MR, 1>(acc, args);
}

#define CNNFAST_TILES(pairs) \
  {nullptr,                  \
   grouped_tile<pairs, 1>,   \
   grouped_tile<pairs, 2>,   \
   grouped_tile<pairs, 3>,   \
   grouped_tile<pairs, 4>,   \
   grouped_tile<pairs, 5>,   \
   grouped_tile<pairs, 6>,   \
   grouped_tile<pairs, 7>,   \
   grouped_tile<pairs, 8>,   \
   grouped_tile<pairs, 9>,   \
   grouped_tile<pairs, 10>,  \
   grouped_tile<pairs, 11>,  \
   grouped_tile<pairs, 12>,  \
   grouped_tile<pairs, 13>,  \
   grouped_tile<pairs, 14>}
constexpr DotTileFn kTiles[3][kDotRows + 1] = {CNNFAST_TILES(1), CNNFAST_TILES(2), CNNFAST_TILES(4)};
#undef CNNFAST_TILES

struct Operands {
  const BFloat16 *x, *w, *bias;
  BFloat16* y;
};

// What one thread works with; the view's C and K are 2, 4 or 8.
class Worker {
 public:
  Worker(const Conv2dView& v, const Operands& o, const Epilogue<BFloat16>* epilogue)
      : v_(v),
        o_(o),
        results_(v, o.bias, o.y, epilogue),
        tiles_(kTiles[v.C == 2   ? 0
                      : v.C == 4 ? 1
                                 : 2]) {}

  bool finite() const { return finite_; }

  // Vectors [vec, last_vec) of rows [unit, last_unit) of the batch. False: out of memory.
  bool run(int64_t vec, int64_t last_vec, int64_t unit, int64_t last_unit) {
    if (vec == last_vec || unit == last_unit) return true;
    const int64_t vecs = min(kVecs, last_vec - vec), taps = v_.R * v_.S, weights = taps * v_.C / 2 * kHalves;
    step_h_ = needed_step(v_.P, v_.R, v_.stride_h, v_.dilation_h);
    step_w_ = needed_step(v_.Q, v_.S, v_.stride_w, v_.dilation_w);
    columns_ = taps ? ((v_.Q - 1) * v_.stride_w + (v_.S - 1) * v_.dilation_w) / step_w_ + 1 : 0;
    int64_t block = v_.P;
    while (block > 1 && strip_elements(block) * static_cast<int64_t>(sizeof(BFloat16)) > kStripBytes)
      block = ceil_div(block, 2);
    const auto carve = [&](Carver carver) {
      rows_ = carver.take<int64_t>(v_.R);
      packed_ = carver.take<BFloat16>(vecs * weights);
      results_.set_room(carver.take<float>(DotResults::kSums));
      strip_ = carver.take<BFloat16>(vecs * strip_elements(block) + kHalves);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    for (int64_t r = 0; r < v_.R; ++r)
      rows_[r] = r * (v_.dilation_h / step_h_) * columns_ * VL * static_cast<int64_t>(sizeof(BFloat16));
    for (; vec < last_vec; vec += vecs) {
      const int64_t count = min(vecs, last_vec - vec);
      for (int64_t j = 0; j < count; ++j) pack(vec + j, packed_ + j * weights);
      for (int64_t u = unit; u < last_unit;) {
        const int64_t n = u / v_.P, p = u % v_.P, rows = min(block, min(v_.P - p, last_unit - u));
        copy_rows(vec, count, n, p, rows, strip_elements(block));
        for (int64_t j = 0; j < count; ++j) {
          results_.set_channels((vec + j) * VL, lanes(vec + j), 1);
          for (int64_t i = 0; i < rows; ++i)
            run_row(packed_ + j * weights, u + i,
                    strip_ + j * strip_elements(block) + (v_.P == 1 ? 0 : i * (v_.stride_h / step_h_)) * columns_ * VL);
        }
        u += rows;
      }
    }
    return true;
  }

 private:
  int64_t lanes(int64_t vec) const { return min(VL, v_.G * v_.K - vec * VL); }
  int64_t strip_rows(int64_t rows) const {
    return v_.R * v_.S == 0 ? 0 : ((rows - 1) * v_.stride_h + (v_.R - 1) * v_.dilation_h) / step_h_ + 1;
  }
  int64_t strip_elements(int64_t rows) const { return strip_rows(rows) * columns_ * VL; }

  // One vector's weights [tap][q][lane][2].
  void pack(int64_t vec, BFloat16* out) {
    const int64_t channel = vec * VL, n = lanes(vec);
    for (int64_t r = 0; r < v_.R; ++r)
      for (int64_t s = 0; s < v_.S; ++s)
        for (int64_t c = 0; c < v_.C; c += 2, out += kHalves) {
          BitsVec pairs{};
          for (int64_t l = 0; l < n; ++l) {
            const int64_t k = channel + l;
            const BFloat16* in = o_.w + k / v_.K * v_.w_g + k % v_.K * v_.w_k + r * v_.w_r + s * v_.w_s + c * v_.w_c;
            pairs[l] = in[0].bits | static_cast<uint32_t>(in[v_.w_c].bits) << 16;
          }
          finite_ &= all_zero(first_of(pairs) * 0.f + second_of(pairs) * 0.f);
          store_halves(out, pairs);
        }
  }

  // The rows of x that output rows [p, p + rows) of image n need: of `count` vectors, `distance` elements apart.
  void copy_rows(int64_t vec, int64_t count, int64_t n, int64_t p, int64_t rows, int64_t distance) {
    for (int64_t i = 0; i < strip_rows(rows); ++i) {
      const int64_t h = p * v_.stride_h - v_.pad_h + i * step_h_;
      const bool inside = h >= 0 && h < v_.H;
      const BFloat16* x = o_.x + n * v_.x_n + (inside ? h : 0) * v_.x_h + vec * VL;
      // Columns [begin, end) lie inside.
      const int64_t begin = inside ? min(columns_, max(0, ceil_div(v_.pad_w, step_w_))) : columns_;
      const int64_t end = v_.W + v_.pad_w > 0 ? max(begin, min(columns_, (v_.W - 1 + v_.pad_w) / step_w_ + 1)) : begin;
      for (int64_t j = 0; j < count; ++j) {
        BFloat16* out = strip_ + j * distance + i * columns_ * VL;
        const BFloat16* in = x + j * VL - v_.pad_w * v_.x_w;
        const int64_t channels = lanes(vec + j), step = step_w_ * v_.x_w;
        for (int64_t w = 0; w < begin; ++w) store_low_halves(out + w * VL, BitsVec{});
        if (channels == VL)
          for (int64_t w = begin; w < end; ++w) store_low_halves(out + w * VL, load_low_halves(in + w * step));
        else
          for (int64_t w = begin; w < end; ++w) store_low_halves(out + w * VL, load_halves(in + w * step, channels));
        for (int64_t w = end; w < columns_; ++w) store_low_halves(out + w * VL, BitsVec{});
      }
    }
  }

  void run_row(const BFloat16* weights, int64_t unit, const BFloat16* strip) {
    const int64_t size = VL * static_cast<int64_t>(sizeof(BFloat16));
    DotTileArgs args;
    args.a_row = v_.Q == 1 ? 0 : v_.stride_w / step_w_ * size;
    args.next[0].step = v_.S == 1 ? 0 : v_.dilation_w / step_w_ * size;
    args.taps = rows_, args.ntaps = v_.S ? v_.R : 0, args.run = v_.S, args.b = weights;
    for_each_tile(v_.Q, [&](int64_t q, int64_t pixels) {
      args.a = reinterpret_cast<const char*>(strip) + q * args.a_row;
      results_.run(tiles_[pixels], args, unit * v_.Q + q, pixels);
    });
  }

  const Conv2dView& v_;
  const Operands& o_;
  DotResults results_;
  const DotTileFn* tiles_;
  int64_t step_h_ = 1, step_w_ = 1, columns_ = 0;
  bool finite_ = true;
  int64_t* rows_ = nullptr;
  BFloat16 *packed_ = nullptr, *strip_ = nullptr;
};

// What became of a call; the threads only ever set these.
struct Outcome {
  bool no_memory = false;
  bool not_finite = false;  // a weight is Inf or NaN, and zeros stood for the padding beside it
};

// The share of one thread in one view.
void run_view(const Conv2dView& v, const Operands& o, int threads, int64_t task, Outcome& outcome,
              const Epilogue<BFloat16>* epilogue) {
  const int64_t vecs = ceil_div(v.G * v.K, VL), units = v.N * v.P;
  if (vecs * units * v.Q == 0) return;
  // Vectors are the better half to share: no weights are packed and no rows copied twice.
  const int64_t threads_v = vecs % threads == 0 || vecs >= 4 * threads ? threads : gcd(vecs, threads);
  const int64_t threads_u = threads / threads_v, tv = task / threads_u, tu = task % threads_u;
  Worker worker(v, o, epilogue);
  if (!worker.run(vecs * tv / threads_v, vecs * (tv + 1) / threads_v, units * tu / threads_u,
                  units * (tu + 1) / threads_u))
    __atomic_store_n(&outcome.no_memory, true, __ATOMIC_RELAXED);
  if (!worker.finite() && reaches_padding(v)) __atomic_store_n(&outcome.not_finite, true, __ATOMIC_RELAXED);
}

int useful_threads(const Conv2dParams& p, int threads) {
  return p.N * p.P * p.Q * p.K * (p.C / p.G) * p.R * p.S < kMacsWorthThreads ? 1 : threads;
}

template <class T>
T* operand(const Launch& l, int i) {
  return static_cast<T*>(l.operands[i]);
}

const char* launch_fprop(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const Conv2dView v = fprop_view(p);
  const Operands o{operand<const BFloat16>(l, 0), operand<const BFloat16>(l, 1), operand<const BFloat16>(l, 2),
                   operand<BFloat16>(l, 3)};
  const int threads = useful_threads(p, l.threads);
  const Epilogue<BFloat16> epilogue(p, l);
  Outcome outcome;
  parallel_for(
      threads, threads, [&](int64_t task) { run_view(v, o, threads, task, outcome, epilogue.or_null()); },
      kDenormals<BFloat16>);
  if (outcome.no_memory) return kNoMemory;
  return outcome.not_finite ? avx512::direct_fprop_bf16(params, l) : nullptr;
}

const char* launch_dgrad(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const int threads = useful_threads(p, l.threads);
  const int64_t image = p.P * p.Q * p.K * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t images = p.stride_h * p.stride_w == 1 ? p.N : max(1, kImageBytes / max(1, image));
  Outcome outcome;
  parallel_for(
      threads, threads,
      [&](int64_t task) {
        // All classes of a few images before the next ones, so that g comes from memory once.
        for (int64_t n = 0; n < p.N; n += images)
          for_each_dgrad_view(p, [&](Conv2dView v, int64_t w_offset, int64_t dx_offset) {
            v.N = min(images, p.N - n);
            run_view(v,
                     {operand<const BFloat16>(l, 3) + n * p.y_n, operand<const BFloat16>(l, 1) + w_offset, nullptr,
                      operand<BFloat16>(l, 0) + n * p.x_n + dx_offset},
                     threads, task, outcome, nullptr);
          });
      },
      kDenormals<BFloat16>);
  if (outcome.no_memory) return kNoMemory;
  return outcome.not_finite ? avx512::direct_dgrad_bf16(params, l) : nullptr;
}

}  // namespace

CNNFAST_KERNEL("conv2d_grouped.fprop.bf16", Conv2dParams, launch_fprop, nullptr)
CNNFAST_KERNEL("conv2d_grouped.dgrad.bf16", Conv2dParams, launch_dgrad, nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
