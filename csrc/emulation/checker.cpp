#include "checker.h"

#include <link.h>

#include <cstdio>
#include <vector>

#include "state.h"

namespace cnnfast::emulation {

namespace {

struct Range {
  uintptr_t begin, end;
  bool writable;
  std::vector<uint64_t> writer;  // by byte: 1 + the number in the grid of the thread that wrote it; check variant only
};

std::vector<Range>& ranges() {
  static std::vector<Range> value;
  return value;
}

}  // namespace

void register_range(const void* begin, size_t bytes, bool writable) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  ranges().push_back({address, address + bytes, writable, {}});
}

void clear_ranges() { ranges().clear(); }

namespace checker {
void require_shared(const void* address, size_t bytes, const char* instruction) {
  const Block& block = *current_block;
  const size_t offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset > block.shared_used || offset + bytes > block.shared_used)
    fail(std::string(instruction) + ": the address is not in this block's shared memory");
}
}  // namespace checker

#ifndef CNNFAST_EMULATION_CHECK

const bool checking = false;

#else

const bool checking = true;

namespace {

// What is known of a byte of shared memory. An access is ordered after an earlier one by a block barrier (a new epoch),
// by being the same thread's, or by a __syncwarp between two lanes of a warp (a new warp epoch).
struct Cell {
  uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
  uint16_t writer, reader;
  bool several_readers, several_warps_read, initialised, pending;
};

std::vector<Cell>& cells() {
  static std::vector<Cell> value(Block::kArena);
  return value;
}

struct Segment {
  uintptr_t begin, end;
};

// The segments of this module: constants that kernels may read.
const std::vector<Segment>& own_segments() {
  static const std::vector<Segment> segments = [] {
    std::vector<Segment> found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          std::vector<Segment> candidate;
          bool ours = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr, end = begin + header.p_memsz;
            candidate.push_back({begin, end});
            const auto here = reinterpret_cast<uintptr_t>(&checking);
            ours = ours || (begin <= here && here < end);
          }
          if (ours) *static_cast<std::vector<Segment>*>(data) = candidate;
          return 0;
        },
        &found);
    return found;
  }();
  return segments;
}

std::string describe(checker::Access access, size_t bytes, const std::string& where) {
  return std::string(access == checker::kRead ? " reading " : " writing ") + std::to_string(bytes) + " bytes at " +
         where;
}

void check_shared(const Block& block, const Thread& thread, size_t offset, size_t bytes, checker::Access access) {
  const std::string where = "shared+" + std::to_string(offset);
  if (offset + bytes > block.shared_used) fail("out of bounds:" + describe(access, bytes, where));
  for (Cell *cell = &cells()[offset], *end = cell + bytes; cell != end; ++cell) {
    const bool written_here = cell->write_epoch == block.epoch && cell->writer != thread.linear;
    if (written_here && !(cell->writer / kWarp == thread.warp && cell->write_warp_epoch < thread.warp_epoch))
      fail("race with thread " + std::to_string(cell->writer) + "'s write," + describe(access, bytes, where));
    if (access == checker::kRead) {
      if (cell->pending) fail("not waited for (cp.async)," + describe(access, bytes, where));
      if (!cell->initialised) fail("uninitialised shared memory," + describe(access, bytes, where));
      if (cell->read_epoch != block.epoch) {
        cell->read_epoch = block.epoch;
        cell->read_warp_epoch = thread.warp_epoch;
        cell->reader = static_cast<uint16_t>(thread.linear);
        cell->several_readers = cell->several_warps_read = false;
      } else if (cell->reader / kWarp != thread.warp) {
        cell->several_warps_read = true;
      } else if (cell->read_warp_epoch != thread.warp_epoch) {
        cell->read_warp_epoch = thread.warp_epoch;
        cell->reader = static_cast<uint16_t>(thread.linear);
        cell->several_readers = false;
      } else if (cell->reader != thread.linear) {
        cell->several_readers = true;
      }
      continue;
    }
    if (cell->read_epoch == block.epoch) {
      const bool other_warp = cell->several_warps_read || cell->reader / kWarp != thread.warp;
      const bool same_moment = cell->read_warp_epoch == thread.warp_epoch;
      if (other_warp || (same_moment && (cell->several_readers || cell->reader != thread.linear)))
        fail("race with thread " + std::to_string(cell->reader) + "'s read," + describe(access, bytes, where));
    }
    cell->write_epoch = block.epoch;
    cell->write_warp_epoch = thread.warp_epoch;
    cell->writer = static_cast<uint16_t>(thread.linear);
    cell->pending = access == checker::kPendingWrite;
    cell->initialised = true;
  }
}

