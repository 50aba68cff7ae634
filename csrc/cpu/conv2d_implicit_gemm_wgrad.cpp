// Implicit GEMM, wgrad: rows are input channels, columns output channels, the reduction runs over output pixels.
//
//   dw[k,c,r,s] = sum_{n,p,q} x[n,c,h,w] * g[n,k,p,q]     h = p*stride_h - pad_h + r*dilation_h, w alike
//
// A register tile (gemm_tile.h) computes up to 14 channels c x 2 vectors of channels k of one tap over some hundred
// pixels. x is read where it lies, if no tap leaves it and nothing is to be widened, else from a strip: rows of x
// copied with their zero borders and widened to float. With few input channels (stems) the strip's pixels are adjacent,
// and the S taps of a filter row are one run of S*C rows. g comes from panels [pixel][k] that stay in L1 while all
// channels and taps pass by; what is needed next is prefetched between the tiles.
//
// A task owns a block of k, a block of c, a range of filter rows and one of a few fixed parts of the pixels. The blocks
// are equal, and chosen by the estimated cost of multiplying, reading and copying. Its sums stay in scratch (~0.8 MiB);
// those of several parts wait in the workspace and are added in the order of the parts: the same bit for bit in every
// run.
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

constexpr int64_t kBlockBytes = 800 << 10;      // sums, and pixels of x, each
constexpr int64_t kPartsBytes = 4 << 20;        // sums of all parts
constexpr int64_t kMostParts = 8;               // of the pixels
constexpr int64_t kPartPixels = 1024;           // at least, of a part
constexpr int64_t kMacsWorthThreads = 1 << 18;  // below, one thread
constexpr int64_t kFoldChannels = 16;           // fewer channels: taps of a filter row become one run
constexpr int64_t kMostChannels = 336;          // of a task
constexpr int64_t kMostRows = 256;              // output rows in a block
constexpr int64_t kPiece = 256;                 // pixels that pass all tiles before the next ones
constexpr int64_t kPad = 16;                    // elements between pixels
constexpr int64_t kLine = 64;                   // bytes of a cache line

struct Plan {
  bool direct;                          // x is read where it lies
  bool fold;                            // taps of a filter row are one run
  int64_t C, S;                         // rows of a tap, taps across: S*C and 1 where folded
  int64_t step_h, step_w;               // strip row i is input row i * step_h - pad_h
  int64_t parts;                        // of the pixels
  int64_t tasks_k, tasks_c, tasks_r;    // of one group: equal parts of K's vectors, C and R
  int64_t vecs, channels, filter_rows;  // at most, of a task
  int64_t columns;                      // columns of a strip
  int64_t rows;                         // output rows in a block
  int64_t sums;                         // elements that a task's sums take, at most
};

// How many parts the pixels are cut into: enough for some threads where dw is small for its pixels. Decided without
// the thread count, since the workspace is.
inline int64_t parts_of(const Conv2dParams& p) {
  const int64_t bytes = p.K * (p.C / p.G) * p.R * p.S * 8;
  int64_t parts = kMostParts;
  while (parts > 1 && (parts * kPartPixels > p.N * p.P * p.Q || parts > p.N * p.P || parts * bytes > kPartsBytes))
    parts /= 2;
  return parts;
}

// The elements that the sums of one part take.
template <class T>
int64_t all_sums(const Conv2dView& v) {
  return v.G * round_up(v.K, kLanes<T>) * v.C * v.R * v.S;
}

int64_t strip_pitch(const Plan& plan, const Conv2dView& v, int64_t channels) {
  return plan.fold ? v.C : round_up(channels, kPad) + kPad;
}
int64_t strip_rows(const Plan& plan, const Conv2dView& v, int64_t rows, int64_t filter_rows) {
  return ((rows - 1) * v.stride_h + (filter_rows - 1) * v.dilation_h) / plan.step_h + 1;
}
// The bytes of x that a block of `rows` output rows, all of images where they are more than one has, is copied to.
int64_t copied_bytes(const Plan& plan, const Conv2dView& v, int64_t rows, int64_t size) {
  if (plan.direct) return 0;
  return strip_rows(plan, v, min(rows, v.P), plan.filter_rows) * ceil_div(rows, v.P) * plan.columns *
         strip_pitch(plan, v, plan.channels) * size;
}

