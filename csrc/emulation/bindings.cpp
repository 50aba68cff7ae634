// What the emulated modules offer besides the kernel table.
#include <pybind11/pybind11.h>

#include "../common/device.h"
#include "runtime.h"
#include "traffic.h"

namespace py = pybind11;

namespace cnnfast {

std::map<std::string, std::string> device_info() {
  return {{"emulated", "yes"}, {"checked", emulation::checking ? "yes" : "no"}};
}

void bind_extras(py::module_& m) {
  using namespace emulation;
  m.def(
      "configure",
      [](const std::string& order, uint32_t seed, bool lazy_async, int64_t max_grid, int64_t processors,
         bool count_accesses) {
        Config next;
        if (order == "ascending")
          next.order = Order::ascending;
        else if (order == "descending")
          next.order = Order::descending;
        else if (order == "random")
          next.order = Order::random;
        else
          throw py::value_error("order is ascending, descending or random, not " + order);
        next.seed = seed;
        next.lazy_async = lazy_async;
        if (max_grid > 0) next.max_grid = max_grid;
        if (processors > 0) next.processors = processors;
        next.count_accesses = count_accesses;
        config() = next;
      },
      py::arg("order") = "ascending", py::arg("seed") = 0, py::arg("lazy_async") = false, py::arg("max_grid") = 0,
      py::arg("processors") = 0, py::arg("count_accesses") = false,
      "How launches run: the order of threads and blocks, when asynchronous copies land, the largest grid a kernel may "
      "use (0: the GPU's limit), and how many multiprocessors there are (0: an H100's). count_accesses: see "
      "accesses().");
  m.def(
      "accesses",
      [] {
        constexpr const char* kinds[] = {"shared read", "shared write", "global read", "global write"};
        py::list out;
        for (const traffic::Count& c : traffic::counts())
          out.append(py::make_tuple(c.kernel, kinds[static_cast<int>(c.kind)], c.where, c.accesses, c.units, c.least));
        traffic::reset();
        return out;
      },
      "Counts of the check variant since the last call, where the configuration asked for them: (kernel, kind, line, "
      "accesses of a warp, wavefronts or sectors, the fewest that the bytes need).");
  m.def(
      "statistics",
      [](bool reset) {
        const Statistics s = statistics();
        if (reset) statistics() = Statistics{};
        py::dict out;
        out["launches"] = s.launches;
        out["blocks"] = s.blocks;
        out["threads"] = s.threads;
        out["switches"] = s.switches;
        out["barriers"] = s.barriers;
        out["warp_operations"] = s.warp_operations;
        out["mma"] = s.mma;
        out["ldmatrix"] = s.ldmatrix;
        out["ldmatrix_wavefronts"] = s.ldmatrix_wavefronts;
        out["async_copies"] = s.async_copies;
        out["shared_bytes"] = s.shared_bytes;
        return out;
      },
      py::arg("reset") = true, "Counts since the last reset.");
  m.def(
      "register_range",
      [](uintptr_t address, size_t bytes, bool writable) {
        register_range(reinterpret_cast<void*>(address), bytes, writable);
      },
      py::arg("address"), py::arg("bytes"), py::arg("writable"),
      "Memory that kernels may touch; the check variant reports accesses to any other once one is registered.");
  m.def("clear_ranges", &clear_ranges);
}

}  // namespace cnnfast
