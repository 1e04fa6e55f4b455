// Hopper's products of a warpgroup: four warps multiply matrices that lie in shared memory, while they do other things.
//
// What wgmma reads is read by another path than a thread's own accesses, hence the fences: `fence_shared` by whoever
// wrote to shared memory, before the barrier after which a product may read it; `fence` between a thread's own use of
// sums and a product that adds to them. Sums may not be touched from a product until `wait` says that it is over.
#pragma once

#include "device.cuh"

#ifdef QWENPORT_CUDA_ON_CPU
#include "wgmma_on_cpu.hpp"
#endif

namespace qwenport::cuda::warpgroup {

constexpr int warps = 4;
constexpr int rows = 64;      // of a and of the sums, 16 a warp
constexpr int columns = 192;  // of the sums, rows of b
/// Bytes to which matrices are aligned.
constexpr std::size_t alignment = 1024;

/// In shared memory: counts threads that arrive, in rounds.
using Barrier = std::uint64_t;

/// What tells a product of rows of 128 bytes, 8 pieces of 16, in which row r has piece i at place i ^ (r % 8): the
/// address / 16, the distance of 8 rows / 16, and the kind of turning. 16 numbers further along the rows is 32 bytes further.
__device__ inline std::uint64_t matrix(const void* shared) {
  constexpr std::uint64_t next_8_rows = 1024 / 16;
  constexpr std::uint64_t turned_in_128_bytes = 1;
  return (shared_address(shared) / 16 & 0x3FFFU) | std::uint64_t{1} << 16 | next_8_rows << 32 |
         turned_in_128_bytes << 62;
}

#ifdef QWENPORT_CUDA_ON_CPU

constexpr bool compiled = true;
using cuda_on_cpu::warpgroup::arrive;
using cuda_on_cpu::warpgroup::begin;
using cuda_on_cpu::warpgroup::commit;
using cuda_on_cpu::warpgroup::fence;
using cuda_on_cpu::warpgroup::fence_shared;
using cuda_on_cpu::warpgroup::multiply_accumulate;
using cuda_on_cpu::warpgroup::wait;
using cuda_on_cpu::warpgroup::wait_for;

template <int Registers>
void give_registers() {}
template <int Registers>
void take_registers() {}

#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)

constexpr bool compiled = true;

/// `arrivals` end each of its rounds.
__device__ inline void begin(Barrier& barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
}
/// What this thread did before is there for whoever waits for the round.
__device__ inline void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}
/// Wait for the end of a round, 0 the first. No more than one behind: the round before the first is over.
__device__ inline void wait_for(Barrier& barrier, unsigned round) {
  unsigned over = 0;
  while (over == 0) {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(over)
                 : "r"(shared_address(&barrier)), "r"(round & 1)
                 : "memory");
  }
}

/// Of this warpgroup's registers `Registers` a thread stay, so that others can take more.
template <int Registers>
__device__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

/// What this thread wrote to shared memory is there for products.
__device__ inline void fence_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// End a group of products.
__device__ inline void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Wait until no more than the last `Left` groups are under way.
template <int Left>
__device__ void wait(float (&c)[24][4]) {
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
__device__ void begin(Barrier& barrier, int arrivals);
__device__ void arrive(Barrier& barrier);
__device__ void wait_for(Barrier& barrier, unsigned round);
template <int Registers>
__device__ void give_registers();
template <int Registers>
__device__ void take_registers();
__device__ void fence_shared();
__device__ void fence();
__device__ void commit();
template <int Left>
__device__ void wait(float (&c)[24][4]);
template <typename T>
__device__ void multiply_accumulate(float (&c)[24][4], std::uint64_t a, std::uint64_t b, T type);

#endif

}  // namespace qwenport::cuda::warpgroup
