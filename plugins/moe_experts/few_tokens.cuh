// MoEExperts for up to 8 tokens: matrix-vector products that read each chosen expert once for all its tokens.
//
// They are memory-bound, so several weight reads are in flight before the first is used.
#pragma once

#include "device.cuh"
#include "kernel.hpp"

namespace qwenport::cuda {

constexpr int few_warps = 4;  // per block
constexpr int few_threads = few_warps * warp_size;
constexpr int few_blocks = 4;  // per multiprocessor
constexpr int few_pairs = few_tokens * most_chosen;
constexpr int few_words = few_pairs / warp_size;

/// An element of an array in registers, which cannot be indexed dynamically.
template <typename T>
__device__ T element(const T (&array)[few_words], int index) {
  T found = 0;
#pragma unroll
  for (int i = 0; i < few_words; ++i) found += i == index ? array[i] : 0;
  return found;
}

/// A set of pairs (token, expert), the same in all lanes.
struct Pairs {
  std::uint64_t low;   ///< a bit for each of the first 64
  std::uint64_t high;  ///< and for the rest
  static_assert(few_pairs == 128);

  [[nodiscard]] __device__ bool empty() const { return (low | high) == 0; }
  /// -1 if the set is empty.
  [[nodiscard]] __device__ int first() const {
    if (low != 0) return __ffsll(static_cast<long long>(low)) - 1;
    return high != 0 ? 63 + __ffsll(static_cast<long long>(high)) : -1;
  }
  /// Remove the first few_tokens of them, or all; returns how many.
  __device__ int take(int (&taken)[few_tokens]) {
    int count = 0;
#pragma unroll
    for (int m = 0; m < few_tokens; ++m) {
      if (empty()) break;
      taken[m] = first();
      ++count;
      high = low != 0 ? high : high & (high - 1);
      low &= low - 1;
    }
    return count;
  }
};

/// The expert of each pair, distributed over a warp: lane l keeps those of the pairs l, l + 32, ...
template <typename T>
class Named {
 public:
  __device__ explicit Named(const ExpertsArguments<T>& a) : count_(a.tokens * a.k) {
    const int lane = static_cast<int>(threadIdx.x) % warp_size;
#pragma unroll
    for (int i = 0; i < few_words; ++i) {
      const int pair = i * warp_size + lane;
      experts_[i] = none;
      if (pair >= count_) continue;
      const std::int64_t expert = a.indices[pair];
      if (expert >= 0 && expert < a.experts) experts_[i] = static_cast<int>(expert);
    }
  }

  /// -1 if there is no such expert.
  [[nodiscard]] __device__ int by(int pair) const {
    return __shfl_sync(all_lanes, element(experts_, pair / warp_size), pair % warp_size);
  }
  /// The pairs that name an expert that exists.
  [[nodiscard]] __device__ Pairs pairs_of(int expert) const {
    const auto among = [&](int i) { return std::uint64_t{__ballot_sync(all_lanes, experts_[i] == expert)}; };
    return {among(0) | among(1) << 32, among(2) | among(3) << 32};
  }
  /// The first pair from `pair` on whose expert no earlier pair names; the number of pairs if there is none.
  [[nodiscard]] __device__ int first_from(int pair) const {
    for (; pair < count_; ++pair) {
      const int expert = by(pair);
      if (expert != none && pairs_of(expert).first() == pair) break;
    }
    return pair;
  }
  /// Whether the pair i * 32 + this lane names an expert that exists.
  [[nodiscard]] __device__ bool exists(int i) const { return experts_[i] != none; }
  [[nodiscard]] __device__ int count() const { return count_; }

 private:
  static constexpr int none = -1;
  int experts_[few_words];
  int count_;
};

/// A warp's reads of a row that are in flight together: a lane has N numbers of each.
template <typename T, int N, int Reads>
struct Part {
  static constexpr int numbers = Reads * warp_size * N;
  Packed<T, N> packed[Reads];