void check_global(const Block& block, const Thread& thread, uintptr_t address, size_t bytes, checker::Access access) {
  if (ranges().empty()) return;
  const uint64_t self = block.linear * kMaxThreads + thread.linear + 1;
  for (size_t i = 0; i < ranges().size(); ++i) {
    Range& range = ranges()[i];
    if (address < range.begin || address + bytes > range.end) continue;
    const std::string where = "range " + std::to_string(i) + "+" + std::to_string(address - range.begin);
    if (access != checker::kRead && !range.writable) fail("read-only memory," + describe(access, bytes, where));
    if (!range.writable) return;
    for (size_t byte = address - range.begin, end = byte + bytes; byte < end; ++byte) {
      uint64_t& writer = range.writer[byte];
      if (writer && writer != self) fail("race in global memory," + describe(access, bytes, where));
      if (access != checker::kRead) writer = self;
    }
    return;
  }
  if (access == checker::kRead)
    for (const Segment& segment : own_segments())
      if (address >= segment.begin && address + bytes <= segment.end) return;
  char where[32];
  std::snprintf(where, sizeof where, "0x%zx", static_cast<size_t>(address));
  fail("out of bounds:" + describe(access, bytes, where));
}

}  // namespace

namespace checker {

void start_launch(Block&) {
  for (Range& range : ranges())
    if (range.writable) range.writer.assign(range.end - range.begin, 0);
}

void start_block(Block& block) { clear_shared(0, block.shared_used); }

void clear_shared(size_t begin, size_t end) { std::fill(cells().begin() + begin, cells().begin() + end, Cell{}); }

void on_access(const void* address, size_t bytes, Access access) {
  if (!current_thread) return;
  const Block& block = *current_block;
  const size_t offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset < Block::kArena) return check_shared(block, *current_thread, offset, bytes, access);
  if (block.stacks.contains(address)) return;
  check_global(block, *current_thread, reinterpret_cast<uintptr_t>(address), bytes, access);
}

}  // namespace checker

#endif

}  // namespace cnnfast::emulation

#ifdef CNNFAST_EMULATION_CHECK
// The functions that -fsanitize=thread makes the compiler call.
using cnnfast::emulation::checker::kRead;
using cnnfast::emulation::checker::kWrite;
using cnnfast::emulation::checker::on_access;

#define CNNFAST_TSAN_SIZE(n)                                         \
  void __tsan_read##n(void* p) { on_access(p, n, kRead); }           \
  void __tsan_write##n(void* p) { on_access(p, n, kWrite); }         \
  void __tsan_unaligned_read##n(void* p) { on_access(p, n, kRead); } \
  void __tsan_unaligned_write##n(void* p) { on_access(p, n, kWrite); }

extern "C" {
CNNFAST_TSAN_SIZE(1)
CNNFAST_TSAN_SIZE(2)
CNNFAST_TSAN_SIZE(4)
CNNFAST_TSAN_SIZE(8)
CNNFAST_TSAN_SIZE(16)
void __tsan_read_range(void* p, size_t n) { on_access(p, n, kRead); }
void __tsan_write_range(void* p, size_t n) { on_access(p, n, kWrite); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#endif
