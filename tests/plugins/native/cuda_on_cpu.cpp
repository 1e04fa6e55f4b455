// The few calls of the CUDA runtime that the plugins make besides launching, on a machine without it.
#include "cuda_on_cpu.hpp"

#include <algorithm>

using cuda_on_cpu::capability;
using cuda_on_cpu::most_shared;

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
cudaError_t cudaFuncSetAttribute(const void* /*kernel*/, cudaFuncAttribute attribute, int value) {
  const bool fits = static_cast<std::size_t>(value) <= most_shared();
  return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && fits ? cudaSuccess
                                                                          : cudaErrorInvalidValue;
}
/// By threads and shared memory: registers are unknown here.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* /*kernel*/, int threads,
                                                          std::size_t shared) {
  constexpr std::size_t reserved = 1024;  // per block
  const std::size_t by_shared = (most_shared() + reserved) / (shared + reserved);
  *blocks = std::min(2048 / threads, static_cast<int>(by_shared));
  return cudaSuccess;
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
