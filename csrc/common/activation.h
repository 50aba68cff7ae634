// The activations that fused kernels end with.
#pragma once
#include <cstdint>

namespace cnnfast {

// In the order of ACTIVATIONS in cnnfast/ops/_activation.py.
enum class Activation : int64_t { kNone, kRelu, kRelu6, kLeakyRelu };

constexpr double kLeakySlope = 0.01;

}  // namespace cnnfast
