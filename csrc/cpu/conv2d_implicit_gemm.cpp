// Implicit GEMM, fprop and dgrad: rows are output pixels, columns output channels, the reduction runs over taps and
// input channels. dgrad is fprop of the gradient, one stride-1 convolution for each residue class (conv2d_view.h).
//
//   y[pixel, k] = b[k] + sum_{r,s,c} x[pixel moved by tap (r,s), c] * w[k,c,r,s]
//
// A register tile (gemm_tile.h) computes up to 14 pixels x 2 vectors of channels. Its pixels lie at one distance:
//
//   kDirect   x itself: 1x1 without padding and conversion; a map in one piece counts as one row. (With more taps
//             the strip is faster, even where none leaves the input.)
//   kStrip    rows of x copied with their zero borders and widened to float, pixel pitch a cache line longer than
//             the channels: no borders in the tile, no L1 set conflicts
//   kWindows  every pixel's filter window copied in one piece (im2col of a block that stays in L2): for narrow maps,
//             where the rows of a strip would cut the tiles short
//
// Of x itself a tile's pixels are asked for while the tile before is at work, of windows of groups the next block's
// rows; results too large for the caches go past them.
//
// fprop with more operands is conv_bn_act: finished sums go through epilogue.h on their way from the tile to y.
//
// Few channels (stems): pixel pitch = channels, so that the S taps of a filter row are one run of S*C elements.
// Weights are packed inside the call, panel by panel (pack.h), or all of them beforehand for a plan (the pack entry):
// nothing is cached across calls.
//
// A thread owns a range of channels times a range of rows or pixels, chosen by the estimated cost, and walks them in
// blocks: the copied pixels at most ~0.8 MiB, the packed panels ~2.3 MiB; reductions too long for that are cut into
// channel chunks whose sums wait in scratch. Windows of many channels, long to copy, are copied once: a chunk of their
// channels meets the weights of all output channels, and all sums wait.
//
// Sums are in float for float, bf16 and fp16, in double for double, in one order whatever the thread count, and are
// rounded once. Padding contributes nothing, as in oneDNN: zeros stand for it while the weights are finite, and a call
// that meets an Inf or a NaN among its weights is done again by the direct kernel.
//
// After Georganas et al., Anatomy of High-Performance Deep Learning Convolutions on SIMD Architectures (2018), and
// Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication (2008).
#include "../common/kernel_table.h"
#include "conv2d_direct.h"
#include "conv2d_implicit_gemm_plan.h"
#include "gemm_tile.h"
#include "pack.h"
#include "primitives/parallel.h"
#include "primitives/scratch.h"

namespace cnnfast {
namespace CNNFAST_ISA {
namespace {

constexpr int64_t kHotPanelBytes = 384 << 10;      // panels that stay in L2 beside everything else
constexpr int64_t kHotPixels = 8 * kMostTileRows;  // pixels that pass through all of them in one go
constexpr int64_t kMacsWorthThreads = 1 << 18;     // below, one thread
constexpr int64_t kShortSum = 256;  // sums of so few products don't hide the fetching of y's lines: that is done ahead
template <class S>
constexpr int64_t kLineElements = kLineBytes / static_cast<int64_t>(sizeof(S));

// A packed panel, or a chunk of one: the bias, then the weights.
template <class T>
int64_t packed_panel_elements(const Conv2dView& v, const Plan& plan) {
  return (1 + v.R * v.S * plan.chunk) * kMaxTileVecs * kLanes<T>;
}
inline int64_t packed_panels(const Conv2dView& v, const Plan& plan) {
  return v.G * ceil_div(plan.group_vecs, kMaxTileVecs);
}

// What one thread works with.
template <class T, class S>
class Worker {
 public:
  Worker(const Conv2dView& v, const Plan& plan, const S* x, const S* w, const S* bias, S* y, const T* packed,
         const Epilogue<S>* epilogue)
      : v_(v), plan_(plan), x_(x), w_(w), bias_(bias), y_(y), packed_(packed), epilogue_(epilogue) {
    chunks_ = max(1, ceil_div(v_.C, max(1, plan_.chunk)));
    panel_elements_ = packed_panel_elements<T>(v, plan);
    last_vec_ = plan_.vecs;
  }

