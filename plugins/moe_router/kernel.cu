// One warp routes one token: its lanes hold the probabilities in registers, expert e in lane e % 32.
#include "kernel.hpp"

#include <climits>

#include "device.cuh"

namespace qwenport::cuda {
namespace {

constexpr int warps = 4;

/// A probability and its expert.
struct Candidate {
  float p;
  int expert;
};

/// Whether a comes before b: larger probabilities first, NaN before all others, the lower expert among equals.
__device__ inline bool before(const Candidate& a, const Candidate& b) {
  const bool a_nan = isnan(a.p);
  const bool b_nan = isnan(b.p);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.p != b.p) return a.p > b.p;
  return a.expert < b.expert;
}

/// N: experts per lane, at least experts / 32.
template <typename T, int N>
__global__ void __launch_bounds__(warps* warp_size) route_kernel(RouteArguments<T> a) {
  const auto lane = static_cast<int>(threadIdx.x) % warp_size;
  const std::int64_t token = static_cast<std::int64_t>(blockIdx.x) * warps + threadIdx.x / warp_size;
  if (token >= a.tokens) return;
  const T* logits = a.logits + token * a.experts;

  float p[N];
  float largest = -INFINITY;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int expert = i * warp_size + lane;
    p[i] = expert < a.experts ? to_float(logits[expert]) : -INFINITY;
    largest = fmaxf(largest, p[i]);
  }
  for (int other = warp_size / 2; other > 0; other /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(all_lanes, largest, other));
  }
  float total = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const bool exists = i * warp_size + lane < a.experts;
    p[i] = exists ? expf(p[i] - largest) : 0;
    total += p[i];
  }
  total = warp_sum(total);
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] /= total;

  unsigned taken = 0;  // this lane's experts, one bit each
  float weight = 0;    // for the place with this lane's number
  int chosen = 0;
  float sum = 0;
  for (int place = 0; place < a.k; ++place) {
    Candidate best{-1, INT_MAX};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const Candidate mine{p[i], i * warp_size + lane};
      if (mine.expert < a.experts && (taken >> i & 1U) == 0 && before(mine, best)) best = mine;
    }
    for (int other = warp_size / 2; other > 0; other /= 2) {
      const Candidate theirs{__shfl_xor_sync(all_lanes, best.p, other),
                             __shfl_xor_sync(all_lanes, best.expert, other)};
      if (before(theirs, best)) best = theirs;
    }
    if (best.expert % warp_size == lane) taken |= 1U << (best.expert / warp_size);
    sum += best.p;
    if (place == lane) {
      weight = best.p;
      chosen = best.expert;
    }
  }
  if (lane >= a.k) return;
  a.weights[token * a.k + lane] = a.normalize ? weight / sum : weight;
  a.indices[token * a.k + lane] = chosen;
}

}  // namespace

template <typename T>
cudaError_t route(const RouteArguments<T>& a, cudaStream_t stream) {
  if (a.experts < 1 || a.experts > most_experts || a.k < 1 || a.k > most_chosen || a.k > a.experts) {
    return cudaErrorInvalidValue;
  }
  if (a.tokens == 0) return cudaSuccess;
  const auto start = [&](auto* kernel) {
    const auto blocks = static_cast<unsigned>(ceil_div(a.tokens, warps));
    return launch(kernel, dim3(blocks), dim3(warps * warp_size), 0, stream, false, a);
  };
  static_assert(most_experts <= 16 * warp_size && most_chosen <= warp_size);
  if (a.experts <= 32) return start(route_kernel<T, 1>);
  if (a.experts <= 64) return start(route_kernel<T, 2>);
  if (a.experts <= 128) return start(route_kernel<T, 4>);
  if (a.experts <= 256) return start(route_kernel<T, 8>);
  return start(route_kernel<T, 16>);
}

template cudaError_t route(const RouteArguments<float>&, cudaStream_t);
template cudaError_t route(const RouteArguments<__half>&, cudaStream_t);
template cudaError_t route(const RouteArguments<__nv_bfloat16>&, cudaStream_t);

}  // namespace qwenport::cuda
