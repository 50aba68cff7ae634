// What the two test sources share: how Python calls into them.
#pragma once
#include <cstdint>
#include <exception>
#include <string>

namespace cnnfast::test {

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
