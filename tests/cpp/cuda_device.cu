#include "cuda_device.hpp"

namespace {

__global__ void add_kernel(float* data, int count, float value) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) data[i] += value;
}

}  // namespace

cudaError_t add(float* data, int count, float value, cudaStream_t stream) {
  add_kernel<<<(count + 255) / 256, 256, 0, stream>>>(data, count, value);
  return cudaGetLastError();
}
