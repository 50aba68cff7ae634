// What the kernels of batch norm share: operands, a channel's factors, and sums that a block adds up in order.
#pragma once
#include <cmath>
#include <cstring>

#include "../common/kernel_table.h"
#include "activation.h"
#include "pixels.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda::batch_norm {

constexpr int kThreads = 256;
// Channels of a thread that sums: more of 16 bits would take the registers that keep loads under way.
template <class T>
constexpr int kSumWidth = sizeof(T) == 8 ? 2 : 4;
constexpr int kFinishChannels = 8;  // of a block that adds the chunks' sums up; its other threads share the chunks
constexpr int64_t kSumBlocks = 1024, kMapBlocks = 2048;  // about so many where there is enough to do

enum Operand { kX, kW, kB, kM, kV, kR, kY, kS, kDw, kDb, kT, kU };

template <class Params>
double eps_of(const Params& p) {
  double eps;
  std::memcpy(&eps, &p.eps_bits, sizeof eps);
  return eps;
}

// What a call is about, as its kernels see it; operands that a direction doesn't have are null.
template <class T>
struct Call {
  using Acc = Accumulator<T>;
  const T *x, *r, *y;
  T *result, *t, *u;
  const Acc *w, *b, *m, *v;
  Strides sx, sr, sy, st, su;
  Pixels pixels;
  int64_t C;
  Acc eps;
  Activation act;
  bool training;

  Call(const BatchNormParams& p, const Launch& run)
      : x(static_cast<const T*>(run.operands[kX])),
        r(static_cast<const T*>(run.operands[kR])),
        y(static_cast<const T*>(run.operands[kY])),
        result(static_cast<T*>(run.operands[kY])),
        t(static_cast<T*>(run.operands[kT])),
        u(static_cast<T*>(run.operands[kU])),
        w(static_cast<const Acc*>(run.operands[kW])),
        b(static_cast<const Acc*>(run.operands[kB])),
        m(static_cast<const Acc*>(run.operands[kM])),
        v(static_cast<const Acc*>(run.operands[kV])),
        sx{p.x_n, p.x_h, p.x_w},
        sr{p.r_n, p.r_h, p.r_w},
        sy{p.y_n, p.y_h, p.y_w},
        st{p.t_n, p.t_h, p.t_w},
        su{p.u_n, p.u_h, p.u_w},
        pixels(p.N, p.H, p.W, present(x, sx), present(r, sr), present(y, sy), present(t, st), present(u, su)),
        C(p.C),
        eps(static_cast<Acc>(eps_of(p))),
        act(static_cast<Activation>(p.act)),
        training(p.training != 0) {}

  bool packed(int width) const {
    const auto bytes = static_cast<int64_t>(sizeof(T));
    return C % width == 0 && takes_packs(x, sx.all(), width, bytes) && takes_packs(r, sr.all(), width, bytes) &&
           takes_packs(y, sy.all(), width, bytes) && takes_packs(t, st.all(), width, bytes) &&
           takes_packs(u, su.all(), width, bytes);
  }

 private:
  Strides present(const void* operand, const Strides& s) const { return operand ? s : Strides{0, 0, 0}; }
};

// What `width` channels of a pixel are multiplied with.
template <class Acc, int width>
struct Factors {
  Pack<Acc, width> mean, invstd, scale, bias;  // scale: w * v

  template <class T>
  __device__ __forceinline__ Factors(const Call<T>& call, int64_t pack)
      : mean(vector_of<Acc, width>(call.m, pack, Acc(0))),
        invstd(vector_of<Acc, width>(call.v, pack, Acc(1))),
        scale(vector_of<Acc, width>(call.w, pack, Acc(1))),
        bias(vector_of<Acc, width>(call.b, pack, Acc(0))) {
    const bool variance = call.v && !call.training;
#pragma unroll
    for (int e = 0; e < width; ++e) {
      if (variance) invstd.v[e] = Acc(1) / std::sqrt(invstd.v[e] + call.eps);
      scale.v[e] *= invstd.v[e];
    }
  }
  // The same instructions in every direction: the gradient finds the very value that fprop's activation saw.
  __device__ __forceinline__ Acc normalised(Acc centred, int e) const { return centred * scale.v[e] + bias.v[e]; }
};

// The shares of a reduction, and of a map.
inline Shares sum_shares(int64_t pixels, int64_t packs, int64_t rows_at_once) {
  return Shares(pixels, packs, kThreads, rows_at_once, INT64_MAX / kThreads, kSumBlocks);
}
inline Shares map_shares(int64_t pixels, int64_t packs, int64_t rows_at_once) {
  return Shares(pixels, packs, kThreads, rows_at_once, 4 * rows_at_once, kMapBlocks);
}

// Bytes for two doubles a channel and chunk, whichever width it will be.
template <class T>
int64_t sums_workspace(const BatchNormParams& p, int64_t rows_at_once) {
  const int64_t pixels = p.N * p.H * p.W;
  const int64_t packed = p.C % kSumWidth<T> ? 0 : sum_shares(pixels, p.C / kSumWidth<T>, rows_at_once).chunks;
  return std::max(packed, sum_shares(pixels, p.C, rows_at_once).chunks) * 2 * p.C *
         static_cast<int64_t>(sizeof(double));
}

}  // namespace cnnfast::cuda::batch_norm