// Cycles that the tiles of one tap and pixel take: two multiply-adds a cycle, but no tile less than their latency.
inline double tile_cycles(int64_t channels, int64_t vecs) {
  double cycles = 0;
  for (int64_t width = kMaxTileVecs; width; --width) {
    const int64_t panels = width == kMaxTileVecs ? vecs / width : vecs % kMaxTileVecs == width;
    const int64_t tiles = ceil_div(channels, kMaxTileRows[width]), rows = ceil_div(channels, tiles);
    const double one = static_cast<double>(rows * width) / 2;
    cycles += static_cast<double>(panels * tiles) * ((one < 4 ? 4 : one) * (width == 1 ? 1.1 : 1) + 0.5);
  }
  return cycles;
}

template <class T, class S>
Plan make_plan(const Conv2dView& v, int64_t parts, int threads) {
  constexpr int64_t VL = kLanes<T>, size = sizeof(T);
  Plan plan{};
  plan.step_h = needed_step(v.P, v.R, v.stride_h, v.dilation_h);
  plan.step_w = needed_step(v.Q, v.S, v.stride_w, v.dilation_w);
  plan.columns = ((v.Q - 1) * v.stride_w + (v.S - 1) * v.dilation_w) / plan.step_w + 1;
  plan.parts = parts;
  // Pixels a multiple of 2 KiB apart share a few sets of L1, which only a single tap can afford.
  plan.direct = kSame<S, T> && !reaches_padding(v) && (v.R * v.S == 1 || v.stride_w * v.x_w * size % 2048 != 0);
  plan.fold = v.G == 1 && v.S > 1 && v.dilation_w == plan.step_w && v.C < kFoldChannels;
  if (plan.fold) plan.direct = false;
  plan.C = plan.fold ? v.S * v.C : v.C, plan.S = plan.fold ? 1 : v.S;

  // The rows don't depend on what follows: the order of the sums is the same for any thread count.
  plan.channels = min(v.C, kMostChannels), plan.filter_rows = v.R;
  plan.rows = min(kMostRows, max(1, (1 << 14) / v.Q));
  while (plan.rows > 1 && copied_bytes(plan, v, plan.rows, size) > kBlockBytes) plan.rows /= 2;

  // What one thread has to multiply, and to move at some 12 bytes a cycle, a pixel.
  const int64_t k_vecs = ceil_div(v.K, VL);
  double best = -1;
  static constexpr int64_t kVecs[] = {1, 2, 3, 4, 6, 8, 12, 16};
  static constexpr int64_t kChannels[] = {14, 28, 42, 56, 70, 84, 112, 140, 168, 224, 280, kMostChannels};
  for (const int64_t vecs : kVecs) {
    const int64_t tasks_k = ceil_div(k_vecs, vecs);
    if (tasks_k == plan.tasks_k) continue;
    for (const int64_t channels : kChannels)
      for (int split = 0; split < 2; ++split) {
        Plan p = plan;
        p.tasks_k = tasks_k, p.tasks_c = ceil_div(p.C, channels), p.tasks_r = split ? v.R : 1;
        p.vecs = ceil_div(k_vecs, p.tasks_k), p.channels = ceil_div(p.C, p.tasks_c);
        p.filter_rows = ceil_div(v.R, p.tasks_r);
        p.sums = p.vecs * VL * p.channels * p.filter_rows * p.S;
        const double tasks = static_cast<double>(ceil_div(v.G * p.tasks_k * p.tasks_c * p.tasks_r * parts, threads));
        const double x_bytes =
            static_cast<double>((p.fold ? v.C : p.channels) * (v.stride_h / p.step_h) * (v.stride_w / p.step_w) * size);
        const double g_bytes = static_cast<double>(p.vecs * VL * size);
        double cost = static_cast<double>(p.filter_rows * p.S) * tile_cycles(p.channels, p.vecs) +
                      x_bytes / (p.direct ? 24 : 12) + g_bytes / 12;
        if (p.sums * size > kBlockBytes) cost *= 2;
        if (copied_bytes(p, v, 1, size) > kBlockBytes) cost *= 2;
        cost *= tasks;
        if (best < 0 || cost < best) best = cost, plan = p;
        if (v.R == 1) break;
      }
  }
  return plan;
}