  // Packs chunk task % chunks of panel task / chunks of all panels.
  void pack_task(int64_t task, T* packed) {
    const int64_t chunk = task % chunks_, c = chunk * plan_.chunk;
    pack(panel_at(packed_vec(task / chunks_)), c, min(plan_.chunk, v_.C - c), packed + task * panel_elements_);
  }

  // The way back, to weights at `w`.
  void unpack_task(int64_t task, const T* packed, S* w) const {
    const int64_t c = task % chunks_ * plan_.chunk, channels = min(plan_.chunk, v_.C - c);
    const Panel panel = panel_at(packed_vec(task / chunks_));
    if (channels && v_.R && v_.S)
      unpack_panel<T>(w + weights_at(panel, c), packed + task * panel_elements_ + panel.vecs * VL,
                      shape(panel, channels));
  }

  // False: out of memory. `finite_` tells whether the weights were.
  bool run(int64_t task) {
    const int64_t tk = task / plan_.threads_u, tu = task % plan_.threads_u;
    if (packed_) {  // whole panels, as they were packed
      const int64_t panels = packed_panels(v_, plan_);
      first_vec_ = packed_vec(panels * tk / plan_.threads_k);
      last_vec_ = packed_vec(panels * (tk + 1) / plan_.threads_k);
    } else {
      first_vec_ = plan_.vecs * tk / plan_.threads_k;
      last_vec_ = plan_.vecs * (tk + 1) / plan_.threads_k;
    }
    first_unit_ = plan_.units * tu / plan_.threads_u;
    last_unit_ = plan_.units * (tu + 1) / plan_.threads_u;
    if (first_vec_ == last_vec_ || first_unit_ == last_unit_) return true;
    first_group_ = first_vec_ / plan_.group_vecs;
    groups_ = (last_vec_ - 1) / plan_.group_vecs + 1 - first_group_;
    source_channels_ = chunks_ > 1 ? plan_.chunk : groups_ * v_.C;
    // As many panels at a time as fit; one if every block needs new ones anyway.
    const bool one_block = last_unit_ - first_unit_ <= plan_.block && plan_.columns == v_.Q &&
                           (plan_.flat || first_unit_ / v_.P == (last_unit_ - 1) / v_.P);
    kept_panels_ = one_block || chunks_ > 1 || plan_.deep
                       ? 1
                       : max(1, min(kPanelBytes / (panel_elements_ * static_cast<int64_t>(sizeof(T))),
                                    count_panels(first_vec_, last_vec_)));
    const int64_t width = kMaxTileVecs * VL;
    const int64_t block_pixels = plan_.block * (plan_.flat ? 1 : plan_.columns);
    const auto carve = [&](Carver carver) {
      taps_ = carver.take<Tap>(TapList::capacity(v_.R * v_.S + 1, max(plan_.chunk, plan_.fold ? v_.S * v_.C : 1)));
      panels_ = carver.take<T>(packed_ ? 0 : kept_panels_ * panel_elements_);
      tile_ = carver.take<T>(kMostTileRows * width);
      chains_ = carver.take<T>(kMostTileRows * width);
      sums_ = carver.take<T>(chunks_ == 1 ? 0
                             : plan_.deep ? block_pixels * (last_vec_ - first_vec_) * VL
                                          : block_pixels * width);
      strip_ = carver.take<T>(plan_.source == Source::kDirect
                                  ? 0
                                  : copied_elements(plan_, v_, plan_.block, plan_.columns, source_channels_) + 2 * VL);
      return carver.used();
    };
    void* scratch = thread_scratch(carve(Carver(nullptr)));
    if (!scratch) return false;
    carve(Carver(scratch));
    streams_ = (kLineVectors || !epilogue_) && streams_result(v_, y_, v_.K % VL == 0);
    if (plan_.deep)
      walk_deep();
    else
      walk();
    if (streams_) stream_end();
    return true;
  }
  bool finite() const { return finite_; }

 private:
  static constexpr int64_t VL = kLanes<T>;

