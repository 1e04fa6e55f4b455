// CUDA's built-ins for g++, so that the kernels' own sources run without a GPU: blocks one after the other, a
// block's threads as fibres on one CPU thread.
//
// It is stricter than a GPU. Shared memory is poisoned before each block and is exactly as large as asked for;
// asynchronous copies destroy what they replace at once and land when they are waited for; matrices are loaded without
// bank conflicts; a warp's collective waits for all 32 lanes, and a block in which nobody can go on is an error. Fibres
// run in an order that changes from block to block. A kernel begins when its successor is launched, or when it is
// waited for; the successor that is launched early runs before it, until it waits. wgmma_on_cpu.hpp adds Hopper's
// products.
#pragma once

#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

constexpr int lanes = 32;
constexpr std::size_t stack_bytes = 128 * 1024;

[[noreturn]] inline void misuse(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::abort();
}

/// What the lanes of a warp tell each other. Two sets, since a lane may be one exchange ahead.
struct Warp {
  int arrived = 0;
  unsigned generation = 0;
  alignas(16) unsigned char told[2][lanes][64];
};

struct Copy {
  void* to;
  const void* from;
  bool wanted;
};

/// Shared memory that a product reads until `group` of its thread is waited for.
struct Read {
  const unsigned char* begin;
  const unsigned char* end;
  unsigned group;
};

/// Sums that a thread's products are adding to, and the last group that does.
struct UnderWay {
  float* sums;
  std::vector<float> values;
  unsigned group;
};

/// Where a fibre goes on. It begins by setcontext, which asks the kernel for signal masks: too slow for every switch.
struct Context {
  ucontext_t beginning{};
  void* place[5]{};
  bool begun = true;
};

/// Not instrumented, and a function of its own, for the sake of the built-ins.
__attribute__((noinline, no_sanitize("address", "undefined"))) inline void jump(Context& from, Context& to) {
  if (__builtin_setjmp(from.place) != 0) return;
  if (!to.begun) {
    to.begun = true;
    setcontext(&to.beginning);
  }
  __builtin_longjmp(to.place, 1);
}

struct Fibre {
  Context context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  void* fake_stack = nullptr;
  bool finished = false;
  const unsigned* awaited = nullptr;  // goes on when this is no longer `seen`
  unsigned seen = 0;
  dim3 index{};
  unsigned number = 0;
  std::deque<std::vector<Copy>> copies;  // the last group is still open
  bool waited_for_previous = false;
  // of Hopper's products
  bool shared_fenced = true;
  bool sums_fenced = false;
  unsigned group = 0;     // the open one
  unsigned products = 0;  // so far
  std::vector<UnderWay> under_way;
  std::vector<Read> reads;
};

struct Block {
  std::function<void()> kernel;
  dim3 grid, size, index;
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  // the operands of each product of each warpgroup, told by whichever thread came first
  std::vector<std::vector<std::pair<std::uint64_t, std::uint64_t>>> products;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  Fibre* running = nullptr;
  unsigned unfinished = 0, waiting = 0, generation = 0;
  unsigned long progress = 0;
  bool early = false;
  std::size_t bytes_read_once = 0;            // by all blocks of the kernel
  std::vector<std::function<void()>> checks;  // when the block has ended
};

/// The GPU that this plays, "90" if QWENPORT_TEST_GPU is not set; "" is none.
inline int capability() {
  const char* const text = std::getenv("QWENPORT_TEST_GPU");
  return text != nullptr ? std::atoi(text) : 90;
}
/// Shared memory that a block may ask for, by CUDA's programming guide.
inline std::size_t most_shared() {
  const int gpu = capability();
  const std::size_t kib = gpu == 90 || gpu == 100 ? 227 : gpu == 80 ? 163 : 99;
  return kib * 1024;
}

inline Block* current = nullptr;

/// Switch between the scheduler and a fibre, and tell the address sanitizer.
inline void switch_context(Context& from, Context& to, void** fake_stack, const void* stack,
                           std::size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
  jump(from, to);
}

