// Grouped GEMM: rows that are grouped by expert times their expert's matrix, out[p] = B[expert of p] a[p], or with Swiglu
// silu(gate a[p]) * (up a[p]), where B is the gate's rows, then the up projection's.
//
// The grid is over work tiles: a tile from Order's list, which is some places of one expert, times some columns.
// Consecutive work tiles share what they read.
#pragma once

#include "device.cuh"
#include "order.cuh"

namespace qwenport::cuda {

template <typename T>
struct GroupedArguments {
  const T* a;        ///< rows [.., depth]
  const int* pairs;  ///< the pair of each place: its row of a is pair / k; nullptr if a is ordered by place
  int k;
  const T* b;  ///< [experts, columns (twice with Swiglu), depth]
  T* out;      ///< [places, columns]
  int depth;
  int columns;
  Order order;
};

template <typename T>
__device__ int row_of(const GroupedArguments<T>& g, int place) {
  return g.pairs != nullptr ? g.pairs[place] / g.k : place;
}

/// An expert's matrix, or pair of matrices.
template <bool Swiglu, typename T>
__device__ const T* matrix_of(const GroupedArguments<T>& g, int expert) {
  return g.b + static_cast<std::int64_t>(expert) * (Swiglu ? 2 : 1) * g.columns * g.depth;
}

/// The part of the result that a block computes at a time.
struct WorkTile {
  int expert;
  int begin;  ///< the first place
  int end;    ///< one past the expert's last place, possibly beyond the tile
  int column;
};

/// The number of work tiles.
template <int Columns, typename T>
__device__ int count_work_tiles(const GroupedArguments<T>& g) {
  return *g.order.tiles * static_cast<int>(ceil_div(g.columns, Columns));
}

template <int Columns, typename T>
__device__ WorkTile work_tile_at(const GroupedArguments<T>& g, int index) {
  const auto across = static_cast<int>(ceil_div(g.columns, Columns));
  const int tile = index / across;
  return {g.order.tile_expert[tile], g.order.tile_place[tile], g.order.tile_end[tile],
          index % across * Columns};
}

}  // namespace qwenport::cuda
