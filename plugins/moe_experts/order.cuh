// The pairs (token, expert) sorted stably by expert: a counting sort over chunks of pairs, without atomics
// whose order matters. Also makes the list of tiles that a grouped GEMM processes.
#pragma once

#include "device.cuh"
#include "kernel.hpp"

namespace qwenport::cuda {

constexpr int order_chunk = 512;  // pairs
constexpr int least_tile_rows = 128;

/// The result of the sort, in device memory.
struct Order {
  int* counts;       ///< [chunks, experts]: pairs of an expert in a chunk; later, in the chunks before it
  int* begins;       ///< [experts]: each expert's first place
  int* pairs;        ///< [pairs]: the pair of each place
  int* places;       ///< [pairs]: the place of each pair; -1 if it names no expert
  int* tile_expert;  ///< [tiles]
  int* tile_place;   ///< [tiles]: the tile's first place
  int* tile_end;     ///< [tiles]: one past its expert's last place
  int* tiles;        ///< [1]: the number of tiles
  int tile_rows;     ///< the most places in a tile
};

__host__ __device__ constexpr std::int64_t order_chunks(std::int64_t pairs) {
  return ceil_div(pairs, order_chunk);
}
/// The most tiles there can be: full ones, and one for each expert.
__host__ __device__ constexpr std::int64_t most_tiles(std::int64_t pairs, std::int64_t experts) {
  return pairs / least_tile_rows + (pairs < experts ? pairs : experts);
}

/// counts [chunks, experts] = how often each expert is named in a chunk. grid: chunks.
static __global__ void __launch_bounds__(order_chunk)
    count_experts(const std::int64_t* indices, int pairs, int experts, Order order) {
  int* counts = shared_memory<int>();
  const auto thread = static_cast<int>(threadIdx.x);
  const auto chunk = static_cast<int>(blockIdx.x);
  for (int expert = thread; expert < experts; expert += order_chunk) counts[expert] = 0;
  __syncthreads();
  const int pair = chunk * order_chunk + thread;
  if (pair < pairs) {
    const std::int64_t expert = indices[pair];
    if (expert >= 0 && expert < experts) atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  for (int expert = thread; expert < experts; expert += order_chunk) {
    order.counts[static_cast<std::int64_t>(chunk) * experts + expert] = counts[expert];
  }
}

/// counts = the sums over earlier chunks; begins; the tiles. One block of most_experts threads.
static __global__ void __launch_bounds__(most_experts) place_experts(int chunks, int experts, Order order) {
  int* rows = shared_memory<int>();      // [most_experts + 1]: where an expert's places begin
  int* tiles = rows + most_experts + 1;  // the same for tiles
  const auto expert = static_cast<int>(threadIdx.x);
  int total = 0;
  if (expert < experts) {
    constexpr int ahead = 16;  // reads in flight at once
    for (int first = 0; first < chunks; first += ahead) {
      int* const counts = order.counts + static_cast<std::int64_t>(first) * experts + expert;
      int here[ahead] = {};
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (first + i < chunks) here[i] = counts[i * experts];
      }
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (first + i < chunks) counts[i * experts] = total;
        total += here[i];
      }
    }
  }
  rows[expert + 1] = total;
  tiles[expert + 1] = (total + order.tile_rows - 1) / order.tile_rows;
  if (expert == 0) rows[0] = tiles[0] = 0;
  __syncthreads();
  for (int step = 1; step <= most_experts; step *= 2) {  // running sums
    const int i = expert + 1;
    const int row = i >= step ? rows[i - step] : 0;
    const int tile = i >= step ? tiles[i - step] : 0;
    __syncthreads();
    rows[i] += row;
    tiles[i] += tile;
    __syncthreads();
  }
  if (expert < experts) {
    const int begin = rows[expert];
    const int end = rows[expert + 1];
    order.begins[expert] = begin;
    int tile = tiles[expert];
    for (int place = begin; place < end; place += order.tile_rows, ++tile) {
      order.tile_expert[tile] = expert;
      order.tile_place[tile] = place;
      order.tile_end[tile] = end;
    }
  }
  if (expert == 0) *order.tiles = tiles[most_experts];
}

/// pairs and places. grid: chunks.
static __global__ void __launch_bounds__(order_chunk)
    order_pairs(const std::int64_t* indices, int pairs, int experts, Order order) {
  int* named = shared_memory<int>();  // [order_chunk]
  const auto thread = static_cast<int>(threadIdx.x);
  const int pair = static_cast<int>(blockIdx.x) * order_chunk + thread;
  int expert = -1;
  if (pair < pairs && indices[pair] >= 0 && indices[pair] < experts) expert = static_cast<int>(indices[pair]);
  named[thread] = expert;
  __syncthreads();
  if (pair >= pairs) return;
  int place = -1;
  if (expert >= 0) {
    place = order.begins[expert] + order.counts[static_cast<std::int64_t>(blockIdx.x) * experts + expert];
    constexpr int together = 4;
    for (int other = 0; other < thread; other += together) {
      const auto four = load<together>(named + other);
#pragma unroll
      for (int i = 0; i < together; ++i) place += four.values[i] == expert && other + i < thread ? 1 : 0;
    }
    order.pairs[place] = pair;
  }
  order.places[pair] = place;
}

template <typename T>
cudaError_t order_by_expert(const ExpertsArguments<T>& a, const Order& order, cudaStream_t stream) {
  const int pairs = a.tokens * a.k;
  const dim3 chunks(static_cast<unsigned>(order_chunks(pairs)));
  const std::size_t shared = static_cast<std::size_t>(a.experts) * sizeof(int);
  cudaError_t status = launch(count_experts, chunks, dim3(order_chunk), shared, stream, false, a.indices,
                              pairs, a.experts, order);
  if (status != cudaSuccess) return status;
  status = launch(place_experts, dim3(1), dim3(most_experts), 2 * (most_experts + 1) * sizeof(int), stream,
                  false, static_cast<int>(chunks.x), a.experts, order);
  if (status != cudaSuccess) return status;
  return launch(order_pairs, chunks, dim3(order_chunk), order_chunk * sizeof(int), stream, false, a.indices,
                pairs, a.experts, order);
}

}  // namespace qwenport::cuda