inline void arrived_in_fibre(Fibre& fibre) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &current->scheduler_stack,
                                  &current->scheduler_stack_bytes);
#else
  (void)fibre;
#endif
}

inline void yield() {
  Fibre& fibre = *current->running;
  switch_context(fibre.context, current->scheduler, &fibre.fake_stack, current->scheduler_stack,
                 current->scheduler_stack_bytes);
  arrived_in_fibre(fibre);
}

/// Until another fibre changes `generation`.
inline void wait_for_next(const unsigned& generation) {
  Fibre& fibre = *current->running;
  fibre.seen = generation;
  fibre.awaited = &generation;
  yield();
  fibre.awaited = nullptr;
}

/// Whether the barrier opened.
inline bool release_if_all_wait() {
  Block& block = *current;
  if (block.waiting == 0 || block.waiting != block.unfinished) return false;
  block.waiting = 0;
  ++block.generation;
  ++block.progress;
  return true;
}

inline void fibre_main() {
  arrived_in_fibre(*current->running);
  current->kernel();
  Block& block = *current;
  Fibre& fibre = *block.running;
  fibre.finished = true;
  --block.unfinished;
  ++block.progress;
  release_if_all_wait();
  switch_context(fibre.context, block.scheduler, nullptr, block.scheduler_stack, block.scheduler_stack_bytes);
}

/// Make a fibre begin the kernel as thread `i`.
inline void begin(const Block& block, Fibre& fibre, unsigned i) {
  ucontext_t& beginning = fibre.context.beginning;
  getcontext(&beginning);
  beginning.uc_stack.ss_sp = fibre.stack.get();
  beginning.uc_stack.ss_size = stack_bytes;
  beginning.uc_link = nullptr;
  fibre.context.begun = false;
  fibre.fake_stack = nullptr;
  fibre.finished = false;
  fibre.number = i;
  fibre.index = {i % block.size.x, i / block.size.x % block.size.y, i / (block.size.x * block.size.y)};
  fibre.copies.assign(1, {});
  fibre.waited_for_previous = fibre.sums_fenced = false;
  fibre.shared_fenced = true;
  fibre.group = fibre.products = 0;
  makecontext(&beginning, fibre_main, 0);
}

inline void run(Block& block) {
  const unsigned count = block.size.x * block.size.y * block.size.z;
  if (count % lanes != 0 || count > 1024) misuse("a block is 32 to 1024 threads, in whole warps");
  current = &block;
  block.warps.assign(count / lanes, Warp{});
  block.products.assign((count + 127) / 128, {});
  block.checks.clear();
  block.unfinished = count;
  block.waiting = 0;
  std::fill(block.shared.begin(), block.shared.end(), static_cast<unsigned char>(0xFF));  // NaN
  while (block.fibres.size() < count) block.fibres.push_back(std::make_unique<Fibre>());
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0U);
  std::shuffle(order.begin(), order.end(), std::mt19937(block.index.x * 31 + block.index.y));
  for (unsigned i = 0; i < count; ++i) {
    begin(block, *block.fibres[i], i);
  }
  void* fake_stack = nullptr;
  while (block.unfinished != 0) {
    const unsigned long before = block.progress;
    for (const unsigned i : order) {
      Fibre& fibre = *block.fibres[i];
      if (fibre.finished || (fibre.awaited != nullptr && *fibre.awaited == fibre.seen)) continue;
      block.running = &fibre;
      switch_context(block.scheduler, fibre.context, &fake_stack, fibre.stack.get(), stack_bytes);
#ifdef __SANITIZE_ADDRESS__
      __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }
    if (block.unfinished != 0 && block.progress == before) {
      misuse("nobody can go on: a barrier or a warp's collective that not all threads reach");
    }
  }
  for (unsigned i = 0; i < count; ++i) {
    const Fibre& fibre = *block.fibres[i];
    for (const auto& group : fibre.copies) {
      if (!group.empty()) misuse("a block ended with copies under way");
    }
    if (!fibre.under_way.empty()) misuse("a block ended with products under way");
    if (fibre.products != block.products[i / 128].size()) misuse("a product without all of its warpgroup");
    if (block.early && !fibre.waited_for_previous) misuse("a kernel that began early did not wait");
  }
  for (const auto& check : block.checks) check();
  current = nullptr;
}

