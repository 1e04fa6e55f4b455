// The grouped product of 16-bit numbers on tensor cores.
//
// A block has a multiprocessor to itself, or half of one, and works through its items without a pause between them:
// while a step's products run, the parts of a and B that later steps need are on their way to shared memory, those of
// the next item too. How products are made is WarpProducts or, on Hopper, WarpgroupProducts.
#pragma once

#include "grouped_product.cuh"
#include "hopper.cuh"

namespace qwenport::cuda {

constexpr int tensor_depth = 64;  // numbers of a row in a step: 128 bytes, 8 pieces of 16

/// Where piece `piece` of a row lies: turned by the row, so that the 8 rows of a matrix lie in 8 banks.
__device__ inline int place_of(int row, int piece) { return row * 8 + (piece ^ (row & 7)); }

/// Each warp for itself, with mma.sync, which every GPU since SM80 has.
struct WarpProducts {
  static constexpr bool compiled = true;
  static constexpr int threads = 256;
  static constexpr int tile_rows = 128;     ///< of the result, in an item
  static constexpr int rows_of_b = 128;     ///< in a step
  static constexpr int warp_rows = 32;      ///< of the result, that a warp has
  static constexpr int warp_columns = 64;   ///< rows of B, likewise
  static constexpr int rows_together = 32;  ///< that are left out together, if they do not exist
  static constexpr int stages = 3;          ///< steps that shared memory holds
  static constexpr int under_way = 0;       ///< steps before the present one whose products may still run
  static constexpr int blocks = 2;          ///< a multiprocessor, where they fit

  using Sums = float[warp_rows / 16][warp_columns / 8][4];  ///< in the layout of m16n8

  __device__ static void begin(Sums& /*sums*/) {}
  template <int Left>
  __device__ static void wait(Sums& /*sums*/) {}

  /// sums += a b of a step, of this warp's rows and columns.
  template <typename T>
  __device__ static void multiply(Sums& sums, const uint4* a, const uint4* b, int row, int column, T type) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
    for (int k = 0; k < tensor_depth / 16; ++k) {
      std::uint32_t rows[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        load_matrices(rows[m], a + place_of(row + m * 16 + lane % 16, k * 2 + lane / 16));
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        std::uint32_t columns[4];
        load_matrices(columns,
                      b + place_of(column + n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
        const std::uint32_t low[2] = {columns[0], columns[1]};
        const std::uint32_t high[2] = {columns[2], columns[3]};
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          multiply_accumulate(sums[m][2 * n], rows[m], low, type);
          multiply_accumulate(sums[m][2 * n + 1], rows[m], high, type);
        }
      }
    }
  }
};

/// Four warps together, with wgmma, which reads both operands from shared memory and runs beside everything else.
struct WarpgroupProducts {
  static constexpr bool compiled = warpgroup::compiled;
  static constexpr int threads = 384;
  static constexpr int tile_rows = 192;
  static constexpr int rows_of_b = warpgroup::columns;
  static constexpr int warp_rows = warpgroup::rows / warpgroup::warps;
  static constexpr int warp_columns = warpgroup::columns;
  static constexpr int rows_together = warpgroup::rows;
  static constexpr int stages = 4;
  static constexpr int under_way = 1;
  static constexpr int blocks = 1;

  using Sums = float[1][warp_columns / 8][4];

  /// Copies that this thread has waited for may be read by products, after a barrier.
  __device__ static void begin(Sums& /*sums*/) { warpgroup::fence_shared(); }
  template <int Left>
  __device__ static void wait(Sums& sums) {
    warpgroup::wait<Left>(sums[0]);
  }

  template <typename T>
  __device__ static void multiply(Sums& sums, const uint4* a, const uint4* b, int row, int /*column*/,
                                  T type) {
    const uint4* const rows = a + row / warpgroup::rows * warpgroup::rows * 8;
    warpgroup::fence();
#pragma unroll
    for (int k = 0; k < tensor_depth / 16; ++k) {
      warpgroup::multiply_accumulate(sums[0], warpgroup::matrix(rows + k * 2), warpgroup::matrix(b + k * 2),
                                     type);
    }
    warpgroup::commit();
  }
};

template <typename Products>
constexpr int stage_pieces = (Products::tile_rows + Products::rows_of_b) * 8;
template <typename Products>
constexpr std::size_t tensor_shared = std::size_t{Products::stages} * stage_pieces<Products> * 16;
/// Columns of the result in an item; with Swiglu each takes two rows of B.
template <typename Products, bool Swiglu>
constexpr int tensor_columns = Swiglu ? Products::rows_of_b / 2 : Products::rows_of_b;

/// Brings the steps of a block's items to shared memory, one after the other.
///
/// Which row of B a row of a stage is: with Swiglu the rows that belong to a warp are gate rows, then the up rows of
/// the same columns, so that a thread has both of a column.
template <typename Products, typename T, bool Swiglu>
class Copies {
 public:
  __device__ explicit Copies(const GroupedArguments<T>& g)
      : g_(g), index_(static_cast<int>(blockIdx.x)), items_(items_of<columns>(g)) {
    find();
  }

  /// Begin to copy the next step, if there is one, and end the group of copies.
  __device__ void next(uint4* stage) {
    if (index_ < items_) {
      copy(stage);
      from_ += tensor_depth;
      if (from_ >= g_.depth) {
        index_ += static_cast<int>(gridDim.x);
        find();
      }
    }
    copy_commit();
  }

 private:
  static constexpr int columns = tensor_columns<Products, Swiglu>;
  static constexpr int rows_apart =
      Products::threads / 8;  // of a thread, which copies a piece of every so manieth row
  static constexpr int a_rows = Products::tile_rows / rows_apart;
  static constexpr int b_rows = Products::rows_of_b / rows_apart;
  static constexpr int half = Products::warp_columns / 2;