template <class T, class S>
class Worker {
 public:
  Worker(const Conv2dView& v, const Plan& plan, const S* x, S* dw, const S* g)
      : v_(v), plan_(plan), x_(x), dw_(dw), g_(g) {}

  bool finite() const { return finite_; }

  // Adds up one part of the pixels; in `partials` (all_sums elements for each part), or, where they are null, in
  // scratch, and writes the weights. False: out of memory.
  bool run(int64_t task, int64_t part, T* partials) {
    const int64_t images = plan_.rows >= v_.P ? plan_.rows / v_.P : 1, block = images * min(plan_.rows, v_.P);
    set_task(task);
    pitch_ = strip_pitch(plan_, v_, channels_);
    const int64_t image = strip_rows(plan_, v_, min(plan_.rows, v_.P), filter_rows_) * plan_.columns * pitch_;
    const auto carve = [&](Carver carver) {
      taps_ = carver.take<Tap>(TapList::capacity(block, v_.Q));
      sums_ = carver.take<T>(plan_.sums);
      chains_ = carver.take<T>(kMostTileRows * kMaxTileVecs * VL);
      panel_ = carver.take<T>(max(kPiece, kChain) * kMaxTileVecs * VL);
      strip_ = carver.take<T>((plan_.direct ? 0 : images * image) + 2 * VL);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    if (partials) sums_ = partials + part * all_sums<T>(v_) + first_sum();

    for (int64_t i = 0; i < sums(); i += VL) store(sums_ + i, Vec<T>{});
    // A part's rows of the batch, in blocks of rows of one image, or of several whole images.
    const int64_t units = v_.N * v_.P, end = units * (part + 1) / plan_.parts;
    for (int64_t u = units * part / plan_.parts; u < end;) {
      const int64_t n = u / v_.P, p = u % v_.P;
      const int64_t whole = p == 0 && plan_.rows >= v_.P ? min(images, (end - u) / v_.P) : 0;
      const int64_t rows = whole ? v_.P : min(plan_.rows, min(v_.P - p, end - u));
      run_block(n, max(1, whole), p, rows);
      u += max(1, whole) * rows;
    }
    if (!partials) write();
    return true;
  }

  // Adds up the parts and writes the weights.
  void reduce(int64_t task, T* partials) {
    set_task(task);
    sums_ = partials + first_sum();
    for (int64_t part = 1; part < plan_.parts; ++part)
      for (int64_t i = 0; i < sums(); i += VL)
        store(sums_ + i, load(sums_ + i) + load(sums_ + part * all_sums<T>(v_) + i));
    write();
  }

 private:
  static constexpr int64_t VL = kLanes<T>;

  void set_task(int64_t task) {
    const int64_t r = task % plan_.tasks_r;
    task /= plan_.tasks_r;
    const int64_t c = task % plan_.tasks_c;
    task /= plan_.tasks_c;
    group_ = task / plan_.tasks_k;
    const int64_t k = task % plan_.tasks_k, k_vecs = ceil_div(v_.K, VL);
    k_ = k_vecs * k / plan_.tasks_k * VL, vecs_ = k_vecs * (k + 1) / plan_.tasks_k - k_ / VL;
    lanes_ = min(vecs_ * VL, v_.K - k_);
    c_ = plan_.C * c / plan_.tasks_c, channels_ = plan_.C * (c + 1) / plan_.tasks_c - c_;
    r_ = v_.R * r / plan_.tasks_r, filter_rows_ = v_.R * (r + 1) / plan_.tasks_r - r_;
  }

  // The task's sums, and how many those of the tasks before it take.
  int64_t sums() const { return vecs_ * VL * channels_ * filter_rows_ * plan_.S; }
  int64_t first_sum() const {
    const int64_t before = (group_ * ceil_div(v_.K, VL) + k_ / VL) * plan_.C * v_.R;
    return (before + vecs_ * (c_ * v_.R + channels_ * r_)) * plan_.S * VL;
  }

  void run_block(int64_t n0, int64_t images, int64_t p0, int64_t rows) {
    TapList list(taps_);
    if (plan_.direct)
      list_pixels(list, n0, images, p0, rows);
    else
      copy_strip(list, n0, images, p0, rows);
    multiply(list.size(), n0, p0, rows);
  }

  void list_pixels(TapList& list, int64_t n0, int64_t images, int64_t p0, int64_t rows) {
    const int64_t size = sizeof(T);
    column_ = v_.dilation_w * v_.x_w, row_ = v_.dilation_h * v_.x_h, step_ = v_.stride_w * v_.x_w * size;
    source_ = in_place(n0 * v_.x_n + (p0 * v_.stride_h - v_.pad_h + r_ * v_.dilation_h) * v_.x_h - v_.pad_w * v_.x_w +
                       group_ * v_.C + c_);
    // Rows, or even images, that follow each other are one run.
    const bool rows_join = rows == 1 || v_.stride_h * v_.x_h == v_.Q * v_.stride_w * v_.x_w;
    even_ = rows_join && (images == 1 || v_.x_n == v_.P * v_.Q * v_.stride_w * v_.x_w);
    if (even_) return list.add(0, images * rows * v_.Q, step_);
    for (int64_t n = 0; n < images; ++n)
      for (int64_t p = 0; p < rows; ++p) list.add((n * v_.x_n + p * v_.stride_h * v_.x_h) * size, v_.Q, step_);
  }
  const T* in_place(int64_t elements) const {
    if constexpr (kSame<S, T>)
      return x_ + elements;
    else
      return nullptr;  // make_plan copies what needs widening
  }

  void copy_strip(TapList& list, int64_t n0, int64_t images, int64_t p0, int64_t rows) {
    const int64_t size = sizeof(T), image_rows = strip_rows(plan_, v_, rows, filter_rows_);
    const int64_t strip_row = plan_.columns * pitch_, first = plan_.fold ? 0 : c_;
    source_ = strip_ + c_ - first;
    column_ = v_.S == 1 ? 0 : v_.dilation_w / plan_.step_w * pitch_;
    row_ = v_.R == 1 ? 0 : v_.dilation_h / plan_.step_h * strip_row;
    step_ = v_.Q == 1 ? 0 : v_.stride_w / plan_.step_w * pitch_ * size;
    const int64_t row_step = rows == 1 ? 0 : v_.stride_h / plan_.step_h * strip_row;
    for (int64_t n = 0; n < images; ++n) {
      T* image = strip_ + n * image_rows * strip_row;
      for (int64_t i = 0; i < image_rows; ++i) {
        const int64_t h = p0 * v_.stride_h - v_.pad_h + r_ * v_.dilation_h + i * plan_.step_h;
        const bool inside = h >= 0 && h < v_.H;
        copy_row(image + i * strip_row, x_ + (n0 + n) * v_.x_n + (inside ? h : 0) * v_.x_h + group_ * v_.C + first,
                 plan_.columns, -v_.pad_w, plan_.step_w, inside ? v_.W : 0, v_.x_w, plan_.fold ? v_.C : channels_,
                 pitch_);
      }
      for (int64_t p = 0; p < rows; ++p) list.add((image - strip_ + p * row_step) * size, v_.Q, step_);
    }
  }

  // `count` pixels of g from one on, counted in an image's `rows` rows from p0 on, as a panel [pixel][k].
  void pack_gradient(int64_t n0, int64_t p0, int64_t rows, int64_t pixel, int64_t count, int64_t vec, int64_t width) {
    Vec<T> check{};
    T* out = panel_;
    int64_t q = pixel % v_.Q, p = pixel / v_.Q % rows, n = n0 + pixel / v_.Q / rows;
    const int64_t left = lanes_ - vec * VL;
    while (count > 0) {
      const S* in = g_ + n * v_.y_n + (p0 + p) * v_.y_h + q * v_.y_w + group_ * v_.K + k_ + vec * VL;
      const int64_t run = min(count, v_.Q - q);
      if (left >= width) {
        for (int64_t i = 0; i < run; ++i, in += v_.y_w)
          for (int64_t l = 0; l < width; l += VL, out += VL) {
            const Vec<T> value = load_wide(in + l);
            check += value * T(0);
            store(out, value);
          }
      } else {
        for (int64_t i = 0; i < run; ++i, in += v_.y_w)
          for (int64_t l = 0; l < width; l += VL, out += VL) {
            const Vec<T> value = load_wide(in + l, max(0, min(VL, left - l)));
            check += value * T(0);
            store(out, value);
          }
      }
      count -= run, q = 0;
      if (++p == rows) p = 0, ++n;
    }
    for (int l = 0; l < VL; ++l) finite_ &= check[l] == T(0);
  }

  // Lines of memory that are needed soon.
  struct Ahead {
    const char* next;
    int64_t pixel, bytes, pixels, share;  // share: pixels to fetch between two tiles
    CNNFAST_INLINE void fetch() {
      for (int64_t i = 0; i < share && pixels > 0; ++i, --pixels, next += pixel)
        for (int64_t b = 0; b < bytes; b += kLine) __builtin_prefetch(next + b, 0, 2);
    }
  };

  void multiply(int64_t ntaps, int64_t n0, int64_t p0, int64_t rows) {
    const int64_t taps = filter_rows_ * plan_.S, panels = ceil_div(vecs_, kMaxTileVecs);
    const S* g = g_ + n0 * v_.y_n + p0 * v_.y_h + group_ * v_.K + k_;
    TileArgs<T> args;
    args.a_row = 0, args.a_step = step_, args.chains = chains_;
    args.b = panel_;
    int64_t pixel = 0;
    for (int64_t first = 0; first < ntaps;) {
      int64_t last = first, count = 0;
      while (last < ntaps && (count == 0 || count + taps_[last].run <= kPiece)) count += taps_[last++].run;
      args.taps = taps_ + first, args.ntaps = last - first;
      Ahead x{reinterpret_cast<const char*>(source_) + (pixel + count) * step_, step_,
              channels_ * static_cast<int64_t>(sizeof(T)), plan_.direct && even_ ? count : 0,
              ceil_div(count, panels * taps * ceil_div(channels_, kMaxTileRows[kMaxTileVecs]))};
      for (int64_t j = 0; j < vecs_; j += kMaxTileVecs) {
        const int64_t vecs = min(kMaxTileVecs, vecs_ - j), width = vecs * VL;
        const int64_t tiles = ceil_div(channels_, kMaxTileRows[vecs]);
        pack_gradient(n0, p0, rows, pixel, count, j, width);
        const bool turn = j + kMaxTileVecs >= vecs_;
        const S* next = turn ? g + (pixel + count) * v_.y_w : g + pixel * v_.y_w + (j + kMaxTileVecs) * VL;
        Ahead ahead{reinterpret_cast<const char*>(next), v_.y_w * static_cast<int64_t>(sizeof(S)),
                    kMaxTileVecs * VL * static_cast<int64_t>(sizeof(S)), count, ceil_div(count, taps * tiles)};
        args.b_step = width;
        T* sums = sums_of(j);
        for (int64_t r = 0; r < filter_rows_; ++r)
          for (int64_t s = 0; s < plan_.S; ++s, sums += channels_ * width)
            for (int64_t t = 0; t < tiles; ++t) {
              const int64_t i = channels_ * t / tiles, rows = channels_ * (t + 1) / tiles - i;
              args.a = source_ + r * row_ + s * column_ + i;
              args.init = args.out = sums + i * width;
              args.init_row = args.out_row = width;
              ahead.fetch();
              x.fetch();
              tile_function<T, false>(rows, vecs)(args);
            }
      }
      pixel += count, first = last;
    }
  }

  T* sums_of(int64_t vec) const { return sums_ + filter_rows_ * plan_.S * channels_ * vec * VL; }

  // The sums of a panel are rows (tap, c) of vectors of k, as pack_panel makes them of weights; a task's part of a
  // folded filter row may begin and end amid a tap.
  void write() {
    for (int64_t j = 0; j < vecs_; j += kMaxTileVecs) {
      const int64_t vecs = min(kMaxTileVecs, vecs_ - j), lanes = min(vecs * VL, lanes_ - j * VL);
      S* dw = dw_ + group_ * v_.w_g + (k_ + j * VL) * v_.w_k;
      const T* row = sums_of(j);
      if (plan_.fold) {
        for (int64_t r = r_; r < r_ + filter_rows_; ++r)
          for (int64_t i = c_; i < c_ + channels_; ++i, row += vecs * VL) {
            S* out = dw + r * v_.w_r + i / v_.C * v_.w_s + i % v_.C * v_.w_c;
            for (int64_t l = 0; l < lanes; ++l) narrow_one(out + l * v_.w_k, row[l]);
          }
      } else {
        const PanelShape shape{lanes, vecs, channels_, filter_rows_, v_.S, v_.w_k, v_.w_c, v_.w_r, v_.w_s};
        unpack_panel(dw + c_ * v_.w_c + r_ * v_.w_r, row, shape);
      }
    }
  }

  const Conv2dView& v_;
  const Plan& plan_;
  const S* x_;
  S* dw_;
  const S* g_;
  int64_t group_ = 0, k_ = 0, lanes_ = 0, vecs_ = 0, c_ = 0, channels_ = 0, r_ = 0, filter_rows_ = 0, pitch_ = 0;
  const T* source_ = nullptr;                // where the first pixel's channels are, of the first tap
  int64_t row_ = 0, column_ = 0, step_ = 0;  // from tap to tap in elements, from pixel to pixel in bytes
  bool even_ = false;                        // all pixels are step_ apart
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
  const int64_t parts = parts_of(p);
  const Plan plan = make_plan<T, S>(v, parts, threads);
  const int64_t tasks = v.G * plan.tasks_k * plan.tasks_c * plan.tasks_r;
  T* partials = static_cast<T*>(l.workspace);
  bool finite = true, memory = true;  // only ever set to false, so that the threads may race
  parallel_for(
      threads, tasks * parts,
      [&](int64_t i) {
        Worker<T, S> worker(v, plan, x, dw, g);
        if (!worker.run(i % tasks, i / tasks, partials)) __atomic_store_n(&memory, false, __ATOMIC_RELAXED);
        if (!worker.finite()) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      },
      kDenormals<S>);
  if (partials && memory)
    parallel_for(
        threads, tasks, [&](int64_t task) { Worker<T, S>(v, plan, x, dw, g).reduce(task, partials); }, kDenormals<S>);
  if (!memory) return "out of memory";
  if (!finite && reaches_padding(v)) direct_wgrad(p, x, dw, g, l.threads);
  return nullptr;
}

template <class S>
int64_t wgrad_workspace(const void* params) {
  using T = Compute<S>;
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const int64_t parts = parts_of(p);
  return parts > 1 ? parts * all_sums<T>(fprop_view(p)) * static_cast<int64_t>(sizeof(T)) : 0;
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f32", Conv2dParams, launch_wgrad<float>, wgrad_workspace<float>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f64", Conv2dParams, launch_wgrad<double>, wgrad_workspace<double>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.bf16", Conv2dParams, launch_wgrad<BFloat16>, wgrad_workspace<BFloat16>)
CNNFAST_KERNEL("conv2d_implicit_gemm.wgrad.f16", Conv2dParams, launch_wgrad<Float16>, wgrad_workspace<Float16>)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
