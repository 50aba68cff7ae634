// How an implicit GEMM is cut into blocks: a pure function of its sizes, the number of multiprocessors and the shared
// memory that one has (which is all that tells compute capabilities apart here).
//
// Plain C++, compiled by tests without a device. The rates and overheads are of an H100; only ratios between candidates
// decide, and those are much the same on other cards.
#pragma once
#include <algorithm>
#include <cstdint>

namespace cnnfast::cuda::implicit_gemm {

// What a block computes, and what it costs. `rate` is the share of the tensor cores' rate that such blocks reach when
// all processors are busy: large tiles read less from shared memory for each product.
struct TileShape {
  int rows, columns;
  int blocks;  // at once on a processor
  double rate;
};

enum TileChoice : int { k128x128, k128x64, k64x64, kTiles };
constexpr int64_t kStagedBytes = 4 * 64;  // of a row or column: four stages of 64 bytes
constexpr int64_t kReservedBytes = 1024;  // of a block, by the system
constexpr TileShape kShapes[kTiles] = {{128, 128, 2, 1.0}, {128, 64, 3, 0.8}, {64, 64, 4, 0.62}};

constexpr double kProductsASecond = 1.3e12;  // multiply-adds of 16-bit operands, of one processor
constexpr int64_t kOverhead = 10;            // of a block, in steps of kStepDepth: filling the pipeline, storing
constexpr int64_t kStepDepth = 32;
constexpr double kBytesASecond = 2e12;

// A cut of the depth decides how sums are rounded: it doesn't depend on the card.
constexpr int64_t kNominalProcessors = 132, kNominalSharedBytes = int64_t{228} << 10;
constexpr int64_t kSliceSteps = 8;  // at least, of a slice
constexpr int64_t kMaxSlices = 512;
constexpr int64_t kWorkspaceBytes = int64_t{128} << 20;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks at once on a processor with so much shared memory: sm_86, sm_89 and sm_120 have 100 KB, half of the others'.
inline int64_t blocks_at_once(const TileShape& s, int64_t shared_bytes) {
  const int64_t fit = shared_bytes / ((s.rows + s.columns) * kStagedBytes + kReservedBytes);
  return std::max<int64_t>(1, std::min<int64_t>(s.blocks, fit));
}

// Predicted seconds of so many equal blocks.
inline double seconds(TileChoice tile, int64_t blocks, int64_t depth, int64_t processors, int64_t shared_bytes) {
  const TileShape& s = kShapes[tile];
  const int64_t at_once = blocks_at_once(s, shared_bytes);
  const int64_t steps = divide_up(depth, kStepDepth) + kOverhead;
  // Blocks that share a processor take turns: a processor's time is that of its blocks one after the other, but the
  // last ones alone reach only a part of the rate.
  const int64_t full = blocks / (processors * at_once), rest = blocks % (processors * at_once);
  const double least = 0.6 * static_cast<double>(at_once);
  const double turns = static_cast<double>(full * at_once) +
                       (rest ? std::max<double>(static_cast<double>(divide_up(rest, processors)), least) : 0);
  return turns * static_cast<double>(steps * kStepDepth * s.rows * s.columns) / (kProductsASecond * s.rate);
}

// The tile for `products` products of rows x columns over that depth.
inline TileChoice choose_tile(int64_t rows, int64_t columns, int64_t depth, int64_t products, int64_t processors,
                              int64_t shared_bytes) {
  TileChoice best = k64x64;
  double least = -1;
  for (int i = 0; i < kTiles; ++i) {
    const TileShape& s = kShapes[i];
    const int64_t blocks = products * divide_up(rows, s.rows) * divide_up(columns, s.columns);
    const double predicted = seconds(static_cast<TileChoice>(i), blocks, depth, processors, shared_bytes);
    if (least >= 0 && predicted >= least) continue;
    least = predicted;
    best = static_cast<TileChoice>(i);
  }
  return best;
}

struct Split {
  TileChoice tile;
  int64_t slices;  // of the depth, equal but for the last
  int64_t depth;   // of a slice, in whole steps
};

// The same where the result is small and the depth long: slices of the depth give blocks enough. `only`: that tile.
inline Split choose_split(int64_t rows, int64_t columns, int64_t depth, int64_t products, TileChoice only = kTiles) {
  Split best{k64x64, 1, std::max<int64_t>(depth, 1)};
  double least = -1;
  const int64_t steps = std::max<int64_t>(divide_up(depth, kStepDepth), 1);
  const int64_t bytes = std::max<int64_t>(products * rows * columns * 4, 1);
  const int64_t most =
      std::max<int64_t>(1, std::min({steps / kSliceSteps, kMaxSlices, std::max<int64_t>(kWorkspaceBytes / bytes, 1)}));
  for (int i = 0; i < kTiles; ++i) {
    if (only != kTiles && i != only) continue;
    const TileShape& s = kShapes[i];
    const int64_t owners = std::max<int64_t>(products * divide_up(rows, s.rows) * divide_up(columns, s.columns), 1);
    for (int64_t waves = 0; waves <= 3; ++waves) {  // as many slices as fill so many waves of blocks; 0: one slice
      const int64_t wanted = waves * kNominalProcessors * s.blocks / owners;
      const int64_t slice_steps = divide_up(steps, std::max<int64_t>(1, std::min(wanted, most)));
      const int64_t slices = divide_up(steps, slice_steps);
      double predicted = seconds(static_cast<TileChoice>(i), owners * slices, slice_steps * kStepDepth,
                                 kNominalProcessors, kNominalSharedBytes);
      if (slices > 1) predicted += 3e-6 + 2 * static_cast<double>(slices * bytes) / kBytesASecond;
      if (least >= 0 && predicted >= least) continue;
      least = predicted;
      best = {static_cast<TileChoice>(i), slices, slice_steps * kStepDepth};
    }
  }
  return best;
}

// The same for fprop: only where the smallest tiles leave processors without a block.
inline Split choose_small_split(int64_t rows, int64_t columns, int64_t depth, int64_t products) {
  const TileShape& s = kShapes[k64x64];
  if (products * divide_up(rows, s.rows) * divide_up(columns, s.columns) >= kNominalProcessors)
    return {k64x64, 1, std::max<int64_t>(depth, 1)};
  return choose_split(rows, columns, depth, products);
}

}  // namespace cnnfast::cuda::implicit_gemm
