// RotaryEmbedding on a GPU, queries and keys in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace qwenport::cuda {

/// Arrays in device memory: q and k [batch, heads, seq, head_dim], outputs likewise; cos and sin
/// [positions, head_dim/2]; position_ids [batch, seq]. A position outside the tables gives NaN.
template <typename T>
struct RotateArguments {
  const T* q;
  const T* k;
  const T* cos;
  const T* sin;
  const std::int64_t* position_ids;
  T* q_out;
  T* k_out;
  int batch;
  int q_heads;
  int k_heads;
  int seq;
  int head_dim;  ///< even
  std::int64_t positions;
};

/// T is float, __half or __nv_bfloat16. Computes in fp32 and rounds once.
template <typename T>
cudaError_t rotate(const RotateArguments<T>& arguments, cudaStream_t stream);

}  // namespace qwenport::cuda
