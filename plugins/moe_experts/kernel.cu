// Which kernels serve how many tokens, and the workspace they share.
#include "kernel.hpp"

#include "device.cuh"
#include "few_tokens.cuh"
#include "grouped_product.cuh"
#include "order.cuh"

namespace qwenport::cuda {
namespace {

/// Hands out parts of one allocation, each aligned to 256 bytes.
class Parts {
 public:
  explicit Parts(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  T* take(std::int64_t count) {
    T* part = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += static_cast<std::size_t>(ceil_div(count * static_cast<std::int64_t>(sizeof(T)), 256)) * 256;
    return part;
  }
  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  char* memory_;
  std::size_t used_ = 0;
};

template <typename T>
struct Workspace {
  T* active;  ///< [pairs, inner]; in order of pairs for few tokens, of places for many
  T* rows;    ///< [pairs, hidden], in order of places
  Order order;
  std::size_t bytes;
};

template <typename T>
Workspace<T> divide(void* memory, std::int64_t tokens, int k, int experts, int hidden, int inner) {
  const std::int64_t pairs = tokens * k;
  Parts parts(memory);
  Workspace<T> w{};
  w.active = parts.take<T>(pairs * inner);
  if (tokens > few_tokens) {
    w.rows = parts.take<T>(pairs * hidden);
    w.order.counts = parts.take<int>(order_chunks(pairs) * experts);
    w.order.pairs = parts.take<int>(pairs);
    w.order.places = parts.take<int>(pairs);
    for (int** list : {&w.order.tile_expert, &w.order.tile_place, &w.order.tile_end}) {
      *list = parts.take<int>(most_tiles(pairs, experts));
    }
    w.order.tiles = parts.take<int>(1);
  }
  w.bytes = parts.used();
  return w;
}

constexpr int combine_threads = 256;

/// y = each token's rows, weighted, added in the router's order.
template <typename T>
__global__ void __launch_bounds__(combine_threads)
    combine(ExpertsArguments<T> a, const T* rows, const int* places) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * combine_threads + threadIdx.x;
  if (i >= static_cast<std::int64_t>(a.tokens) * a.hidden) return;
  const std::int64_t token = i / a.hidden;
  const std::int64_t column = i % a.hidden;
  float y = 0;
  for (int j = 0; j < a.k; ++j) {
    const int place = places[token * a.k + j];
    const float part =
        place >= 0 ? to_float(rows[place * static_cast<std::int64_t>(a.hidden) + column]) : NAN;
    y += a.weights[token * a.k + j] * part;
  }
  a.y[i] = from_float<T>(y);
}

template <typename T>
cudaError_t apply_many(const ExpertsArguments<T>& a, const Workspace<T>& w, cudaStream_t stream) {
  cudaError_t status = order_by_expert(a, w.order, stream);
  if (status != cudaSuccess) return status;
  const std::int64_t tiles = most_tiles(static_cast<std::int64_t>(a.tokens) * a.k, a.experts);
  status = multiply_grouped<T, true>(
      {a.x, w.order.pairs, a.k, a.gate_up, w.active, a.hidden, a.inner, w.order}, tiles, stream);
  if (status != cudaSuccess) return status;
  status = multiply_grouped<T, false>({w.active, nullptr, a.k, a.down, w.rows, a.inner, a.hidden, w.order},
                                      tiles, stream);
  if (status != cudaSuccess) return status;
  const auto blocks =
      static_cast<unsigned>(ceil_div(static_cast<std::int64_t>(a.tokens) * a.hidden, combine_threads));
  return launch(combine<T>, dim3(blocks), dim3(combine_threads), 0, stream, a, static_cast<const T*>(w.rows),
                static_cast<const int*>(w.order.places));
}

}  // namespace

template <typename T>
std::size_t experts_workspace(int tokens, int k, int experts, int hidden, int inner) {
  return divide<T>(nullptr, tokens, k, experts, hidden, inner).bytes;
}

template <typename T>
cudaError_t apply_experts(const ExpertsArguments<T>& a, cudaStream_t stream) {
  if (a.k < 1 || a.k > most_experts_a_token || a.experts < 1 || a.experts > most_experts || a.hidden < 1 ||
      a.inner < 1 || static_cast<std::int64_t>(a.tokens) * a.k > most_pairs) {
    return cudaErrorInvalidValue;
  }
  if (a.tokens == 0) return cudaSuccess;
  const Workspace<T> w = divide<T>(a.workspace, a.tokens, a.k, a.experts, a.hidden, a.inner);
  return a.tokens <= few_tokens ? apply_few(a, w.active, stream) : apply_many(a, w, stream);
}

template std::size_t experts_workspace<float>(int, int, int, int, int);
template std::size_t experts_workspace<__half>(int, int, int, int, int);
template std::size_t experts_workspace<__nv_bfloat16>(int, int, int, int, int);
template cudaError_t apply_experts(const ExpertsArguments<float>&, cudaStream_t);
template cudaError_t apply_experts(const ExpertsArguments<__half>&, cudaStream_t);
template cudaError_t apply_experts(const ExpertsArguments<__nv_bfloat16>&, cudaStream_t);

}  // namespace qwenport::cuda
