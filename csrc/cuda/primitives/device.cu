// What the CUDA module says of the machine. The driver is asked only here, never at import.
#include <cuda_runtime.h>

#include "../../common/device.h"

#ifndef CNNFAST_CUDA_ARCHITECTURES
#define CNNFAST_CUDA_ARCHITECTURES ""
#endif

namespace cnnfast {

namespace {
// 13000 -> "13.0"; the driver's version is 0 without a driver.
std::string version(cudaError_t error, int value) {
  if (error != cudaSuccess || value == 0) return "none";
  return std::to_string(value / 1000) + "." + std::to_string(value % 1000 / 10);
}
}  // namespace

std::map<std::string, std::string> device_info() {
  int driver = 0, runtime = 0;
  const cudaError_t driver_error = cudaDriverGetVersion(&driver);
  const cudaError_t runtime_error = cudaRuntimeGetVersion(&runtime);
  return {{"driver", version(driver_error, driver)},
          {"runtime", version(runtime_error, runtime)},
          {"architectures", CNNFAST_CUDA_ARCHITECTURES}};
}

}  // namespace cnnfast
