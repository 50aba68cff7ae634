// cp.async. The bytes land when the copy is issued, or in lazy mode not before the wait that covers it: both are
// allowed on a GPU. For the checker they are pending until that wait in either mode.
#include <cstring>

#include "checker.h"
#include "state.h"
#include "traffic.h"

namespace cnnfast::emulation {

namespace {
void land(const AsyncCopy& copy) {
  std::memcpy(copy.shared, copy.global, copy.valid_bytes);
  std::memset(copy.shared + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
}
}  // namespace

void async_copy(void* shared, const void* global, int bytes, int valid_bytes, int line) {
  Thread& thread = *current_thread;
  if (reinterpret_cast<uintptr_t>(shared) % bytes || reinterpret_cast<uintptr_t>(global) % bytes)
    fail("cp.async: addresses not aligned to " + std::to_string(bytes) + " bytes" + at_line(line));
  checker::require_shared(shared, bytes, "cp.async");
  checker::on_access(shared, bytes, checker::kPendingWrite, line);
  traffic::on_access(shared, bytes, true, line);
  if (valid_bytes) {
    checker::on_access(global, valid_bytes, checker::kRead, line);
    traffic::on_access(global, valid_bytes, false, line);
  }
  ++statistics().async_copies;
  if (thread.async_groups.empty()) thread.async_groups.emplace_back();
  const AsyncCopy copy{static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), bytes,
                       valid_bytes, line};
  thread.async_groups.back().push_back(copy);
  if (!config().lazy_async) land(copy);
}

void async_commit() {
  Thread& thread = *current_thread;
  if (thread.async_groups.empty()) thread.async_groups.emplace_back();
  thread.async_groups.emplace_back();
}

void async_wait(int pending) {
  auto& groups = current_thread->async_groups;
  const int closed = groups.empty() ? 0 : static_cast<int>(groups.size()) - 1;
  if (closed <= pending) return;
  const auto end = groups.begin() + (closed - pending);
  for (auto group = groups.begin(); group != end; ++group)
    for (const AsyncCopy& copy : *group) {
      checker::on_access(copy.shared, copy.bytes, checker::kWrite, copy.line);
      if (config().lazy_async) land(copy);
    }
  groups.erase(groups.begin(), end);
}

}  // namespace cnnfast::emulation
