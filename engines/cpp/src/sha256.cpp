#include "sha256.hpp"

#include <algorithm>
#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace qwenport::detail {
namespace {

constexpr std::array<std::uint32_t, 64> k{
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr std::uint32_t rotr(std::uint32_t x, unsigned n) { return (x >> n) | (x << (32U - n)); }

/// Whether the processor has the SHA extensions (and SSE4.1 and SSSE3, which came long before).
bool has_sha_extensions() {
#ifdef __x86_64__
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & (1U << 29U)) != 0;
#else
  return false;
#endif
}

#ifdef __x86_64__

/// Blocks in hardware: four rounds per turn, their four message words computed from the previous sixteen.
__attribute__((target("sha,sse4.1"))) void hardware_blocks(std::array<std::uint32_t, 8>& state,
                                                           const std::uint8_t* data, std::size_t blocks) {
  const auto lane = [&state](std::size_t i) { return static_cast<int>(state[i]); };
  const __m128i big_endian = _mm_set_epi32(0x0c0d0e0f, 0x08090a0b, 0x04050607, 0x00010203);
  __m128i abef = _mm_set_epi32(lane(0), lane(1), lane(4), lane(5));
  __m128i cdgh = _mm_set_epi32(lane(2), lane(3), lane(6), lane(7));
  for (; blocks != 0; --blocks, data += 64) {
    const __m128i abef_before = abef;
    const __m128i cdgh_before = cdgh;
    __m128i w[4] = {};  // words 4(g-4) .. 4g-1 before turn g, the oldest at g % 4
    for (std::size_t g = 0; g < 16; ++g) {
      __m128i& now = w[g % 4];
      if (g < 4) {
        now = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data) + g), big_endian);
      } else {
        const __m128i last = w[(g + 3) % 4];
        const __m128i seven_before = _mm_alignr_epi8(last, w[(g + 2) % 4], 4);
        now = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(now, w[(g + 1) % 4]), seven_before),
                                   last);
      }
      const __m128i sum = _mm_add_epi32(now, _mm_loadu_si128(reinterpret_cast<const __m128i*>(k.data()) + g));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, sum);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(sum, 0x0e));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  std::array<std::uint32_t, 8> out{};  // f e b a, h g d c
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out.data()), abef);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out.data()) + 1, cdgh);
  state = {out[3], out[2], out[7], out[6], out[1], out[0], out[5], out[4]};
}

#endif

}  // namespace

void Sha256::take_blocks(const std::uint8_t* data, std::size_t blocks) {
#ifdef __x86_64__
  if (hardware_) {
    hardware_blocks(state_, data, blocks);
    return;
  }
#endif
  for (; blocks != 0; --blocks, data += 64) block(data);
}

void Sha256::block(const std::uint8_t* data) {
  std::array<std::uint32_t, 64> w{};
  for (std::size_t i = 0; i < 16; ++i) {
    w[i] = std::uint32_t{data[4 * i]} << 24U | std::uint32_t{data[4 * i + 1]} << 16U |
           std::uint32_t{data[4 * i + 2]} << 8U | std::uint32_t{data[4 * i + 3]};
  }
  for (std::size_t i = 16; i < 64; ++i) {
    const std::uint32_t s0 = rotr(w[i - 15], 7) ^ rotr(w[i - 15], 18) ^ (w[i - 15] >> 3U);
    const std::uint32_t s1 = rotr(w[i - 2], 17) ^ rotr(w[i - 2], 19) ^ (w[i - 2] >> 10U);
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (std::size_t i = 0; i < 64; ++i) {
    const std::uint32_t t1 =
        h + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i];
    const std::uint32_t t2 = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + t1;
    d = c;
    c = b;
    b = a;
    a = t1 + t2;
  }
  const std::array<std::uint32_t, 8> add{a, b, c, d, e, f, g, h};
  for (std::size_t i = 0; i < 8; ++i) state_[i] += add[i];
}

void Sha256::update(const void* data, std::size_t bytes) {
  const auto* next = static_cast<const std::uint8_t*>(data);
  total_bytes_ += bytes;
  if (pending_bytes_ != 0) {
    const std::size_t taken = std::min(bytes, pending_.size() - pending_bytes_);
    std::memcpy(pending_.data() + pending_bytes_, next, taken);
    pending_bytes_ += taken;
    next += taken;
    bytes -= taken;
    if (pending_bytes_ < pending_.size()) return;
    take_blocks(pending_.data(), 1);
    pending_bytes_ = 0;
  }
  take_blocks(next, bytes / pending_.size());
  next += bytes - bytes % pending_.size();
  bytes %= pending_.size();
  if (bytes != 0) std::memcpy(pending_.data(), next, bytes);
  pending_bytes_ = bytes;
}

Sha256::Sha256(bool hardware) : hardware_(hardware && has_sha_extensions()) {}

std::string Sha256::hex() {
  // One bit, zeros up to 8 bytes before the end of a block, the length in bits.
  const std::uint64_t bits = total_bytes_ * 8;
  std::array<std::uint8_t, 72> padding{0x80};
  const std::size_t before_length = 1 + (119 - pending_bytes_) % 64;
  for (unsigned i = 0; i < 8; ++i)
    padding[before_length + i] = static_cast<std::uint8_t>(bits >> (56U - 8U * i));
  update(padding.data(), before_length + 8);
  std::string text;
  for (const std::uint32_t word : state_) {
    for (unsigned shift = 32; shift != 0; shift -= 4)
      text += "0123456789abcdef"[(word >> (shift - 4U)) & 15U];
  }
  return text;
}

std::string sha256(const void* data, std::size_t bytes) {
  Sha256 hash;
  hash.update(data, bytes);
  return hash.hex();
}

}  // namespace qwenport::detail