  __device__ void find() {
    from_ = 0;
    if (index_ >= items_) return;
    const Item item = item_at<columns>(g_, index_);
    const int row = static_cast<int>(threadIdx.x) / 8;
#pragma unroll
    for (int i = 0; i < a_rows; ++i) {
      const int place = item.begin + row + rows_apart * i;
      row_of_a_[i] = place < item.end ? row_of(g_, place) : -1;
    }
    column_ = item.column + row;
    b_ = matrix_of<Swiglu>(g_, item.expert);
  }

  __device__ void copy(uint4* stage) const {
    const int row = static_cast<int>(threadIdx.x) / 8;
    const int piece = static_cast<int>(threadIdx.x) % 8;
    const int at = from_ + piece * 8;
    const bool inside = at < g_.depth;
#pragma unroll
    for (int i = 0; i < a_rows; ++i) {
      // a row that is not there may hold anything: it makes only its own row of the result
      if (row_of_a_[i] < 0) continue;
      const T* const from = g_.a + std::int64_t{row_of_a_[i]} * g_.depth + at;
      copy_16_bytes(stage + place_of(row + rows_apart * i, piece), inside ? from : g_.a, inside);
    }
#pragma unroll
    for (int i = 0; i < b_rows; ++i) {
      const int first = rows_apart * i;  // of this thread's row and its neighbours'
      const bool up = Swiglu && first % Products::warp_columns >= half;
      const int column = column_ + (Swiglu ? first / Products::warp_columns * half + first % half : first);
      const bool wanted = inside && column < g_.columns;
      const std::int64_t b_row = column + (up ? std::int64_t{g_.columns} : 0);
      copy_16_bytes(stage + Products::tile_rows * 8 + place_of(row + first, piece),
                    wanted ? b_ + b_row * g_.depth + at : g_.b, wanted);
    }
  }

  const GroupedArguments<T>& g_;
  int index_;  // of the item
  int items_;
  int from_ = 0;  // along the rows
  int row_of_a_[a_rows];
  int column_ = 0;  // of this thread's first row of B
  const T* b_ = nullptr;
};

/// What a warp has of an item goes to the result.
template <typename Products, bool Swiglu, typename T>
__device__ void store_item(const GroupedArguments<T>& g, const Item& item,
                           const typename Products::Sums& sums, int warp_row, int warp_column) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  constexpr int blocks = Products::warp_columns / 8 / (Swiglu ? 2 : 1);  // of 8 columns
#pragma unroll
  for (int m = 0; m < Products::warp_rows / 16; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = item.begin + warp_row + m * 16 + half * 8 + lane / 4;
      if (place >= item.end) continue;
      T* const row = g.out + static_cast<std::int64_t>(place) * g.columns;
#pragma unroll
      for (int n = 0; n < blocks; ++n) {
        const int column = item.column + warp_column / (Swiglu ? 2 : 1) + n * 8 + lane % 4 * 2;
        if (column >= g.columns) continue;
        Vector<T, 2> two;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float value = sums[m][n][half * 2 + i];
          two.values[i] =
              from_float<T>(Swiglu ? swiglu(value, sums[m][n + (Swiglu ? blocks : 0)][half * 2 + i]) : value);
        }
        store(row + column, two);
      }
    }
  }
}

template <typename Products, typename T, bool Swiglu>
__device__ void multiply_items(const GroupedArguments<T>& g) {
  constexpr int columns = tensor_columns<Products, Swiglu>;
  constexpr int ahead = Products::stages - 1 - Products::under_way;  // steps whose copies have begun
  constexpr int warps_across = Products::rows_of_b / Products::warp_columns;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int warp_row = warp / warps_across * Products::warp_rows;
  const int warp_column = warp % warps_across * Products::warp_columns;
  static_assert(Products::threads / warp_size / warps_across * Products::warp_rows == Products::tile_rows);

  auto* const shared = shared_memory<uint4>();
  const auto stage = [&](int slot) { return shared + slot * stage_pieces<Products>; };
  int slot = 0;  // of the present step
  Copies<Products, T, Swiglu> copies(g);
  for (int step = 0; step < ahead; ++step) copies.next(stage(step));

  const int items = items_of<columns>(g);
  for (auto index = static_cast<int>(blockIdx.x); index < items; index += static_cast<int>(gridDim.x)) {
    const Item item = item_at<columns>(g, index);
    const bool exists = item.begin + warp_row / Products::rows_together * Products::rows_together < item.end;
    typename Products::Sums sums = {};
    for (int from = 0; from < g.depth; from += tensor_depth) {
      copy_wait<ahead - 1>();
      Products::begin(sums);
      Products::template wait<Products::under_way>(sums);
      __syncthreads();
      // the step's copies are there for everybody, and nobody reads what the next copies replace
      if (exists) {
        Products::multiply(sums, stage(slot), stage(slot) + Products::tile_rows * 8, warp_row, warp_column,
                           T{});
      }
      copies.next(stage((slot + ahead) % Products::stages));
      slot = (slot + 1) % Products::stages;
    }
    Products::template wait<0>(sums);
    store_item<Products, Swiglu>(g, item, sums, warp_row, warp_column);
  }
  copy_wait<0>();
}

/// As many blocks as the GPU can hold share the items.
template <typename Products, typename T, bool Swiglu>
__global__ void __launch_bounds__(Products::threads, Products::blocks)
    multiply_on_tensor_cores(GroupedArguments<T> g) {
  if constexpr (Products::compiled) multiply_items<Products, T, Swiglu>(g);
}

}  // namespace qwenport::cuda