  struct Panel {
    int64_t group, k, vecs;  // k: first channel within the group
  };
  struct Block {
    int64_t n, p, q, rows, columns;  // rows of one image
    int64_t pixel, pixels;           // flat: pixels of the batch
  };

  Panel panel_at(int64_t vec) const {
    const int64_t group = vec / plan_.group_vecs, j = vec % plan_.group_vecs;
    const int64_t left = min(plan_.group_vecs - j, last_vec_ - vec);
    return {group, j * VL, min(kMaxTileVecs, left)};
  }
  // Panels in the order they are packed in: those of a group start at its first vector.
  int64_t packed_panel(const Panel& panel) const {
    return panel.group * ceil_div(plan_.group_vecs, kMaxTileVecs) + panel.k / VL / kMaxTileVecs;
  }
  const T* packed_chunk(const Panel& panel, int64_t chunk) const {
    return packed_ + (packed_panel(panel) * chunks_ + chunk) * panel_elements_;
  }
  int64_t packed_vec(int64_t panel) const {
    const int64_t of_group = ceil_div(plan_.group_vecs, kMaxTileVecs);
    return panel / of_group * plan_.group_vecs + panel % of_group * kMaxTileVecs;
  }
  int64_t count_panels(int64_t vec, int64_t end) const {
    int64_t count = 0;
    for (; vec < end; ++count) vec += panel_at(vec).vecs;
    return count;
  }

  void walk() {
    for (int64_t vec = first_vec_; vec < last_vec_;) {
      int64_t end = vec;
      for (int64_t i = 0; i < kept_panels_ && end < last_vec_; ++i) end += panel_at(end).vecs;
      bool packed = false;
      if (plan_.flat) {
        for (int64_t u = first_unit_; u < last_unit_; u += plan_.block) {
          run_block({0, 0, 0, 0, 0, u, min(plan_.block, last_unit_ - u)}, vec, end, packed);
          packed = true;
        }
      } else {
        for (int64_t u = first_unit_; u < last_unit_;) {
          const int64_t n = u / v_.P, p = u % v_.P, rows = min(plan_.block, min(v_.P - p, last_unit_ - u));
          for (int64_t q = 0; q < v_.Q; q += plan_.columns) {
            run_block({n, p, q, rows, min(plan_.columns, v_.Q - q), u * v_.Q + q, 0}, vec, end, packed);
            packed = true;
          }
          u += rows;
        }
      }
      vec = end;
    }
  }

  // A chunk of the channels of all pixels for all output channels, before the next chunk.
  void walk_deep() {
    for (int64_t u = first_unit_; u < last_unit_; u += plan_.block) {
      const Block block{0, 0, 0, 0, 0, u, min(plan_.block, last_unit_ - u)};
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const int64_t c = chunk * plan_.chunk, channels = min(plan_.chunk, v_.C - c);
        copy_source(block, 0, c, channels);
        set_taps(channels);
        T* sums = sums_;
        for (int64_t v = first_vec_; v < last_vec_;) {
          const Panel panel = panel_at(v);
          if (!packed_) pack(panel, c, channels, panels_);
          const T* data = packed_ ? packed_chunk(panel, chunk) : panels_;
          run_panel(block, 0, block.pixels, panel, c, chunk, data, sums);
          sums += block.pixels * panel.vecs * VL;
          v += panel.vecs;
        }
      }
    }
  }

  void run_block(const Block& block, int64_t vec, int64_t end, bool packed) {
    // Panels that stay in L2 together all pass over a row before the next one: the row of y is written in one go.
    const bool hot = chunks_ == 1 && kept_panels_ * panel_elements_ * static_cast<int64_t>(sizeof(T)) <= kHotPanelBytes;
    const int64_t units = plan_.flat ? block.pixels : block.rows;
    const int64_t step = !hot ? units : plan_.flat ? kHotPixels : 1;
    ask_for_next(block);
    for (int64_t unit = 0; unit < units; unit += step) {
      T* panel_data = panels_;
      for (int64_t v = vec; v < end; panel_data += panel_elements_) {
        const Panel panel = panel_at(v);
        new_pixels_ = v == vec && plan_.source == Source::kDirect && v_.R * v_.S == 1;
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          const int64_t c = chunk * plan_.chunk, channels = min(plan_.chunk, v_.C - c);
          if (unit == 0) {
            if (plan_.source != Source::kDirect) copy_source(block, panel.group, c, channels);
            set_taps(channels);
            if (!packed_ && (!packed || chunks_ > 1)) pack(panel, c, channels, panel_data);
          }
          const T* data = packed_ ? packed_chunk(panel, chunk) : panel_data;
          run_panel(block, unit, min(step, units - unit), panel, c, chunk, data, sums_);
        }
        v += panel.vecs;
      }
    }
  }

