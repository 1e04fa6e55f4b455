// MoEExperts for up to 8 tokens: matrix-vector products that read each chosen expert once for all its tokens.
#pragma once

#include "device.cuh"
#include "kernel.hpp"

namespace qwenport::cuda {

constexpr int few_warps = 8;  // a block

constexpr int few_pairs = few_tokens * most_experts_a_token;
constexpr std::size_t few_shared = 3 * few_pairs * sizeof(int);

/// Which pairs (token, expert) name the same expert, in the block's shared memory.
struct SameExpert {
  int* expert;  ///< [few_pairs]: each pair's; -1 if there is no such expert
  int* first;   ///< [few_pairs]: whether no pair before it names its expert
  int* next;    ///< [few_pairs]: the next pair that names its expert; -1 if none does
};

template <typename T>
__device__ SameExpert find_same_experts(const ExpertsArguments<T>& a) {
  int* const shared = shared_memory<int>();
  const SameExpert same{shared, shared + few_pairs, shared + 2 * few_pairs};
  const auto mine = static_cast<int>(threadIdx.x);
  const int pairs = a.tokens * a.k;
  if (mine < pairs) {
    const std::int64_t expert = a.indices[mine];
    same.expert[mine] = expert >= 0 && expert < a.experts ? static_cast<int>(expert) : -1;
  }
  __syncthreads();
  if (mine < pairs) {
    int first = 1;
    int next = -1;
    for (int pair = 0; pair < pairs; ++pair) {
      if (same.expert[pair] != same.expert[mine]) continue;
      if (pair < mine) first = 0;
      if (pair > mine && next < 0) next = pair;
    }
    same.first[mine] = first;
    same.next[mine] = next;
  }
  __syncthreads();
  return same;
}

/// Take up to few_tokens pairs of one expert's; returns how many, and moves `next` to the rest.
__device__ inline int take(const SameExpert& same, int& next, int (&pairs)[few_tokens]) {
  int count = 0;
#pragma unroll
  for (int m = 0; m < few_tokens; ++m) {
    pairs[m] = next;
    if (next < 0) continue;
    ++count;
    next = same.next[next];
  }
  return count;
}

/// active [pairs, inner] = silu(gate x) * (up x). A warp computes one row of an expert, for all pairs that name it.
/// grid: [rows of inner / few_warps, pairs]; N numbers are read at once.
template <typename T, int N>
__global__ void __launch_bounds__(few_warps* warp_size) few_swiglu(ExpertsArguments<T> a, T* active) {
  const SameExpert same = find_same_experts(a);
  const auto first = static_cast<int>(blockIdx.y);
  const int row = static_cast<int>(blockIdx.x) * few_warps + static_cast<int>(threadIdx.x) / warp_size;
  if (same.expert[first] < 0 || same.first[first] == 0 || row >= a.inner) return;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const T* gate = a.gate_up + (std::int64_t{2} * same.expert[first] * a.inner + row) * a.hidden;
  const T* up = gate + static_cast<std::int64_t>(a.inner) * a.hidden;

  int pairs[few_tokens];
  for (int next = first; next >= 0;) {
    const int count = take(same, next, pairs);
    float gates[few_tokens] = {};
    float ups[few_tokens] = {};
    for (int column = lane * N; column < a.hidden; column += warp_size * N) {
      const auto g = load<N>(gate + column);
      const auto u = load<N>(up + column);
#pragma unroll
      for (int m = 0; m < few_tokens; ++m) {
        if (m >= count) break;
        const auto x = load<N>(a.x + static_cast<std::int64_t>(pairs[m] / a.k) * a.hidden + column);
#pragma unroll
        for (int i = 0; i < N; ++i) {
          gates[m] += to_float(g.values[i]) * to_float(x.values[i]);
          ups[m] += to_float(u.values[i]) * to_float(x.values[i]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < few_tokens; ++m) {
      if (m >= count) break;
      const float value = swiglu(warp_sum(gates[m]), warp_sum(ups[m]));
      if (lane == 0) active[static_cast<std::int64_t>(pairs[m]) * a.inner + row] = from_float<T>(value);
    }
  }
}

/// y [tokens, hidden] = sum over a token's experts of weight * down active. A warp computes one column of y, for all
/// tokens: it reads that row of each chosen expert once. Lane p % 32 keeps the result of pair p until the end.
template <typename T, int N>
__global__ void __launch_bounds__(few_warps* warp_size) few_down(ExpertsArguments<T> a, const T* active) {
  constexpr int most_kept = few_pairs / warp_size;
  const SameExpert same = find_same_experts(a);
  const int row = static_cast<int>(blockIdx.x) * few_warps + static_cast<int>(threadIdx.x) / warp_size;
  if (row >= a.hidden) return;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  float kept[most_kept] = {};
  const auto keep = [&](int pair, float value) {
#pragma unroll
    for (int i = 0; i < most_kept; ++i) {
      if (pair == i * warp_size + lane) kept[i] = value;
    }
  };
  int pairs[few_tokens];
  for (int first = 0; first < a.tokens * a.k; ++first) {
    const int expert = same.expert[first];
    if (expert < 0) keep(first, NAN);
    if (expert < 0 || same.first[first] == 0) continue;
    const T* down = a.down + (static_cast<std::int64_t>(expert) * a.hidden + row) * a.inner;
    for (int next = first; next >= 0;) {
      const int count = take(same, next, pairs);
      float sums[few_tokens] = {};
      for (int column = lane * N; column < a.inner; column += warp_size * N) {
        const auto d = load<N>(down + column);
#pragma unroll
        for (int m = 0; m < few_tokens; ++m) {
          if (m >= count) break;
          const auto v = load<N>(active + static_cast<std::int64_t>(pairs[m]) * a.inner + column);
#pragma unroll
          for (int i = 0; i < N; ++i) sums[m] += to_float(d.values[i]) * to_float(v.values[i]);
        }
      }
#pragma unroll
      for (int m = 0; m < few_tokens; ++m) {
        if (m >= count) break;
        keep(pairs[m], warp_sum(sums[m]));
      }
    }
  }
  for (int token = 0; token < a.tokens; ++token) {
    float y = 0;
    for (int j = 0; j < a.k; ++j) {
      const int pair = token * a.k + j;
      float mine = 0;
#pragma unroll
      for (int i = 0; i < most_kept; ++i) {
        if (i == pair / warp_size) mine = kept[i];
      }
      y += a.weights[pair] * __shfl_sync(all_lanes, mine, pair % warp_size);
    }
    if (lane == 0) a.y[static_cast<std::int64_t>(token) * a.hidden + row] = from_float<T>(y);
  }
}

template <typename T>
cudaError_t apply_few(const ExpertsArguments<T>& a, T* active, cudaStream_t stream) {
  const auto start = [&](auto* swiglu, auto* down) {
    const dim3 block(few_warps * warp_size);
    const dim3 rows(static_cast<unsigned>(ceil_div(a.inner, few_warps)),
                    static_cast<unsigned>(a.tokens * a.k));
    const cudaError_t status = launch(swiglu, rows, block, few_shared, stream, a, active);
    if (status != cudaSuccess) return status;
    const dim3 columns(static_cast<unsigned>(ceil_div(a.hidden, few_warps)));
    return launch(down, columns, block, few_shared, stream, a, static_cast<const T*>(active));
  };
  constexpr int n = widest<T>;
  const bool wide =
      a.hidden % n == 0 && a.inner % n == 0 && aligned(a.x) && aligned(a.gate_up) && aligned(a.down);
  if (wide) return start(few_swiglu<T, n>, few_down<T, n>);
  return start(few_swiglu<T, 1>, few_down<T, 1>);
}

}  // namespace qwenport::cuda
