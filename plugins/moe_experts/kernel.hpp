// MoEExperts (by token) on a GPU.
//
// Few tokens: two memory-bound kernels that read each chosen expert once. Many tokens: pairs (token, expert) are
// sorted by expert, two grouped GEMMs run on tensor cores, and a last kernel adds up each token's rows. Both add
// a token's experts in the order in which the router names them, without atomics: results are reproducible bit by bit
// and do not depend on the other tokens' places.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "contract.hpp"

namespace qwenport::cuda {

/// x and y [tokens, hidden]; indices and weights [tokens, k]; gate_up [experts, 2*inner, hidden]; down [experts,
/// hidden, inner], all in device memory. An index outside [0, experts) gives its token NaN.
template <typename T>
struct ExpertsArguments {
  const T* x;
  const std::int64_t* indices;
  const float* weights;
  const T* gate_up;
  const T* down;
  T* y;
  int tokens;
  int k;
  int experts;
  int hidden;
  int inner;
  void* workspace;  ///< experts_workspace bytes, aligned to 256
};

/// Workspace bytes for a number of tokens; grows with it.
template <typename T>
std::size_t experts_workspace(int tokens, int k, int experts, int hidden, int inner);

/// T is float, __half or __nv_bfloat16. Products are accumulated in fp32.
template <typename T>
cudaError_t apply_experts(const ExpertsArguments<T>& arguments, cudaStream_t stream);

/// Tokens up to which the kernels for few tokens are used. benchmarks/plugins.py also measures a library without them.
constexpr int few_tokens = 8;
#ifdef QWENPORT_MANY_TOKENS_ONLY
constexpr bool has_few_tokens = false;
#else
constexpr bool has_few_tokens = true;
#endif
inline bool are_few(std::int64_t tokens) { return has_few_tokens && tokens <= few_tokens; }

using contract::most_chosen;
using contract::most_experts;
/// The largest tokens * k.
constexpr std::int64_t most_pairs = std::int64_t{1} << 30;

}  // namespace qwenport::cuda