  void pack(const Panel& panel, int64_t c, int64_t channels, T* data) {
    for (int64_t j = 0; j < panel.vecs; ++j) {
      const int64_t n = max(0, min(VL, panel_lanes(panel) - j * VL));
      store(data + j * VL, bias_ ? load_wide(bias_ + panel.group * v_.K + panel.k + j * VL, n) : Vec<T>{});
    }
    if (channels && v_.R && v_.S)
      finite_ &= pack_panel<T>(data + panel.vecs * VL, w_ + weights_at(panel, c), shape(panel, channels));
  }
  int64_t panel_lanes(const Panel& panel) const { return min(panel.vecs * VL, v_.K - panel.k); }
  int64_t weights_at(const Panel& panel, int64_t c) const {
    return panel.group * v_.w_g + panel.k * v_.w_k + c * v_.w_c;
  }
  PanelShape shape(const Panel& panel, int64_t channels) const {
    return {panel_lanes(panel), panel.vecs, channels, v_.R, v_.S, v_.w_k, v_.w_c, v_.w_r, v_.w_s};
  }

  // Copies the pixels a block needs, unless they are there already.
  void copy_source(const Block& block, int64_t group, int64_t c, int64_t channels) {
    const int64_t first = chunks_ > 1 ? group * v_.C + c : first_group_ * v_.C;
    if (loaded_pixel_ == block.pixel && loaded_channel_ == first) return;
    loaded_pixel_ = block.pixel, loaded_channel_ = first;
    const int64_t count = chunks_ > 1 ? channels : source_channels_;
    pitch_ = pixel_pitch(plan_, v_, count);
    if (plan_.source == Source::kWindows) return copy_windows(block, first, count);
    strip_columns_ = strip_columns(plan_, v_, block.columns);
    const int64_t rows = strip_rows(plan_, v_, block.rows);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t h = block.p * v_.stride_h - v_.pad_h + i * plan_.step_h;
      const bool inside = h >= 0 && h < v_.H;
      copy_row(strip_ + i * strip_columns_ * pitch_, x_ + block.n * v_.x_n + (inside ? h : 0) * v_.x_h + first,
               strip_columns_, block.q * v_.stride_w - v_.pad_w, plan_.step_w, inside ? v_.W : 0, v_.x_w, count,
               pitch_);
    }
  }

  // Groups' windows lie far apart in x, and are read a part of a pixel at a time: the products of a block take long
  // enough to ask for the rows that the next block is the first to read.
  void ask_for_next(const Block& block) {
    next_rows_ = next_rows_end_ = nullptr;
    const int64_t after = block.pixel + block.pixels, end = min(after + plan_.block, last_unit_);
    const bool one_piece =
        v_.x_w == v_.G * v_.C && v_.x_h == v_.W * v_.x_w && (v_.N == 1 || v_.x_n == v_.H * v_.x_h) && groups_ == v_.G;
    if (plan_.source != Source::kWindows || v_.G == 1 || v_.R * v_.S == 1 || !one_piece || after >= end) return;
    next_rows_ = row_after(after - 1), next_rows_end_ = row_after(end - 1);
  }
  // As many of their lines as a tile has steps; null: there are none left.
  const char* next_lines() {
    if (next_rows_ >= next_rows_end_) return nullptr;
    const char* const lines = next_rows_;
    next_rows_ += v_.R * v_.S * v_.C * kLineBytes;
    return lines;
  }
  // The first row of x that the window of an output pixel doesn't reach.
  const char* row_after(int64_t pixel) const {
    const int64_t h = pixel / v_.Q % v_.P * v_.stride_h - v_.pad_h + (v_.R - 1) * v_.dilation_h + 1;
    return reinterpret_cast<const char*>(x_ + pixel / v_.Q / v_.P * v_.x_n + max(0, min(h, v_.H)) * v_.x_h);
  }

