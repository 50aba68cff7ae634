// Sum and activation in one pass: y = act(x + r), and its gradient t = g * act', which the result tells.
//
// A task is a share of the rows (rows.h). Operands that lie alike without gaps are one run of elements, whatever their
// order of dimensions; those with neighbouring channels are rows of pixels; others (mixed layouts) go element by
// element. Sums are in float for float, bf16 and fp16, in double for double, and rounded once. Layout: any.
#include "../common/kernel_table.h"
#include "epilogue.h"
#include "primitives/parallel.h"
#include "rows.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kRun = 1024;                      // elements of a row of one run
constexpr int64_t kElementsWorthThreads = 1 << 15;  // below, one thread

template <class S>
struct Tensor {
  S* data;
  int64_t n, c, h, w;

  Pixels<S> pixels() const { return {data, n, h, w}; }
};

template <class A, class B>
bool alike(const AddActParams& p, const Tensor<A>& a, const Tensor<B>& b) {
  return (p.N == 1 || a.n == b.n) && (p.C == 1 || a.c == b.c) && (p.H == 1 || a.h == b.h) && (p.W == 1 || a.w == b.w);
}
template <class S>
bool without_gaps(const AddActParams& p, const Tensor<S>& x) {
  int64_t elements = 1;
  const int64_t sizes[] = {p.N, p.C, p.H, p.W}, strides[] = {x.n, x.c, x.h, x.w};
  bool done[4] = {};
  for (int round = 0; round < 4; ++round)
    for (int d = 0; d < 4; ++d)
      if (!done[d] && (sizes[d] == 1 || strides[d] == elements)) done[d] = true, elements *= sizes[d];
  return done[0] && done[1] && done[2] && done[3];
}

// out = f(a, b), vector by vector.
template <class S, class F>
void map(const AddActParams& p, Tensor<const S> a, Tensor<const S> b, Tensor<S> out, int threads, const F& f) {
  using T = Compute<S>;
  const int64_t elements = p.N * p.C * p.H * p.W;
  threads = elements < kElementsWorthThreads ? 1 : threads;
  Pixels<const S> x = a.pixels(), r = b.pixels();
  Pixels<S> y = out.pixels();
  Rows rows{p.N, p.H, p.W, p.C, 0};
  if (alike(p, a, b) && alike(p, a, out) && without_gaps(p, a)) {
    rows = {1, 1, elements / kRun, kRun, elements % kRun};
    make_flat(x, kRun), make_flat(r, kRun), make_flat(y, kRun);
  } else if (p.C > 1 && (a.c != 1 || b.c != 1 || out.c != 1)) {
    parallel_for(threads, p.N * p.C, [&](int64_t task) {
      const int64_t n = task / p.C, c = task % p.C;
      for (int64_t h = 0; h < p.H; ++h)
        for (int64_t w = 0; w < p.W; ++w) {
          const Vec<T> left = broadcast(widen_one(x.at(n, h, w)[c * a.c]));
          const Vec<T> right = broadcast(widen_one(r.at(n, h, w)[c * b.c]));
          narrow_one(y.at(n, h, w) + c * out.c, f(left, right)[0]);
        }
    });
    return;
  }
  const int64_t tasks = min(threads, rows.count());
  with_stores(rows, y, [&](auto stores) {
    parallel_for(threads, tasks, [&](int64_t task) {
      for_each_rows_back<1>(rows, rows.count() * task / tasks, rows.count() * (task + 1) / tasks,
                            [&](auto, int64_t n, int64_t h, int64_t w, int64_t len) {
                              const S *left = x.at(n, h, w), *right = r.at(n, h, w);
                              S* to = y.at(n, h, w);
                              const int64_t next_left = x.w, next_right = r.w;
                              for_each_vector<T>(0, len, [=](int64_t i, auto lanes) {
                                stores.fetch(left + next_left + i), stores.fetch(right + next_right + i);
                                stores.write_to(to + i, f(read(left + i, lanes), read(right + i, lanes)), lanes);
                              });
                            });
      stores.end();
    });
  });
}

template <class S>
const char* launch_fprop(const void* params, const Launch& l) {
  using V = Vec<Compute<S>>;
  const AddActParams& p = *static_cast<const AddActParams*>(params);
  with_activation<Compute<S>>(static_cast<Activation>(p.act), [&](auto act) {
    map<S>(p, {static_cast<const S*>(l.operands[0]), p.x_n, p.x_c, p.x_h, p.x_w},
           {static_cast<const S*>(l.operands[1]), p.r_n, p.r_c, p.r_h, p.r_w},
           {static_cast<S*>(l.operands[2]), p.y_n, p.y_c, p.y_h, p.y_w}, l.threads,
           [act](V x, V r) { return activate<Compute<S>>(x + r, act); });
  });
  return nullptr;
}

template <class S>
const char* launch_dgrad(const void* params, const Launch& l) {
  using V = Vec<Compute<S>>;
  const AddActParams& p = *static_cast<const AddActParams*>(params);
  with_activation<Compute<S>>(static_cast<Activation>(p.act), [&](auto act) {
    map<S>(p, {static_cast<const S*>(l.operands[3]), p.g_n, p.g_c, p.g_h, p.g_w},
           {static_cast<const S*>(l.operands[2]), p.y_n, p.y_c, p.y_h, p.y_w},
           {static_cast<S*>(l.operands[4]), p.t_n, p.t_c, p.t_h, p.t_w}, l.threads,
           [act](V g, V y) { return activate_gradient<Compute<S>>(g, y, act); });
  });
  return nullptr;
}

}  // namespace

CNNFAST_KERNEL("add_act.fprop.f32", AddActParams, launch_fprop<float>, nullptr)
CNNFAST_KERNEL("add_act.fprop.f64", AddActParams, launch_fprop<double>, nullptr)
CNNFAST_KERNEL("add_act.fprop.bf16", AddActParams, launch_fprop<BFloat16>, nullptr)
CNNFAST_KERNEL("add_act.fprop.f16", AddActParams, launch_fprop<Float16>, nullptr)
CNNFAST_KERNEL("add_act.dgrad.f32", AddActParams, launch_dgrad<float>, nullptr)
CNNFAST_KERNEL("add_act.dgrad.f64", AddActParams, launch_dgrad<double>, nullptr)
CNNFAST_KERNEL("add_act.dgrad.bf16", AddActParams, launch_dgrad<BFloat16>, nullptr)
CNNFAST_KERNEL("add_act.dgrad.f16", AddActParams, launch_dgrad<Float16>, nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