  __device__ static int column(int from, int read) {
    return from + (read * warp_size + static_cast<int>(threadIdx.x) % warp_size) * N;
  }
  __device__ void read(const T* row, int from, int size) {
#pragma unroll
    for (int i = 0; i < Reads; ++i) {
      if (column(from, i) < size) packed[i] = load_once<N>(row + column(from, i));
    }
  }
};

template <int N, typename T>
__device__ float dot(const Vector<T, N>& a, const Vector<T, N>& b, float sum) {
#pragma unroll
  for (int i = 0; i < N; ++i) sum += to_float(a.values[i]) * to_float(b.values[i]);
  return sum;
}

/// active [pairs, inner] = silu(gate x) * (up x). A warp computes one row of an expert, for all pairs that name it.
/// grid: [rows of inner / few_warps, pairs]; N numbers are read at once.
template <typename T, int N>
__global__ void __launch_bounds__(few_threads, few_blocks) few_swiglu(ExpertsArguments<T> a, T* active) {
  may_begin_next();  // at once: what few_down reads before its wait was written before this kernel
  const Named<T> named(a);
  const auto first = static_cast<int>(blockIdx.y);
  const int row = static_cast<int>(blockIdx.x) * few_warps + static_cast<int>(threadIdx.x) / warp_size;
  const int expert = named.by(first);
  Pairs pairs = named.pairs_of(expert);
  if (expert < 0 || pairs.first() != first || row >= a.inner) return;
  const T* const gate = a.gate_up + (std::int64_t{2} * expert * a.inner + row) * a.hidden;
  const T* const up = gate + static_cast<std::int64_t>(a.inner) * a.hidden;
  using RowPart = Part<T, N, 4>;
  RowPart g;
  RowPart u;
  const auto read = [&](int from) {
    g.read(gate, from, a.hidden);
    u.read(up, from, a.hidden);
  };

  read(0);
  do {
    int taken[few_tokens];
    const int count = pairs.take(taken);
    float gates[few_tokens] = {};
    float ups[few_tokens] = {};
    for (int from = 0; from < a.hidden; from += RowPart::numbers) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = RowPart::column(from, i);
        if (column >= a.hidden) break;
#pragma unroll
        for (int m = 0; m < few_tokens; ++m) {
          if (m >= count) break;
          const auto x = load<N>(a.x + static_cast<std::int64_t>(taken[m] / a.k) * a.hidden + column);
          gates[m] = dot(g.packed[i].unpacked(), x, gates[m]);
          ups[m] = dot(u.packed[i].unpacked(), x, ups[m]);
        }
      }
      read(from + RowPart::numbers);
    }
    if (!pairs.empty()) read(0);
#pragma unroll
    for (int m = 0; m < few_tokens; ++m) {
      if (m >= count) break;
      const float value = swiglu(warp_sum(gates[m]), warp_sum(ups[m]));
      if (threadIdx.x % warp_size == 0) {
        active[static_cast<std::int64_t>(taken[m]) * a.inner + row] = from_float<T>(value);
      }
    }
  } while (!pairs.empty());
}

/// Iterates over what a warp of few_down reads: for each named expert, in the order of its first pair, one row in parts,
/// repeated until all pairs that name the expert are served.
template <typename T, int Numbers>
class RowStream {
 public:
  __device__ RowStream(const Named<T>& named, int size) : named_(named), size_(size) { begin(0); }

  [[nodiscard]] __device__ bool done() const { return first_ >= named_.count(); }
  [[nodiscard]] __device__ int expert() const { return expert_; }
  [[nodiscard]] __device__ int from() const { return from_; }
  /// Whether this is the last part of the row.
  [[nodiscard]] __device__ bool ends_row() const { return from_ + Numbers >= size_; }
  /// The pairs that are served by this row and the following ones of this expert.
  [[nodiscard]] __device__ Pairs& pairs() { return pairs_; }

  /// \param served whether pairs were taken from pairs(); otherwise those of a row are skipped.
  __device__ void advance(bool served) {
    from_ += Numbers;
    if (from_ < size_) return;
    from_ = 0;
    int skipped[few_tokens];
    if (!served) pairs_.take(skipped);
    if (pairs_.empty()) begin(first_ + 1);
  }

 private:
  __device__ void begin(int pair) {
    first_ = named_.first_from(pair);
    if (done()) return;
    expert_ = named_.by(first_);
    pairs_ = named_.pairs_of(expert_);
  }

  const Named<T>& named_;
  int size_;
  int first_ = 0;
  int expert_ = 0;
  int from_ = 0;
  Pairs pairs_{};
};

