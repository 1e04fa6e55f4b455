// Products of rows that are grouped by expert with their expert's matrix: out[p] = B[expert of p] a[p], or with Swiglu
// silu(gate a[p]) * (up a[p]), where B is the gate's rows, then the up projection's.
//
// A block computes the tile that Order lists, 128 places of one expert, times some columns. Two kernels: on tensor
// cores for 16-bit numbers, and a plain one for fp32 and for sizes that 16-byte copies do not fit.
#pragma once

#include "device.cuh"
#include "order.cuh"

namespace qwenport::cuda {

template <typename T>
struct GroupedArguments {
  const T* a;        ///< rows [.., depth]
  const int* pairs;  ///< the pair of each place: its row of a is pair / k; nullptr if a is in order of places
  int k;
  const T* b;  ///< [experts, columns (twice with Swiglu), depth]
  T* out;      ///< [places, columns]
  int depth;
  int columns;
  Order order;
};

template <typename T>
__device__ const T* row_of(const GroupedArguments<T>& g, int place) {
  const std::int64_t row = g.pairs != nullptr ? g.pairs[place] / g.k : place;
  return g.a + row * g.depth;
}

// ---- on tensor cores

constexpr int tensor_depth = 64;  // numbers of a row in a stage: 128 bytes, 8 pieces of 16
constexpr int tensor_stages = 3;
constexpr int tensor_threads =
    256;  // 8 warps: 4 along the rows, 2 along the columns, each 32 rows x 64 columns
constexpr int tensor_rows_of_b = 128;
constexpr int stage_pieces = (tile_rows + tensor_rows_of_b) * 8;
constexpr std::size_t tensor_shared = std::size_t{tensor_stages} * stage_pieces * 16;

/// Columns of the result that a block computes; with Swiglu each takes two rows of B.
template <bool Swiglu>
constexpr int tensor_columns = Swiglu ? tensor_rows_of_b / 2 : tensor_rows_of_b;

/// Which column of the block's a row of its B tile belongs to. With Swiglu each half of the tile, a warp's, is 32 gate
/// rows and the 32 up rows of the same columns, so that one thread has both.
template <bool Swiglu>
__device__ int column_of(int row) {
  return Swiglu ? row / 64 * 32 + row % 32 : row;
}
template <bool Swiglu>
__device__ bool is_up(int row) {
  return Swiglu && row % 64 >= 32;
}

/// Where piece `piece` of a row lies in a stage: turned by the row, so that the 8 rows of a matrix lie in 8 banks.
__device__ inline int place_of(int row, int piece) { return row * 8 + (piece ^ (row & 7)); }

template <typename T, bool Swiglu>
__global__ void __launch_bounds__(tensor_threads) multiply_on_tensor_cores(GroupedArguments<T> g) {
  const auto tile = static_cast<int>(blockIdx.x);
  if (tile >= *g.order.tiles) return;
  const int expert = g.order.tile_expert[tile];
  const int begin = g.order.tile_place[tile];
  const int end = g.order.tile_end[tile];
  const int first_column = static_cast<int>(blockIdx.y) * tensor_columns<Swiglu>;
  uint4* const shared = shared_memory<uint4>();
  const auto thread = static_cast<int>(threadIdx.x);
  const int lane = thread % warp_size;
  const int warp_row = thread / warp_size / 2 * 32;
  const int warp_column = thread / warp_size % 2 * 64;

  // what this thread copies: one piece of 4 rows of a and of 4 rows of B, 32 rows apart
  const int piece = thread % 8;
  const T* from_a[4];
  const T* from_b[4];
  bool a_exists[4];
  bool b_exists[4];
  const T* b = g.b + static_cast<std::int64_t>(expert) * (Swiglu ? 2 : 1) * g.columns * g.depth;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = thread / 8 + 32 * i;
    a_exists[i] = begin + row < end;
    from_a[i] = row_of(g, a_exists[i] ? begin + row : begin) + piece * 8;
    const int column = first_column + column_of<Swiglu>(row);
    b_exists[i] = column < g.columns;
    const std::int64_t b_row = (b_exists[i] ? column : 0) + (is_up<Swiglu>(row) ? g.columns : 0);
    from_b[i] = b + b_row * g.depth + piece * 8;
  }
  const int steps = (g.depth + tensor_depth - 1) / tensor_depth;
  const auto copy_stage = [&](int step) {
    uint4* const stage = shared + step % tensor_stages * stage_pieces;
    const int column = step * tensor_depth;
    const bool inside = column + piece * 8 < g.depth;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = thread / 8 + 32 * i;
      const bool a_wanted = inside && a_exists[i];
      const bool b_wanted = inside && b_exists[i];
      copy_16_bytes(stage + place_of(row, piece), a_wanted ? from_a[i] + column : g.a, a_wanted);
      copy_16_bytes(stage + tile_rows * 8 + place_of(row, piece), b_wanted ? from_b[i] + column : g.b,
                    b_wanted);
    }
  };

  float sums[2][8][4] = {};
  for (int step = 0; step < tensor_stages - 1; ++step) {
    if (step < steps) copy_stage(step);
    copy_commit();
  }
  for (int step = 0; step < steps; ++step) {
    copy_wait<tensor_stages - 2>();
    __syncthreads();
    if (step + tensor_stages - 1 < steps) copy_stage(step + tensor_stages - 1);
    copy_commit();
    const uint4* const stage_a = shared + step % tensor_stages * stage_pieces;
    const uint4* const stage_b = stage_a + tile_rows * 8;
#pragma unroll
    for (int k = 0; k < tensor_depth / 16; ++k) {
      std::uint32_t rows[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices(rows[m], stage_a + place_of(warp_row + m * 16 + lane % 16, k * 2 + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t columns[4];
        const int row = warp_column + n * 16 + lane % 8 + lane / 16 * 8;
        load_matrices(columns, stage_b + place_of(row, k * 2 + lane / 8 % 2));
        const std::uint32_t low[2] = {columns[0], columns[1]};
        const std::uint32_t high[2] = {columns[2], columns[3]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_accumulate(sums[m][2 * n], rows[m], low, T{});
          multiply_accumulate(sums[m][2 * n + 1], rows[m], high, T{});
        }
      }
    }
  }
  copy_wait<0>();

  constexpr int blocks = Swiglu ? 4 : 8;  // of 8 columns
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = begin + warp_row + m * 16 + half * 8 + lane / 4;
      if (place >= end) continue;
#pragma unroll
      for (int n = 0; n < blocks; ++n) {
        const int column = first_column + (Swiglu ? warp_column / 2 : warp_column) + n * 8 + lane % 4 * 2;
        if (column >= g.columns) continue;
        Vector<T, 2> two;
        for (int i = 0; i < 2; ++i) {
          const float value = sums[m][n][half * 2 + i];
          two.values[i] = from_float<T>(Swiglu ? swiglu(value, sums[m][(n + 4) % 8][half * 2 + i]) : value);
        }
        store(g.out + static_cast<std::int64_t>(place) * g.columns + column, two);
      }
    }
  }
}

