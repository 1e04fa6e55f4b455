// Grouped GEMM on Hopper, warp-specialised and persistent: three consumer warpgroups with wgmma, 64 rows each, and four
// producer warps with cp.async.
//
// Shared memory is a pipeline with one stage per producer warp. A stage's `full` barrier says that the warp has loaded a
// k tile, its `empty` barrier that no wgmma reads it any more. A producer waits only for its own copies, so that the
// proxy fence after them, which may wait for all copies of a warp, delays no others.
#pragma once

#include "grouped_gemm_tensor.cuh"
#include "hopper.cuh"

namespace qwenport::cuda::sm90 {

constexpr int consumer_warpgroups = 3;
using Sizes = TileShape<consumer_warpgroups * warpgroup::rows, warpgroup::columns,
                        warpgroup::rows / warpgroup::warps, warpgroup::columns>;
constexpr int warpgroup_threads = warpgroup::warps * warp_size;
constexpr int threads = (consumer_warpgroups + 1) * warpgroup_threads;
constexpr int stages = warpgroup::warps;
/// Registers per thread (setmaxnreg): of 128 for all, a producer gives up 72, for 24 more for each consumer.
constexpr int producer_registers = 56;
constexpr int consumer_registers = 152;
static_assert(producer_registers + consumer_warpgroups * consumer_registers <=
              (consumer_warpgroups + 1) * 65536 / threads);

struct Shared {
  uint4 stage[stages][Sizes::stage_pieces];
  warpgroup::Barrier full[stages];
  warpgroup::Barrier empty[stages];
  int rows_of_a[stages][Sizes::rows];  ///< of a producer warp's work tile; -1 if there is none
};
static_assert(sizeof(Shared::stage[0]) % warpgroup::alignment == 0);

/// A stage of the pipeline, and the phase of its barriers: how often the pipeline has wrapped around.
struct PipelineState {
  int stage = 0;
  unsigned phase = 0;

