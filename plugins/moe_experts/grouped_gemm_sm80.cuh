// Grouped GEMM with mma.sync and cp.async, multistage, for every GPU since SM80.
//
// All threads of a block load and multiply, with one __syncthreads per k tile.
#pragma once

#include "grouped_gemm_tensor.cuh"

namespace qwenport::cuda::sm80 {

using Sizes = TileShape<128, 128, 32, 64>;
constexpr int threads = 256;
constexpr int warps_across = Sizes::rows_of_b / Sizes::warp_rows_of_b;
constexpr int stages = 3;
constexpr int blocks = 2;  // per multiprocessor, by registers; shared memory may hold one
constexpr std::size_t shared = std::size_t{stages} * Sizes::stage_pieces * 16;
static_assert(threads / warp_size / warps_across * Sizes::warp_rows == Sizes::rows);

/// Loads the k tiles of a block's work tiles into the pipeline's stages, one after another.
template <typename T, bool Swiglu>
class Producer {
 public:
  __device__ explicit Producer(const GroupedArguments<T>& g)
      : g_(g), work_tiles_(count_work_tiles<columns>(g)) {
    find();
  }

  /// Start loading the next k tile, if there is one, and commit the group of copies.
  __device__ void load_next(uint4* stage) {
    if (work_tile_in_wave(wave_) < work_tiles_) {
      copy(stage);
      from_ += tensor_tile_k;
      if (from_ >= g_.depth) {
        ++wave_;
        find();
      }
    }
    copy_commit();
  }

 private:
  static constexpr int columns = Sizes::columns<Swiglu>;
  static constexpr int rows_apart = threads / 8;  // between the rows of which a thread loads a piece each
  static constexpr int a_rows = Sizes::rows / rows_apart;
  static constexpr int b_rows = Sizes::rows_of_b / rows_apart;

  __device__ void find() {
    from_ = 0;
    if (work_tile_in_wave(wave_) >= work_tiles_) return;
    const WorkTile work_tile = work_tile_at<columns>(g_, work_tile_in_wave(wave_));
    const int row = static_cast<int>(threadIdx.x) / 8;
#pragma unroll
    for (int i = 0; i < a_rows; ++i) {
      const int place = work_tile.begin + row + rows_apart * i;
      row_of_a_[i] = place < work_tile.end ? row_of(g_, place) : -1;
    }
    column_ = work_tile.column + row;
    b_ = matrix_of<Swiglu>(g_, work_tile.expert);
  }

  __device__ void copy(uint4* stage) const {
    const int row = static_cast<int>(threadIdx.x) / 8;
    const int piece = static_cast<int>(threadIdx.x) % 8;
    const int at = from_ + piece * 8;
    const bool inside = at < g_.depth;
#pragma unroll
    for (int i = 0; i < a_rows; ++i) {
      // a row that does not exist may hold anything: it affects only its own row of the result
      if (row_of_a_[i] < 0) continue;
      const T* const from = g_.a + std::int64_t{row_of_a_[i]} * g_.depth + at;
      copy_16_bytes(stage + swizzled(row + rows_apart * i, piece), inside ? from : g_.a, inside);
    }
#pragma unroll
    for (int i = 0; i < b_rows; ++i) {
      const int first = rows_apart * i;  // for this thread's row and its neighbours'
      constexpr int span = Sizes::warp_rows_of_b;
      const bool up = Swiglu && first % span >= span / 2;
      const int column = column_ + (Swiglu ? first / span * (span / 2) + first % (span / 2) : first);
      const bool wanted = inside && column < g_.columns;
      const std::int64_t b_row = column + (up ? std::int64_t{g_.columns} : 0);
      copy_16_bytes(stage + Sizes::rows * 8 + swizzled(row + first, piece),
                    wanted ? b_ + b_row * g_.depth + at : g_.b, wanted);
    }
  }

  const GroupedArguments<T>& g_;
  int work_tiles_;
  int wave_ = 0;
  int from_ = 0;  // offset along the rows
  int row_of_a_[a_rows];
  int column_ = 0;  // of this thread's first row of B
  const T* b_ = nullptr;
};

/// accumulators += a b of a stage.
template <typename T>
__device__ void mma_stage(Sizes::Accumulators& accumulators, const uint4* a, const uint4* b, int row,
                          int row_of_b) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
  for (int k = 0; k < tensor_tile_k / 16; ++k) {
    std::uint32_t rows[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load_matrices(rows[m], a + swizzled(row + m * 16 + lane % 16, k * 2 + lane / 16));
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      std::uint32_t columns[4];
      load_matrices(columns,
                    b + swizzled(row_of_b + n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
      const std::uint32_t low[2] = {columns[0], columns[1]};
      const std::uint32_t high[2] = {columns[2], columns[3]};
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_accumulate(accumulators[m][2 * n], rows[m], low, T{});
        multiply_accumulate(accumulators[m][2 * n + 1], rows[m], high, T{});
      }
    }
  }
}

template <typename T, bool Swiglu>
__global__ void __launch_bounds__(threads, blocks) grouped_gemm(GroupedArguments<T> g) {
  constexpr int columns = Sizes::columns<Swiglu>;
  constexpr int ahead = stages - 1;  // k tiles whose loads have begun
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int row = warp / warps_across * Sizes::warp_rows;
  const int row_of_b = warp % warps_across * Sizes::warp_rows_of_b;

  auto* const memory = shared_memory<uint4>();
  const auto stage = [memory](int slot) { return memory + slot * Sizes::stage_pieces; };
  int slot = 0;  // the stage of the current k tile
  Producer<T, Swiglu> producer(g);
  for (int tile = 0; tile < ahead; ++tile) producer.load_next(stage(tile));

  const int work_tiles = count_work_tiles<columns>(g);
  for (int wave = 0; work_tile_in_wave(wave) < work_tiles; ++wave) {
    const WorkTile work_tile = work_tile_at<columns>(g, work_tile_in_wave(wave));
    const bool exists = work_tile.begin + row < work_tile.end;
    Sizes::Accumulators accumulators = {};
    for (int from = 0; from < g.depth; from += tensor_tile_k) {
      copy_wait<ahead - 1>();
      __syncthreads();
      // the stage is visible to all threads, and no thread still reads what the next loads replace
      if (exists) mma_stage<T>(accumulators, stage(slot), stage(slot) + Sizes::rows * 8, row, row_of_b);
      producer.load_next(stage((slot + ahead) % stages));
      slot = (slot + 1) % stages;
    }
    epilogue<Sizes, Swiglu>(g, work_tile, accumulators, row, row_of_b);
  }
  copy_wait<0>();
}

}  // namespace qwenport::cuda::sm80