// ---- plain

constexpr int plain_threads = 256;  // each 4 places x 4 columns
constexpr int plain_columns = 32;
constexpr int plain_depth = 16;
constexpr int plain_pitch = plain_depth + 1;
constexpr std::size_t plain_shared = (tile_rows + 2 * plain_columns) * plain_pitch * sizeof(float);

template <typename T, bool Swiglu>
__global__ void __launch_bounds__(plain_threads) multiply_plainly(GroupedArguments<T> g) {
  const auto tile = static_cast<int>(blockIdx.x);
  if (tile >= *g.order.tiles) return;
  const int begin = g.order.tile_place[tile];
  const int end = g.order.tile_end[tile];
  const int first_column = static_cast<int>(blockIdx.y) * plain_columns;
  constexpr int rows_of_b = Swiglu ? 2 * plain_columns : plain_columns;
  const T* b =
      g.b + static_cast<std::int64_t>(g.order.tile_expert[tile]) * (Swiglu ? 2 : 1) * g.columns * g.depth;
  float* const tile_a = shared_memory<float>();
  float* const tile_b = tile_a + tile_rows * plain_pitch;
  const auto thread = static_cast<int>(threadIdx.x);

  float sums[4][4] = {};
  float ups[4][4] = {};
  for (int from = 0; from < g.depth; from += plain_depth) {
    for (int i = thread; i < tile_rows * plain_depth; i += plain_threads) {
      const int row = i / plain_depth;
      const int at = from + i % plain_depth;
      const bool inside = begin + row < end && at < g.depth;
      tile_a[row * plain_pitch + i % plain_depth] = inside ? to_float(row_of(g, begin + row)[at]) : 0;
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

/// \param tiles that there may be.
template <typename T, bool Swiglu>
cudaError_t multiply_grouped(const GroupedArguments<T>& g, std::int64_t tiles, cudaStream_t stream) {
  const auto grid = [&](int columns) {
    return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(ceil_div(g.columns, columns)));
  };
  if constexpr (sizeof(T) == 2) {
    if (g.depth % 8 == 0 && g.columns % 8 == 0 && aligned(g.a) && aligned(g.b)) {
      return launch(multiply_on_tensor_cores<T, Swiglu>, grid(tensor_columns<Swiglu>), dim3(tensor_threads),
                    tensor_shared, stream, g);
    }
  }
  return launch(multiply_plainly<T, Swiglu>, grid(plain_columns), dim3(plain_threads), plain_shared, stream,
                g);
}

}  // namespace qwenport::cuda