/// The kernel that was launched and has not begun.
inline std::function<void()> launched;

/// Run it.
inline void synchronize() {
  if (!launched) return;
  const std::function<void()> start = std::exchange(launched, nullptr);
  Block* const interrupted = current;
  start();
  current = interrupted;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block_size, std::size_t shared,
                   cudaStream_t /*stream*/, bool early, Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535 ||
      shared > most_shared() || (early && capability() < 90)) {
    return cudaErrorInvalidConfiguration;
  }
  const auto start = [=] {
    Block block;
    block.kernel = [=] { kernel(arguments...); };
    block.grid = grid;
    block.size = block_size;
    block.shared.resize(shared);
    block.early = early;
    for (block.index.z = 0; block.index.z < grid.z; ++block.index.z) {
      for (block.index.y = 0; block.index.y < grid.y; ++block.index.y) {
        for (block.index.x = 0; block.index.x < grid.x; ++block.index.x) run(block);
      }
    }
    if (const char* const path = std::getenv("QWENPORT_TEST_LAUNCHES")) {
      std::ofstream(path, std::ios::app) << shared << ' ' << block.bytes_read_once << ' ' << grid.x << '\n';
    }
  };
  if (early) {
    start();
  } else {
    synchronize();
    launched = start;
  }
  return cudaSuccess;
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(current->shared.data());
}

/// As on Hopper, which keeps the first KiB for itself.
constexpr std::uint32_t shared_begin = 1024;
inline std::uint32_t shared_address(const void* shared) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(shared) - current->shared.data()) +
         shared_begin;
}

inline void may_begin_next() {}
inline void wait_for_previous() {
  synchronize();
  current->running->waited_for_previous = true;
}

/// Every lane tells something and hears what the others tell.
template <typename T>
const T* exchange(const T& value) {
  static_assert(sizeof(T) <= 64);
  Fibre& fibre = *current->running;
  Warp& warp = current->warps[fibre.number / lanes];
  auto* told = warp.told[warp.generation % 2];
  std::memcpy(told[fibre.number % lanes], &value, sizeof value);
  if (++warp.arrived == lanes) {
    warp.arrived = 0;
    ++warp.generation;
    ++current->progress;
  } else {
    wait_for_next(warp.generation);
  }
  return reinterpret_cast<const T*>(told);
}
template <typename T>
const T& told_by(const T* all, unsigned lane) {
  return *reinterpret_cast<const T*>(reinterpret_cast<const unsigned char*>(all) + std::size_t{64} * lane);
}
inline unsigned lane() { return current->running->number % lanes; }

inline void copy_16_bytes(void* shared, const void* from, bool wanted) {
  const auto* begin = current->shared.data();
  const auto* to = static_cast<const unsigned char*>(shared);
  if (to < begin || to + 16 > begin + current->shared.size()) misuse("a copy that is not to shared memory");
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    misuse("a copy whose addresses are not multiples of 16");
  }
  for (unsigned i = 0; i < current->warps.size(); ++i) {
    for (const Read& read : current->fibres[std::size_t{lanes} * i]->reads) {
      if (to + 16 > read.begin && to < read.end) misuse("a copy to what a product may still read");
    }
  }
  std::memset(shared, 0xFF, 16);
  current->running->copies.back().push_back({shared, from, wanted});
}
inline void copy_commit() { current->running->copies.emplace_back(); }
template <int Left>
void copy_wait() {
  auto& groups = current->running->copies;
  while (groups.size() > Left + 1) {
    if (!groups.front().empty()) current->running->shared_fenced = false;
    for (const Copy& copy : groups.front()) {
      if (copy.wanted) {
        std::memcpy(copy.to, copy.from, 16);
      } else {
        std::memset(copy.to, 0, 16);
      }
    }
    groups.pop_front();
  }
}