  __device__ void advance() {
    stage = (stage + 1) % stages;
    phase += stage == 0 ? 1 : 0;
  }
};

/// A producer warp loads a k tile into a stage, four rows at a time, 128 bytes of each. One warp loads all of it, so that
/// few instructions per copy matter: addresses advance by additions.
template <typename T, bool Swiglu>
__device__ void load_stage(const GroupedArguments<T>& g, const WorkTile& work_tile, const int* rows_of_a,
                           int from, uint4* stage) {
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int piece = lane % 8;
  const int first = lane / 8;  // of this lane's rows, which are 4 apart
  const int at = from + piece * 8;
  const bool inside = at < g.depth;
  uint4* const even = stage + swizzled(first, piece);
  uint4* const odd = stage + swizzled(first + 4, piece);

  const auto* const a = reinterpret_cast<const char*>(g.a + at);
  const int row_bytes = g.depth * static_cast<int>(sizeof(T));
  constexpr int together = 8;  // rows that a lane looks up at once
  static_assert(Sizes::rows % (4 * together) == 0);
  for (int from_row = 0; from_row < Sizes::rows && work_tile.begin + from_row < work_tile.end;
       from_row += 4 * together) {
    int row_of_a[together];
#pragma unroll
    for (int i = 0; i < together; ++i) row_of_a[i] = rows_of_a[from_row + 4 * i + first];
#pragma unroll
    for (int i = 0; i < together; ++i) {
      // a row that does not exist may hold anything: it affects only its own row of the result
      uint4* const to = (i % 2 == 0 ? even : odd) + (from_row + i / 2 * 8) * 8;
      if (row_of_a[i] >= 0) copy_16_bytes(to, a + std::int64_t{row_of_a[i]} * row_bytes, inside);
    }
  }

  constexpr int parts = Swiglu ? 2 : 1;  // gate and up
  constexpr int part_rows = Sizes::columns<Swiglu>;
  static_assert(part_rows % 8 == 0);
  const int rows = inside ? g.columns - work_tile.column : 0;  // existing rows, a multiple of 8
  const std::int64_t step = std::int64_t{4} * row_bytes;
#pragma unroll
  for (int part = 0; part < parts; ++part) {
    const std::int64_t row_of_b = work_tile.column + first + static_cast<std::int64_t>(part) * g.columns;
    const auto* b =
        reinterpret_cast<const char*>(matrix_of<Swiglu>(g, work_tile.expert) + row_of_b * g.depth + at);
    const int stage_row = Sizes::rows + part * part_rows;
#pragma unroll 4
    for (int row = 0; row < part_rows; row += 8) {
      copy_16_bytes(even + (stage_row + row) * 8, b, row < rows);
      copy_16_bytes(odd + (stage_row + row) * 8, b + step, row < rows);
      b += 2 * step;
    }
  }
}

/// A producer warp: every n-th k tile, for n stages, over all work tiles of the block.
template <typename T, bool Swiglu>
__device__ void produce(const GroupedArguments<T>& g, Shared& shared) {
  constexpr int columns = Sizes::columns<Swiglu>;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int mine = static_cast<int>(threadIdx.x) / warp_size % warpgroup::warps;  // its stage
  int* const rows_of_a = shared.rows_of_a[mine];
  PipelineState state;
  const int work_tiles = count_work_tiles<columns>(g);
  for (int wave = 0; work_tile_in_wave(wave) < work_tiles; ++wave) {
    const WorkTile work_tile = work_tile_at<columns>(g, work_tile_in_wave(wave));
    __syncwarp();  // no lane reads the last work tile's rows any more
    for (int row = lane; row < Sizes::rows; row += warp_size) {
      const int place = work_tile.begin + row;
      rows_of_a[row] = place < work_tile.end ? row_of(g, place) : -1;
    }
    __syncwarp();
    for (int from = 0; from < g.depth; from += tensor_tile_k, state.advance()) {
      if (state.stage != mine) continue;
      warpgroup::wait_barrier(shared.empty[mine], state.phase + 1);
      load_stage<T, Swiglu>(g, work_tile, rows_of_a, from, shared.stage[mine]);
      copy_commit();
      copy_wait<0>();
      warpgroup::fence_async_proxy();
      warpgroup::arrive(shared.full[mine]);
    }
  }
}

/// A consumer warpgroup: mainloop and epilogue of each work tile of the block.
template <typename T, bool Swiglu>
__device__ void consume(const GroupedArguments<T>& g, Shared& shared) {
  constexpr int columns = Sizes::columns<Swiglu>;
  const int warp = static_cast<int>(threadIdx.x) / warp_size;
  const int first_row = warp / warpgroup::warps * warpgroup::rows;
  PipelineState state;
  const auto release = [&shared](int stage) {
    if (threadIdx.x % warp_size == 0) warpgroup::arrive(shared.empty[stage]);
  };
  const int work_tiles = count_work_tiles<columns>(g);
  for (int wave = 0; work_tile_in_wave(wave) < work_tiles; ++wave) {
    const WorkTile work_tile = work_tile_at<columns>(g, work_tile_in_wave(wave));
    const bool exists = work_tile.begin + first_row < work_tile.end;
    Sizes::Accumulators accumulators = {};
    for (int from = 0; from < g.depth; from += tensor_tile_k, state.advance()) {
      warpgroup::wait_barrier(shared.full[state.stage], state.phase);
      if (exists) {
        const uint4* const a = shared.stage[state.stage] + first_row * 8;
        const uint4* const b = shared.stage[state.stage] + Sizes::rows * 8;
        warpgroup::fence_accumulators();
#pragma unroll
        for (int k = 0; k < tensor_tile_k / 16; ++k) {
          warpgroup::multiply_accumulate(accumulators[0], warpgroup::descriptor(a + k * 2),
                                         warpgroup::descriptor(b + k * 2), T{});
        }
        warpgroup::commit_group();
      }
      warpgroup::wait_group<1>(accumulators[0]);
      if (from != 0) release((state.stage + stages - 1) % stages);
    }
    warpgroup::wait_group<0>(accumulators[0]);
    release((state.stage + stages - 1) % stages);
    if (exists) epilogue<Sizes, Swiglu>(g, work_tile, accumulators, warp * Sizes::warp_rows, 0);
  }
}

template <typename T, bool Swiglu>
__global__ void __launch_bounds__(threads, 1) grouped_gemm(GroupedArguments<T> g) {
  if constexpr (warpgroup::compiled) {
    Shared& shared = *shared_memory<Shared>();
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; ++i) {
        warpgroup::init(shared.full[i], warp_size);
        warpgroup::init(shared.empty[i], consumer_warpgroups * warpgroup::warps);
      }
    }
    __syncthreads();
    if (threadIdx.x >= consumer_warpgroups * warpgroup_threads) {
      warpgroup::deallocate_registers<producer_registers>();
      produce<T, Swiglu>(g, shared);
    } else {
      warpgroup::allocate_registers<consumer_registers>();
      consume<T, Swiglu>(g, shared);
    }
  }
}

}  // namespace qwenport::cuda::sm90
