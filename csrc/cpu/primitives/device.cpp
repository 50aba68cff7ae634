// What this processor can run, found at run time. Compiled with no ISA flags.
#include "../../common/device.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace cnnfast {
namespace {

#if defined(__x86_64__)

std::string cpu_model() {
  unsigned registers[12] = {};
  if (__get_cpuid_max(0x80000000u, nullptr) < 0x80000004u) return "x86-64";
  for (unsigned i = 0; i < 3; ++i)
    __get_cpuid(0x80000002u + i, &registers[4 * i], &registers[4 * i + 1], &registers[4 * i + 2],
                &registers[4 * i + 3]);
  std::string name(reinterpret_cast<const char*>(registers), sizeof registers);
  name = name.substr(0, name.find('\0'));
  const size_t begin = name.find_first_not_of(' ');
  const size_t end = name.find_last_not_of(' ');
  return begin == std::string::npos ? "x86-64" : name.substr(begin, end - begin + 1);
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

#if defined(CNNFAST_SIMDE)
// As functions on AVX2, for tests.
bool has_avx512() { return has_avx2(); }
bool has_avx512_bf16() { return has_avx2(); }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Instructions that no kernel above assumes. The operating system must save AMX's tiles (XCR0 bits 17, 18), too.
void add_flags(std::map<std::string, std::string>& info) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const bool vnni = c >> 11 & 1, amx_bf16 = d >> 22 & 1, amx_tile = d >> 24 & 1, amx_int8 = d >> 25 & 1;
  const bool fp16 = d >> 23 & 1;
  unsigned a1 = 0, b1 = 0, c1 = 0, d1 = 0;
  if (a >= 1) __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1);
  uint32_t xcr0 = 0, high = 0;
  unsigned e, f, g = 0, h;
  __get_cpuid(1, &e, &f, &g, &h);
  if (g >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
  const bool tiles = (xcr0 >> 17 & 3) == 3, zmm = (xcr0 >> 5 & 7) == 7;
  const auto yes = [](bool x) { return x ? "yes" : "no"; };
  info["avx512_bf16"] = yes(zmm && (a1 >> 5 & 1));
  info["avx512_fp16"] = yes(zmm && fp16);
  info["avx512_vnni"] = yes(zmm && vnni);
  info["amx_bf16"] = yes(tiles && amx_tile && amx_bf16);
  info["amx_int8"] = yes(tiles && amx_tile && amx_int8);
}

#else

std::string cpu_model() { return "unknown"; }
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_avx512_bf16() { return false; }
void add_flags(std::map<std::string, std::string>&) {}

#endif

}  // namespace

std::map<std::string, std::string> device_info() {
  std::map<std::string, std::string> info;
  std::string isas = "portable", best = "portable";
  if (has_avx2()) isas += ",avx2", best = "avx2";
  if (has_avx512()) isas += ",avx512", best = "avx512";
  if (has_avx512_bf16()) isas += ",avx512_bf16";
  info["isa"] = best;
  info["isas"] = isas;
  info["cpu"] = cpu_model();
#ifdef _OPENMP
  info["openmp"] = "yes";
#else
  info["openmp"] = "no";
#endif
  add_flags(info);
  return info;
}

}  // namespace cnnfast