  void copy_windows(const Block& block, int64_t first, int64_t count) {
    int64_t q = block.pixel % v_.Q, p = block.pixel / v_.Q % v_.P, n = block.pixel / v_.Q / v_.P;
    T* out = strip_;
    for (int64_t i = 0; i < block.pixels; ++i, out += pitch_) {
      T* window = out;
      for (int64_t r = 0; r < v_.R; ++r) {
        const int64_t h = p * v_.stride_h - v_.pad_h + r * v_.dilation_h;
        for (int64_t s = 0; s < v_.S; ++s, window += count) {
          const int64_t w = q * v_.stride_w - v_.pad_w + s * v_.dilation_w;
          if (h < 0 || h >= v_.H || w < 0 || w >= v_.W)
            zero_channels(window, count);
          else
            copy_channels(window, x_ + n * v_.x_n + h * v_.x_h + w * v_.x_w + first, count);
        }
      }
      if (++q == v_.Q) {
        q = 0;
        if (++p == v_.P) p = 0, ++n;
      }
    }
  }

  // Where each tap's elements start, seen from a pixel's first.
  void set_taps(int64_t channels) {
    const int64_t size = sizeof(T);
    TapList list(taps_);
    if (plan_.source == Source::kWindows) {
      const int64_t count = chunks_ > 1 ? channels : source_channels_;
      row_step_ = pitch_;
      if (v_.G == 1)
        list.add(0, v_.R * v_.S * channels, size);
      else
        for (int64_t t = 0; t < v_.R * v_.S; ++t) list.add(t * count * size, channels, size);
      ntaps_ = list.size();
      return;
    }
    int64_t h, w;
    if (plan_.source == Source::kStrip) {
      h = v_.R == 1 ? 0 : v_.dilation_h / plan_.step_h * strip_columns_ * pitch_;
      w = v_.S == 1 ? 0 : v_.dilation_w / plan_.step_w * pitch_;
      row_step_ = v_.stride_w / plan_.step_w * pitch_;
    } else {
      h = v_.dilation_h * v_.x_h, w = v_.dilation_w * v_.x_w;
      row_step_ = v_.stride_w * v_.x_w;
    }
    for (int64_t r = 0; r < v_.R; ++r)
      if (plan_.fold)
        list.add(r * h * size, v_.S * channels, size);
      else
        for (int64_t s = 0; s < v_.S; ++s) list.add((r * h + s * w) * size, channels, size);
    ntaps_ = list.size();
  }

  // One panel over `count` rows (or pixels, where flat) of a block, from the `first` on.
  void run_panel(const Block& block, int64_t first, int64_t count, const Panel& panel, int64_t c, int64_t chunk,
                 const T* data, T* sums) {
    const int64_t y_channel = panel.group * v_.K + panel.k, width = panel.vecs * VL;
    const int64_t in_source = plan_.source == Source::kDirect ? panel.group * v_.C + c
                              : chunks_ > 1                   ? 0
                                                              : (panel.group - first_group_) * v_.C;
    if (plan_.flat) {
      const T* a = plan_.source == Source::kDirect ? direct((block.pixel + first) * v_.x_w) : strip_ + first * pitch_;
      run_pixels(a + in_source, block.pixel + first, count, sums + first * width, panel, y_channel, chunk, data);
      return;
    }
    for (int64_t i = first; i < first + count; ++i) {
      const int64_t p = block.p + i;
      const T* a;
      if (plan_.source == Source::kDirect)
        a = direct(block.n * v_.x_n + (p * v_.stride_h - v_.pad_h) * v_.x_h +
                   (block.q * v_.stride_w - v_.pad_w) * v_.x_w);
      else
        a = strip_ + (block.rows == 1 ? 0 : i * (v_.stride_h / plan_.step_h)) * strip_columns_ * pitch_;
      run_pixels(a + in_source, (block.n * v_.P + p) * v_.Q + block.q, block.columns, sums + i * block.columns * width,
                 panel, y_channel, chunk, data);
    }
  }

