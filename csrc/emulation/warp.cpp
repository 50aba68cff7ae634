// Warp collectives. The last lane of the mask to arrive does the work for all of them, on their registers.
#include <algorithm>
#include <cstring>

#include "checker.h"
#include "state.h"
#include "traffic.h"

namespace cnnfast::emulation {

namespace {

enum Operation { kSyncWarp = 1, kShuffle, kBallot, kLdmatrix, kLdmatrixTransposed, kMmaBf16, kMmaF16, kMmaTf32 };
constexpr const char* kNames[] = {"",         "__syncwarp", "shuffle", "__ballot_sync", "ldmatrix", "ldmatrix.trans",
                                  "mma.sync", "mma.sync",   "mma.sync"};

template <class Visit>
void each_lane(uint32_t mask, Visit visit) {
  for (; mask; mask &= mask - 1) visit(__builtin_ctz(mask));
}

Gate& gate_for(Warp& warp, uint32_t mask) {
  Gate* free_gate = nullptr;
  for (Gate& gate : warp.gates) {
    if (gate.arrived && gate.mask == mask) return gate;
    if (!gate.arrived && !free_gate) free_gate = &gate;
  }
  if (!free_gate) fail("too many warp collectives in progress");
  free_gate->mask = mask;
  return *free_gate;
}

// perform(arguments by lane, mask) runs once, when all lanes of the mask are here.
template <class Argument, class Perform>
void collective(uint32_t mask, Operation operation, Argument* argument, int line, Perform perform) {
  Block& block = *current_block;
  Thread& thread = *current_thread;
  Warp& warp = block.warp[thread.warp];
  mask &= warp.exists;  // a block's last warp may be smaller
  const std::string name = kNames[operation];
  if (!(mask >> thread.lane & 1)) fail(name + ": the calling lane is not in its own mask" + at_line(line));
  if (mask & warp.exited)
    fail(name + ": lane " + std::to_string(__builtin_ctz(mask & warp.exited)) + " of the mask has exited" +
         at_line(line));
  Gate& gate = gate_for(warp, mask);
  if (!gate.arrived) {
    gate.operation = operation;
    gate.line = line;
  } else if (gate.operation != operation || gate.line != line) {
    fail(name + at_line(line) + " meets " + kNames[gate.operation] + at_line(gate.line) + " in one warp");
  }
  gate.arguments[thread.lane] = argument;
  gate.arrived |= 1u << thread.lane;
  if (gate.arrived != mask) return wait(kNames[operation], line);

  ++statistics().warp_operations;
  gate.arrived = 0;
  Argument* arguments[kWarp] = {};
  each_lane(mask, [&](int lane) { arguments[lane] = static_cast<Argument*>(gate.arguments[lane]); });
  perform(arguments, mask);
  each_lane(mask, [&](int lane) {
    if (static_cast<uint32_t>(lane) != thread.lane) make_ready(thread.warp * kWarp + lane);
  });
}

float float_of_bf16(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float float_of_f16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 0) {  // zero or subnormal
    const float magnitude = static_cast<float>(mantissa) * (1.0f / (1 << 24));
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

const float* f16_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (uint32_t i = 0; i < values.size(); ++i) values[i] = float_of_f16(static_cast<uint16_t>(i));
    return values;
  }();
  return table.data();
}

struct MmaArguments {
  float* d;
  const uint32_t *a, *b;
};

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": group = lane / 4, pair = lane % 4 * 2.
//   A (16x16): register i holds row group + 8*(i&1), columns pair + 8*(i>>1) and the next
//   B (16x8):  register i holds rows pair + 8*i and the next, column group
//   C (16x8):  element i is row group + 8*(i>>1), column pair + (i&1)
template <class ToFloat>
void perform_mma(MmaArguments* const* lanes, ToFloat to_float) {
  ++statistics().mma;
  alignas(32) float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaArguments& x = *lanes[lane];
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* to = &a[group + 8 * (i & 1)][pair + 8 * (i >> 1)];
      to[0] = to_float(static_cast<uint16_t>(x.a[i]));
      to[1] = to_float(static_cast<uint16_t>(x.a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + 8 * i][group] = to_float(static_cast<uint16_t>(x.b[i]));
      b[pair + 8 * i + 1][group] = to_float(static_cast<uint16_t>(x.b[i] >> 16));
    }
    for (int i = 0; i < 4; ++i) c[group + 8 * (i >> 1)][pair + (i & 1)] = x.d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = c[group + 8 * (i >> 1)][pair + (i & 1)];
  }
}