/// y [tokens, hidden] = sum over a token's experts of weight * down active. A warp computes one column of y, for all
/// tokens: it reads that row of each chosen expert once, two parts ahead of its work. Lane p % 32 keeps the result of
/// pair p until the end. It is launched early: weight reads are in flight before `active` is ready.
template <typename T, int N>
__global__ void __launch_bounds__(few_threads, few_blocks) few_down(ExpertsArguments<T> a, const T* active) {
  constexpr int reads = 3;
  using RowPart = Part<T, N, reads>;
  const int lane = static_cast<int>(threadIdx.x) % warp_size;
  const int row = static_cast<int>(blockIdx.x) * few_warps + static_cast<int>(threadIdx.x) / warp_size;
  const Named<T> named(a);
  RowStream<T, RowPart::numbers> ahead(named, a.inner);
  const auto read_ahead = [&](RowPart& part) {
    if (ahead.done() || row >= a.hidden) return;
    part.read(a.down + (static_cast<std::int64_t>(ahead.expert()) * a.hidden + row) * a.inner, ahead.from(),
              a.inner);
    ahead.advance(false);
  };
  RowPart even;
  RowPart odd;
  read_ahead(even);
  read_ahead(odd);
  wait_for_previous();
  if (row >= a.hidden) return;

  float kept[few_words];
#pragma unroll
  for (int i = 0; i < few_words; ++i) kept[i] = named.exists(i) ? 0 : NAN;
  RowStream<T, RowPart::numbers> work(named, a.inner);
  int taken[few_tokens];
  int count = 0;
  float sums[few_tokens];
  const auto multiply = [&](RowPart& part) {
    if (work.done()) return;
    if (work.from() == 0) {
      count = work.pairs().take(taken);
#pragma unroll
      for (float& sum : sums) sum = 0;
    }
#pragma unroll
    for (int i = 0; i < reads; ++i) {
      const int column = RowPart::column(work.from(), i);
      if (column >= a.inner) break;
#pragma unroll
      for (int m = 0; m < few_tokens; ++m) {
        if (m >= count) break;
        const auto v = load<N>(active + static_cast<std::int64_t>(taken[m]) * a.inner + column);
        sums[m] = dot(part.packed[i].unpacked(), v, sums[m]);
      }
    }
    read_ahead(part);
    if (work.ends_row()) {
#pragma unroll
      for (int m = 0; m < few_tokens; ++m) {
        if (m >= count) break;
        const float sum = warp_sum(sums[m]);
#pragma unroll
        for (int i = 0; i < few_words; ++i) {
          if (taken[m] == i * warp_size + lane) kept[i] = sum;
        }
      }
    }
    work.advance(true);
  };
  while (!work.done()) {
    multiply(even);
    multiply(odd);
  }
  for (int token = 0; token < a.tokens; ++token) {
    float y = 0;
    for (int j = 0; j < a.k; ++j) {
      const int pair = token * a.k + j;
      y += a.weights[pair] * __shfl_sync(all_lanes, element(kept, pair / warp_size), pair % warp_size);
    }
    if (lane == 0) a.y[static_cast<std::int64_t>(token) * a.hidden + row] = from_float<T>(y);
  }
}

template <typename T>
cudaError_t apply_few(const ExpertsArguments<T>& a, T* active, const Gpu& gpu, cudaStream_t stream) {
  const auto start = [&](auto* swiglu, auto* down) {
    const dim3 block(few_threads);
    const dim3 rows(static_cast<unsigned>(ceil_div(a.inner, few_warps)),
                    static_cast<unsigned>(a.tokens * a.k));
    const cudaError_t status = launch(swiglu, rows, block, 0, stream, false, a, active);
    if (status != cudaSuccess) return status;
    const dim3 columns(static_cast<unsigned>(ceil_div(a.hidden, few_warps)));
    return launch(down, columns, block, 0, stream, runs_on_hopper(gpu), a, static_cast<const T*>(active));
  };
  constexpr int n = widest<T>;
  const bool wide =
      a.hidden % n == 0 && a.inner % n == 0 && aligned(a.x) && aligned(a.gate_up) && aligned(a.down);
  if (wide) return start(few_swiglu<T, n>, few_down<T, n>);
  return start(few_swiglu<T, 1>, few_down<T, 1>);
}

}  // namespace qwenport::cuda