  const T* direct(int64_t offset) const {
    if constexpr (kSame<S, T>)
      return x_ + offset;
    else
      return nullptr;  // make_plan copies what needs widening
  }

  S* output(int64_t pixel) const {
    return y_ + pixel / v_.Q / v_.P * v_.y_n + pixel / v_.Q % v_.P * v_.y_h + pixel % v_.Q * v_.y_w;
  }

  // Tiles over `count` pixels, row_step_ apart from `a`; the first is output pixel `pixel`. Short sums leave little
  // time between tiles: what divides is done once for all of them.
  void run_pixels(const T* a, int64_t pixel, int64_t count, T* sums, const Panel& panel, int64_t channel, int64_t chunk,
                  const T* data) {
    const int64_t width = panel.vecs * VL, lanes = min(width, v_.K - panel.k);
    const int64_t tiles = ceil_div(count, kMaxTileRows[panel.vecs]);
    const int64_t least = count / tiles, longer = count % tiles;  // rows of a tile; tiles that have one more
    const TileFn<T> functions[] = {tile_function<T, true>(least, panel.vecs),
                                   longer ? tile_function<T, true>(least + 1, panel.vecs) : nullptr};
    const bool last = chunk == chunks_ - 1;
    TileArgs<T> args;
    args.a_row = row_step_ * static_cast<int64_t>(sizeof(T));
    args.a_step = 0;
    args.taps = taps_, args.ntaps = ntaps_, args.chains = chains_;
    args.b = data + width;
    args.init = data;  // the bias, before the first chunk
    args.init_row = chunk ? width : 0;
    const bool one_line = v_.y_h == v_.Q * v_.y_w && (v_.N == 1 || v_.y_n == v_.P * v_.y_h);
    const int64_t left = one_line ? count : v_.Q - pixel % v_.Q;  // pixels until y's next row lies elsewhere
    const bool fetch = last && !streams_ && v_.R * v_.S * v_.C <= kShortSum && v_.y_h == v_.Q * v_.y_w;
    S* const first = output(pixel) + channel;
    for (int64_t t = 0, i = 0, rows; t < tiles; ++t, i += rows) {
      rows = least + (t < longer);
      args.a = a + i * row_step_;
      if (chunk) args.init = sums + i * width;
      S* const y = first + i * v_.y_w;
      const bool linear = i + rows <= left;
      bool stored = false;
      args.out = last ? tile_ : sums + i * width;
      args.out_row = width;
      if constexpr (kSame<S, T>) {
        stored = last && linear && lanes == width && !epilogue_;
        if (stored) args.out = y, args.out_row = v_.y_w;
        args.streams = stored && streams_;
      }
      if (fetch && t + 1 < tiles) {
        const int64_t next = least + (t + 1 < longer);
        for (int64_t j = 0; j < next; ++j) {
          const S* line = y + (rows + j) * v_.y_w;
          for (int64_t l = 0; l < lanes; l += kLineElements<S>) __builtin_prefetch(line + l, 1);
        }
      }
      args.next = new_pixels_ ? reinterpret_cast<const char*>(args.a + rows * row_step_) : next_lines();
      functions[rows - least](args);
      if (!last || stored) continue;
      if (epilogue_) {
        finish(pixel + i, rows, channel, lanes, width);
        continue;
      }
      for (int64_t j = 0; j < rows; ++j) {
        S* out = linear ? y + j * v_.y_w : output(pixel + i + j) + channel;
        for (int64_t l = 0; l < lanes; l += VL) {
          const Vec<T> value = load(tile_ + j * width + l);
          if (lanes - l >= VL)
            store_narrow(out + l, value);
          else
            store_narrow(out + l, value, lanes - l);
        }
      }
    }
  }

