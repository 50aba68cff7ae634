// The activations that fused kernels end with.
#pragma once
#include <cstdint>

namespace cnnfast {

// In the order of INFERENCE in cnnfast/ops/_activation.py; those after kLeakyRelu only where no gradient is asked for.
enum class Activation : int64_t { kNone, kRelu, kRelu6, kLeakyRelu, kSilu, kHardswish, kSigmoid, kHardsigmoid };

constexpr double kLeakySlope = 0.01;

}  // namespace cnnfast
