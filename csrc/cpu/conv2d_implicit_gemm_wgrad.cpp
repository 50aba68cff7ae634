// Implicit GEMM, wgrad: rows are input channels, columns output channels, the reduction runs over output pixels.
//
//   dw[k,c,r,s] = sum_{n,p,q} x[n,c,h,w] * g[n,k,p,q]     h = p*stride_h - pad_h + r*dilation_h, w alike
//
// A register tile (gemm_tile.h) computes up to 14 channels c x 2 vectors of channels k of one tap over a block of
// pixels; x comes from a strip of zero-bordered rows (widened to float), g from panels [pixel][k]. Few input channels:
// the strip's pixels are adjacent, so that the S taps of a filter row are one run of S*C rows.
//
// A task owns a block of k, a block of c and a range of filter rows, and walks all pixels: no sum crosses threads, so
// the result is the same bit for bit in every run. Its sums stay in scratch (~0.8 MiB) while blocks of x and g
// (together ~1.5 MiB) pass by. The blocks are chosen by the estimated cost of multiplying, copying and packing.
//
// Sums are in float for float, bf16 and fp16, in double for double; one rounding at the end. Padding contributes
// nothing: a call that meets an Inf or a NaN in g is done again by the direct kernel (zeros stand for the padding).
#include "../common/kernel_table.h"
#include "conv2d_direct.h"
#include "conv2d_view.h"
#include "gemm_tile.h"
#include "pack.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kBlockBytes = 800 << 10;      // sums, and pixels of x and of g, each
constexpr int64_t kMacsWorthThreads = 1 << 18;  // below, one thread
constexpr int64_t kFoldChannels = 16;           // fewer channels: taps of a filter row become one run
constexpr int64_t kMostRows = 256;              // output rows in a block
constexpr int64_t kPad = 16;                    // elements between pixels

struct Plan {
  bool fold;
  int64_t step_h, step_w;               // strip row i is input row i * step_h - pad_h
  int64_t vecs, channels, filter_rows;  // a task's block: vectors of k, channels c, filter rows
  int64_t tasks_k, tasks_c, tasks_r;    // of one group
  int64_t columns;                      // columns of a strip
  int64_t rows;                         // output rows in a block
};

int64_t pixel_pitch(const Plan& plan, int64_t channels) {
  return plan.fold ? channels : round_up(channels, kPad) + kPad;
}
int64_t strip_rows(const Plan& plan, const Conv2dView& v, int64_t rows) {
  return ((rows - 1) * v.stride_h + (plan.filter_rows - 1) * v.dilation_h) / plan.step_h + 1;
}

template <class T>
Plan make_plan(const Conv2dView& v, int threads) {
  constexpr int64_t VL = kLanes<T>, size = sizeof(T);
  Plan plan{};
  plan.step_h = needed_step(v.P, v.R, v.stride_h, v.dilation_h);
  plan.step_w = needed_step(v.Q, v.S, v.stride_w, v.dilation_w);
  plan.columns = ((v.Q - 1) * v.stride_w + (v.S - 1) * v.dilation_w) / plan.step_w + 1;
  plan.fold = v.G == 1 && v.S > 1 && v.dilation_w == plan.step_w && v.C < kFoldChannels;
  const double pixels = static_cast<double>(v.N * v.P * v.Q);
  double best = -1;
  for (int64_t vecs = 1; vecs <= 8; vecs *= 2)
    for (int64_t channels = plan.fold ? v.C : 16; channels <= 256; channels *= 2)
      for (int split = 0; split < 2; ++split) {
        Plan p = plan;
        p.vecs = min(vecs, ceil_div(v.K, VL));
        p.channels = min(channels, v.C);
        p.filter_rows = split ? 1 : v.R;
        p.tasks_k = ceil_div(v.K, p.vecs * VL), p.tasks_c = ceil_div(v.C, p.channels);
        p.tasks_r = ceil_div(v.R, p.filter_rows);
        const double sums = static_cast<double>(p.vecs * VL * p.channels * p.filter_rows * v.S);
        const double tasks = static_cast<double>(ceil_div(v.G * p.tasks_k * p.tasks_c * p.tasks_r, threads));
        const double narrow = p.vecs == 1 ? 1.1 : 1;  // a tile one vector wide is bound by its loads
        double cost =
            pixels * (sums / (2 * VL) * narrow + static_cast<double>(p.channels * v.stride_h * v.stride_w) / 8 +
                      static_cast<double>(p.vecs * VL) / 8);
        if (sums * size > kBlockBytes) cost *= 2;
        if (strip_rows(p, v, 1) * p.columns * pixel_pitch(p, p.channels) * size > kBlockBytes) cost *= 2;
        cost *= tasks;
        if (best < 0 || cost < best) best = cost, plan = p;
      }
  const int64_t pitch = pixel_pitch(plan, plan.channels);
  plan.rows = min(kMostRows, max(1, kBlockBytes / max(1, v.Q * plan.vecs * VL * size)));
  while (plan.rows > 1 &&
         strip_rows(plan, v, min(plan.rows, v.P)) * ceil_div(plan.rows, v.P) * plan.columns * pitch * size >
             kBlockBytes)
    plan.rows /= 2;
  return plan;
}

