// Sum and activation in one pass: y = act(x + r), and its gradient t = g * act', which the result tells; in f32, f64,
// bf16 and f16.
//
// Mapping: an item is 16 bytes of each operand, neighbouring threads taking neighbouring items, a thread several at a
// time. Operands that lie alike without gaps are one run of elements, whatever their order of dimensions; those with
// neighbouring channels are packs of pixels (pixels.h); others (mixed layouts, channels that don't fill packs) go
// element by element. Layout: any. Sums are in f32 (f64 for f64) and rounded once. Memory offsets are 64-bit.
#include "../common/kernel_table.h"
#include "activation.h"
#include "packs.h"
#include "primitives/cuda.h"
#include "primitives/launch.h"
#include "primitives/numeric.h"

namespace cnnfast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 2;  // of a thread, loaded before the first is stored
constexpr int kBlockItems = kThreads * kItems;

enum class Direction { fprop, dgrad };

// a: x or g; b: r or y.
template <Direction direction, class Acc>
__device__ __forceinline__ Acc combine(Acc a, Acc b, const Activate<Acc>& act) {
  if constexpr (direction == Direction::fprop)
    return act(a + b);
  else
    return act.gradient(a, b);
}

struct Strides {
  int64_t n, c, h, w;
};

// Where item i of an operand lies: a pack of a pixel; with packs of one element and `channels_last` unset, w fastest.
struct Items {
  int64_t count, packs, H, W;
  bool run, channels_last;  // run: of one run of elements

  __device__ __forceinline__ void find(int64_t i, int64_t& n, int64_t& pack, int64_t& h, int64_t& w) const {
    int64_t pixel = i;
    if (channels_last) {
      pixel = i / packs;
      pack = i - pixel * packs;
    }
    int64_t line = pixel / W;
    w = pixel - line * W;
    n = line / H;
    h = line - n * H;
    if (channels_last) return;
    pack = n % packs;
    n /= packs;
  }
};

template <class T, int width, Direction direction>
__global__ void __launch_bounds__(kThreads, 4)
    map(const Items items, const Strides sa, const Strides sb, const Strides so, const Activation activation,
        const T* __restrict__ a, const T* __restrict__ b, T* __restrict__ out) {
  const Activate<Accumulator<T>> act(activation);
  const int64_t blocks = ceil_div(items.count, kBlockItems);
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first = block * kBlockItems + threadIdx.x;
    Pack<T, width> left[kItems], right[kItems];
    Pack<T, width>* to[kItems];
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = first + j * kThreads;
      if (i >= items.count) continue;
      int64_t at_a = i, at_b = i, at_out = i;
      if (!items.run) {
        int64_t n, pack, h, w;
        items.find(i, n, pack, h, w);
        const int64_t c = pack * width;
        at_a = (n * sa.n + c * sa.c + h * sa.h + w * sa.w) / width;
        at_b = (n * sb.n + c * sb.c + h * sb.h + w * sb.w) / width;
        at_out = (n * so.n + c * so.c + h * so.h + w * so.w) / width;
      }
      left[j] = reinterpret_cast<const Pack<T, width>*>(a)[at_a];
      right[j] = reinterpret_cast<const Pack<T, width>*>(b)[at_b];
      to[j] = reinterpret_cast<Pack<T, width>*>(out) + at_out;
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (first + j * kThreads >= items.count) continue;
      Pack<T, width> result;
#pragma unroll
      for (int e = 0; e < width; ++e)
        result.v[e] = Numeric<T>::narrow(
            combine<direction>(Numeric<T>::widen(left[j].v[e]), Numeric<T>::widen(right[j].v[e]), act));
      *to[j] = result;
    }
  }
}

bool alike(const AddActParams& p, const Strides& a, const Strides& b) {
  return (p.N == 1 || a.n == b.n) && (p.C == 1 || a.c == b.c) && (p.H == 1 || a.h == b.h) && (p.W == 1 || a.w == b.w);
}
bool without_gaps(const AddActParams& p, const Strides& s) {
  int64_t elements = 1;
  const int64_t sizes[] = {p.N, p.C, p.H, p.W}, strides[] = {s.n, s.c, s.h, s.w};
  bool done[4] = {};
  for (int round = 0; round < 4; ++round)
    for (int d = 0; d < 4; ++d)
      if (!done[d] && (sizes[d] == 1 || strides[d] == elements)) done[d] = true, elements *= sizes[d];
  return done[0] && done[1] && done[2] && done[3];
}

template <class T>
struct Operands {
  const T *a, *b;
  T* out;
  Strides sa, sb, so;

