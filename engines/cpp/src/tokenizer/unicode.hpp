// What the `tokenizers` package knows about Unicode: classes of code points, and NFC. And UTF-8.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace qwenport::detail {

// --- the generated tables

struct Numbers {
  const std::uint32_t* data;
  std::size_t size;
};
/// Runs of code points of one class: the gap before the run, its length, the class.
extern const Numbers class_runs;
/// The same, of the ranks of canonical combining classes; starters, whose rank is 0, are left out.
extern const Numbers combining_runs;
/// Pairs: a code point, and the ASCII letter that (?i:...) takes it for.
extern const Numbers contraction_letters;
/// For each code point with a canonical decomposition, Hangul excepted: the gap before it, 2 x the number of parts (+ 1 if
/// NFC puts them together again), the parts. Two parts that are put together may decompose further.
extern const Numbers decompositions;

// --- what they are used as

/// The classes of a code point, bits of a byte. The first six are numbered as in the generated table.
struct Classes {
  static constexpr unsigned letter = 1U;        // \p{L} of the pre-tokenizers' regular expressions
  static constexpr unsigned number = 2U;        // \p{N}
  static constexpr unsigned space = 4U;         // \s
  static constexpr unsigned numeric = 8U;       // of the pre-tokenizer Digits
  static constexpr unsigned word = 16U;         // \w of added tokens
  static constexpr unsigned white_space = 32U;  // \s of added tokens
  static constexpr unsigned begins = 64U;       // NFC never joins it to what comes before it
  static constexpr unsigned stays = 128U;       // it alone is its own NFC
};

class Unicode {
 public:
  /// The tables, made at the first call.
  static const Unicode& tables();

  [[nodiscard]] std::uint8_t classes(char32_t c) const noexcept { return classes_[c]; }
  /// The letter a to z that (?i:...) takes a code point for, or 0.
  [[nodiscard]] static char contraction_letter(char32_t c) noexcept;
  /// Unicode's normalization form C. \param text valid UTF-8.
  [[nodiscard]] std::string nfc(std::string_view text) const;
  /// Whether NFC leaves all characters of a text as they are, without a look at how they combine.
  [[nodiscard]] bool is_plain(std::string_view text) const noexcept;

 private:
  struct Part {
    char32_t c = 0;
    std::uint8_t rank = 0;  // of its combining class
    std::size_t place = 0;  // among its neighbours
  };
  struct Decomposition {
    const std::uint32_t* parts;
    std::size_t count;
  };

  Unicode();
  [[nodiscard]] std::uint8_t rank(char32_t c) const;
  void decompose(char32_t c, std::vector<Part>& parts) const;
  /// The composition of two characters, or 0.
  [[nodiscard]] char32_t composed(char32_t first, char32_t second) const;
  void compose(std::vector<Part>& parts, std::string& to) const;

  std::vector<std::uint8_t> classes_;
  std::unordered_map<char32_t, std::uint8_t> ranks_;
  std::unordered_map<char32_t, Decomposition> decompositions_;
  std::unordered_map<std::uint64_t, char32_t> compositions_;
};

// --- UTF-8

/// A character in valid UTF-8.
struct Character {
  char32_t c = 0;
  std::size_t size = 0;  ///< its bytes; 0 at the end of the text
};

/// The character at a place of valid UTF-8.
inline Character character_at(std::string_view text, std::size_t at) noexcept {
  if (at >= text.size()) return {};
  const auto byte = [&](std::size_t i) {
    return static_cast<char32_t>(static_cast<unsigned char>(text[at + i]));
  };
  const char32_t first = byte(0);
  if (first < 0x80) return {first, 1};
  if (first < 0xE0) return {(first & 0x1FU) << 6U | (byte(1) & 0x3FU), 2};
  if (first < 0xF0) return {(first & 0xFU) << 12U | (byte(1) & 0x3FU) << 6U | (byte(2) & 0x3FU), 3};
  return {(first & 7U) << 18U | (byte(1) & 0x3FU) << 12U | (byte(2) & 0x3FU) << 6U | (byte(3) & 0x3FU), 4};
}

/// The character that ends at a place of valid UTF-8.
Character character_before(std::string_view text, std::size_t end) noexcept;

void append_utf8(char32_t c, std::string& to);

/// Append bytes as UTF-8, with U+FFFD for every invalid sequence: a truncated character is one, any other byte by itself
/// is one, as in Python's errors="replace".
/// \param whole the text ends here. Otherwise bytes that more may make a character are left.
/// \return how many bytes were taken.
std::size_t append_valid(std::string_view bytes, bool whole, std::string& to);

bool is_valid_utf8(std::string_view bytes) noexcept;

/// The same bytes, with U+FFFD for what append_valid replaces.
std::string valid_utf8(std::string bytes);

}  // namespace qwenport::detail
