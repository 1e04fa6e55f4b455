// SHA-256 (FIPS 180-4), to check files against a manifest.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace qwenport::detail {

class Sha256 {
 public:
  /// \param hardware use the processor's SHA extensions, if available.
  explicit Sha256(bool hardware = true);
  void update(const void* data, std::size_t bytes);
  /// 64 lower-case hexadecimal digits. Ends the computation.
  std::string hex();

 private:
  void take_blocks(const std::uint8_t* data, std::size_t blocks);
  void block(const std::uint8_t* data);

  std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                      0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, 64> pending_{};
  std::size_t pending_bytes_ = 0;
  std::uint64_t total_bytes_ = 0;
  bool hardware_ = false;
};

/// The SHA-256 of some bytes, 64 lower-case hexadecimal digits.
std::string sha256(const void* data, std::size_t bytes);

}  // namespace qwenport::detail
