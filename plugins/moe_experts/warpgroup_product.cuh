// The grouped product on Hopper, by warpgroups: three multiply 64 rows each with wgmma, the warps of a fourth copy.
//
// Shared memory is a ring of stages, one a copying warp. A stage is `full` when its warp has copied a step, and `empty`
// when no product reads it any more; nobody waits for anything else. A copying warp waits for its own copies alone, so
// that the fence behind them, which may wait for all copies of a warp, holds up no others.
#pragma once

#include "hopper.cuh"
#include "tensor_product.cuh"

namespace qwenport::cuda::by_warpgroups {

constexpr int groups = 3;  // that multiply
using Sizes = Tile<groups * warpgroup::rows, warpgroup::columns, warpgroup::rows / warpgroup::warps,
                   warpgroup::columns>;
constexpr int group_threads = warpgroup::warps * warp_size;
constexpr int threads = (groups + 1) * group_threads;
constexpr int stages = warpgroup::warps;
/// Registers a thread: of 128 for all, 72 are given up by each that copies, for 24 more for each that multiplies.
constexpr int copying_registers = 56;
constexpr int multiplying_registers = 152;
static_assert(copying_registers + groups * multiplying_registers <= (groups + 1) * 65536 / threads);

struct Shared {
  uint4 stage[stages][Sizes::stage_pieces];
  warpgroup::Barrier full[stages];
  warpgroup::Barrier empty[stages];
  int rows_of_a[stages][Sizes::rows];  ///< of a copying warp's item; -1 if there is none
};
static_assert(sizeof(Shared::stage[0]) % warpgroup::alignment == 0);

/// A position in the ring, and how often it has gone round.
struct Slot {
  int stage = 0;
  unsigned round = 0;

  __device__ void advance() {
    stage = (stage + 1) % stages;
    round += stage == 0 ? 1 : 0;
  }
};

/// A warp copies a step, four rows at a time, 128 bytes of each. One warp does a stage's copies, so that few instructions
/// a copy matter: rows and where they go advance by additions.
template <typename T, bool Swiglu>
__device__ void copy_step(const GroupedArguments<T>& g, const Item& item, const int* rows_of_a, int from,
                          uint4* stage) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int piece = lane % 8;
  const int first = lane / 8;  // of this lane's rows, which are 4 apart
  const int at = from + piece * 8;
  const bool inside = at < g.depth;
  uint4* const even = stage + place_of(first, piece);
  uint4* const odd = stage + place_of(first + 4, piece);

  const auto* const a = reinterpret_cast<const char*>(g.a + at);
  const int row_bytes = g.depth * static_cast<int>(sizeof(T));
  constexpr int together = 8;  // rows of a lane that are looked up at once
  static_assert(Sizes::rows % (4 * together) == 0);
  for (int from_row = 0; from_row < Sizes::rows && item.begin + from_row < item.end;
       from_row += 4 * together) {
    int row_of_a[together];
#pragma unroll
    for (int i = 0; i < together; ++i) row_of_a[i] = rows_of_a[from_row + 4 * i + first];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      // a row that is not there may hold anything: it makes only its own row of the result
      uint4* const to = (i % 2 == 0 ? even : odd) + (from_row + i / 2 * 8) * 8;
      if (row_of_a[i] >= 0) copy_16_bytes(to, a + std::int64_t{row_of_a[i]} * row_bytes, inside);
    }
  }

  constexpr int parts = Swiglu ? 2 : 1;  // gate and up
  constexpr int part_rows = Sizes::columns<Swiglu>;
  static_assert(part_rows % 8 == 0);
  const int rows = inside ? g.columns - item.column : 0;  // that there are, a multiple of 8
  const std::int64_t step = std::int64_t{4} * row_bytes;
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    const std::int64_t row_of_b = item.column + first + static_cast<std::int64_t>(part) * g.columns;
    const auto* b =
        reinterpret_cast<const char*>(matrix_of<Swiglu>(g, item.expert) + row_of_b * g.depth + at);
    const int stage_row = Sizes::rows + part * part_rows;
