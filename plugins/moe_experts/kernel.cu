// Chooses kernels by the number of tokens, and lays out the workspace they share.
#include "kernel.hpp"

#include <algorithm>
#include <limits>

#include "device.cuh"
#include "few_tokens.cuh"
#include "grouped_gemm_simt.cuh"
#include "grouped_gemm_sm80.cuh"
#include "grouped_gemm_sm90.cuh"
#include "order.cuh"

namespace qwenport::cuda {
namespace {

/// Hands out parts of one allocation, each aligned to 256 bytes.
class WorkspaceAllocator {
 public:
  explicit WorkspaceAllocator(void* memory) : memory_(static_cast<char*>(memory)) {}
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
  T* active;  ///< [pairs, inner]; ordered by pair for few tokens, by place for many
  T* rows;    ///< [pairs, hidden], ordered by place
  Order order;
  std::size_t bytes;
};

template <typename T>
Workspace<T> divide(void* memory, std::int64_t tokens, int k, int experts, int hidden, int inner) {
  const std::int64_t pairs = tokens * k;
  WorkspaceAllocator allocator(memory);
  Workspace<T> w{};
  w.active = allocator.take<T>(pairs * inner);
  if (!are_few(tokens)) {
    w.rows = allocator.take<T>(pairs * hidden);
    w.order.counts = allocator.take<int>(order_chunks(pairs) * experts);
    w.order.begins = allocator.take<int>(experts);
    w.order.pairs = allocator.take<int>(pairs);
    w.order.places = allocator.take<int>(pairs);
    for (int** list : {&w.order.tile_expert, &w.order.tile_place, &w.order.tile_end}) {
      *list = allocator.take<int>(most_tiles(pairs, experts));
    }
    w.order.tiles = allocator.take<int>(1);
  }
  w.bytes = allocator.used();
  return w;
}

/// The kinds of grouped GEMM.
enum class Kind : std::uint8_t { simt, sm80, sm90 };

template <typename T>
Kind kind_for(const ExpertsArguments<T>& a, const Gpu& gpu) {
  const bool fits = sizeof(T) == 2 && a.hidden % 8 == 0 && a.inner % 8 == 0 && aligned(a.x) &&
                    aligned(a.gate_up) && aligned(a.down);
  if (!fits) return Kind::simt;
  return runs_on_hopper(gpu) ? Kind::sm90 : Kind::sm80;
}

int tile_rows_of(Kind kind) {
  switch (kind) {
    case Kind::sm90:
      return sm90::Sizes::rows;
    case Kind::sm80:
      return sm80::Sizes::rows;
    default:
      return simt_rows;
  }
}
static_assert(std::min({sm90::Sizes::rows, sm80::Sizes::rows, simt_rows}) == least_tile_rows);

/// \param tiles the most tiles there can be.
template <typename T, bool Swiglu>
cudaError_t launch_grouped_gemm(Kind kind, const GroupedArguments<T>& g, std::int64_t tiles, const Gpu& gpu,
                                cudaStream_t stream) {
  const auto start = [&](auto* kernel, int columns, int threads, std::size_t shared, bool persistent) {
    std::int64_t blocks = tiles * ceil_div(g.columns, columns);  // one per work tile
    if (blocks > std::numeric_limits<int>::max() / 2) return cudaErrorInvalidValue;
    if (persistent) {
      std::int64_t resident = 0;
      const cudaError_t status = find_resident_blocks(kernel, threads, shared, gpu, resident);
      if (status != cudaSuccess) return status;
      blocks = std::min(blocks, resident);
    }
    return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), shared,
                  stream, false, g);
  };
  if constexpr (sizeof(T) == 2) {
    if (kind == Kind::sm90) {
      using namespace sm90;
      return start(sm90::grouped_gemm<T, Swiglu>, Sizes::columns<Swiglu>, threads, sizeof(Shared), true);
    }
    if (kind == Kind::sm80) {
      using namespace sm80;
      return start(sm80::grouped_gemm<T, Swiglu>, Sizes::columns<Swiglu>, threads, shared, true);
    }
  }
  return start(grouped_gemm_simt<T, Swiglu>, simt_columns, simt_threads, simt_shared, false);
}

constexpr int combine_threads = 256;

