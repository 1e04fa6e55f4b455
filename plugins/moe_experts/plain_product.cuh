// The grouped product for fp32, and for sizes that 16-byte copies do not fit.
#pragma once

#include "grouped_product.cuh"

namespace qwenport::cuda {

constexpr int plain_threads = 256;  // each 4 places x 4 columns
constexpr int plain_rows = 128;
constexpr int plain_columns = 32;
constexpr int plain_depth = 16;
constexpr int plain_pitch = plain_depth + 1;
constexpr std::size_t plain_shared = (plain_rows + 2 * plain_columns) * plain_pitch * sizeof(float);

/// A block an item.
template <typename T, bool Swiglu>
__global__ void __launch_bounds__(plain_threads) multiply_plainly(GroupedArguments<T> g) {
  const auto index = static_cast<int>(blockIdx.x);
  if (index >= items_of<plain_columns>(g)) return;
  const auto [expert, begin, end, first_column] = item_at<plain_columns>(g, index);
  constexpr int rows_of_b = Swiglu ? 2 * plain_columns : plain_columns;
  const T* b = matrix_of<Swiglu>(g, expert);
  auto* const tile_a = shared_memory<float>();
  float* const tile_b = tile_a + plain_rows * plain_pitch;
  const auto thread = static_cast<int>(threadIdx.x);

  float sums[4][4] = {};
  float ups[4][4] = {};
  for (int from = 0; from < g.depth; from += plain_depth) {
    for (int i = thread; i < plain_rows * plain_depth; i += plain_threads) {
      const int row = i / plain_depth;
      const int at = from + i % plain_depth;
      const bool inside = begin + row < end && at < g.depth;
      tile_a[row * plain_pitch + i % plain_depth] =
          inside ? to_float(g.a[std::int64_t{row_of(g, begin + row)} * g.depth + at]) : 0;
    }
    for (int i = thread; i < rows_of_b * plain_depth; i += plain_threads) {
      const int row = i / plain_depth;
      const int at = from + i % plain_depth;
      const int column = first_column + row % plain_columns;
      const bool inside = column < g.columns && at < g.depth;
      const std::int64_t b_row = column + (row >= plain_columns ? g.columns : 0);
      tile_b[row * plain_pitch + i % plain_depth] = inside ? to_float(b[b_row * g.depth + at]) : 0;
    }
    __syncthreads();
    for (int k = 0; k < plain_depth; ++k) {
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float a = tile_a[(thread / 8 + 32 * m) * plain_pitch + k];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int column = thread % 8 + 8 * n;
          sums[m][n] += a * tile_b[column * plain_pitch + k];
          if (Swiglu) ups[m][n] += a * tile_b[(plain_columns + column) * plain_pitch + k];
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
      const float value = Swiglu ? swiglu(sums[m][n], ups[m][n]) : sums[m][n];
      g.out[static_cast<std::int64_t>(place) * g.columns + column] = from_float<T>(value);
    }
  }
}

}  // namespace qwenport::cuda
