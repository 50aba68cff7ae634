// Batch normalisation with a residual and an activation, and both halves of its gradient, in f32, f64, bf16 and f16.
// (The statistics are in batch_norm_stats.cu.)
//
//   fprop              y = act((x - m) * v * w + b + r)
//   wgrad              dw[c] = sum of dz * xhat, db[c] = sum of dz     dz = dy * act', xhat = (x - m) * v
//   dgrad              dx = w * v * dz, the statistics being constants
//   backward           dw, db and dx; in training dx = w * v * (dz - (db + xhat * dw) / count)
//   backward_residual  these and u = dz, which is then all that the second pass has to read beside x
//
// Each direction reads its operands once, backward twice (its sums come first). act' is taken from the result where
// there was a residual; where there was none fprop's value is computed again from x by the same instructions, which is
// cheaper than reading the result.
//
// Mapping: a thread keeps the factors of a pack of channels in registers and walks over pixels, several at a time; a
// block is 32 packs at most by the pixels that 256 threads have room for (pixels.h). dgrad walks backwards, so that it
// finds in the cache what wgrad read last. Sums: a thread's over 8 pixels, then its own, the block's and, in a second
// kernel, the chunks', in an order that the sizes decide; no atomics.
// Layout: NHWC, any pixel strides; where sizes, strides or addresses don't allow packs of 16 bytes a thread takes one
// channel. Accumulator: f32 (f64 for f64); sums over more than 8 pixels f64. Memory offsets are 64-bit.
#include "batch_norm.h"

namespace cnnfast::cuda::batch_norm {
namespace {

// Pixels whose operands are loaded before the first is computed with: as many as there are registers for.
constexpr int kRowsAtOnce = 2;
template <bool residual>
constexpr int kFpropRowsAtOnce = residual ? 2 : 4;
template <class T>
constexpr int kSumRowsAtOnce = sizeof(T) == 2 ? 4 : 2;
constexpr int kRowsASum = 8;   // pixels whose sum is in Acc
constexpr int kLeastWalk = 4;  // pixels of a thread

// A pack of pixel number `pixel`.
template <class T, int width>
__device__ __forceinline__ Pack<T, width> read(const T* from, const Pixels& pixels, const Strides& strides, int pixel,
                                               int64_t pack) {
  return load<T, width>(from + pixels.offset(strides, pixel) + pack * width);
}
template <class T, int width>
__device__ __forceinline__ void write(T* to, const Pixels& pixels, const Strides& strides, int pixel, int64_t pack,
                                      const Pack<T, width>& value) {
  pack_of<T, width>(to + pixels.offset(strides, pixel), pack) = value;
}

// ---- fprop ----------------------------------------------------------------------------------------------------------

template <class T, int width, bool residual>
__global__ void __launch_bounds__(kThreads, 2) fprop(const Call<T> call, const Shares shares, const int64_t packs) {
  using Acc = Accumulator<T>;
  const Activate<Acc> act(call.act);
  for (int64_t i = blockIdx.x; i < shares.count(); i += gridDim.x) {
    const Share share(shares, i, threadIdx.x, packs, call.pixels.count);
    if (!share.present) continue;
    const Factors<Acc, width> factors(call, share.pack);
    for (int pixel = share.first; pixel < share.end; pixel += kFpropRowsAtOnce<residual> * shares.rows) {
      Pack<T, width> x[kFpropRowsAtOnce<residual>], r[kFpropRowsAtOnce<residual>];
#pragma unroll
      for (int j = 0; j < kFpropRowsAtOnce<residual>; ++j) {
        const int here = pixel + j * shares.rows;
        if (here >= share.end) continue;
        x[j] = read<T, width>(call.x, call.pixels, call.sx, here, share.pack);
        if (residual) r[j] = read<T, width>(call.r, call.pixels, call.sr, here, share.pack);
      }
#pragma unroll
      for (int j = 0; j < kFpropRowsAtOnce<residual>; ++j) {
        const int here = pixel + j * shares.rows;
        if (here >= share.end) break;
        Pack<T, width> y;
#pragma unroll
        for (int e = 0; e < width; ++e) {
          Acc z = factors.normalised(Numeric<T>::widen(x[j].v[e]) - factors.mean.v[e], e);
          if (residual) z += Numeric<T>::widen(r[j].v[e]);
          y.v[e] = Numeric<T>::narrow(act(z));
        }
        write(call.result, call.pixels, call.sy, here, share.pack, y);
      }
    }
  }
}

// ---- the gradient ---------------------------------------------------------------------------------------------------

// What the gradient reads of a pixel; out: the result, of which it has use.
template <class T, int width>
struct Operands {
  Pack<T, width> x, out, g;

