// Hopper's products for g++. They are computed when they are asked for, from what shared memory holds then, and handed
// out when they are waited for: until then the sums are NaN, and nothing may be copied to what they read. What they
// read is found as the hardware finds it, from the address and the distances in a descriptor.
#pragma once

#include "cuda_on_cpu.hpp"

namespace cuda_on_cpu::warpgroup {

constexpr unsigned threads = 128;
constexpr unsigned rows_of_b = 192;
constexpr unsigned depth = 16;

/// A barrier, in the 8 bytes that a GPU has for it.
struct Barrier {
  std::uint16_t arrivals;
  std::uint16_t missing;
  std::uint32_t round;
};
static_assert(sizeof(Barrier) == sizeof(std::uint64_t));

inline Barrier read(const std::uint64_t& barrier) {
  Barrier now{};
  std::memcpy(&now, &barrier, sizeof now);
  if (now.missing == 0 || now.missing > now.arrivals || now.arrivals == 0xFFFF) {
    misuse("a barrier that did not begin");
  }
  return now;
}
inline void init(std::uint64_t& barrier, int arrivals) {
  const auto count = static_cast<std::uint16_t>(arrivals);
  const Barrier begun{count, count, 0};
  std::memcpy(&barrier, &begun, sizeof begun);
  current->checks.emplace_back([&barrier] {
    if (read(barrier).missing != read(barrier).arrivals) misuse("a block ended within a round of a barrier");
  });
}
inline void arrive(std::uint64_t& barrier) {
  Barrier now = read(barrier);
  const Fibre& fibre = *current->running;
  for (const auto& copies : fibre.copies) {
    if (!copies.empty()) misuse("a thread that arrives with copies under way");
  }
  if (!fibre.shared_fenced) misuse("a thread that arrives without a fence behind its copies");
  if (--now.missing == 0) {
    now.missing = now.arrivals;
    ++now.round;
  }
  std::memcpy(&barrier, &now, sizeof now);
  ++current->progress;
}
inline void wait_barrier(std::uint64_t& barrier, unsigned round) {
  for (;;) {
    const Barrier now = read(barrier);
    if ((now.round & 1U) != (round & 1U)) return;  // a GPU tells odd from even rounds only
    yield();
  }
}

inline void fence_async_proxy() { current->running->shared_fenced = true; }
inline void fence_accumulators() {
  exchange(0);  // all lanes of a warp, as all of these
  current->running->sums_fenced = true;
}
inline void commit_group() {
  exchange(0);
  ++current->running->group;
}

/// A matrix in shared memory, by PTX's format of descriptors: rows of 128 bytes, eight of them turned as one.
class Operand {
 public:
  Operand(std::uint64_t descriptor, unsigned rows)
      : start_((descriptor & 0x3FFF) * 16), next_8_rows_((descriptor >> 32 & 0x3FFF) * 16), rows_(rows) {
    if (descriptor >> 62 != 1) misuse("a matrix that is not turned in 128 bytes");
    if ((descriptor >> 49 & 7) != 0 || start_ % 1024 >= 128) misuse("a matrix that is not aligned to 1024");
    if (start_ % 32 != 0) misuse("a matrix that does not begin at 16 numbers");
    if (begin() < current->shared.data() || end() > current->shared.data() + current->shared.size()) {
      misuse("a matrix outside of shared memory");
    }
  }
  [[nodiscard]] const unsigned char* begin() const {
    return current->shared.data() + (start_ / 1024 * 1024) - shared_begin;
  }
  [[nodiscard]] const unsigned char* end() const {
    return begin() + (rows_ / 8 - 1) * next_8_rows_ + std::size_t{8} * 128;
  }
  template <typename T>
  void read(unsigned row, float (&numbers)[depth]) const {
    for (unsigned piece = 0; piece < 2; ++piece) {
      std::uint64_t address = start_ + row / 8 * next_8_rows_ + row % 8 * 128 + std::uint64_t{16} * piece;
      address ^= (address >> 7 & 7) << 4;
      T values[8];
      std::memcpy(static_cast<void*>(values), current->shared.data() + address - shared_begin, 16);
      for (unsigned i = 0; i < 8; ++i) numbers[8 * piece + i] = static_cast<float>(values[i]);
    }
  }

 private:
  std::uint64_t start_;
  std::uint64_t next_8_rows_;
  unsigned rows_;
};

template <typename T>
void multiply_accumulate(float (&c)[rows_of_b / 8][4], std::uint64_t a, std::uint64_t b, T /*type*/) {
  Fibre& fibre = *current->running;
  exchange(0);
  auto& told = current->products[fibre.number / threads];
  if (fibre.products == told.size()) told.emplace_back(a, b);
  if (told[fibre.products++] != std::pair(a, b)) misuse("a warpgroup that does not agree on a product");
  if (!fibre.sums_fenced) misuse("a product of sums that were not fenced");
  for (const auto& other : current->fibres) {
    if (!other->shared_fenced) misuse("a product of what was copied without a fence");
  }

  const Operand rows(a, 64);
  const Operand columns(b, rows_of_b);
  if (fibre.number % lanes == 0) {
    for (const Operand& operand : {rows, columns}) {
      fibre.reads.push_back({operand.begin(), operand.end(), fibre.group});
    }
  }
  float* const sums = &c[0][0];
  auto found = std::find_if(fibre.under_way.begin(), fibre.under_way.end(),
                            [&](const UnderWay& one) { return one.sums == sums; });
  if (found == fibre.under_way.end()) {
    const std::vector<float> values(sums, sums + rows_of_b / 2);
    found = fibre.under_way.insert(found, {sums, values, 0});
    std::fill_n(sums, rows_of_b / 2, std::numeric_limits<float>::quiet_NaN());
  }
  found->group = fibre.group;

  const unsigned warp = fibre.number % threads / lanes;
  float from_a[2][depth];
  for (unsigned half = 0; half < 2; ++half) {
    rows.read<T>(16 * warp + lane() / 4 + 8 * half, from_a[half]);
  }
  for (unsigned j = 0; j < rows_of_b / 8; ++j) {
    for (unsigned i = 0; i < 2; ++i) {
      float from_b[depth];
      columns.read<T>(8 * j + lane() % 4 * 2 + i, from_b);
      for (unsigned half = 0; half < 2; ++half) {
        float& sum = found->values[4 * j + 2 * half + i];
        double exact = sum;
        for (unsigned k = 0; k < depth; ++k) {
          exact += static_cast<double>(from_a[half][k]) * static_cast<double>(from_b[k]);
        }
        sum = static_cast<float>(exact);
      }
    }
  }
}

template <int Left>
void wait_group(float (& /*c*/)[rows_of_b / 8][4]) {
  Fibre& fibre = *current->running;
  exchange(0);
  const auto over = [&](unsigned group) { return group + Left < fibre.group; };
  for (const UnderWay& one : fibre.under_way) {
    if (!over(one.group)) continue;
    std::copy(one.values.begin(), one.values.end(), one.sums);
    fibre.sums_fenced = false;
  }
  const auto erase = [&](auto& all) {
    all.erase(std::remove_if(all.begin(), all.end(), [&](const auto& one) { return over(one.group); }),
              all.end());
  };
  erase(fibre.under_way);
  erase(fibre.reads);
}

}  // namespace cuda_on_cpu::warpgroup
