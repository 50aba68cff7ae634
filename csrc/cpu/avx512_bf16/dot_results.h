// Where the sums of a tile go: through the epilogue to y, in the tile's registers wherever it can, else through memory.
#pragma once
#include "../conv2d_view.h"
#include "../epilogue.h"
#include "dot_tile.h"

namespace cnnfast {
namespace CNNFAST_ISA {

// `count` pixels in tiles that differ by one at most: calls fn(first, rows).
template <class F>
CNNFAST_INLINE void for_each_tile(int64_t count, const F& fn) {
  const int64_t tiles = ceil_div(count, kDotRows), least = count / max(1, tiles), more = count - least * tiles;
  for (int64_t t = 0, i = 0; t < tiles; ++t) {
    const int64_t rows = least + (t < more);
    fn(i, rows);
    i += rows;
  }
}

class DotResults {
 public:
  static constexpr int64_t kSums = kDotRows * kDotVecs * kLanes<float>;

  DotResults(const Conv2dView& v, const BFloat16* bias, BFloat16* y, const Epilogue<BFloat16>* epilogue)
      : v_(v), given_(bias), y_(y), epilogue_(epilogue), act_(epilogue ? epilogue->act : Activation::kNone) {
    rows_follow_ = v.y_h == v.Q * v.y_w && (v.N == 1 || v.y_n == v.P * v.y_h);
    if (epilogue && epilogue->residual)
      rows_follow_ &= epilogue->r_h == v.Q * epilogue->r_w && (v.N == 1 || epilogue->r_n == v.P * epilogue->r_h);
  }
  void set_room(float* sums) { sums_ = sums; }  // kSums of them

  // The next tiles write `lanes` channels from `channel` on, in so many vectors.
  void set_channels(int64_t channel, int64_t lanes, int64_t vecs) {
    channel_ = channel, lanes_ = lanes, vecs_ = vecs;
    for (int64_t j = 0; j < vecs; ++j) {
      const int64_t k = channel + j * VL, n = min(VL, lanes - j * VL);
      Epilogue<BFloat16>::Factors f{broadcast(1.f), Vec<float>{}};
      if (epilogue_) f = epilogue_->factors(k, n);
      bias_[j] = given_ ? load_wide(given_ + k, n) : Vec<float>{};
      scale_[j] = f.scale;
      shift_[j] = f.shift;
    }
  }

  // Runs a tile over `rows` neighbouring pixels of y, the first of them `pixel`.
  CNNFAST_INLINE void run(DotTileFn tile, DotTileArgs& args, int64_t pixel, int64_t rows) const {
    const bool residual = epilogue_ && epilogue_->residual;
    bool whole = lanes_ == vecs_ * VL && act_ <= Activation::kRelu;
    args.bias = reinterpret_cast<const float*>(bias_);
    args.scale = reinterpret_cast<const float*>(scale_), args.shift = reinterpret_cast<const float*>(shift_);
    args.relu = act_ == Activation::kRelu;
    args.sums = sums_;
    args.y_row = v_.y_w, args.r = nullptr;
    if (residual) args.r_row = epilogue_->r_w;
    if (rows_follow_) {
      args.y = y_ + pixel * v_.y_w + channel_;
      if (residual) args.r = epilogue_->residual + pixel * epilogue_->r_w + channel_;
    } else {
      const int64_t q = pixel % v_.Q, p = pixel / v_.Q % v_.P, n = pixel / v_.Q / v_.P;
      args.y = y_ + n * v_.y_n + p * v_.y_h + q * v_.y_w + channel_;
      if (residual) args.r = epilogue_->residual_at(n, p, q) + channel_;
      whole &= q + rows <= v_.Q;
    }
    if (!whole) args.y = nullptr;
    tile(args);
    if (!whole) finish(pixel, rows);
  }

 private:
  static constexpr int64_t VL = kLanes<float>;

  // A tile's sums through the epilogue, pixel by pixel.
  __attribute__((noinline)) void finish(int64_t pixel, int64_t rows) const {
    int64_t q = pixel % v_.Q, p = pixel / v_.Q % v_.P, n = pixel / v_.Q / v_.P;
    for (int64_t i = 0; i < rows; ++i) {
      BFloat16* y = y_ + n * v_.y_n + p * v_.y_h + q * v_.y_w + channel_;
      const BFloat16* r = epilogue_ ? epilogue_->residual_at(n, p, q) : nullptr;
      for (int64_t j = 0; j < vecs_; ++j) {
        const Vec<float> sum = load(sums_ + (i * vecs_ + j) * VL);
        const int64_t lanes = min(VL, lanes_ - j * VL), l = j * VL;
        if (epilogue_)
          epilogue_->store(y + l, sum, {scale_[j], shift_[j]}, r ? r + channel_ + l : nullptr, lanes, false);
        else
          store_narrow(y + l, sum, lanes);
      }
      if (++q == v_.Q) {
        q = 0;
        if (++p == v_.P) p = 0, ++n;
      }
    }
  }

  const Conv2dView& v_;
  const BFloat16* given_;
  BFloat16* y_;
  const Epilogue<BFloat16>* epilogue_;
  Activation act_;
  bool rows_follow_;  // neighbouring pixels are y_w apart from row to row and image to image, too
  int64_t channel_ = 0, lanes_ = 0, vecs_ = 0;
  Vec<float> bias_[kDotVecs] = {}, scale_[kDotVecs] = {}, shift_[kDotVecs] = {};
  float* sums_ = nullptr;
};

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
