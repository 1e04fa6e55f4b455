// Grouped GEMM of 16-bit numbers on tensor cores: the common part of the SM80 and SM90 kernels.
//
// Both are persistent: a block takes work tiles from a static schedule. A k tile is 128 bytes of each row of A and B; while
// one is multiplied the next ones are loaded, also across work tiles.
#pragma once

#include "grouped_gemm.cuh"

namespace qwenport::cuda {

constexpr int tensor_tile_k = 64;  // numbers of a row in a k tile: 8 pieces of 16 bytes

/// The persistent tile scheduler: a block's work tile in a wave of all blocks. Waves alternate in direction: otherwise an
/// expert's last tile, which has fewer rows, would fall to the same blocks each time.
__device__ inline int work_tile_in_wave(int wave) {
  const auto blocks = static_cast<int>(gridDim.x);
  const auto block = static_cast<int>(blockIdx.x);
  return wave * blocks + (wave % 2 == 0 ? block : blocks - 1 - block);
}

/// The position of a row's piece `piece` in a stage: XOR-swizzled by row, so that eight rows hit distinct banks.
__device__ inline int swizzled(int row, int piece) { return row * 8 + (piece ^ (row & 7)); }

/// Sizes of a work tile and of a warp's part of it. With Swiglu a column of the result takes two rows of B: those of a warp are
/// gate rows, then the up rows of the same columns, so that a thread has both.
template <int Rows, int RowsOfB, int WarpRows, int WarpRowsOfB>
struct TileShape {
  static constexpr int rows = Rows;  ///< of the result
  static constexpr int rows_of_b = RowsOfB;
  static constexpr int warp_rows = WarpRows;
  static constexpr int warp_rows_of_b = WarpRowsOfB;
  static constexpr int stage_pieces = (Rows + RowsOfB) * 8;

  template <bool Swiglu>
  static constexpr int columns = Swiglu ? RowsOfB / 2 : RowsOfB;

  /// A warp's accumulators: its rows by 16, its columns by 8, in the layout of mma's m16n8.
  using Accumulators = float[WarpRows / 16][WarpRowsOfB / 8][4];
};

/// A 4x4 transpose: lane 4 g + t gives its word i of 4 to lane 4 g + i and gets that lane's word t.
__device__ inline void transpose_in_quads(std::uint32_t (&words)[4]) {
  const bool high = threadIdx.x % 4 >= 2;
  const std::uint32_t a = __shfl_xor_sync(all_lanes, high ? words[0] : words[2], 2);
  const std::uint32_t b = __shfl_xor_sync(all_lanes, high ? words[1] : words[3], 2);
  words[0] = high ? a : words[0];
  words[1] = high ? b : words[1];
  words[2] = high ? words[2] : a;
  words[3] = high ? words[3] : b;
  const bool odd = threadIdx.x % 2 == 1;
  const std::uint32_t c = __shfl_xor_sync(all_lanes, odd ? words[0] : words[1], 1);
  const std::uint32_t d = __shfl_xor_sync(all_lanes, odd ? words[2] : words[3], 1);
  words[0] = odd ? c : words[0];
  words[1] = odd ? words[1] : c;
  words[2] = odd ? d : words[2];
  words[3] = odd ? words[3] : d;
}

/// A warp's epilogue: SwiGLU if requested, conversion, and 16-byte stores per lane.
/// \param row, row_of_b the warp's first rows in the work tile.
template <typename TileShape, bool Swiglu, typename T>
__device__ void epilogue(const GroupedArguments<T>& g, const WorkTile& work_tile,
                         const typename TileShape::Accumulators& accumulators, int row, int row_of_b) {
  constexpr int blocks = TileShape::warp_rows_of_b / 8 / (Swiglu ? 2 : 1);  // of 8 columns
  static_assert(blocks % 4 == 0);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int first_column = work_tile.column + row_of_b / (Swiglu ? 2 : 1) + lane % 4 * 8;
#pragma unroll
  for (int m = 0; m < TileShape::warp_rows / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = work_tile.begin + row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < blocks; n += 4) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Vector<T, 2> two;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float value = accumulators[m][n + i][half * 2 + j];
            const float up = accumulators[m][n + i + (Swiglu ? blocks : 0)][half * 2 + j];
            two.values[j] = from_float<T>(Swiglu ? swiglu(value, up) : value);
          }
          memcpy(&words[i], &two, sizeof two);
        }
        transpose_in_quads(words);
        const int column = first_column + n * 8;
        if (place < work_tile.end && column < g.columns) {
          Packed<T, 8> eight;
          eight.words = {words[0], words[1], words[2], words[3]};
          store(g.out + static_cast<std::int64_t>(place) * g.columns + column, eight.unpacked());
        }
      }
    }
  }
}

}  // namespace qwenport::cuda