  __device__ __forceinline__ void read_from(const Call<T>& call, bool reads_x, bool reads_out, int pixel,
                                            int64_t pack) {
    if (reads_x) x = read<T, width>(call.x, call.pixels, call.sx, pixel, pack);
    if (reads_out) out = read<T, width>(call.r, call.pixels, call.sr, pixel, pack);
    g = read<T, width>(call.y, call.pixels, call.sy, pixel, pack);
  }
  template <class Acc>
  __device__ __forceinline__ Acc before_activation(bool reads_out, const Factors<Acc, width>& factors,
                                                   const Activate<Acc>& act, Acc centred, int e) const {
    const Acc gradient = Numeric<T>::widen(g.v[e]);
    return act.gradient(gradient, reads_out ? Numeric<T>::widen(out.v[e]) : factors.normalised(centred, e));
  }
};

// residual: whether the result tells act' (one of two uses of registers). partial: [chunk][sum of dz, of dz * (x -
// m)][C].
template <class T, int width, bool residual>
__global__ void __launch_bounds__(kThreads, 2)
    wgrad(const Call<T> call, const Shares shares, const int64_t packs, double* __restrict__ partial) {
  using Acc = Accumulator<T>;
  CNNFAST_SHARED(double, sums, [2][width][kThreads]);
  const int self = threadIdx.x;
  const Activate<Acc> act(call.act);
  for (int64_t i = blockIdx.x; i < shares.count(); i += gridDim.x) {
    const Share share(shares, i, self, packs, call.pixels.count);
#pragma unroll
    for (int e = 0; e < width; ++e) sums[0][e][self] = sums[1][e][self] = 0;
    if (share.present) {
      const Factors<Acc, width> factors(call, share.pack);
      Acc db[width] = {}, dw[width] = {};
      const auto add = [&] {
#pragma unroll
        for (int e = 0; e < width; ++e) {
          sums[0][e][self] += db[e], sums[1][e][self] += dw[e];
          db[e] = dw[e] = 0;
        }
      };
      int rows = 0;
      for (int pixel = share.first; pixel < share.end; pixel += kSumRowsAtOnce<T> * shares.rows) {
        Operands<T, width> at[kSumRowsAtOnce<T>];
#pragma unroll
        for (int j = 0; j < kSumRowsAtOnce<T>; ++j)
          if (pixel + j * shares.rows < share.end)
            at[j].read_from(call, true, residual, pixel + j * shares.rows, share.pack);
#pragma unroll
        for (int j = 0; j < kSumRowsAtOnce<T>; ++j) {
          const int here = pixel + j * shares.rows;
          if (here >= share.end) break;
          Pack<T, width> u;
#pragma unroll
          for (int e = 0; e < width; ++e) {
            const Acc centred = Numeric<T>::widen(at[j].x.v[e]) - factors.mean.v[e];
            const Acc dz = at[j].before_activation(residual, factors, act, centred, e);
            db[e] += dz;
            dw[e] += dz * centred;
            u.v[e] = Numeric<T>::narrow(dz);
          }
          if (call.u) write(call.u, call.pixels, call.su, here, share.pack, u);
        }
        if ((rows += kSumRowsAtOnce<T>) % kRowsASum == 0) add();
      }
      add();
    }
    join_rows(shares.rows, shares.lanes, share.row, [&](int other) {
#pragma unroll
      for (int e = 0; e < width; ++e) sums[0][e][self] += sums[0][e][other], sums[1][e][self] += sums[1][e][other];
    });
    if (share.present && share.row == 0) {
      double* to = partial + share.chunk * 2 * call.C + share.pack * width;
#pragma unroll
      for (int e = 0; e < width; ++e) to[e] = sums[0][e][self], to[call.C + e] = sums[1][e][self];
    }
  }
}

// Adds the chunks of 8 channels up, a thread every 32nd chunk of one channel.
template <class T, class Acc>
__global__ void __launch_bounds__(kThreads, 4)
    finish(const Call<T> call, const int64_t chunks, const double* __restrict__ partial, Acc* __restrict__ dw,
           Acc* __restrict__ db) {
  const int64_t C = call.C;
  constexpr int slices = kThreads / kFinishChannels;
  CNNFAST_SHARED(double, sums, [2][kThreads]);
  const int self = threadIdx.x, slice = self / kFinishChannels;
  for (int64_t tile = blockIdx.x; tile * kFinishChannels < C; tile += gridDim.x) {
    const int64_t c = tile * kFinishChannels + self % kFinishChannels;
    double bias = 0, weight = 0;
    if (c < C) {
#pragma unroll 4
      for (int64_t chunk = slice; chunk < chunks; chunk += slices) {
        bias += partial[chunk * 2 * C + c];
        weight += partial[chunk * 2 * C + C + c];
      }
    }
    sums[0][self] = bias, sums[1][self] = weight;
    join_rows(slices, kFinishChannels, slice, [&](int other) {
      sums[0][self] = bias += sums[0][other];
      sums[1][self] = weight += sums[1][other];
    });
    if (slice == 0 && c < C) {
      const Factors<Acc, 1> factors(call, c);
      db[c] = static_cast<Acc>(bias);
      dw[c] = static_cast<Acc>(weight * factors.invstd.v[0]);
    }
  }
}

template <class T, int width>
__global__ void __launch_bounds__(kThreads, 2)
    dgrad(const Call<T> call, const Shares shares, const int64_t packs, const Accumulator<T>* __restrict__ dw,
          const Accumulator<T>* __restrict__ db) {
  using Acc = Accumulator<T>;
  const Activate<Acc> act(call.act);
  const bool reads_x = call.training || (call.act != Activation::kNone && !call.r);
  for (int64_t i = blockIdx.x; i < shares.count(); i += gridDim.x) {
    const Share share(shares, shares.count() - 1 - i, threadIdx.x, packs, call.pixels.count);
    if (!share.present) continue;
    const Factors<Acc, width> factors(call, share.pack);
    Pack<Acc, width> bias = vector_of<Acc, width>(db, share.pack, Acc(0));
    Pack<Acc, width> weight = vector_of<Acc, width>(dw, share.pack, Acc(0));
    const Acc count = static_cast<Acc>(call.pixels.count);
#pragma unroll
    for (int e = 0; e < width; ++e) bias.v[e] /= count, weight.v[e] /= count;
    for (int pixel = share.first; pixel < share.end; pixel += kRowsAtOnce * shares.rows) {
      Operands<T, width> at[kRowsAtOnce];
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j)
        if (pixel + j * shares.rows < share.end)
          at[j].read_from(call, reads_x, call.r, pixel + j * shares.rows, share.pack);
#pragma unroll
      for (int j = 0; j < kRowsAtOnce; ++j) {
        const int here = pixel + j * shares.rows;
        if (here >= share.end) break;
        Pack<T, width> t;
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const Acc centred = reads_x ? Numeric<T>::widen(at[j].x.v[e]) - factors.mean.v[e] : Acc(0);
          Acc dz = at[j].before_activation(call.r, factors, act, centred, e);
          if (call.training) dz = dz - bias.v[e] - centred * factors.invstd.v[e] * weight.v[e];
          t.v[e] = Numeric<T>::narrow(dz * factors.scale.v[e]);
        }
        write(call.t, call.pixels, call.st, here, share.pack, t);
      }
    }
  }
}

