// The Python module of a device: the kernel table, one launch, one plan. It names no operation.
//
// Compiled once for each native module (_cpu, _cuda, the emulation's) with CNNFAST_MODULE set to its name.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/device.h"
#include "../common/kernel_table.h"

namespace py = pybind11;

extern "C" {
extern const cnnfast::Kernel* const __start_cnnfast_kernels[] __attribute__((visibility("hidden")));
extern const cnnfast::Kernel* const __stop_cnnfast_kernels[] __attribute__((visibility("hidden")));
}

#ifdef CNNFAST_MODULE_EXTRAS
namespace cnnfast {
void bind_extras(py::module_& m);  // what only this module offers (the emulation's configuration)
}
#endif

namespace {

using cnnfast::kMaxOperands;

int64_t kernel_count() { return __stop_cnnfast_kernels - __start_cnnfast_kernels; }

const cnnfast::Kernel& kernel(int64_t id) {
  if (id < 0 || id >= kernel_count()) throw py::index_error("no kernel " + std::to_string(id));
  return *__start_cnnfast_kernels[id];
}

void check(const cnnfast::Kernel& k, const char* error) {
  if (error) throw std::runtime_error(std::string(k.name) + ": " + error);
}

std::string checked_params(const cnnfast::Kernel& k, const py::bytes& params) {
  std::string_view bytes = params;
  if (static_cast<int64_t>(bytes.size()) != k.params->size)
    throw py::value_error(std::string(k.name) + ": expected " + std::to_string(k.params->size) + " bytes of " +
                          k.params->name + ", got " + std::to_string(bytes.size()));
  return std::string(bytes);
}

// A kernel with its parameters: what the hot path holds. Calling it takes raw addresses, so that one call costs a few
// hundred nanoseconds.
class Call {
 public:
  Call(int64_t id, const py::bytes& params) : kernel_(kernel(id)), params_(checked_params(kernel_, params)) {}

  int64_t workspace() const { return kernel_.workspace ? kernel_.workspace(params_.data()) : 0; }

  void run(const int64_t* addresses, int count, int64_t workspace, int64_t stream, int threads) const {
    void* operands[kMaxOperands] = {};
    for (int i = 0; i < count; ++i) operands[i] = reinterpret_cast<void*>(addresses[i]);
    cnnfast::Launch launch{operands, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream), threads};
    const char* error;
    {
      py::gil_scoped_release release;
      error = kernel_.launch(params_.data(), launch);
    }
    check(kernel_, error);
  }

 private:
  const cnnfast::Kernel& kernel_;
  std::string params_;
};

struct Operand {
  int slot;        // which of the buffers given to run(), or one of these
  int64_t offset;  // bytes; the address itself where it is fixed
};
constexpr int kAbsent = -1, kFixed = -2;

struct Node {
  const cnnfast::Kernel* kernel;
  std::string params;
  std::vector<Operand> operands;
};

// A flat list of kernels over the buffers of one arena, run in one native call.
class Plan {
 public:
  // `packed`: the constants as the kernel's .pack entry left them.
  void add(int64_t id, const py::bytes& params, std::vector<std::pair<int, int64_t>> operands,
           std::optional<std::pair<int, int64_t>> packed) {
    if (packed) {
      if (operands.size() > cnnfast::kPackedOperand) throw py::value_error("no room for a packed operand");
      operands.resize(cnnfast::kPackedOperand, {kAbsent, 0});
      operands.push_back(*packed);
    }
    if (operands.size() > kMaxOperands)
      throw py::value_error("at most " + std::to_string(kMaxOperands) + " operands a node");
    Node node{&kernel(id), "", {}};
    node.params = checked_params(*node.kernel, params);
    for (auto [slot, offset] : operands) {
      if (slot < kFixed) throw py::value_error("no buffer " + std::to_string(slot));
      node.operands.push_back({slot, offset});
      slots_ = std::max(slots_, slot + 1);
    }
    if (node.kernel->workspace) workspace_ = std::max(workspace_, node.kernel->workspace(node.params.data()));
    nodes_.push_back(std::move(node));
  }

  int64_t workspace() const { return workspace_; }
  int64_t size() const { return static_cast<int64_t>(nodes_.size()); }

