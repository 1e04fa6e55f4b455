// Hopper's warpgroup matmul (wgmma): four warps multiply matrices in shared memory, asynchronously.
//
// wgmma reads memory through another proxy than a thread's own accesses, hence the fences: `fence_async_proxy` by the
// thread that wrote to shared memory, before the barrier after which a wgmma may read it; `fence_accumulators` between a
// thread's own use of accumulators and a wgmma that adds to them. From a wgmma on, its accumulators may not be touched
// until `wait_group` says that it has finished.
#pragma once

#include "device.cuh"

#ifdef QWENPORT_CUDA_ON_CPU
#include "wgmma_on_cpu.hpp"
#endif

namespace qwenport::cuda::warpgroup {

constexpr int warps = 4;
constexpr int rows = 64;      // of a and of the accumulators, 16 per warp
constexpr int columns = 192;  // of the accumulators, rows of b
/// Alignment of matrices in bytes.
constexpr std::size_t alignment = 1024;

/// An mbarrier in shared memory: counts arriving threads, in phases.
using Barrier = std::uint64_t;

/// The wgmma descriptor of rows of 128 bytes, 8 pieces of 16 bytes each, where row r has piece i at place i ^ (r % 8):
/// the address / 16, the stride of 8 rows / 16, and the swizzle. 16 numbers further along the rows is 32 bytes further.
__device__ inline std::uint64_t descriptor(const void* shared) {
  constexpr std::uint64_t next_8_rows = 1024 / 16;
  constexpr std::uint64_t swizzle_128_bytes = 1;
  return (shared_address(shared) / 16 & 0x3FFFU) | std::uint64_t{1} << 16 | next_8_rows << 32 |
         swizzle_128_bytes << 62;
}

#ifdef QWENPORT_CUDA_ON_CPU

constexpr bool compiled = true;
using cuda_on_cpu::warpgroup::arrive;
using cuda_on_cpu::warpgroup::commit_group;
using cuda_on_cpu::warpgroup::fence_accumulators;
using cuda_on_cpu::warpgroup::fence_async_proxy;
using cuda_on_cpu::warpgroup::init;
using cuda_on_cpu::warpgroup::multiply_accumulate;
using cuda_on_cpu::warpgroup::wait_barrier;
using cuda_on_cpu::warpgroup::wait_group;

template <int Registers>
void deallocate_registers() {}
template <int Registers>
void allocate_registers() {}

#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr bool compiled = true;

/// `arrivals` complete each of its phases.
__device__ inline void init(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}
/// Arrive: this thread's earlier writes are visible to threads that wait for the phase.
__device__ inline void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
/// Wait for the end of a phase, counted from 0. At most one phase behind: the phase before the first is complete.
__device__ inline void wait_barrier(Barrier& barrier, unsigned round) {
  unsigned over = 0;
  while (over == 0) {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(over)
                 : "r"(shared_address(&barrier)), "r"(round & 1)
                 : "memory");
  }
}

/// Keep `Registers` registers per thread in this warpgroup, so that others can take more.
template <int Registers>
__device__ void deallocate_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ void allocate_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

/// Make this thread's writes to shared memory visible to wgmma.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void fence_accumulators() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// Commit a group of wgmmas.
__device__ inline void commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Wait until at most the last `Left` groups are in flight.
template <int Left>
__device__ void wait_group(float (&c)[24][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
#pragma unroll
  for (int j = 0; j < 24; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[j][i])::"memory");  // not read before this
  }
}

#define QWENPORT_SUMS_4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define QWENPORT_SUMS_16(j) \
  QWENPORT_SUMS_4(j), QWENPORT_SUMS_4(j + 1), QWENPORT_SUMS_4(j + 2), QWENPORT_SUMS_4(j + 3)
#define QWENPORT_MULTIPLY(type)                                                              \
  asm volatile(                                                                              \
      "{.reg .pred p; setp.ne.b32 p, %98, 0;"                                                \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type                           \
      " "                                                                                    \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"                              \
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                     \
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"                     \
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"                     \
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"                     \
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95}, "                   \
      "%96, %97, p, 1, 1, 0, 0;}"                                                            \
      : QWENPORT_SUMS_16(0), QWENPORT_SUMS_16(4), QWENPORT_SUMS_16(8), QWENPORT_SUMS_16(12), \
        QWENPORT_SUMS_16(16), QWENPORT_SUMS_16(20)                                           \
      : "l"(a), "l"(b), "r"(1))

/// c [64, 192] += a [64, 16] b [192, 16]^T. Lane 4 g + t of warp w has rows 16 w + g (and + 8) of c: c[j] are columns
/// 8 j + 2 t and the next one of the first, then of the other.
__device__ inline void multiply_accumulate(float (&c)[24][4], std::uint64_t a, std::uint64_t b,
                                           __nv_bfloat16) {
  QWENPORT_MULTIPLY("bf16");
}
__device__ inline void multiply_accumulate(float (&c)[24][4], std::uint64_t a, std::uint64_t b, __half) {
  QWENPORT_MULTIPLY("f16");
}

#undef QWENPORT_MULTIPLY
#undef QWENPORT_SUMS_16
#undef QWENPORT_SUMS_4

#else

/// Other architectures do not have these instructions, and kernels for them do not call these.
constexpr bool compiled = false;
__device__ void init(Barrier& barrier, int arrivals);
__device__ void arrive(Barrier& barrier);
__device__ void wait_barrier(Barrier& barrier, unsigned round);
template <int Registers>
__device__ void deallocate_registers();
template <int Registers>
__device__ void allocate_registers();
__device__ void fence_async_proxy();
__device__ void fence_accumulators();
__device__ void commit_group();
template <int Left>
__device__ void wait_group(float (&c)[24][4]);
template <typename T>
__device__ void multiply_accumulate(float (&c)[24][4], std::uint64_t a, std::uint64_t b, T type);

#endif

}  // namespace qwenport::cuda::warpgroup