template <class T, class S>
class Worker {
 public:
  Worker(const Conv2dView& v, const Plan& plan, const S* x, S* dw, const S* g)
      : v_(v), plan_(plan), x_(x), dw_(dw), g_(g) {}

  bool finite() const { return finite_; }

  // False: out of memory.
  bool run(int64_t task) {
    const int64_t r = task % plan_.tasks_r;
    task /= plan_.tasks_r;
    const int64_t c = task % plan_.tasks_c;
    task /= plan_.tasks_c;
    group_ = task / plan_.tasks_k;
    k_ = task % plan_.tasks_k * plan_.vecs * VL;
    lanes_ = min(plan_.vecs * VL, v_.K - k_), vecs_ = ceil_div(lanes_, VL);
    c_ = c * plan_.channels, channels_ = min(plan_.channels, v_.C - c_);
    r_ = r * plan_.filter_rows, filter_rows_ = min(plan_.filter_rows, v_.R - r_);
    pitch_ = pixel_pitch(plan_, channels_);
    // Rows of a tap: its channels, or with adjacent pixels the S*C elements of a filter row.
    tap_rows_ = plan_.fold ? v_.S * channels_ : channels_;
    taps_across_ = plan_.fold ? 1 : v_.S;
    const int64_t images = plan_.rows >= v_.P ? plan_.rows / v_.P : 1;
    const int64_t image_rows = strip_rows(plan_, v_, min(plan_.rows, v_.P));
    const auto carve = [&](Carver carver) {
      taps_ = carver.take<Tap>(TapList::capacity(plan_.rows, v_.Q));
      sums_ = carver.take<T>(filter_rows_ * taps_across_ * tap_rows_ * vecs_ * VL);
      chains_ = carver.take<T>(kMostTileRows * kMaxTileVecs * VL);
      panel_ = carver.take<T>(plan_.rows * v_.Q * vecs_ * VL);
      strip_ = carver.take<T>(images * image_rows * plan_.columns * pitch_ + 2 * VL);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));