  void run(const std::vector<int64_t>& buffers, int64_t workspace, int64_t stream, int threads) const {
    if (static_cast<int>(buffers.size()) < slots_)
      throw py::value_error("the plan names " + std::to_string(slots_) + " buffers, got " +
                            std::to_string(buffers.size()));
    const cnnfast::Kernel* failed = nullptr;
    const char* error = nullptr;
    {
      py::gil_scoped_release release;
      for (const Node& node : nodes_) {
        void* operands[kMaxOperands] = {};
        for (size_t i = 0; i < node.operands.size(); ++i)
          if (node.operands[i].slot != kAbsent)
            operands[i] = reinterpret_cast<void*>(
                (node.operands[i].slot == kFixed ? 0 : buffers[node.operands[i].slot]) + node.operands[i].offset);
        cnnfast::Launch launch{operands, reinterpret_cast<void*>(workspace), reinterpret_cast<void*>(stream), threads};
        error = node.kernel->launch(node.params.data(), launch);
        if (error) {
          failed = node.kernel;
          break;
        }
      }
    }
    if (failed) check(*failed, error);
  }

 private:
  std::vector<Node> nodes_;
  int slots_ = 0;
  int64_t workspace_ = 0;
};

}  // namespace

PYBIND11_MODULE(CNNFAST_MODULE, m) {
  m.def(
      "kernels",
      [] {
        py::list out;
        for (int64_t i = 0; i < kernel_count(); ++i) out.append(py::make_tuple(kernel(i).name, kernel(i).params->name));
        return out;
      },
      "The kernel table: (name, parameter struct) by id.");
  m.def(
      "structs",
      [] {
        py::dict out;
        for (int64_t i = 0; i < kernel_count(); ++i) {
          const cnnfast::StructInfo& s = *kernel(i).params;
          if (out.contains(s.name)) continue;
          py::list fields;
          for (int64_t f = 0; f < s.count; ++f) fields.append(py::make_tuple(s.fields[f].name, s.fields[f].offset));
          out[s.name] = py::make_tuple(s.size, fields);
        }
        return out;
      },
      "Parameter structs by name: (size in bytes, [(field, offset in bytes)]); every field is an int64.");
  m.def(
      "device", [] { return cnnfast::device_info(); },
      "What this module found on this machine, as a dict of strings; calls no CUDA function at import.");
  py::class_<Call>(m, "Call", "A kernel with its packed parameters, ready to launch.")
      .def(py::init<int64_t, py::bytes>(), py::arg("kernel"), py::arg("params"))
      .def_property_readonly("workspace", &Call::workspace, "Bytes of workspace that a launch needs.")
      .def("__call__",
           [](const Call& c, int64_t a, int64_t b, int64_t ws, int64_t stream, int threads) {
             const int64_t p[] = {a, b};
             c.run(p, 2, ws, stream, threads);
           })
      .def("__call__",
           [](const Call& c, int64_t a, int64_t b, int64_t d, int64_t ws, int64_t stream, int threads) {
             const int64_t p[] = {a, b, d};
             c.run(p, 3, ws, stream, threads);
           })
      .def("__call__",
           [](const Call& c, int64_t a, int64_t b, int64_t d, int64_t e, int64_t ws, int64_t stream, int threads) {
             const int64_t p[] = {a, b, d, e};
             c.run(p, 4, ws, stream, threads);
           })
      .def("__call__", [](const Call& c, const std::vector<int64_t>& p, int64_t ws, int64_t stream, int threads) {
        if (p.size() > kMaxOperands) throw py::value_error("at most " + std::to_string(kMaxOperands) + " operands");
        c.run(p.data(), static_cast<int>(p.size()), ws, stream, threads);
      });
  py::class_<Plan> plan(m, "Plan", "A flat list of kernels over shared buffers, run in one native call.");
  m.attr("PACKED_OPERAND") = cnnfast::kPackedOperand;
  plan.attr("ABSENT") = kAbsent;
  plan.attr("FIXED") = kFixed;
  plan.def(py::init<>())
      .def("add", &Plan::add, py::arg("kernel"), py::arg("params"), py::arg("operands"), py::arg("packed") = py::none(),
           "Adds a node. An operand: (index of a buffer given to run, offset in bytes), (ABSENT, 0), (FIXED, address).")
      .def_property_readonly("workspace", &Plan::workspace)
      .def("__len__", &Plan::size)
      .def("run", &Plan::run, py::arg("buffers"), py::arg("workspace"), py::arg("stream"), py::arg("threads"));
#ifdef CNNFAST_MODULE_EXTRAS
  cnnfast::bind_extras(m);
#endif
}
