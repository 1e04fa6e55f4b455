// Grouped GEMM on CUDA cores, for fp32 and for sizes that do not allow 16-byte copies.
#pragma once

#include "grouped_gemm.cuh"

namespace qwenport::cuda {

constexpr int simt_threads = 256;  // each 4 places x 4 columns
constexpr int simt_rows = 128;
constexpr int simt_columns = 32;
constexpr int simt_tile_k = 16;
constexpr int simt_pitch = simt_tile_k + 1;
constexpr std::size_t simt_shared = (simt_rows + 2 * simt_columns) * simt_pitch * sizeof(float);

/// One work tile per block.
template <typename T, bool Swiglu>
__global__ void __launch_bounds__(simt_threads) grouped_gemm_simt(GroupedArguments<T> g) {
  const auto index = static_cast<int>(blockIdx.x);
  if (index >= count_work_tiles<simt_columns>(g)) return;
  const auto [expert, begin, end, first_column] = work_tile_at<simt_columns>(g, index);
  constexpr int rows_of_b = Swiglu ? 2 * simt_columns : simt_columns;
  const T* b = matrix_of<Swiglu>(g, expert);
  auto* const tile_a = shared_memory<float>();
  float* const tile_b = tile_a + simt_rows * simt_pitch;
  const auto thread = static_cast<int>(threadIdx.x);

  float accumulators[4][4] = {};
  float ups[4][4] = {};
  for (int from = 0; from < g.depth; from += simt_tile_k) {
    for (int i = thread; i < simt_rows * simt_tile_k; i += simt_threads) {
      const int row = i / simt_tile_k;
      const int at = from + i % simt_tile_k;
      const bool inside = begin + row < end && at < g.depth;
      tile_a[row * simt_pitch + i % simt_tile_k] =
          inside ? to_float(g.a[std::int64_t{row_of(g, begin + row)} * g.depth + at]) : 0;
    }
    for (int i = thread; i < rows_of_b * simt_tile_k; i += simt_threads) {
      const int row = i / simt_tile_k;
      const int at = from + i % simt_tile_k;
      const int column = first_column + row % simt_columns;
      const bool inside = column < g.columns && at < g.depth;
      const std::int64_t b_row = column + (row >= simt_columns ? g.columns : 0);
      tile_b[row * simt_pitch + i % simt_tile_k] = inside ? to_float(b[b_row * g.depth + at]) : 0;
    }
    __syncthreads();
    for (int k = 0; k < simt_tile_k; ++k) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float a = tile_a[(thread / 8 + 32 * m) * simt_pitch + k];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int column = thread % 8 + 8 * n;
          accumulators[m][n] += a * tile_b[column * simt_pitch + k];
          if (Swiglu) ups[m][n] += a * tile_b[(simt_columns + column) * simt_pitch + k];
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int place = begin + thread / 8 + 32 * m;
    if (place >= end) continue;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int column = first_column + thread % 8 + 8 * n;
      if (column >= g.columns) continue;
      const float value = Swiglu ? swiglu(accumulators[m][n], ups[m][n]) : accumulators[m][n];
      g.out[static_cast<std::int64_t>(place) * g.columns + column] = from_float<T>(value);
    }
  }
}

}  // namespace qwenport::cuda
