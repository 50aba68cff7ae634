// What the test sources share: the bugs, and how Python calls into them.
#pragma once
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

// (constant, name, kernel)
#define CNNFAST_BUGS(bug)                                                                                              \
  bug(kNoBarrierBeforeUse, "no_barrier_before_use", "direct") bug(                                                     \
      kNoBarrierBeforeRestaging, "no_barrier_before_restaging",                                                        \
      "direct") bug(kSurplusBarrier, "surplus_barrier", "direct") bug(kHaloOffByOne, "halo_off_by_one", "direct")      \
      bug(kColumnMaskOfRows, "column_mask_of_rows", "direct") bug(kTapTooFar, "tap_too_far", "direct") bug(            \
          kNoTailMask, "no_tail_mask", "direct") bug(kHaloNotStaged, "halo_not_staged", "direct")                      \
          bug(kChannelTailRead, "channel_tail_read", "direct") bug(kTwoOwners, "two_owners", "direct") bug(            \
              kWaitTooLittle, "wait_too_little", "gemm") bug(kNeverWaited, "never_waited",                             \
                                                             "gemm") bug(kNeverCommitted, "never_committed", "gemm")   \
              bug(kCommitForgottenAtEnd, "commit_forgotten_at_end", "gemm") bug(                                       \
                  kCopiesLeft, "copies_left", "gemm") bug(kMisalignedCopy, "misaligned_copy", "gemm")                  \
                  bug(kNoBarrierAfterWait, "no_barrier_after_wait", "gemm") bug(                                       \
                      kRefillBeforeBarrier, "refill_before_barrier", "gemm") bug(kTwoStages, "two_stages", "gemm")     \
                      bug(kStaleStage, "stale_stage", "gemm") bug(kWrongRow, "wrong_row", "gemm") bug(                 \
                          kTransposed, "transposed", "gemm") bug(kRegistersSwapped, "registers_swapped", "gemm")       \
                          bug(kFragmentsSwapped, "fragments_swapped", "gemm") bug(                                     \
                              kDepthSwapped, "depth_swapped",                                                          \
                              "gemm") bug(kSwizzleForgotten, "swizzle_forgotten", "gemm")                              \
                              bug(kPartialMma,                                                                         \
                                  "partial_mma", "gemm") bug(kResultRow, "result_row",                                 \
                                                             "gemm") bug(kRowTailRead, "row_tail_read", "gemm")        \
                                  bug(kColumnTailWritten, "column_tail_written", "gemm") bug(                          \
                                      kNoBarrierBeforeReduction, "no_barrier_before_reduction",                        \
                                      "reduce") bug(kHalfWarpReduced, "half_warp_reduced",                             \
                                                    "reduce") bug(kNoSyncwarp, "no_syncwarp", "reduce")                \
                                      bug(kShuffleWidth, "shuffle_width", "reduce") bug(                               \
                                          kShuffleMask, "shuffle_mask",                                                \
                                          "reduce") bug(kPartialShuffle, "partial_shuffle",                            \
                                                        "reduce") bug(kEarlyReturn, "early_return", "reduce")          \
                                          bug(kOnePartial, "one_partial", "reduce") bug(                               \
                                              kOnePartialMore, "one_partial_more",                                     \
                                              "reduce") bug(kBufferReused, "buffer_reused", "reduce")                  \
                                              bug(kAccumulatesInShared, "accumulates_in_shared", "histogram") bug(     \
                                                  kAccumulatesInGlobal, "accumulates_in_global",                       \
                                                  "histogram") bug(kBinsNotCleared, "bins_not_cleared", "histogram")   \
                                                  bug(kAliasedOutput, "aliased_output", "blur") bug(                   \
                                                      kMisalignedVector, "misaligned_vector",                          \
                                                      "blur") bug(kVectorTail, "vector_tail", "blur")                  \
                                                      bug(kGridTooSmall, "grid_too_small", "blur") bug(                \
                                                          kGridStride, "grid_stride",                                  \
                                                          "blur") bug(kReadsItsResult, "reads_its_result", "blur")     \
                                                          bug(kOffsetOverflow, "offset_overflow", "rows")              \
                                                              bug(kShiftTooFar, "shift_too_far", "rows") bug(          \
                                                                  kDynamicTooSmall, "dynamic_too_small",               \
                                                                  "transpose") bug(kTooMuchShared, "too_much_shared",  \
                                                                                   "transpose")                        \
                                                                  bug(kWrongPitch, "wrong_pitch", "transpose") bug(    \
                                                                      kDivergentBarrier, "divergent_barrier",          \
                                                                      "transpose") bug(kNoBarrierBetweenTiles,         \
                                                                                       "no_barrier_between_tiles",     \
                                                                                       "transpose")                    \
                                                                      bug(kVoteUnderCondition, "vote_under_condition", \
                                                                          "compact")                                   \
                                                                          bug(kVoteOfTail, "vote_of_tail", "compact")  \
                                                                              bug(kVoteIncludesSelf,                   \
                                                                                  "vote_includes_self", "compact")

namespace cnnfast::test {

#define CNNFAST_CONSTANT(constant, name, kernel) constant,
enum Bug : int { kNone, CNNFAST_BUGS(CNNFAST_CONSTANT) };
#undef CNNFAST_CONSTANT

struct Arguments {
  const void* in0;
  const void* in1;
  void* out;
  int sizes[4];
};

void run_products(const std::string& kernel, int bug, const Arguments& arguments);
void run_maps(const std::string& kernel, int bug, const Arguments& arguments);

// Runs f; returns null, or what it threw.
template <class F>
const char* message_of(F f) {
  static thread_local std::string message;
  try {
    f();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace cnnfast::test

#define CNNFAST_TEST_API extern "C" __attribute__((visibility("default")))
