#include "checker.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "state.h"
#include "traffic.h"

namespace cnnfast::emulation {

namespace {

// What is known of a byte of global memory in a launch: the threads (1 + their number in the grid) that wrote and read
// it last, and after how many of their block's barriers.
struct GlobalCell {
  uint64_t writer, reader;
  uint32_t write_epoch, read_epoch;
  bool several_readers, several_blocks_read;
};

struct Range {
  uintptr_t begin, end;
  bool writable;
  // By byte, of what is writable; check variant only.
  std::vector<GlobalCell> cells;
  std::vector<bool> initialised;
};

std::vector<Range>& ranges() {
  static std::vector<Range> value;
  return value;
}

}  // namespace

void register_range(const void* begin, size_t bytes, bool writable) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  ranges().push_back({address, address + bytes, writable, {}, {}});
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
  bool gap;  // between variables
};

std::vector<Cell>& cells() {
  static std::vector<Cell> value(Block::kArena);
  return value;
}

size_t& end_of_gaps() {
  static size_t value = 0;
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

std::string describe(checker::Access access, size_t bytes, const std::string& place, checker::Where where) {
  return std::string(access == checker::kRead ? " reading " : " writing ") + std::to_string(bytes) + " bytes at " +
         place + " in " + checker::source_line(where);
}

void check_shared(const Block& block, const Thread& thread, size_t offset, size_t bytes, checker::Access access,
                  checker::Where where) {
  const auto what = [&] { return describe(access, bytes, "shared+" + std::to_string(offset), where); };
  if (offset + bytes > block.shared_used) fail("out of bounds:" + what());
  for (Cell *cell = &cells()[offset], *end = cell + bytes; cell != end; ++cell) {
    if (cell->gap) fail("out of bounds:" + what());
    const bool written_here = cell->write_epoch == block.epoch && cell->writer != thread.linear;
    if (written_here && !(cell->writer / kWarp == thread.warp && cell->write_warp_epoch < thread.warp_epoch))
      fail("race with thread " + std::to_string(cell->writer) + "'s write," + what());
    if (access == checker::kRead) {
      if (cell->pending) fail("not waited for (cp.async)," + what());
      if (!cell->initialised) fail("uninitialised shared memory," + what());
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
        fail("race with thread " + std::to_string(cell->reader) + "'s read," + what());
    }
    cell->write_epoch = block.epoch;
    cell->write_warp_epoch = thread.warp_epoch;
    cell->writer = static_cast<uint16_t>(thread.linear);
    cell->pending = access == checker::kPendingWrite;
    cell->initialised = true;
  }
}

void check_global(const Block& block, const Thread& thread, uintptr_t address, size_t bytes, checker::Access access,
                  checker::Where where) {
  if (ranges().empty()) return;
  const uint64_t self = block.linear * kMaxThreads + thread.linear + 1;
  // What another thread did earlier is ordered before this access only by a barrier of their block.
  const auto concurrent = [&](uint64_t other, uint32_t epoch) {
    return other && other != self && ((other - 1) / kMaxThreads != block.linear || epoch == block.epoch);
  };
  for (size_t i = 0; i < ranges().size(); ++i) {
    Range& range = ranges()[i];
    if (address < range.begin || address + bytes > range.end) continue;
    const auto what = [&] {
      return describe(access, bytes, "range " + std::to_string(i) + "+" + std::to_string(address - range.begin), where);
    };
    if (access != checker::kRead && !range.writable) fail("read-only memory," + what());
    if (!range.writable) return;
    for (size_t byte = address - range.begin, end = byte + bytes; byte < end; ++byte) {
      GlobalCell& cell = range.cells[byte];
      if (concurrent(cell.writer, cell.write_epoch)) fail("race in global memory," + what());
      if (access == checker::kRead) {
        if (!range.initialised[byte]) fail("uninitialised global memory," + what());
        const bool other = concurrent(cell.reader, cell.read_epoch);
        cell.several_blocks_read |= other && (cell.reader - 1) / kMaxThreads != block.linear;
        cell.several_readers = other || (cell.several_readers && cell.read_epoch == block.epoch);
        cell.reader = self;
        cell.read_epoch = block.epoch;
      } else {
        if (cell.several_blocks_read || (cell.several_readers && cell.read_epoch == block.epoch) ||
            concurrent(cell.reader, cell.read_epoch))
          fail("race in global memory," + what());
        cell.writer = self;
        cell.write_epoch = block.epoch;
        range.initialised[byte] = true;
      }
    }
    return;
  }
  if (access == checker::kRead)
    for (const Segment& segment : own_segments())
      if (address >= segment.begin && address + bytes <= segment.end) return;
  char place[32];
  std::snprintf(place, sizeof place, "0x%zx", static_cast<size_t>(address));
  fail("out of bounds:" + describe(access, bytes, place, where));
}

// What is wrong in a launcher, outside of any kernel: it fails at its next launch.
std::string& fault_of_launcher() {
  static thread_local std::string fault;
  return fault;
}

}  // namespace