    const int64_t total = filter_rows_ * taps_across_ * tap_rows_ * vecs_;
    for (int64_t i = 0; i < total; ++i) store(sums_ + i * VL, Vec<T>{});
    // Blocks hold rows of one image, or several whole images.
    if (plan_.rows >= v_.P)
      for (int64_t n = 0; n < v_.N; n += images) run_block(n, min(images, v_.N - n), 0, v_.P);
    else
      for (int64_t n = 0; n < v_.N; ++n)
        for (int64_t p = 0; p < v_.P; p += plan_.rows) run_block(n, 1, p, min(plan_.rows, v_.P - p));
    write();
    return true;
  }

 private:
  static constexpr int64_t VL = kLanes<T>;

  void run_block(int64_t n0, int64_t images, int64_t p0, int64_t rows) {
    const int64_t image_rows = strip_rows_of(rows), image = image_rows * plan_.columns * pitch_;
    TapList list(taps_);
    const int64_t step = v_.Q == 1 ? 0 : v_.stride_w / plan_.step_w * pitch_ * static_cast<int64_t>(sizeof(T));
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t i = 0; i < image_rows; ++i) {
        const int64_t h = p0 * v_.stride_h - v_.pad_h + r_ * v_.dilation_h + i * plan_.step_h;
        const bool inside = h >= 0 && h < v_.H;
        copy_row(strip_ + n * image + i * plan_.columns * pitch_,
                 x_ + (n0 + n) * v_.x_n + (inside ? h : 0) * v_.x_h + group_ * v_.C + c_, plan_.columns, -v_.pad_w,
                 plan_.step_w, inside ? v_.W : 0, v_.x_w, channels_, pitch_);
      }
      const int64_t row_step = rows == 1 ? 0 : v_.stride_h / plan_.step_h * plan_.columns * pitch_;
      for (int64_t p = 0; p < rows; ++p)
        list.add((n * image + p * row_step) * static_cast<int64_t>(sizeof(T)), v_.Q, step);
    }
    pack_gradient(n0, images, p0, rows);
    multiply(list.size(), step, images * rows * v_.Q);
  }

  int64_t strip_rows_of(int64_t rows) const {
    return ((rows - 1) * v_.stride_h + (filter_rows_ - 1) * v_.dilation_h) / plan_.step_h + 1;
  }

  // Panels of up to kMaxTileVecs vectors, each [pixel][k].
  void pack_gradient(int64_t n0, int64_t images, int64_t p0, int64_t rows) {
    const int64_t pixels = images * rows * v_.Q;
    Vec<T> check{};
    for (int64_t j = 0; j < vecs_; j += kMaxTileVecs) {
      const int64_t width = min(kMaxTileVecs, vecs_ - j) * VL;
      T* out = panel_ + j * VL * pixels;
      for (int64_t n = 0; n < images; ++n)
        for (int64_t p = 0; p < rows; ++p) {
          const S* in = g_ + (n0 + n) * v_.y_n + (p0 + p) * v_.y_h + group_ * v_.K + k_ + j * VL;
          for (int64_t q = 0; q < v_.Q; ++q, in += v_.y_w, out += width)
            for (int64_t l = 0; l < width; l += VL) {
              const int64_t left = lanes_ - j * VL - l;
              const Vec<T> value = left >= VL ? load_wide(in + l) : load_wide(in + l, left);
              check += value * T(0);
              store(out + l, value);
            }
        }
    }
    for (int l = 0; l < VL; ++l) finite_ &= check[l] == T(0);
  }

  void multiply(int64_t ntaps, int64_t step, int64_t pixels) {
    const int64_t dilation_h = v_.R == 1 ? 0 : v_.dilation_h / plan_.step_h * plan_.columns * pitch_;
    const int64_t dilation_w = v_.S == 1 ? 0 : v_.dilation_w / plan_.step_w * pitch_;
    TileArgs<T> args;
    args.a_row = 0, args.a_step = step;
    args.taps = taps_, args.ntaps = ntaps, args.chains = chains_;
    for (int64_t j = 0; j < vecs_; j += kMaxTileVecs) {
      const int64_t vecs = min(kMaxTileVecs, vecs_ - j), width = vecs * VL;
      const int64_t tiles = ceil_div(tap_rows_, kMaxTileRows[vecs]);
      args.b = panel_ + j * VL * pixels;
      T* sums = sums_of(j);
      for (int64_t r = 0; r < filter_rows_; ++r)
        for (int64_t s = 0; s < taps_across_; ++s, sums += tap_rows_ * width)
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t i = tap_rows_ * t / tiles, rows = tap_rows_ * (t + 1) / tiles - i;
            args.a = strip_ + r * dilation_h + s * dilation_w + i;
            args.init = args.out = sums + i * width;
            args.init_row = args.out_row = width;
            tile_function<T, false>(rows, vecs)(args);
          }
    }
  }

  T* sums_of(int64_t vec) const { return sums_ + filter_rows_ * taps_across_ * tap_rows_ * vec * VL; }

  // The sums of a panel are rows (tap, c) of vectors of k, as pack_panel makes them of weights; with adjacent pixels
  // the rows of a filter row are (s, c), which is the same order.
  void write() {
    for (int64_t j = 0; j < vecs_; j += kMaxTileVecs) {
      const int64_t vecs = min(kMaxTileVecs, vecs_ - j);
      const PanelShape shape{
          min(vecs * VL, lanes_ - j * VL), vecs, channels_, filter_rows_, v_.S, v_.w_k, v_.w_c, v_.w_r, v_.w_s};
      unpack_panel(dw_ + group_ * v_.w_g + (k_ + j * VL) * v_.w_k + c_ * v_.w_c + r_ * v_.w_r, sums_of(j), shape);
    }
  }

  const Conv2dView& v_;
  const Plan& plan_;
  const S* x_;
  S* dw_;
  const S* g_;
  int64_t group_ = 0, k_ = 0, lanes_ = 0, vecs_ = 0, c_ = 0, channels_ = 0, r_ = 0, filter_rows_ = 0;
  int64_t pitch_ = 0, tap_rows_ = 0, taps_across_ = 0;
  Tap* taps_ = nullptr;
  T *sums_ = nullptr, *chains_ = nullptr, *panel_ = nullptr, *strip_ = nullptr;
  bool finite_ = true;
};

template <class S>
const char* launch_wgrad(const void* params, const Launch& l) {
  using T = Compute<S>;
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const S *x = static_cast<const S*>(l.operands[0]), *g = static_cast<const S*>(l.operands[3]);
  S* dw = static_cast<S*>(l.operands[1]);
  const Conv2dView v = fprop_view(p);
  if (v.K * v.C * v.R * v.S * v.G == 0) return nullptr;
  if (v.N * v.P * v.Q == 0) {
    direct_wgrad(p, x, dw, g, 1);  // writes zeros
    return nullptr;
  }
  const int threads = v.N * v.P * v.Q * v.K * v.C * v.R * v.S * v.G < kMacsWorthThreads ? 1 : l.threads;
  const Plan plan = make_plan<T>(v, threads);
  bool finite = true, memory = true;  // only ever set to false, so that the threads may race
  parallel_for(threads, v.G * plan.tasks_k * plan.tasks_c * plan.tasks_r, [&](int64_t task) {
    Worker<T, S> worker(v, plan, x, dw, g);
    if (!worker.run(task)) __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
    if (!worker.finite()) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  if (!memory) return "out of memory";
  if (!finite && reaches_padding(v)) direct_wgrad(p, x, dw, g, l.threads);
  return nullptr;
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f32", Conv2dParams, launch_wgrad<float>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f64", Conv2dParams, launch_wgrad<double>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.bf16", Conv2dParams, launch_wgrad<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f16", Conv2dParams, launch_wgrad<Float16>, nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