#pragma unroll 4
    for (int row = 0; row < part_rows; row += 8) {
      copy_16_bytes(even + (stage_row + row) * 8, b, row < rows);
      copy_16_bytes(odd + (stage_row + row) * 8, b + step, row < rows);
      b += 2 * step;
    }
  }
}

/// What a copying warp does: every so manieth step of the block's items.
template <typename T, bool Swiglu>
__device__ void copy_items(const GroupedArguments<T>& g, Shared& shared) {
  constexpr int columns = Sizes::columns<Swiglu>;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int mine = static_cast<int>(threadIdx.x) / warp_size % warpgroup::warps;  // its stage
  int* const rows_of_a = shared.rows_of_a[mine];
  Slot slot;
  const int items = items_of<columns>(g);
  for (int round = 0; index_in(round) < items; ++round) {
    const Item item = item_at<columns>(g, index_in(round));
    __syncwarp();  // nobody reads the last item's rows any more
    for (int row = lane; row < Sizes::rows; row += warp_size) {
      const int place = item.begin + row;
      rows_of_a[row] = place < item.end ? row_of(g, place) : -1;
    }
    __syncwarp();
    for (int from = 0; from < g.depth; from += tensor_depth, slot.advance()) {
      if (slot.stage != mine) continue;
      warpgroup::wait_for(shared.empty[mine], slot.round + 1);
      copy_step<T, Swiglu>(g, item, rows_of_a, from, shared.stage[mine]);
      copy_commit();
      copy_wait<0>();
      warpgroup::fence_shared();
      warpgroup::arrive(shared.full[mine]);
    }
  }
}

/// What a multiplying warpgroup does.
template <typename T, bool Swiglu>
__device__ void multiply_items(const GroupedArguments<T>& g, Shared& shared) {
  constexpr int columns = Sizes::columns<Swiglu>;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int first_row = warp / warpgroup::warps * warpgroup::rows;
  Slot slot;
  const auto release = [&shared](int stage) {
    if (threadIdx.x % warp_size == 0) warpgroup::arrive(shared.empty[stage]);
  };
  const int items = items_of<columns>(g);
  for (int round = 0; index_in(round) < items; ++round) {
    const Item item = item_at<columns>(g, index_in(round));
    const bool exists = item.begin + first_row < item.end;
    Sizes::Sums sums = {};
    for (int from = 0; from < g.depth; from += tensor_depth, slot.advance()) {
      warpgroup::wait_for(shared.full[slot.stage], slot.round);
      if (exists) {
        const uint4* const a = shared.stage[slot.stage] + first_row * 8;
        const uint4* const b = shared.stage[slot.stage] + Sizes::rows * 8;
        warpgroup::fence();
#pragma unroll
        for (int k = 0; k < tensor_depth / 16; ++k) {
          warpgroup::multiply_accumulate(sums[0], warpgroup::matrix(a + k * 2), warpgroup::matrix(b + k * 2),
                                         T{});
        }
        warpgroup::commit();
      }
      warpgroup::wait<1>(sums[0]);
      if (from != 0) release((slot.stage + stages - 1) % stages);
    }
    warpgroup::wait<0>(sums[0]);
    release((slot.stage + stages - 1) % stages);
    if (exists) store_item<Sizes, Swiglu>(g, item, sums, warp * Sizes::warp_rows, 0);
  }
}

template <typename T, bool Swiglu>
__global__ void __launch_bounds__(threads, 1) multiply(GroupedArguments<T> g) {
  if constexpr (warpgroup::compiled) {
    Shared& shared = *shared_memory<Shared>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        warpgroup::begin(shared.full[i], warp_size);
        warpgroup::begin(shared.empty[i], groups * warpgroup::warps);
      }
    }
    __syncthreads();
    if (threadIdx.x >= groups * group_threads) {
      warpgroup::give_registers<copying_registers>();
      copy_items<T, Swiglu>(g, shared);
    } else {
      warpgroup::take_registers<multiplying_registers>();
      multiply_items<T, Swiglu>(g, shared);
    }
  }
}

}  // namespace qwenport::cuda::by_warpgroups
