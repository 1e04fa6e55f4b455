// The grouped product by warps, each for itself, with mma.sync, which every GPU since SM80 has.
//
// All threads of a block copy and multiply, a barrier a step between them.
#pragma once

#include "tensor_product.cuh"

namespace qwenport::cuda::by_warps {

using Sizes = Tile<128, 128, 32, 64>;
constexpr int threads = 256;
constexpr int warps_across = Sizes::rows_of_b / Sizes::warp_rows_of_b;
constexpr int stages = 3;
constexpr int blocks = 2;  // a multiprocessor, where they fit
constexpr std::size_t shared = std::size_t{stages} * Sizes::stage_pieces * 16;
static_assert(threads / warp_size / warps_across * Sizes::warp_rows == Sizes::rows);

/// Brings the steps of a block's items to shared memory, one after the other.
template <typename T, bool Swiglu>
class Copies {
 public:
  __device__ explicit Copies(const GroupedArguments<T>& g) : g_(g), items_(items_of<columns>(g)) { find(); }

  /// Begin to copy the next step, if there is one, and end the group of copies.
  __device__ void next(uint4* stage) {
    if (index_in(round_) < items_) {
      copy(stage);
      from_ += tensor_depth;
      if (from_ >= g_.depth) {
        ++round_;
        find();
      }
    }
    copy_commit();
  }

 private:
  static constexpr int columns = Sizes::columns<Swiglu>;
  static constexpr int rows_apart = threads / 8;  // of a thread, which copies a piece of every so manieth row
  static constexpr int a_rows = Sizes::rows / rows_apart;
  static constexpr int b_rows = Sizes::rows_of_b / rows_apart;

  __device__ void find() {
    from_ = 0;
    if (index_in(round_) >= items_) return;
    const Item item = item_at<columns>(g_, index_in(round_));
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
      constexpr int span = Sizes::warp_rows_of_b;
      const bool up = Swiglu && first % span >= span / 2;
      const int column = column_ + (Swiglu ? first / span * (span / 2) + first % (span / 2) : first);
      const bool wanted = inside && column < g_.columns;
      const std::int64_t b_row = column + (up ? std::int64_t{g_.columns} : 0);
      copy_16_bytes(stage + Sizes::rows * 8 + place_of(row + first, piece),
                    wanted ? b_ + b_row * g_.depth + at : g_.b, wanted);
    }
  }

  const GroupedArguments<T>& g_;
  int items_;
  int round_ = 0;
  int from_ = 0;  // along the rows
  int row_of_a_[a_rows];
  int column_ = 0;  // of this thread's first row of B
  const T* b_ = nullptr;
};

/// sums += a b of a step.
template <typename T>
__device__ void multiply_step(Sizes::Sums& sums, const uint4* a, const uint4* b, int row, int row_of_b) {
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
                    b + place_of(row_of_b + n * 16 + lane % 8 + lane / 16 * 8, k * 2 + lane / 8 % 2));
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

template <typename T, bool Swiglu>
__global__ void __launch_bounds__(threads, blocks) multiply(GroupedArguments<T> g) {
  constexpr int columns = Sizes::columns<Swiglu>;
  constexpr int ahead = stages - 1;  // steps whose copies have begun
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int row = warp / warps_across * Sizes::warp_rows;
  const int row_of_b = warp % warps_across * Sizes::warp_rows_of_b;

  auto* const memory = shared_memory<uint4>();
  const auto stage = [memory](int slot) { return memory + slot * Sizes::stage_pieces; };
  int slot = 0;  // of the present step
  Copies<T, Swiglu> copies(g);
  for (int step = 0; step < ahead; ++step) copies.next(stage(step));

  const int items = items_of<columns>(g);
  for (int round = 0; index_in(round) < items; ++round) {
    const Item item = item_at<columns>(g, index_in(round));
    const bool exists = item.begin + row < item.end;
    Sizes::Sums sums = {};
    for (int from = 0; from < g.depth; from += tensor_depth) {
      copy_wait<ahead - 1>();
      __syncthreads();
      // the step's copies are there for everybody, and nobody reads what the next copies replace
      if (exists) multiply_step<T>(sums, stage(slot), stage(slot) + Sizes::rows * 8, row, row_of_b);
      copies.next(stage((slot + ahead) % stages));
      slot = (slot + 1) % stages;
    }
    store_item<Sizes, Swiglu>(g, item, sums, row, row_of_b);
  }
  copy_wait<0>();
}

}  // namespace qwenport::cuda::by_warps
