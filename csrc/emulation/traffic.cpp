#include "traffic.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "checker.h"
#include "state.h"

namespace cnnfast::emulation::traffic {

namespace {

struct Tally {
  uint64_t accesses, units, least;
};

using Place = std::tuple<std::string, Kind, uintptr_t>;

std::map<Place, Tally>& tallies() {
  static std::map<Place, Tally> value;
  return value;
}

}  // namespace

std::vector<Count> counts() {
  std::vector<Count> found;
  for (const auto& [place, tally] : tallies()) {
    const auto& [kernel, kind, where] = place;
    found.push_back({kernel, kind, checker::source_line(where), tally.accesses, tally.units, tally.least});
  }
  return found;
}

void reset() { tallies().clear(); }

#ifdef CNNFAST_EMULATION_CHECK

namespace {

constexpr size_t kLookBack = 8;  // pieces of other accesses that may lie between those of one
constexpr uintptr_t kBankBytes = 4, kBanks = 32, kSectorBytes = 32, kVectorBytes = 16;

struct Piece {
  uintptr_t address, where, last;  // last: of the pieces that it was put together from
  uint32_t bytes;
  Kind kind;
};

std::vector<std::vector<Piece>>& pieces() {  // by thread of the block
  static std::vector<std::vector<Piece>> value(kMaxThreads);
  return value;
}

bool extends(const Piece& piece, uintptr_t address, size_t bytes, Kind kind, uintptr_t where) {
  return piece.kind == kind && piece.address + piece.bytes == address && piece.last != where && piece.where != where &&
         piece.address % kVectorBytes + piece.bytes + bytes <= kVectorBytes;
}

void count(Kind kind, uintptr_t where, Tally more) {
  Tally& tally = tallies()[{current_block->kernel, kind, where}];
  tally.accesses += more.accesses;
  tally.units += more.units;
  tally.least += more.least;
}

uint64_t distinct(std::vector<uintptr_t>& values) {
  std::sort(values.begin(), values.end());
  return std::unique(values.begin(), values.end()) - values.begin();
}

// One access of a warp to shared memory.
Tally wavefronts(const std::vector<std::pair<uint32_t, const Piece*>>& lanes) {
  uint32_t bytes = 0;
  for (const auto& [lane, piece] : lanes) bytes = std::max(bytes, piece->bytes);
  const uint32_t at_once = bytes > 8 ? 8 : bytes > 4 ? 16 : 32;
  Tally tally{1, 0, 0};
  for (uint32_t first = 0; first < kWarp; first += at_once) {
    std::vector<uintptr_t> words;
    for (const auto& [lane, piece] : lanes)
      if (lane / at_once * at_once == first)
        for (uintptr_t a = piece->address / kBankBytes; a * kBankBytes < piece->address + piece->bytes; ++a)
          words.push_back(a);
    if (words.empty()) continue;
    words.resize(distinct(words));
    uint64_t in_bank[kBanks] = {};
    for (uintptr_t word : words) ++in_bank[word % kBanks];
    tally.units += *std::max_element(in_bank, in_bank + kBanks);
    tally.least += (words.size() + kBanks - 1) / kBanks;
  }
  return tally;
}

// One access of a warp to global memory.
Tally sectors(const std::vector<std::pair<uint32_t, const Piece*>>& lanes) {
  std::vector<uintptr_t> touched, bytes;
  for (const auto& [lane, piece] : lanes)
    for (uintptr_t a = piece->address; a < piece->address + piece->bytes; ++a) {
      bytes.push_back(a);
      touched.push_back(a / kSectorBytes);
    }
  return {1, distinct(touched), (distinct(bytes) + kSectorBytes - 1) / kSectorBytes};
}

}  // namespace

void on_access(const void* address, size_t bytes, bool writes, uintptr_t where) {
  if (!config().count_accesses || !current_thread || current_block->stacks.contains(address)) return;
  const size_t offset = static_cast<const unsigned char*>(address) - current_block->shared;
  const bool shared = offset < Block::kArena;
  const Kind kind =
      shared ? (writes ? Kind::shared_write : Kind::shared_read) : (writes ? Kind::global_write : Kind::global_read);
  const uintptr_t at = shared ? offset : reinterpret_cast<uintptr_t>(address);
  std::vector<Piece>& mine = pieces()[current_thread->linear];
  const size_t oldest = mine.size() - std::min(mine.size(), kLookBack);
  for (size_t i = mine.size(); i-- > oldest;) {
    if (!extends(mine[i], at, bytes, kind, where)) continue;
    mine[i].bytes += static_cast<uint32_t>(bytes);
    mine[i].last = where;
    return;
  }
  mine.push_back({at, where, where, static_cast<uint32_t>(bytes), kind});
}

void on_wavefronts(uint64_t wavefronts, uint64_t least, uintptr_t where) {
  if (config().count_accesses) count(Kind::shared_read, where, {1, wavefronts, least});
}

void flush() {
  if (!config().count_accesses) return;
  const Block& block = *current_block;
  for (uint32_t warp = 0; warp * kWarp < block.threads; ++warp) {
    // (instruction, how often a lane executed it before) -> the lanes' pieces
    using Instruction = std::pair<uintptr_t, Kind>;
    std::map<std::pair<Instruction, uint32_t>, std::vector<std::pair<uint32_t, const Piece*>>> accesses;
    for (uint32_t lane = 0; lane < kWarp && warp * kWarp + lane < block.threads; ++lane) {
      std::map<Instruction, uint32_t> executed;
      for (const Piece& piece : pieces()[warp * kWarp + lane]) {
        const Instruction instruction{piece.where, piece.kind};
        accesses[{instruction, executed[instruction]++}].push_back({lane, &piece});
      }
    }
    for (const auto& [key, lanes] : accesses) {
      const auto [where, kind] = key.first;
      const bool shared = kind == Kind::shared_read || kind == Kind::shared_write;
      count(kind, where, shared ? wavefronts(lanes) : sectors(lanes));
    }
  }
  for (uint32_t t = 0; t < block.threads; ++t) pieces()[t].clear();
}

#endif

}  // namespace cnnfast::emulation::traffic
