// The grouped product of 16-bit numbers on tensor cores: what its two kinds have in common.
//
// A block stays on its multiprocessor and goes through its items. A step of an item brings 128
// bytes of each of its rows of a and of B to shared memory; while its products are made, later steps are on their way,
// those of the next item too.
#pragma once

#include "grouped_product.cuh"

namespace qwenport::cuda {

constexpr int tensor_depth = 64;  // numbers of a row in a step: 8 pieces of 16 bytes

/// The item that is a block's in a round of all blocks. Rounds go forwards and backwards: an expert's last tile, which has
/// fewer rows, would else fall to the same blocks each time.
__device__ inline int index_in(int round) {
  const auto blocks = static_cast<int>(gridDim.x);
  const auto block = static_cast<int>(blockIdx.x);
  return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

/// Where piece `piece` of a row lies: turned by the row, so that the 8 rows of a matrix lie in 8 banks.
__device__ inline int place_of(int row, int piece) { return row * 8 + (piece ^ (row & 7)); }

/// Sizes of an item and of what a warp has of it. With Swiglu a column of the result takes two rows of B: those of a warp are
/// gate rows, then the up rows of the same columns, so that a thread has both.
template <int Rows, int RowsOfB, int WarpRows, int WarpRowsOfB>
struct Tile {
  static constexpr int rows = Rows;  ///< of the result
  static constexpr int rows_of_b = RowsOfB;
  static constexpr int warp_rows = WarpRows;
  static constexpr int warp_rows_of_b = WarpRowsOfB;
  static constexpr int stage_pieces = (Rows + RowsOfB) * 8;

  template <bool Swiglu>
  static constexpr int columns = Swiglu ? RowsOfB / 2 : RowsOfB;

  /// A warp's sums: its rows by 16, its columns by 8, in the layout of mma's m16n8.
  using Sums = float[WarpRows / 16][WarpRowsOfB / 8][4];
};

/// Lane 4 g + t gives its words i of 4 and gets, of the lanes 4 g + i, their words t.
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

/// What a warp has of an item goes to the result, 16 bytes a lane.
/// \param row, row_of_b the warp's first ones in the item.
template <typename Tile, bool Swiglu, typename T>
__device__ void store_item(const GroupedArguments<T>& g, const Item& item, const typename Tile::Sums& sums,
                           int row, int row_of_b) {
  constexpr int blocks = Tile::warp_rows_of_b / 8 / (Swiglu ? 2 : 1);  // of 8 columns
  static_assert(blocks % 4 == 0);
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int first_column = item.column + row_of_b / (Swiglu ? 2 : 1) + lane % 4 * 8;
#pragma unroll
  for (int m = 0; m < Tile::warp_rows / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = item.begin + row + m * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < blocks; n += 4) {
        std::uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          Vector<T, 2> two;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float value = sums[m][n + i][half * 2 + j];
            const float up = sums[m][n + i + (Swiglu ? blocks : 0)][half * 2 + j];
            two.values[j] = from_float<T>(Swiglu ? swiglu(value, up) : value);
          }
          memcpy(&words[i], &two, sizeof two);
        }
        transpose_in_quads(words);
        const int column = first_column + n * 8;
        if (place < item.end && column < g.columns) {
          Packed<T, 8> eight;
          eight.words = {words[0], words[1], words[2], words[3]};
          store(g.out + static_cast<std::int64_t>(place) * g.columns + column, eight.unpacked());
        }
      }
    }
  }
}

}  // namespace qwenport::cuda
