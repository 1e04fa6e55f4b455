// A thread rotates N adjacent elements of a head's first half with their partners in the second half, in a few heads
// of one token, which share the token's angles.
#include "kernel.hpp"

#include <limits>

#include "device.cuh"

namespace qwenport::cuda {
namespace {

constexpr int block_size = 128;
constexpr int heads_a_thread = 4;

/// grid: [a head's groups of N at all sequence positions, heads of q and then of k, batch].
template <typename T, int N>
__global__ void __launch_bounds__(block_size) rotate_kernel(RotateArguments<T> a) {
  const int half = a.head_dim / 2;
  const unsigned chunks = static_cast<unsigned>(half) / N;
  const unsigned thread = blockIdx.x * block_size + threadIdx.x;
  const auto place = static_cast<int>(thread / chunks);
  const int first = static_cast<int>(thread % chunks) * N;
  if (place >= a.seq) return;
  const std::int64_t row = blockIdx.z;
  const int begin = static_cast<int>(blockIdx.y) * heads_a_thread;

  const auto at = [&](int head) {  // in q or k
    const bool is_q = head < a.q_heads;
    const std::int64_t heads = is_q ? a.q_heads : a.k_heads;
    return ((row * heads + (is_q ? head : head - a.q_heads)) * a.seq + place) * a.head_dim + first;
  };
  const std::int64_t position = a.position_ids[row * a.seq + place];
  Packed<T, N> lows[heads_a_thread];
  Packed<T, N> highs[heads_a_thread];
#pragma unroll
  for (int i = 0; i < heads_a_thread; ++i) {
    if (begin + i >= a.q_heads + a.k_heads) break;
    const T* const from = (begin + i < a.q_heads ? a.q : a.k) + at(begin + i);
    lows[i] = load_once<N>(from);
    highs[i] = load_once<N>(from + half);
  }
  const bool known = position >= 0 && position < a.positions;
  Vector<T, N> cos{};
  Vector<T, N> sin{};
  if (known) {
    cos = load<N>(a.cos + position * half + first);
    sin = load<N>(a.sin + position * half + first);
  }
#pragma unroll
  for (int i = 0; i < heads_a_thread; ++i) {
    if (begin + i >= a.q_heads + a.k_heads) break;
    Vector<T, N> low = lows[i].unpacked();
    Vector<T, N> high = highs[i].unpacked();
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float u = to_float(low.values[n]);
      const float v = to_float(high.values[n]);
      const float c = known ? to_float(cos.values[n]) : NAN;
      const float s = to_float(sin.values[n]);
      low.values[n] = from_float<T>(u * c - v * s);
      high.values[n] = from_float<T>(v * c + u * s);
    }
    T* const to = (begin + i < a.q_heads ? a.q_out : a.k_out) + at(begin + i);
    store(to, low);
    store(to + half, high);
  }
}

}  // namespace

template <typename T>
cudaError_t rotate(const RotateArguments<T>& a, cudaStream_t stream) {
  constexpr int most_batch = 65535;  // the limit of a grid's third axis
  const int half = a.head_dim / 2;
  const int heads = a.q_heads + a.k_heads;
  if (a.batch == 0 || a.seq == 0 || heads == 0 || half == 0) return cudaSuccess;
  if (a.batch > most_batch || std::int64_t{a.seq} * half > std::numeric_limits<int>::max() ||
      ceil_div(heads, heads_a_thread) > most_batch) {
    return cudaErrorInvalidValue;
  }
  const bool all_aligned = aligned(a.q) && aligned(a.k) && aligned(a.cos) && aligned(a.sin) &&
                           aligned(a.q_out) && aligned(a.k_out);
  const auto start = [&](auto* kernel, int numbers) {
    const dim3 grid(static_cast<unsigned>(ceil_div(std::int64_t{a.seq} * (half / numbers), block_size)),
                    static_cast<unsigned>(ceil_div(heads, heads_a_thread)), static_cast<unsigned>(a.batch));
    return launch(kernel, grid, dim3(block_size), 0, stream, false, a);
  };
  if (all_aligned && half % widest<T> == 0) return start(rotate_kernel<T, widest<T>>, widest<T>);
  return start(rotate_kernel<T, 1>, 1);
}

template cudaError_t rotate(const RotateArguments<float>&, cudaStream_t);
template cudaError_t rotate(const RotateArguments<__half>&, cudaStream_t);
template cudaError_t rotate(const RotateArguments<__nv_bfloat16>&, cudaStream_t);

}  // namespace qwenport::cuda