/// y = each token's rows, weighted, added in the router's order. A thread has N adjacent elements of a token.
/// grid: [tokens, parts of hidden].
template <typename T, int N>
__global__ void __launch_bounds__(combine_threads)
    combine(ExpertsArguments<T> a, const T* rows, const int* places) {
  const std::int64_t token = blockIdx.x;
  const int column = static_cast<int>(blockIdx.y * combine_threads + threadIdx.x) * N;
  const bool exists = column < a.hidden;
  // a lane keeps one of the token's places and weights
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  static_assert(most_chosen <= warp_size);
  int my_place = -1;
  float my_weight = 0;
  if (lane < a.k) {
    my_place = places[token * a.k + lane];
    my_weight = a.weights[token * a.k + lane];
  }

  constexpr int together = 4;  // rows whose reads are issued at once
  float y[N] = {};
  for (int first = 0; first < a.k; first += together) {
    int place[together];
    Packed<T, N> row[together];
#pragma unroll
    for (int j = 0; j < together; ++j) place[j] = __shfl_sync(all_lanes, my_place, first + j);
#pragma unroll
    for (int j = 0; j < together; ++j) {
      if (exists && place[j] >= 0) {
        row[j] = load_once<N>(rows + std::int64_t{place[j]} * a.hidden + column);
      }
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const float weight = __shfl_sync(all_lanes, my_weight, first + j);
      if (first + j >= a.k) continue;
      const Vector<T, N> part = row[j].unpacked();
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] += weight * (place[j] >= 0 ? to_float(part.values[i]) : NAN);
    }
  }
  if (!exists) return;
  Vector<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.values[i] = from_float<T>(y[i]);
  store(a.y + token * a.hidden + column, result);
}

template <typename T>
cudaError_t combine_rows(const ExpertsArguments<T>& a, const Workspace<T>& w, cudaStream_t stream) {
  const auto start = [&](auto* kernel, int numbers) {
    const auto parts = static_cast<unsigned>(ceil_div(a.hidden, numbers * combine_threads));
    return launch(kernel, dim3(static_cast<unsigned>(a.tokens), parts), dim3(combine_threads), 0, stream,
                  false, a, static_cast<const T*>(w.rows), static_cast<const int*>(w.order.places));
  };
  constexpr int n = widest<T>;
  if (a.hidden % n == 0 && aligned(a.y)) return start(combine<T, n>, n);
  return start(combine<T, 1>, 1);
}

template <typename T>
cudaError_t apply_many(const ExpertsArguments<T>& a, const Workspace<T>& w, const Gpu& gpu,
                       cudaStream_t stream) {
  const Kind kind = kind_for(a, gpu);
  Order order = w.order;
  order.tile_rows = tile_rows_of(kind);
  cudaError_t status = order_by_expert(a, order, stream);
  if (status != cudaSuccess) return status;
  const std::int64_t tiles = most_tiles(static_cast<std::int64_t>(a.tokens) * a.k, a.experts);
  status = launch_grouped_gemm<T, true>(
      kind, {a.x, order.pairs, a.k, a.gate_up, w.active, a.hidden, a.inner, order}, tiles, gpu, stream);
  if (status != cudaSuccess) return status;
  status = launch_grouped_gemm<T, false>(
      kind, {w.active, nullptr, a.k, a.down, w.rows, a.inner, a.hidden, order}, tiles, gpu, stream);
  if (status != cudaSuccess) return status;
  return combine_rows(a, w, stream);
}

}  // namespace

template <typename T>
std::size_t experts_workspace(int tokens, int k, int experts, int hidden, int inner) {
  return divide<T>(nullptr, tokens, k, experts, hidden, inner).bytes;
}

template <typename T>
cudaError_t apply_experts(const ExpertsArguments<T>& a, cudaStream_t stream) {
  if (a.k < 1 || a.k > most_chosen || a.experts < 1 || a.experts > most_experts || a.hidden < 1 ||
      a.inner < 1 || static_cast<std::int64_t>(a.tokens) * a.k > most_pairs) {
    return cudaErrorInvalidValue;
  }
  if (a.tokens == 0) return cudaSuccess;
  Gpu gpu;
  const cudaError_t status = find_gpu(gpu);
  if (status != cudaSuccess) return status;
  const Workspace<T> w = divide<T>(a.workspace, a.tokens, a.k, a.experts, a.hidden, a.inner);
  return are_few(a.tokens) ? apply_few(a, w.active, gpu, stream) : apply_many(a, w, gpu, stream);
}

template std::size_t experts_workspace<float>(int, int, int, int, int);
template std::size_t experts_workspace<__half>(int, int, int, int, int);
template std::size_t experts_workspace<__nv_bfloat16>(int, int, int, int, int);
template cudaError_t apply_experts(const ExpertsArguments<float>&, cudaStream_t);
template cudaError_t apply_experts(const ExpertsArguments<__half>&, cudaStream_t);
template cudaError_t apply_experts(const ExpertsArguments<__nv_bfloat16>&, cudaStream_t);

}  // namespace qwenport::cuda
