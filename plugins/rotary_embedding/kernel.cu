// A thread rotates N neighbours of a head's first half with their partners in the second.
#include "kernel.hpp"

#include <limits>

#include "device.cuh"

namespace qwenport::cuda {
namespace {

constexpr unsigned block_size = 256;

template <typename T, int N>
__global__ void __launch_bounds__(block_size) rotate_kernel(RotateArguments<T> a) {
  const auto half = static_cast<unsigned>(a.head_dim / 2);
  const unsigned chunks = half / N;
  const unsigned thread = blockIdx.x * block_size + threadIdx.x;
  unsigned head = thread / chunks;  // over the heads of all tokens, q's before k's
  const unsigned first = thread % chunks * N;
  const auto seq = static_cast<unsigned>(a.seq);
  const unsigned q_count = static_cast<unsigned>(a.batch * a.q_heads) * seq;
  const unsigned k_count = static_cast<unsigned>(a.batch * a.k_heads) * seq;
  if (head >= q_count + k_count) return;
  const bool is_q = head < q_count;
  if (!is_q) head -= q_count;
  const auto heads = static_cast<unsigned>(is_q ? a.q_heads : a.k_heads);
  const unsigned token = head / (heads * seq) * seq + head % seq;
  const std::int64_t position = a.position_ids[token];
  const std::size_t offset = std::size_t{head} * 2 * half + first;
  T* to = (is_q ? a.q_out : a.k_out) + offset;

  Vector<T, N> low{};
  Vector<T, N> high{};
  if (position >= 0 && position < a.positions) {
    const T* from = (is_q ? a.q : a.k) + offset;
    const auto x1 = load<N>(from);
    const auto x2 = load<N>(from + half);
    const std::size_t angle = static_cast<std::size_t>(position) * half + first;
    const auto cos = load<N>(a.cos + angle);
    const auto sin = load<N>(a.sin + angle);
    for (int i = 0; i < N; ++i) {
      const float u = to_float(x1.values[i]);
      const float v = to_float(x2.values[i]);
      const float c = to_float(cos.values[i]);
      const float s = to_float(sin.values[i]);
      low.values[i] = from_float<T>(u * c - v * s);
      high.values[i] = from_float<T>(v * c + u * s);
    }
  } else {
    for (int i = 0; i < N; ++i) low.values[i] = high.values[i] = from_float<T>(NAN);
  }
  store(to, low);
  store(to + half, high);
}

}  // namespace

template <typename T>
cudaError_t rotate(const RotateArguments<T>& a, cudaStream_t stream) {
  const int half = a.head_dim / 2;
  const auto heads = static_cast<std::int64_t>(a.batch) * a.seq * (a.q_heads + a.k_heads);
  if (heads == 0) return cudaSuccess;
  if (heads * half > std::numeric_limits<unsigned>::max() - block_size) return cudaErrorInvalidValue;
  const bool all_aligned = aligned(a.q) && aligned(a.k) && aligned(a.cos) && aligned(a.sin) &&
                           aligned(a.q_out) && aligned(a.k_out);
  const auto start = [&](auto* kernel, int numbers) {
    const auto blocks = static_cast<unsigned>(ceil_div(heads * (half / numbers), block_size));
    return launch(kernel, dim3(blocks), dim3(block_size), 0, stream, a);
  };
  if (all_aligned && half % widest<T> == 0) return start(rotate_kernel<T, widest<T>>, widest<T>);
  return start(rotate_kernel<T, 1>, 1);
}

template cudaError_t rotate(const RotateArguments<float>&, cudaStream_t);
template cudaError_t rotate(const RotateArguments<__half>&, cudaStream_t);
template cudaError_t rotate(const RotateArguments<__nv_bfloat16>&, cudaStream_t);

}  // namespace qwenport::cuda