inline void load_matrices(std::uint32_t (&matrices)[4], const void* row) {
  const auto* rows = exchange(row);
  if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) misuse("a matrix row that is not aligned");
  for (unsigned i = 0; i < 4; ++i) {
    unsigned banks = 0;
    for (unsigned r = 0; r < 8; ++r) {
      banks |= 1U << (reinterpret_cast<std::uintptr_t>(told_by(rows, 8 * i + r)) / 16 % 8);
    }
    if (banks != 0xFF) misuse("a matrix whose rows share banks of shared memory");
    const auto* from = static_cast<const char*>(told_by(rows, 8 * i + lane() / 4));
    std::memcpy(&matrices[i], from + std::size_t{4} * (lane() % 4), 4);
  }
}

template <typename T>
float half_of(std::uint32_t pair, unsigned which) {
  T values[2];
  std::memcpy(static_cast<void*>(values), &pair, 4);
  return static_cast<float>(values[which]);
}

/// PTX's mma.m16n8k16: lane = 4 * group + t. a: rows group, +8, columns 2t, +1, +8, +9; b: rows 2t, +1, +8, +9, column
/// group; c: rows group, +8, columns 2t, +1.
template <typename T>
void multiply_accumulate(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                         T /*type*/) {
  struct Given {
    std::uint32_t a[4], b[2];
  };
  const Given* all = exchange(Given{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const unsigned group = lane() / 4;
  const unsigned t = lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = group + i / 2 * 8;
    const unsigned column = 2 * t + i % 2;
    double sum = c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const Given& from_a = told_by(all, row % 8 * 4 + k % 8 / 2);
      const Given& from_b = told_by(all, column * 4 + k % 8 / 2);
      sum += static_cast<double>(half_of<T>(from_a.a[row / 8 + k / 8 * 2], k % 2)) *
             static_cast<double>(half_of<T>(from_b.b[k / 8], k % 2));
    }
    c[i] = static_cast<float>(sum);
  }
}

}  // namespace cuda_on_cpu

#define __launch_bounds__(...)
#define threadIdx (cuda_on_cpu::current->running->index)
#define blockIdx (cuda_on_cpu::current->index)
#define blockDim (cuda_on_cpu::current->size)
#define gridDim (cuda_on_cpu::current->grid)

using std::isnan;  // CUDA's are in the global namespace

inline void __syncthreads() {
  cuda_on_cpu::Block& block = *cuda_on_cpu::current;
  ++block.waiting;
  if (!cuda_on_cpu::release_if_all_wait()) cuda_on_cpu::wait_for_next(block.generation);
}

inline void __syncwarp() { cuda_on_cpu::exchange(0); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
  if (mask != 0xFFFFFFFFU) cuda_on_cpu::misuse("a shuffle of part of a warp");
  const T* all = cuda_on_cpu::exchange(value);
  return cuda_on_cpu::told_by(all, cuda_on_cpu::lane() ^ static_cast<unsigned>(other));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  if (mask != 0xFFFFFFFFU) cuda_on_cpu::misuse("a shuffle of part of a warp");
  const T* all = cuda_on_cpu::exchange(value);
  return cuda_on_cpu::told_by(all, static_cast<unsigned>(from) % 32);
}

inline unsigned __ballot_sync(unsigned mask, bool holds) {
  if (mask != 0xFFFFFFFFU) cuda_on_cpu::misuse("a ballot of part of a warp");
  const bool* all = cuda_on_cpu::exchange(holds);
  unsigned lanes = 0;
  for (unsigned i = 0; i < 32; ++i) lanes |= (cuda_on_cpu::told_by(all, i) ? 1U : 0U) << i;
  return lanes;
}

inline float __fdividef(float a, float b) { return a / b; }

inline int __ffsll(long long bits) { return __builtin_ffsll(bits); }

template <typename T>
T atomicAdd(T* to, T value) {  // fibres take turns only where they wait
  const T before = *to;
  *to += value;
  return before;
}
