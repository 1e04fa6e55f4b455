// The few calls of the CUDA runtime that the plugins make besides launching, on a machine without it.
#include "cuda_on_cpu.hpp"

using cuda_on_cpu::capability;

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return capability() == 0 ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability() / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability() % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:  // few, so that a block has more than one piece of work
      *value = 3;
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
cudaError_t cudaDeviceSynchronize() {
  cuda_on_cpu::synchronize();
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "an error of the stand-in";
}
}