  // The tile's rows through the epilogue.
  void finish(int64_t first, int64_t rows, int64_t channel, int64_t lanes, int64_t width) {
    for (int64_t l = 0; l < lanes; l += VL) {
      const auto factors = epilogue_->factors(channel + l, lanes - l);
      int64_t q = first % v_.Q, p = first / v_.Q % v_.P, n = first / v_.Q / v_.P;
      for (int64_t j = 0; j < rows; ++j) {
        const S* r = epilogue_->residual_at(n, p, q);
        epilogue_->store(y_ + n * v_.y_n + p * v_.y_h + q * v_.y_w + channel + l, load(tile_ + j * width + l), factors,
                         r ? r + channel + l : nullptr, lanes - l, streams_);
        if (++q == v_.Q) {
          q = 0;
          if (++p == v_.P) p = 0, ++n;
        }
      }
    }
  }

  const Conv2dView& v_;
  const Plan& plan_;
  const S *x_, *w_, *bias_;
  S* y_;
  const T* packed_;
  const Epilogue<S>* epilogue_;
  int64_t first_vec_ = 0, last_vec_ = 0, first_unit_ = 0, last_unit_ = 0;
  int64_t chunks_ = 1, first_group_ = 0, groups_ = 1, source_channels_ = 0, panel_elements_ = 0, kept_panels_ = 1;
  int64_t loaded_pixel_ = -1, loaded_channel_ = -1;
  int64_t strip_columns_ = 0, pitch_ = 0, ntaps_ = 0, row_step_ = 0;
  Tap* taps_ = nullptr;
  T *panels_ = nullptr, *tile_ = nullptr, *chains_ = nullptr, *sums_ = nullptr, *strip_ = nullptr;
  bool finite_ = true;
  bool streams_ = false;
  const char *next_rows_ = nullptr, *next_rows_end_ = nullptr;
  bool new_pixels_ = false;  // the panel is the first to read them, where they lie beside each other in x
};

// What became of a call; the threads only ever set these.
struct Outcome {
  bool no_memory = false;
  bool not_finite = false;  // a weight is Inf or NaN, and zeros stood for the padding beside it
};

// The share of one thread in one view.
template <class S>
void run_view(const Conv2dView& v, const S* x, const S* w, const S* bias, S* y, const void* packed, int threads,
              int64_t task, Outcome& outcome, const Epilogue<S>* epilogue) {
  using T = Compute<S>;
  if (v.N * v.P * v.Q * v.K * v.G == 0) return;
  const Plan plan = make_plan<T, S>(v, threads, packed != nullptr);
  const char* head = static_cast<const char*>(packed);
  Worker<T, S> worker(v, plan, x, w, bias, y, head ? reinterpret_cast<const T*>(head + kPackedHead) : nullptr,
                      epilogue);
  if (!worker.run(task)) __atomic_store_n(&outcome.no_memory, true, __ATOMIC_RELAXED);
  if (!(head ? *head : worker.finite()) && reaches_padding(v))
    __atomic_store_n(&outcome.not_finite, true, __ATOMIC_RELAXED);
}

int useful_threads(const Conv2dParams& p, int threads) {
  return p.N * p.P * p.Q * p.K * (p.C / p.G) * p.R * p.S < kMacsWorthThreads ? 1 : threads;
}

constexpr const char* kNoMemory = "out of memory";

template <class S>
const char* launch_fprop(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  const S *x = static_cast<const S*>(l.operands[0]), *w = static_cast<const S*>(l.operands[1]);
  const S* bias = static_cast<const S*>(l.operands[2]);
  S* y = static_cast<S*>(l.operands[3]);
  const int threads = useful_threads(p, l.threads);
  const Epilogue<S> operands(p, l);
  const Epilogue<S>* epilogue = operands.or_null();
  Outcome outcome;
  const void* packed = l.operands[kPackedOperand];
  parallel_for(
      threads, threads,
      [&](int64_t task) { run_view(fprop_view(p), x, w, bias, y, packed, threads, task, outcome, epilogue); },
      kDenormals<S>);
  if (outcome.no_memory) return kNoMemory;
  if (outcome.not_finite) direct_fprop(p, x, w, bias, y, l.threads, epilogue);
  return nullptr;
}