namespace checker {

void start_launch(Block& block) {
  std::string fault;
  fault.swap(fault_of_launcher());
  if (!fault.empty()) throw Error(block.kernel + ", its launcher: " + fault);
  clear_shared(0, end_of_gaps());  // the last launch's
  end_of_gaps() = 0;
  for (Range& range : ranges()) {
    if (!range.writable) continue;
    range.cells.assign(range.end - range.begin, GlobalCell{});
    range.initialised.resize(range.end - range.begin);
  }
}

void start_block(Block& block) {
  for (Cell *cell = cells().data(), *end = cell + block.shared_used; cell != end; ++cell) {
    const bool gap = cell->gap;
    *cell = Cell{};
    cell->gap = gap;
  }
}

void clear_shared(size_t begin, size_t end) { std::fill(cells().begin() + begin, cells().begin() + end, Cell{}); }

void mark_gap(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) cells()[i].gap = true;
  end_of_gaps() = std::max(end_of_gaps(), end);
}

void end_thread() {
  for (const auto& group : current_thread->async_groups)
    if (!group.empty()) fail("ends with asynchronous copies that it hasn't waited for");
}

void on_access(const void* address, size_t bytes, Access access, Where where) {
  if (!current_thread) return;
  const Block& block = *current_block;
  const size_t offset = static_cast<const unsigned char*>(address) - block.shared;
  if (offset < Block::kArena)
    check_shared(block, *current_thread, offset, bytes, access, where);
  else if (!block.stacks.contains(address))
    check_global(block, *current_thread, reinterpret_cast<uintptr_t>(address), bytes, access, where);
}

std::string source_line(Where where) {
  if (where < (1u << 20)) return "line " + std::to_string(where);
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(where), &info) || !info.dli_fname) return "an unknown line";
  char command[4096];
  const uintptr_t offset = where - 1 - reinterpret_cast<uintptr_t>(info.dli_fbase);  // in the call, not behind it
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
                static_cast<size_t>(offset));
  std::string first, last;
  if (FILE* output = popen(command, "r")) {
    while (std::fgets(command, sizeof command, output)) {
      std::string line(command, std::strcspn(command, " \n"));
      line.erase(0, line.rfind('/') + 1);
      if (line.empty() || line[0] == '?' || line.compare(0, 8, "launch.h") == 0) continue;
      (first.empty() ? first : last) = line;
    }
    pclose(output);
  }
  if (first.empty()) return "an unknown line";
  return last.empty() || last == first ? first : first + ", called from " + last;
}

}  // namespace checker

#endif

}  // namespace cnnfast::emulation

#ifdef CNNFAST_EMULATION_CHECK
// The functions that -fsanitize=thread makes the compiler call.
using cnnfast::emulation::checker::Access;
using cnnfast::emulation::checker::kRead;
using cnnfast::emulation::checker::kWrite;

namespace {
inline __attribute__((always_inline)) void plain_access(const void* p, size_t bytes, Access access) {
  const auto where = reinterpret_cast<uintptr_t>(__builtin_return_address(0));
  cnnfast::emulation::checker::on_access(p, bytes, access, where);
  cnnfast::emulation::traffic::on_access(p, bytes, access != kRead, where);
}
}  // namespace

#define CNNFAST_TSAN_SIZE(n)                                            \
  void __tsan_read##n(void* p) { plain_access(p, n, kRead); }           \
  void __tsan_write##n(void* p) { plain_access(p, n, kWrite); }         \
  void __tsan_unaligned_read##n(void* p) { plain_access(p, n, kRead); } \
  void __tsan_unaligned_write##n(void* p) { plain_access(p, n, kWrite); }

extern "C" {
CNNFAST_TSAN_SIZE(1)
CNNFAST_TSAN_SIZE(2)
CNNFAST_TSAN_SIZE(4)
CNNFAST_TSAN_SIZE(8)
CNNFAST_TSAN_SIZE(16)
void __tsan_read_range(void* p, size_t n) { plain_access(p, n, kRead); }
void __tsan_write_range(void* p, size_t n) { plain_access(p, n, kWrite); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Launchers' own: atomics of kernels are functions of the emulation.
uint64_t __tsan_atomic64_load(const volatile uint64_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int __tsan_atomic64_compare_exchange_strong(volatile uint64_t* p, uint64_t* expected, uint64_t value, int, int) {
  return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}
}

// Those of -fsanitize=alignment and so on. Each is given a description of the place that begins with this.
namespace {
struct Place {
  const char* file;
  uint32_t line, column;
};

void undefined(const char* what, const void* data) {
  const Place& place = *static_cast<const Place*>(data);
  const char* name = std::strrchr(place.file, '/');
  const std::string text =
      std::string(what) + " in " + (name ? name + 1 : place.file) + ":" + std::to_string(place.line);
  if (cnnfast::emulation::current_thread)
    cnnfast::emulation::fail(text);
  else
    cnnfast::emulation::fault_of_launcher() = text;
}
}  // namespace

#define CNNFAST_UNDEFINED(name, what, ...) \
  void __ubsan_handle_##name(void* data, ##__VA_ARGS__) { undefined(what, data); }

extern "C" {
CNNFAST_UNDEFINED(type_mismatch_v1, "an address not aligned as its type is", void*)
CNNFAST_UNDEFINED(add_overflow, "a sum that overflows", void*, void*)
CNNFAST_UNDEFINED(sub_overflow, "a difference that overflows", void*, void*)
CNNFAST_UNDEFINED(mul_overflow, "a product that overflows", void*, void*)
CNNFAST_UNDEFINED(negate_overflow, "a negation that overflows", void*)
CNNFAST_UNDEFINED(divrem_overflow, "a division by zero, or one that overflows", void*, void*)
CNNFAST_UNDEFINED(shift_out_of_bounds, "a shift too far", void*, void*)
CNNFAST_UNDEFINED(out_of_bounds, "an index outside of its array", void*)
}
#endif