// ---- launch ---------------------------------------------------------------------------------------------------------

template <class T, int width>
struct Launchers {
  using Acc = Accumulator<T>;

  static const char* fprop(const Call<T>& call, const Launch& run) {
    const int64_t packs = call.C / width;
    const Shares shares = map_shares(call.pixels.count, packs, kLeastWalk);
    if (shares.count() == 0) return nullptr;
    const dim3 grid = grid_for(shares.count()), block(kThreads, 1, 1);
    return call.r ? launch<batch_norm::fprop<T, width, true>>(grid, block, 0, run.stream, call, shares, packs)
                  : launch<batch_norm::fprop<T, width, false>>(grid, block, 0, run.stream, call, shares, packs);
  }
  static const char* wgrad(const Call<T>& call, const Launch& run) {
    const int64_t packs = call.C / width;
    const Shares shares = sum_shares(call.pixels.count, packs, kLeastWalk);
    double* partial = static_cast<double*>(run.workspace);
    const char* error = nullptr;
    const dim3 grid = grid_for(shares.count()), block(kThreads, 1, 1);
    if (shares.count() > 0)
      error =
          call.r ? launch<batch_norm::wgrad<T, width, true>>(grid, block, 0, run.stream, call, shares, packs, partial)
                 : launch<batch_norm::wgrad<T, width, false>>(grid, block, 0, run.stream, call, shares, packs, partial);
    if (error) return error;
    return launch<finish<T, Acc>>(grid_for(ceil_div(call.C, kFinishChannels)), dim3(kThreads, 1, 1), 0, run.stream,
                                  call, shares.chunks, partial, static_cast<Acc*>(run.operands[kDw]),
                                  static_cast<Acc*>(run.operands[kDb]));
  }
  static const char* dgrad(const Call<T>& call, const Launch& run) {
    const int64_t packs = call.C / width;
    const Shares shares = map_shares(call.pixels.count, packs, kLeastWalk);
    if (shares.count() == 0) return nullptr;
    return launch<batch_norm::dgrad<T, width>>(grid_for(shares.count()), dim3(kThreads, 1, 1), 0, run.stream, call,
                                               shares, packs, static_cast<const Acc*>(run.operands[kDw]),
                                               static_cast<const Acc*>(run.operands[kDb]));
  }
  // What wgrad left is all that dgrad needs.
  static const char* backward(Call<T> call, const Launch& run) {
    if (call.u) {  // dz is at hand, the activation behind it
      call.y = call.u, call.sy = call.su;
      call.r = nullptr;
      call.act = Activation::kNone;
    }
    return dgrad(call, run);
  }
};

