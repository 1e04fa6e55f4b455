// Building blocks of the kernels: number conversions, vector accesses, shared memory, warp sums, launches, and the
// tensor-core instructions common to all GPUs since SM80. Kernels use CUDA's own names for the rest.
//
// With QWENPORT_CUDA_ON_CPU defined the tests' header replaces CUDA and the same sources run on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef QWENPORT_CUDA_ON_CPU
#include "cuda_on_cpu.hpp"
#endif

namespace qwenport::cuda {

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xFFFFFFFFU;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

/// N numbers that are read and written together; their address must be aligned to their total size.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T values[N];
};

/// The same, still packed as it was read. Given single 16-bit numbers, the compiler would unpack them right after each
/// read, and so wait for one read before it issues the next.
template <typename T, int N>
struct Packed {
  std::conditional_t<sizeof(T) * N == 16, uint4, Vector<T, N>> words;

  [[nodiscard]] __device__ Vector<T, N> unpacked() const {
    Vector<T, N> vector;
    memcpy(&vector, &words, sizeof vector);
    return vector;
  }
};

template <int N, typename T>
__device__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}
template <int N, typename T>
__device__ void store(T* to, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(to) = vector;
}

/// Numbers in 16 bytes, the widest access.
template <typename T>
constexpr int widest = 16 / static_cast<int>(sizeof(T));

/// The local GPU.
struct Gpu {
  int major = 0;  ///< compute capability
  int multiprocessors = 0;
};
inline cudaError_t find_gpu(Gpu& gpu) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&gpu.major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(&gpu.multiprocessors, cudaDevAttrMultiProcessorCount, device);
}

/// Whether the library has code for Hopper; CMakeLists.txt says so.
#if defined(QWENPORT_CUDA_ON_CPU) || defined(QWENPORT_HOPPER)
constexpr bool has_hopper_code = true;
#else
constexpr bool has_hopper_code = false;
#endif
/// Whether that code runs: a library without it may run its SM80 code there, translated by the driver.
inline bool runs_on_hopper(const Gpu& gpu) { return has_hopper_code && gpu.major == 9; }

inline bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

__device__ inline float warp_sum(float value) {
  for (int other = warp_size / 2; other > 0; other /= 2) value += __shfl_xor_sync(all_lanes, value, other);
  return value;
}

/// silu(gate) * up; the division is accurate to two units in the last place, and free of branches.
__device__ inline float swiglu(float gate, float up) { return __fdividef(gate, 1 + expf(-gate)) * up; }

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

/// Let a kernel have `shared` bytes of dynamic shared memory, which may exceed the 48 KiB available by default.
template <typename... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), std::size_t shared) {
  if (shared <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
}

/// The number of a kernel's blocks that the GPU runs at once: the grid of a persistent kernel.
template <typename... Parameters>
cudaError_t find_resident_blocks(void (*kernel)(Parameters...), int threads, std::size_t shared,
                                 const Gpu& gpu, std::int64_t& blocks) {
  cudaError_t status = allow_shared(kernel, shared);
  if (status != cudaSuccess) return status;
  int on_each = 0;
  status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&on_each, reinterpret_cast<const void*>(kernel),
                                                         threads, shared);
  if (status != cudaSuccess) return status;
  blocks = std::int64_t{on_each} * gpu.multiprocessors;
  return blocks == 0 ? cudaErrorLaunchOutOfResources : cudaSuccess;
}

#ifdef QWENPORT_CUDA_ON_CPU

using cuda_on_cpu::copy_16_bytes;
using cuda_on_cpu::copy_commit;
using cuda_on_cpu::copy_wait;
using cuda_on_cpu::launch;
using cuda_on_cpu::load_matrices;
using cuda_on_cpu::may_begin_next;
using cuda_on_cpu::multiply_accumulate;
using cuda_on_cpu::shared_address;
using cuda_on_cpu::shared_memory;
using cuda_on_cpu::wait_for_previous;

template <int N, typename T>
Packed<T, N> load_once(const T* from) {
  Packed<T, N> read;
  memcpy(&read.words, from, sizeof read.words);
  cuda_on_cpu::current->bytes_read_once += sizeof read.words;
  return read;
}

#else

/// A load of data that is not read again soon: it bypasses the L1 cache. Not for data that the kernel writes.
template <int N, typename T>
__device__ Packed<T, N> load_once(const T* from) {
  Packed<T, N> read;
  if constexpr (sizeof(Vector<T, N>) == 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(read.words.x), "=r"(read.words.y), "=r"(read.words.z), "=r"(read.words.w)
                 : "l"(from));
  } else {
    read.words = load<N>(from);
  }
  return read;
}

/// The block's dynamic shared memory.
template <typename T>
__device__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char shared_bytes[];
  return reinterpret_cast<T*>(shared_bytes);
}
/// A shared-memory address in the form that instructions take.
__device__ inline std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
}

/// A kernel that is launched `early` (programmatic dependent launch) begins while its predecessor in the stream is still
/// running, once all the predecessor's blocks have allowed it or have ended. It waits before it touches memory that its
/// predecessor writes or reads.
__device__ inline void may_begin_next() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}

/// Launch a kernel.
/// \param early see may_begin_next; only where runs_on_hopper.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, std::size_t shared,
                   cudaStream_t stream, bool early, Arguments... arguments) {
  const cudaError_t status = allow_shared(kernel, shared);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

/// Copy 16 bytes to shared memory asynchronously; if they are not wanted, write zeros and read nothing.
__device__ inline void copy_16_bytes(void* shared, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
}
/// Commit a group of this thread's copies.
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
/// Wait until at most the last `Left` groups of this thread are in flight.
template <int Left>
__device__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

/// Four 8x8 matrices of 16-bit numbers from shared memory; lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(shared_address(row))
               : "memory");
}

/// c [16, 8] += a [16, 16] b [16, 8], in the register layout of mma.m16n8k16.
__device__ inline void multiply_accumulate(float (&c)[4], const std::uint32_t (&a)[4],
                                           const std::uint32_t (&b)[2], __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void multiply_accumulate(float (&c)[4], const std::uint32_t (&a)[4],
                                           const std::uint32_t (&b)[2], __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace qwenport::cuda
