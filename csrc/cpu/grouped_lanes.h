// A vector that holds whole groups of channels, and how the input channels of a group reach its output lanes.
//
// Lane l of a vector of output channels belongs to group l / kOut of the vector's groups, each of kOut output and kIn
// input channels. spread<q> gives every lane input channel q of its group. The vector's input channels lie beside each
// other in memory: kLanes * kIn / kOut of them, at most two vectors. Shuffles never cross a group, so neither does an
// Inf.
#pragma once
#include "primitives/vec.h"

namespace cnnfast {
namespace CNNFAST_ISA {

// The sizes that a vector can hold: equal ones, depthwise with 2 or 4 outputs a channel, and the reverse (its dgrad).
template <class T, int kIn, int kOut>
constexpr bool kGroupFits =
    kIn <= kLanes<T> && kOut <= kLanes<T> && (kIn == kOut || (kIn == 1 && kOut <= 4) || (kOut == 1 && kIn == 2));

template <class T, int kIn, int kOut>
struct GroupLanes {
  static constexpr int VL = kLanes<T>;
  static constexpr int kInputs = VL * kIn / kOut;  // channels of x for one vector of outputs
  static constexpr int kVectors = kInputs > VL ? kInputs / VL : 1;

  // A group that is a whole vector is read element by element: a broadcast from memory leaves the shuffle unit alone.
  static constexpr bool kBroadcasts = kIn == VL && kOut == VL;

  Vec<T> x[kVectors];
  const T* elements = nullptr;

  // `inputs` of the channels exist: kInputs but in the last vector.
  template <bool kWhole, class S>
  static CNNFAST_INLINE GroupLanes read(const S* p, int64_t inputs) {
    GroupLanes lanes;
    if constexpr (kWhole && kBroadcasts && kSame<S, T>) {
      lanes.elements = p;
    } else if constexpr (kWhole && kInputs >= VL) {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) lanes.x[i] = load_wide(p + i * VL);
    } else if constexpr (kWhole) {
      lanes.x[0] = load_wide(p, kInputs);
    } else {
#pragma GCC unroll 2
      for (int i = 0; i < kVectors; ++i) lanes.x[i] = load_wide(p + i * VL, max(0, min(VL, inputs - i * VL)));
    }
    return lanes;
  }

  template <int q>
  CNNFAST_INLINE Vec<T> spread() const {
    if constexpr (kBroadcasts) {
      if (elements) return broadcast(elements[q]);
    }
    if constexpr (kIn == kOut) {
      return broadcast_in_group<T, kIn, q>(x[0]);
    } else {
      VecIndex<T> index{};
#pragma GCC unroll 16
      for (int l = 0; l < VL; ++l) index[l] = l / kOut * kIn + q;
      if constexpr (kVectors == 1)
        return __builtin_shuffle(x[0], index);
      else
        return __builtin_shuffle(x[0], x[1], index);
    }
  }
};

}  // namespace CNNFAST_ISA
}  // namespace cnnfast
