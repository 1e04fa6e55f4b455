// MoERouter of kind top_k on a GPU, in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "contract.hpp"

namespace qwenport::cuda {

using contract::most_chosen;
using contract::most_experts;

/// logits [tokens, experts], weights and indices [tokens, k], all in device memory. At most `most_experts` experts and
/// `most_chosen` of them. Logits with a NaN or +inf give NaN weights and the experts 0, 1, ...
template <typename T>
struct RouteArguments {
  const T* logits;
  float* weights;
  std::int64_t* indices;
  int tokens;
  int experts;
  int k;
  bool normalize;
};

/// T is float, __half or __nv_bfloat16. Computes in fp32.
template <typename T>
cudaError_t route(const RouteArguments<T>& arguments, cudaStream_t stream);

}  // namespace qwenport::cuda