// Every panel of fprop, with its bias, into the workspace.
template <class S>
const char* launch_pack(const void* params, const Launch& l) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  const Plan plan = make_plan<T, S>(v, 1, true);
  char* head = static_cast<char*>(l.workspace);
  *head = true;
  parallel_for(l.threads, packed_panels(v, plan) * max(1, ceil_div(v.C, max(1, plan.chunk))), [&](int64_t task) {
    Worker<T, S> worker(v, plan, nullptr, static_cast<const S*>(l.operands[1]), static_cast<const S*>(l.operands[2]),
                        nullptr, nullptr, nullptr);
    worker.pack_task(task, reinterpret_cast<T*>(head + kPackedHead));
    if (!worker.finite()) __atomic_store_n(head, false, __ATOMIC_RELAXED);
  });
  return nullptr;
}

// The weights that the pack entry packed, back to where the second operand is.
template <class S>
const char* launch_unpack(const void* params, const Launch& l) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  const Plan plan = make_plan<T, S>(v, 1, true);
  const char* head = static_cast<const char*>(l.operands[kPackedOperand]);
  S* w = static_cast<S*>(l.operands[1]);
  parallel_for(l.threads, packed_panels(v, plan) * max(1, ceil_div(v.C, max(1, plan.chunk))), [&](int64_t task) {
    const Worker<T, S> worker(v, plan, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr);
    worker.unpack_task(task, reinterpret_cast<const T*>(head + kPackedHead), w);
  });
  return nullptr;
}

template <class S>
int64_t packed_bytes(const void* params) {
  using T = Compute<S>;
  const Conv2dView v = fprop_view(*static_cast<const Conv2dParams*>(params));
  const Plan plan = make_plan<T, S>(v, 1, true);
  return kPackedHead + packed_panels(v, plan) * max(1, ceil_div(v.C, max(1, plan.chunk))) *
                           packed_panel_elements<T>(v, plan) * static_cast<int64_t>(sizeof(T));
}

template <class S>
const char* launch_dgrad(const void* params, const Launch& l) {
  const Conv2dParams& p = *static_cast<const Conv2dParams*>(params);
  S* dx = static_cast<S*>(l.operands[0]);
  const S *w = static_cast<const S*>(l.operands[1]), *g = static_cast<const S*>(l.operands[3]);
  const int threads = useful_threads(p, l.threads);
  Outcome outcome;
  // The classes write different pixels: a thread goes through all of them without waiting for the others.
  parallel_for(
      threads, threads,
      [&](int64_t task) {
        for_each_dgrad_view(p, [&](const Conv2dView& v, int64_t w_offset, int64_t dx_offset) {
          run_view<S>(v, g, w + w_offset, nullptr, dx + dx_offset, nullptr, threads, task, outcome, nullptr);
        });
      },
      kDenormals<S>);
  if (outcome.no_memory) return kNoMemory;
  if (outcome.not_finite) direct_dgrad(p, dx, w, g, l.threads);
  return nullptr;
}

}  // namespace

CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32", Conv2dParams, launch_fprop<float>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f64", Conv2dParams, launch_fprop<double>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16", Conv2dParams, launch_fprop<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f16", Conv2dParams, launch_fprop<Float16>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32.pack", Conv2dParams, launch_pack<float>, packed_bytes<float>)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f64.pack", Conv2dParams, launch_pack<double>, packed_bytes<double>)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16.pack", Conv2dParams, launch_pack<BFloat16>, packed_bytes<BFloat16>)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f16.pack", Conv2dParams, launch_pack<Float16>, packed_bytes<Float16>)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f32.unpack", Conv2dParams, launch_unpack<float>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f64.unpack", Conv2dParams, launch_unpack<double>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.bf16.unpack", Conv2dParams, launch_unpack<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.fprop.f16.unpack", Conv2dParams, launch_unpack<Float16>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f32", Conv2dParams, launch_dgrad<float>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f64", Conv2dParams, launch_dgrad<double>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.bf16", Conv2dParams, launch_dgrad<BFloat16>, nullptr)
CNNFAST_KERNEL("conv2d_implicit_gemm.dgrad.f16", Conv2dParams, launch_dgrad<Float16>, nullptr)

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