// The same of mma.m16n8k8 in tf32: group = lane / 4, member = lane % 4.
//   A (16x8): register i holds row group + 8*(i&1), column member + 4*(i>>1)
//   B (8x8):  register i holds row member + 4*i, column group
void perform_mma_tf32(MmaArguments* const* lanes) {
  ++statistics().mma;
  auto to_float = [](uint32_t bits) {
    bits &= ~0x1fffu;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  alignas(32) float a[16][8], b[8][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaArguments& x = *lanes[lane];
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) a[group + 8 * (i & 1)][member + 4 * (i >> 1)] = to_float(x.a[i]);
    for (int i = 0; i < 2; ++i) b[member + 4 * i][group] = to_float(x.b[i]);
    for (int i = 0; i < 4; ++i) c[group + 8 * (i >> 1)][member * 2 + (i & 1)] = x.d[i];
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 8; ++k)
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = c[group + 8 * (i >> 1)][member * 2 + (i & 1)];
  }
}

}  // namespace

void warp_barrier(uint32_t mask, int line) {
  int unused = 0;
  collective(mask, kSyncWarp, &unused, line, [](int**, uint32_t lanes) {
    // The only warp collective that orders memory.
    each_lane(lanes, [](int lane) { ++current_block->thread[current_thread->warp * kWarp + lane].warp_epoch; });
  });
}

uint64_t shuffle(uint32_t mask, uint64_t bits, int source_lane, int line) {
  struct Arguments {
    uint64_t in, out;
    int source;
  } mine{bits, bits, source_lane};
  collective(mask, kShuffle, &mine, line, [line](Arguments** lanes, uint32_t present) {
    each_lane(present, [&](int lane) {
      const int source = lanes[lane]->source;
      if (!(present >> source & 1))
        fail("shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(source) +
             ", which is not in the mask" + at_line(line));
      lanes[lane]->out = lanes[source]->in;
    });
  });
  return mine.out;
}

uint32_t ballot(uint32_t mask, bool predicate, int line) {
  struct Arguments {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  collective(mask, kBallot, &mine, line, [](Arguments** lanes, uint32_t present) {
    uint32_t result = 0;
    each_lane(present, [&](int lane) { result |= uint32_t{lanes[lane]->predicate} << lane; });
    each_lane(present, [&](int lane) { lanes[lane]->result = result; });
  });
  return mine.result;
}

void ldmatrix(uint32_t* result, const void* row, int matrices, bool transposed, int line) {
  struct Arguments {
    uint32_t* result;
    const unsigned char* row;
  } mine{result, static_cast<const unsigned char*>(row)};
  if (static_cast<int>(current_thread->lane) < 8 * matrices) {  // the other lanes' addresses are not used
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: row address not 16-byte aligned" + at_line(line));
    checker::require_shared(row, 16, "ldmatrix");
    checker::on_access(row, 16, checker::kRead, line);
  }
  const Operation operation = transposed ? kLdmatrixTransposed : kLdmatrix;
  collective(~0u, operation, &mine, line, [=](Arguments** lanes, uint32_t present) {
    if (present != ~0u) fail("ldmatrix needs a full warp" + at_line(line));
    ++statistics().ldmatrix;
    uint64_t wavefronts = 0;
    for (int m = 0; m < matrices; ++m) {
      uint16_t matrix[8][8];
      size_t vectors[8];
      int rows_in_bank_group[8] = {};  // a row that several lanes give is read once
      for (int i = 0; i < 8; ++i) {
        const unsigned char* source = lanes[8 * m + i]->row;
        std::memcpy(matrix[i], source, 16);
        vectors[i] = static_cast<size_t>(source - current_block->shared) / 16;
        if (std::find(vectors, vectors + i, vectors[i]) == vectors + i) ++rows_in_bank_group[vectors[i] % 8];
      }
      wavefronts += *std::max_element(rows_in_bank_group, rows_in_bank_group + 8);
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint16_t low = transposed ? matrix[j][i] : matrix[i][j];
        const uint16_t high = transposed ? matrix[j + 1][i] : matrix[i][j + 1];
        lanes[lane]->result[m] = low | uint32_t{high} << 16;
      }
    }
    statistics().ldmatrix_wavefronts += wavefronts;
    traffic::on_wavefronts(wavefronts, matrices, line);
  });
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, MmaType type, int line) {
  MmaArguments mine{d, a, b};
  collective(~0u, type == MmaType::bf16 ? kMmaBf16 : kMmaF16, &mine, line, [=](MmaArguments** lanes, uint32_t present) {
    if (present != ~0u) fail("mma.sync needs a full warp" + at_line(line));
    if (type == MmaType::bf16) return perform_mma(lanes, float_of_bf16);
    const float* table = f16_table();
    perform_mma(lanes, [table](uint16_t bits) { return table[bits]; });
  });
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, int line) {
  MmaArguments mine{d, a, b};
  collective(~0u, kMmaTf32, &mine, line, [=](MmaArguments** lanes, uint32_t present) {
    if (present != ~0u) fail("mma.sync needs a full warp" + at_line(line));
    perform_mma_tf32(lanes);
  });
}

uint32_t round_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const bool finite = (bits >> 23 & 255) != 255;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
}

}  // namespace cnnfast::emulation