  bool aligned(int width) const {
    const auto bytes = static_cast<int64_t>(sizeof(T));
    return takes_packs(a, 0, width, bytes) && takes_packs(b, 0, width, bytes) && takes_packs(out, 0, width, bytes);
  }
  bool packed(const AddActParams& p, int width) const {
    const int64_t strides = sa.n | sa.h | sa.w | sb.n | sb.h | sb.w | so.n | so.h | so.w;
    return sa.c == 1 && sb.c == 1 && so.c == 1 && p.C % width == 0 && strides % width == 0 && aligned(width);
  }
};

template <class T, int width, Direction direction>
const char* launch_map(const AddActParams& p, const Operands<T>& t, const Items& items, const Launch& run) {
  if (items.count == 0) return nullptr;
  return launch<map<T, width, direction>>(grid_for(ceil_div(items.count, kBlockItems)), dim3(kThreads, 1, 1), 0,
                                          run.stream, items, t.sa, t.sb, t.so, static_cast<Activation>(p.act), t.a, t.b,
                                          t.out);
}

template <class T, Direction direction>
const char* launch_of(const AddActParams& p, const Operands<T>& t, const Launch& run) {
  constexpr int width = kPackWidth<T>;
  const int64_t elements = p.N * p.C * p.H * p.W;
  if (alike(p, t.sa, t.sb) && alike(p, t.sa, t.so) && without_gaps(p, t.sa)) {
    if (!t.aligned(width)) return launch_map<T, 1, direction>(p, t, Items{elements, 1, 1, 1, true, true}, run);
    const int64_t whole = elements / width * width;
    const char* error = launch_map<T, width, direction>(p, t, Items{whole / width, 1, 1, 1, true, true}, run);
    if (error || whole == elements) return error;
    const Operands<T> tail{t.a + whole, t.b + whole, t.out + whole, t.sa, t.sb, t.so};
    return launch_map<T, 1, direction>(p, tail, Items{elements - whole, 1, 1, 1, true, true}, run);
  }
  if (t.packed(p, width))
    return launch_map<T, width, direction>(p, t, Items{elements / width, p.C / width, p.H, p.W, false, true}, run);
  const bool channels_last = p.C > 1 && t.so.c == 1;  // the result is written in its own order
  return launch_map<T, 1, direction>(p, t, Items{elements, p.C, p.H, p.W, false, channels_last}, run);
}

template <class T>
const char* launch_fprop(const void* params, const Launch& run) {
  const auto& p = *static_cast<const AddActParams*>(params);
  return launch_of<T, Direction::fprop>(p,
                                        {static_cast<const T*>(run.operands[0]),
                                         static_cast<const T*>(run.operands[1]),
                                         static_cast<T*>(run.operands[2]),
                                         {p.x_n, p.x_c, p.x_h, p.x_w},
                                         {p.r_n, p.r_c, p.r_h, p.r_w},
                                         {p.y_n, p.y_c, p.y_h, p.y_w}},
                                        run);
}

template <class T>
const char* launch_dgrad(const void* params, const Launch& run) {
  const auto& p = *static_cast<const AddActParams*>(params);
  return launch_of<T, Direction::dgrad>(p,
                                        {static_cast<const T*>(run.operands[3]),
                                         static_cast<const T*>(run.operands[2]),
                                         static_cast<T*>(run.operands[4]),
                                         {p.g_n, p.g_c, p.g_h, p.g_w},
                                         {p.y_n, p.y_c, p.y_h, p.y_w},
                                         {p.t_n, p.t_c, p.t_h, p.t_w}},
                                        run);
}

}  // namespace

CNNFAST_KERNEL("add_act.fprop.f32", AddActParams, launch_fprop<float>, nullptr)
CNNFAST_KERNEL("add_act.fprop.f64", AddActParams, launch_fprop<double>, nullptr)
CNNFAST_KERNEL("add_act.fprop.bf16", AddActParams, launch_fprop<__nv_bfloat16>, nullptr)
CNNFAST_KERNEL("add_act.fprop.f16", AddActParams, launch_fprop<__half>, nullptr)
CNNFAST_KERNEL("add_act.dgrad.f32", AddActParams, launch_dgrad<float>, nullptr)
CNNFAST_KERNEL("add_act.dgrad.f64", AddActParams, launch_dgrad<double>, nullptr)
CNNFAST_KERNEL("add_act.dgrad.bf16", AddActParams, launch_dgrad<__nv_bfloat16>, nullptr)
CNNFAST_KERNEL("add_act.dgrad.f16", AddActParams, launch_dgrad<__half>, nullptr)

}  // namespace cnnfast::cuda
