// The kernel of cuda_device.cpp.
#pragma once

#include <cuda_runtime_api.h>

/// data[i] += value, on the stream.
cudaError_t add(float* data, int count, float value, cudaStream_t stream);