template <class T>
const char* launch_fprop(const void* params, const Launch& run) {
  const Call<T> call(*static_cast<const BatchNormParams*>(params), run);
  return call.packed(kPackWidth<T>) ? Launchers<T, kPackWidth<T>>::fprop(call, run) : Launchers<T, 1>::fprop(call, run);
}
template <class T>
const char* sum_up(const Call<T>& call, const Launch& run) {
  constexpr int width = kSumWidth<T>;
  return call.packed(width) ? Launchers<T, width>::wgrad(call, run) : Launchers<T, 1>::wgrad(call, run);
}
template <class T>
const char* launch_wgrad(const void* params, const Launch& run) {
  return sum_up(Call<T>(*static_cast<const BatchNormParams*>(params), run), run);
}
template <class T>
const char* launch_dgrad(const void* params, const Launch& run) {
  const Call<T> call(*static_cast<const BatchNormParams*>(params), run);
  return call.packed(kPackWidth<T>) ? Launchers<T, kPackWidth<T>>::dgrad(call, run) : Launchers<T, 1>::dgrad(call, run);
}
template <class T>
const char* launch_backward(const void* params, const Launch& run) {
  const Call<T> call(*static_cast<const BatchNormParams*>(params), run);
  const char* error = sum_up(call, run);
  if (error) return error;
  return call.packed(kPackWidth<T>) ? Launchers<T, kPackWidth<T>>::backward(call, run)
                                    : Launchers<T, 1>::backward(call, run);
}

template <class T>
int64_t workspace(const void* params) {
  return sums_workspace<T>(*static_cast<const BatchNormParams*>(params), kLeastWalk);
}

}  // namespace

#define CNNFAST_BATCH_NORM(dtype, T)                                                              \
  CNNFAST_KERNEL("batch_norm.fprop." dtype, BatchNormParams, launch_fprop<T>, nullptr)            \
  CNNFAST_KERNEL("batch_norm.dgrad." dtype, BatchNormParams, launch_dgrad<T>, nullptr)            \
  CNNFAST_KERNEL("batch_norm.wgrad." dtype, BatchNormParams, launch_wgrad<T>, workspace<T>)       \
  CNNFAST_KERNEL("batch_norm.backward." dtype, BatchNormParams, launch_backward<T>, workspace<T>) \
  CNNFAST_KERNEL("batch_norm.backward_residual." dtype, BatchNormParams, launch_backward<T>, workspace<T>)
CNNFAST_BATCH_NORM("f32", float)
CNNFAST_BATCH_NORM("f64", double)
CNNFAST_BATCH_NORM("bf16", __nv_bfloat16)
CNNFAST_BATCH_NORM("f16", __half)
#undef CNNFAST_BATCH_NORM

}  // namespace cnnfast::cuda::batch_norm
