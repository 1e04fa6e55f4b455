// The few calls of the CUDA runtime that the plugins make besides launching, on a machine without it.
#include <cuda_runtime_api.h>

#include <cstdlib>

// The GPU that this plays is of compute capability QWENPORT_TEST_GPU, "90" if that is not set; "" is none.
static int capability() {
  const char* const text = std::getenv("QWENPORT_TEST_GPU");
  return text != nullptr ? std::atoi(text) : 90;
}

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return capability() == 0 ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? capability() / 10 : capability() % 10;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "an error of the stand-in";
}
}
